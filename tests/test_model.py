"""The models: parameters, FLOPs, shapes, stages, and initialization."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cnnlab.model import VGG16, VGG19, ResNet9, SmallCNN, build, count_parameters
from cnnlab.recipe import CnnlabError, Recipe


def test_small_cnn_has_25578_parameters():
    assert count_parameters(SmallCNN(channels=3, size=32)) == 25_578


@pytest.mark.parametrize("model, count", [(VGG16, 138_357_544), (VGG19, 143_667_240)])
def test_vgg_has_as_many_parameters_as_in_the_paper(model, count):
    with torch.device("meta"):
        assert count_parameters(model(channels=3, size=224, classes=1000)) == count


@pytest.mark.parametrize(
    "model, size",
    [
        (SmallCNN, 4),
        (SmallCNN, 28),
        (ResNet9, 8),
        (ResNet9, 32),
        (ResNet9, 64),
        (VGG16, 32),
        (VGG19, 64),
    ],
)
@pytest.mark.parametrize("channels, classes", [(1, 10), (3, 7)])
def test_logits_have_one_row_per_image_and_one_column_per_class(model, size, channels, classes):
    with torch.device("meta"):
        network = model(channels=channels, size=size, classes=classes)
        assert network(torch.empty(5, channels, size, size)).shape == (5, classes)


def test_a_wider_model_has_wider_stages():
    assert SmallCNN(width=8).stage1[0].out_channels == 8
    assert ResNet9(width=8).stem[0].out_channels == 8


def test_resnet9_needs_0_57_gflop_per_training_image():
    with torch.device("meta"):
        network, images = ResNet9(width=32), torch.empty(4, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    assert counter.get_total_flops() / 4 == pytest.approx(0.57e9, rel=0.03)


@pytest.mark.parametrize(
    "model, multiple", [("SmallCNN", 4), ("ResNet9", 8), ("VGG16", 32), ("VGG19", 32)]
)
def test_an_image_size_that_does_not_fit_the_model_is_rejected(model, multiple):
    message = f"{model}.*multiple of {multiple} pixels, not {multiple + 1}"
    with pytest.raises(CnnlabError, match=message):
        build(Recipe(model=model), (3, multiple + 1, 10))


def test_the_same_seed_gives_the_same_weights():
    def weights(seed):
        network = build(Recipe(seed=seed), (1, 32, 10))
        return torch.cat([parameter.flatten() for parameter in network.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_build_uses_the_width_of_the_recipe():
    assert build(Recipe(width=5), (3, 32, 10)).stage1[0].out_channels == 5
    assert build(Recipe(), (3, 32, 10)).stage1[0].out_channels == 16


def test_the_stages_are_named():
    assert [name for name, _ in VGG19(width=1).named_children()] == [
        "stage1",
        "stage2",
        "stage3",
        "stage4",
        "stage5",
        "classifier",
    ]


def test_only_trainable_parameters_are_counted():
    network = SmallCNN()
    network.classifier.requires_grad_(False)
    assert count_parameters(network) == 25_578 - (32 * 8 * 8 * 10 + 10)
