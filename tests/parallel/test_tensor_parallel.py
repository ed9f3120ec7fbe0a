"""Ranks that hold a part of each layer train like one process that holds them all."""

import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import interrupted_train, kill_myself, train_float64
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cnnlab import plots
from cnnlab.events import Evaluated, Progress
from cnnlab.launch import launcher
from cnnlab.launch.launcher import RankError, ranks, run
from cnnlab.model import MODELS, build
from cnnlab.parallel.data_parallel import local_tensor
from cnnlab.parallel.tensor_parallel import shard_layers
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training.clock import Clock
from cnnlab.training.loop import set_up

pytestmark = pytest.mark.usefixtures("nothing_is_left")

CPU = torch.device("cpu")
ONE = Recipe(
    data="synthetic",
    images=48,
    image_size=32,
    classes=7,  # divisible by no number of ranks
    batch_size=24,
    steps=4,
    warmup_steps=1,
    width=4,
    threads=1,
)
TWO = ONE.replace(strategy="tensor", tensor_ranks=2)


def one_rank(recipe):
    return recipe.replace(strategy=None, tensor_ranks=1, replicas=1)


def trained(recipe):
    """(loss of each step, (accuracy, loss) on the held-out images for each rank)."""
    events = list(run(recipe))
    held_out = {e.rank: (e.accuracy, e.loss) for e in events if isinstance(e, Evaluated)}
    return plots.loss_curve(events)[1], list(held_out.values())


def sharded(recipe):
    """The recipe's model, with the parts of this rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return shard_layers(build(recipe, (3, 32, recipe.classes)), mesh, Clock(CPU))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="SmallCNN, 2 ranks"),
        pytest.param({"tensor_ranks": 4}, id="SmallCNN, 4 ranks"),
        pytest.param({"replicas": 2, "optimizer": "sgd"}, id="2 replicas on 2 ranks each"),
        pytest.param({"model": "ResNet9"}, id="batch norm, 2 ranks"),
        pytest.param({"model": "ResNet9", "tensor_ranks": 4}, id="batch norm, 4 ranks"),
        pytest.param({"model": "ResNet9", "recompute": True}, id="batch norm, recomputation"),
        pytest.param({"model": "VGG16"}, id="dropout, 2 ranks"),
        pytest.param({"model": "VGG16", "recompute": True}, id="dropout, recomputation"),
    ],
)
def test_losses_in_float64_are_those_of_one_process(monkeypatch, change):
    monkeypatch.setattr(launcher, "train_rank", train_float64)
    recipe = TWO.replace(**change)
    (expected, [(accuracy, loss)]) = trained(one_rank(recipe))
    losses, held_out = trained(recipe)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    assert len(held_out) == recipe.ranks
    for rank_accuracy, rank_loss in held_out:
        assert rank_accuracy == accuracy
        assert rank_loss == pytest.approx(loss, abs=1e-6)  # evaluated in float32


@pytest.mark.parametrize(
    "change, tolerance",
    [
        pytest.param({}, 2e-5, id="fp32"),
        pytest.param({"memory_format": "channels_last"}, 2e-5, id="channels_last"),
        pytest.param({"pooling": "before-relu"}, 2e-5, id="pooling before ReLU"),
        pytest.param({"precision": "bf16"}, 0.02, id="bf16"),
        pytest.param({"data": "photos"}, 2e-5, id="photos"),
    ],
)
def test_techniques_work_with_parts_of_layers(change, tolerance):
    recipe = TWO.replace(model="ResNet9", optimizer="sgd", learning_rate=0.01, **change)
    (expected, [held_out]) = trained(one_rank(recipe))
    losses, found = trained(recipe)
    np.testing.assert_allclose(losses, expected, atol=tolerance)
    np.testing.assert_allclose(found, [held_out, held_out], atol=tolerance)


def test_each_replica_averages_its_gradients_with_the_same_part_of_the_others():
    """With batch norm, replicas have statistics of their own, as with data parallelism."""
    recipe = TWO.replace(model="ResNet9", optimizer="sgd", learning_rate=0.01, replicas=2)
    losses, held_out = trained(recipe)
    expected, [figures, _] = trained(one_rank(recipe).replace(replicas=2))
    np.testing.assert_allclose(losses, expected, atol=2e-5)
    np.testing.assert_allclose(held_out, [figures] * 4, atol=2e-5)


@pytest.mark.parametrize("model", MODELS)
def test_each_rank_computes_its_channels_of_every_convolution(model):
    def local_shapes():
        network = sharded(TWO.replace(model=model))
        shapes = []
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                assert layer.weight.placements == (Shard(0),)
                layer.register_forward_hook(
                    lambda conv, _, images: shapes.append((conv.out_channels, images.shape[1]))
                )
            elif isinstance(layer, nn.Linear):
                assert layer.weight.to_local().numel() == layer.weight.numel() / 2
        logits = network(torch.rand(2, 3, 32, 32))
        return shapes, logits.shape

    for shapes, logits in ranks(local_shapes, 2):
        assert len(shapes) >= 2
        assert all(local == channels / 2 for channels, local in shapes)
        assert logits == (2, 7)


def test_a_sharded_convolution_of_pytorch_calls_a_part_of_the_channels_all_of_them():
    """The reason why `shard_convolutions` exists. If this fails, PyTorch may have fixed it."""

    def convolve():
        mesh = init_device_mesh("cpu", (2,))
        weight = distribute_tensor(torch.rand(8, 3, 3, 3), mesh, [Shard(0)])
        images = distribute_tensor(torch.rand(2, 3, 6, 6), mesh, [Replicate()])
        maps = F.conv2d(images, weight)
        return maps.placements == (Replicate(),), maps.shape[1], maps.full_tensor().shape[1]

    assert ranks(convolve, 2) == [(True, 8, 4)] * 2


@pytest.mark.parametrize("model, world", [("SmallCNN", 4), ("ResNet9", 2), ("VGG16", 2)])
def test_each_rank_holds_its_part_of_the_parameters_and_optimizer_state(model, world):
    recipe = TWO.replace(model=model, width=8, tensor_ranks=world)

    def stored_bytes(recipe):
        _, _, state = set_up(recipe, CPU, recipe.ranks, Clock(CPU))
        state.model(torch.rand(2, 3, 32, 32)).sum().backward()
        state.optimizer.step()
        tensors = list(state.network.parameters())
        moments = [m for values in state.optimizer.state.values() for m in values.values()]
        return [
            sum(local_tensor(tensor).untyped_storage().nbytes() for tensor in part)
            for part in (tensors, [p.grad for p in tensors], moments)
        ], {name: tuple(value.shape) for name, value in state.network.state_dict().items()}

    [(whole, names)] = ranks(stored_bytes, 1, one_rank(recipe))
    for parts, part_names in ranks(stored_bytes, world, recipe):
        assert part_names == names  # those of the full model
        np.testing.assert_allclose(parts, np.array(whole) / world, rtol=0.02)


def test_pooled_channels_are_gathered_and_gradients_of_inputs_summed():
    """The first convolution sends no gradient, because nobody needs that of the images."""

    def bytes_sent():
        network, gathered, summed = sharded(TWO), [], []
        all_gather, all_reduce = dist.all_gather, dist.all_reduce

        def counted_gather(parts, images, group):
            gathered.append(sum(part.nbytes for part in parts))
            all_gather(parts, images, group)

        def counted_sum(gradient, *args):
            summed.append(gradient.nbytes)
            all_reduce(gradient, *args)

        dist.all_gather, dist.all_reduce = counted_gather, counted_sum
        network(torch.rand(2, 3, 32, 32)).sum().backward()
        return gathered, summed

    first, second = 2 * 4 * 16 * 16 * 4, 2 * 8 * 8 * 8 * 4  # images, channels, size, bytes
    assert ranks(bytes_sent, 2) == [([first, second], [first])] * 2


def test_the_timeline_shows_the_communication_of_convolutions():
    events = [event for event in run(TWO.replace(evaluate=False)) if isinstance(event, Progress)]
    phases = [phase for phase, _, _ in events[-1].spans]
    for phase in ("communication", "exposed"):
        assert phases.count(phase) == 3 * phases.count("waiting")


def test_batch_norm_has_the_statistics_of_one_process():
    def statistics(recipe):
        _, _, state = set_up(recipe, CPU, recipe.ranks, Clock(CPU))
        torch.manual_seed(0)
        state.model(torch.rand(4, 3, 32, 32))
        buffers = dict(state.network.named_buffers())
        return {
            name: (b.full_tensor() if isinstance(b, DTensor) else b) for name, b in buffers.items()
        }

    [expected] = ranks(statistics, 1, one_rank(TWO).replace(model="ResNet9"))
    for found in ranks(statistics, 2, TWO.replace(model="ResNet9")):
        assert found.keys() == expected.keys()
        for name, buffer in found.items():
            torch.testing.assert_close(buffer, expected[name])


def test_channels_that_cannot_be_divided_are_rejected_with_a_fix():
    with pytest.raises(CnnlabError, match=r"tensor_ranks=3 .* 4 channels.*multiple of 3"):
        list(run(TWO.replace(tensor_ranks=3)))


def test_a_rank_killed_in_a_step_is_named(monkeypatch):
    kill = partial(kill_myself, os.devnull)
    killed = partial(interrupted_train, step=3, victim=1, what=kill)
    monkeypatch.setattr(launcher, "train_rank", killed)
    with pytest.raises(RankError, match="killed") as caught:
        list(run(TWO.replace(steps=50)))
    assert caught.value.rank == 1


@pytest.mark.parametrize("change", [{"tensor_ranks": 4}, {"strategy": None, "tensor_ranks": 1}])
def test_a_checkpoint_of_two_ranks_resumes_in_four_and_in_one(monkeypatch, tmp_path, change):
    monkeypatch.setattr(launcher, "train_rank", train_float64)
    recipe = TWO.replace(model="ResNet9", checkpoint_every=2, evaluate=False)
    expected, _ = trained(recipe)
    list(run(recipe.replace(steps=2), checkpoints=tmp_path))
    resumed = list(run(recipe.replace(**change), checkpoints=tmp_path))
    np.testing.assert_allclose(plots.loss_curve(resumed)[1], expected[2:], rtol=1e-12)
