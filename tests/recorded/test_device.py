"""What one device is measured to do: figures that are sane, checks that can fail, and a list that is finished whatever happens."""

import json

import pytest
import torch
from helpers import ordered
from recorded import device
from torch import nn

from cnnlab.model import build
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import techniques

SMALL = Recipe(data="synthetic", images=8, batch_size=8, image_size=16, optimizer="sgd")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(one_thread):
    """All of it on the CPU, small, as a reader of the file would load it."""
    return json.loads(json.dumps(dict(device.measure_all("cpu", quick=True)), allow_nan=False))


def test_everything_is_measured_and_nothing_failed(found):
    assert list(found) == ["machine", *device.MEASUREMENTS]
    assert "failed" not in json.dumps(found)
    assert (
        found["machine"]["device_name"]
        and found["machine"]["quick"] is True
        and found["machine"]["versions"]["torch"] == torch.__version__
    )
    assert all(found[name]["took_s"] > 0 for name in device.MEASUREMENTS)


def test_the_checks_pass_here_and_show_the_losses_beside_each_other(found):
    checks = found["checks"]
    assert checks["passed"] is True and list(checks["ways"]) == ["fp32", "channels_last", "bf16"]
    assert (
        checks["ways"]["fp32"]["errors"]["logits"]
        < 1e-5
        < checks["ways"]["bf16"]["errors"]["logits"]
    )
    assert all(
        len(way["losses"]) == len(checks["fp64_losses"]) >= 3 for way in checks["ways"].values()
    )
    assert checks["fp64_losses"][-1] < checks["fp64_losses"][0]


def test_on_a_cpu_the_naive_clock_is_right(found):
    clock = found["clock"]
    assert ordered(clock) and 0.5 * clock["median"] < clock["returned_s"] <= clock["median"]
    assert clock["flops"] == pytest.approx(
        clock["products"] * 2 * clock["size"] ** 3 / clock["median"]
    )


def test_a_copy_counts_what_is_read_and_what_is_written(found):
    [(name, copy)] = found["copies"]["ways"].items()
    assert name == "within its memory" and ordered(copy)
    assert copy["gb_per_s"] == pytest.approx(
        2 * found["copies"]["mib"] * 2**20 / copy["median"] / 1e9
    )


@pytest.mark.parametrize("name", ["overlap", "graphs"])
def test_what_only_a_gpu_can_do_has_a_sentence(found, name):
    assert "needs device='cuda'" in found[name]["missing"]


def test_the_small_step_is_timed_all_the_same(found):
    assert (
        ordered(found["graphs"]["ways"]["one by one"])
        and found["graphs"]["ways"]["one CUDA graph"] is None
    )


def test_images_a_second_follow_from_the_time_of_a_step(found):
    sizes = found["batch_sizes"]["sizes"]
    assert all(
        ordered(figures) and figures["images_per_s"] == pytest.approx(int(size) / figures["median"])
        for size, figures in sizes.items()
    )
    assert len(sizes) >= 2


def test_training_is_held_against_the_peak(found):
    training = found["training"]
    assert (
        Recipe.from_dict(training["recipe"])
        and list(training["ways"])[0] == "fp32"
        and len(training["ways"]) == 3
    )
    for figures in training["ways"].values():
        assert ordered(figures)
        assert figures["share_of_bf16_peak"] == pytest.approx(
            figures["images_per_s"] * training["flop_per_image"] / training["bf16_peak"]
        )


def test_the_flops_of_a_training_step_are_those_that_are_known():
    """2.27 GFLOP an image at width 64, forward and backward: counted on two images."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        device.make_trainer(
            Recipe(model="ResNet9", width=64, data="synthetic", images=2, batch_size=2)
        ).step()
    assert counter.get_total_flops() / 2 == pytest.approx(2.27e9, rel=0.01)


def test_every_way_through_vgg19_gives_the_same_logits(found):
    for ways in found["forward"]["images"].values():
        assert list(ways) == ["fp32", "channels_last", "bf16 autocast", "bf16 weights"] and all(
            map(ordered, ways.values())
        )
        assert (
            ways["fp32"]["error"] == 0
            and ways["channels_last"]["error"] < 1e-5
            and 0 < ways["bf16 weights"]["error"] < 0.05
        )


def test_measuring_leaves_torch_as_it_was():
    before = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
    )
    device.clock("cpu", quick=True)
    assert (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
    ) == before


def test_a_technique_that_changes_the_maths_fails_its_check(monkeypatch):
    def careless(model):
        with torch.no_grad():
            list(model.parameters())[-1].mul_(
                1.01
            )  # not the first: batch normalisation would undo it
        return model.to(memory_format=torch.channels_last)

    monkeypatch.setattr(techniques, "channels_last", careless)
    checks = device.checks("cpu", quick=True)
    assert (
        checks["ways"]["fp32"]["passed"] is True
        and checks["ways"]["channels_last"]["passed"] is False
        and checks["passed"] is False
    )


def test_an_update_that_is_wrong_shows_in_the_losses(monkeypatch):
    make = device.make_optimizer

    def careless(recipe, model, steps):
        fp32 = next(model.parameters()).dtype == torch.float32
        return make(
            recipe.replace(learning_rate=(2 if fp32 else 1) * recipe.learning_rate), model, steps
        )

    monkeypatch.setattr(device, "make_optimizer", careless)
    fp32 = device.checks("cpu", quick=True)["ways"]["fp32"]
    assert (
        fp32["errors"]["logits"] < fp32["limits"]["logits"]
        and fp32["errors"]["losses"] > fp32["limits"]["losses"]
        and not fp32["passed"]
    )


def test_a_way_that_cannot_run_here_is_no_wrong_result(monkeypatch):
    def broken(model):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(techniques, "channels_last", broken)
    checks = device.checks("cpu", quick=True)
    assert (
        checks["passed"] is True
        and "C compiler" in checks["ways"]["channels_last"]["failed"]
        and checks["ways"]["fp32"]["passed"] is True
    )


def test_logits_that_are_no_numbers_fail_and_stay_json(monkeypatch):
    spoil = lambda layer: [weight.data.fill_(float("nan")) for weight in layer.parameters()]
    monkeypatch.setattr(techniques, "channels_last", lambda model: model.apply(spoil))
    checks = device.checks("cpu", quick=True)
    assert (
        checks["ways"]["channels_last"]["passed"] is False
        and checks["ways"]["fp32"]["passed"] is True
    )
    json.dumps(checks, allow_nan=False)


def test_memory_counted_is_what_autograd_and_the_allocator_say(found):
    counted, measured = found["memory"]["counted"], found["memory"]["measured"]
    assert (
        set(counted) == {"parameters", "gradients", "optimizer state", "images", "activations"}
        and min(counted.values()) > 0
    )
    assert counted["optimizer state"] == pytest.approx(
        2 * counted["gradients"], rel=0.01
    )  # Adam's two averages
    assert measured["kept by the forward pass"] == pytest.approx(counted["activations"], rel=0.01)
    most = sum(counted.values())
    assert most - counted["gradients"] <= measured["most at once"] <= 1.5 * most


def test_convolution_and_relu_joined_compute_what_they_did_apart(monkeypatch):
    """cuDNN's call, which is not here, replaced by what its documentation says that it does."""
    calls = []

    def conv_relu(images, weight, bias, stride, padding, dilation, groups):
        calls.append(1)
        return nn.functional.conv2d(images, weight, bias, stride, padding, dilation, groups).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    model = build(Recipe(model="VGG19", width=2), (3, 32, 10)).eval()
    images = torch.randn(2, 3, 32, 32)
    joined = device.fuse_conv_relu(model)
    torch.testing.assert_close(joined(images), model(images))
    assert len(calls) == 16 and not any(isinstance(layer, nn.ReLU) for layer in joined[0])
    assert any(isinstance(layer, nn.ReLU) for layer in model[0])  # the model itself is untouched


@pytest.mark.parametrize("broken", ["checks", "overlap", "forward"])
def test_everything_goes_on_after_a_failure(monkeypatch, broken):
    for name in device.MEASUREMENTS:
        monkeypatch.setattr(device, name, lambda device, quick: {"fine": True})

    def fails(device, quick):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(device, broken, fails)
    found = dict(device.measure_all("cpu", quick=True))
    assert found[broken]["failed"] == "ZeroDivisionError: on purpose"
    assert all(found[name]["fine"] for name in device.MEASUREMENTS if name != broken)


def test_each_piece_is_measured_only_when_it_is_asked_for(monkeypatch):
    asked = []
    for name in device.MEASUREMENTS:
        monkeypatch.setattr(device, name, lambda *_, name=name: asked.append(name) or {})
    pieces = device.measure_all("cpu", quick=True)
    assert next(pieces)[0] == "machine" and next(pieces)[0] == "checks" and asked == ["checks"]
    pieces.close()


def test_a_gpu_that_is_not_there_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CnnlabError, match="NVIDIA GPU"):
        next(device.measure_all("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_passes_its_checks_and_its_graph_trains_alike():
    assert device.checks("cuda", quick=True)["passed"]
    graphs = device.graphs("cuda", quick=True)
    assert graphs["losses"]["one CUDA graph"] == pytest.approx(
        graphs["losses"]["one by one"], rel=1e-3
    )
    assert device.overlap("cuda", quick=True)["ways"]["at the same time"]["n"] >= 2
