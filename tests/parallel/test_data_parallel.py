"""Data-parallel ranks train like one process, whatever the strategy."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cnnlab import plots
from cnnlab.events import Evaluated, Finished, Progress
from cnnlab.launch.launcher import ranks, run
from cnnlab.parallel import data_parallel
from cnnlab.recipe import Recipe

pytestmark = pytest.mark.usefixtures("nothing_is_left")

SMALL = Recipe(
    batch_size=72, steps=20, warmup_steps=1, threads=1, optimizer="sgd", learning_rate=0.01
)


def trained(recipe):
    """(loss of each step, held-out loss at the end or None)."""
    events = list(run(recipe))
    held_out = [event.loss for event in events if isinstance(event, Evaluated)]
    return plots.loss_curve(events)[1], held_out[-1] if held_out else None


def recorded_phases(recipe):
    """The phases in the timeline of the last Progress event."""
    progress = [event for event in run(recipe) if isinstance(event, Progress)]
    return [phase for phase, _, _ in progress[-1].spans]


@pytest.fixture(scope="module")
def one_process():
    """(losses, held-out loss) of one process."""
    return trained(SMALL)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="ddp"),
        pytest.param({"strategy": "ring"}, id="ring"),
        pytest.param({"accumulate": 2}, id="ddp with two micro-batches"),
        pytest.param({"bucket_mb": 0.02}, id="ddp with small buckets"),
        pytest.param({"strategy": "local-sgd", "sync_every": 1}, id="local SGD at each step"),
    ],
)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_train_like_one_process(one_process, world, change):
    losses, held_out = trained(SMALL.replace(replicas=world, **change))
    np.testing.assert_allclose(losses, one_process[0], atol=5e-5)  # rounding, after 20 steps
    assert held_out == pytest.approx(one_process[1], abs=5e-5)


def test_one_rank_trains_the_same_with_and_without_ddp(one_process):
    np.testing.assert_allclose(trained(SMALL.replace(strategy="ddp"))[0], one_process[0], atol=5e-5)


@pytest.mark.parametrize("strategy", ["ring", "local-sgd", "async"])
def test_with_one_rank_every_strategy_is_plain_training(one_process, strategy):
    np.testing.assert_array_equal(trained(SMALL.replace(strategy=strategy))[0], one_process[0])


def test_batch_norm_makes_a_real_but_small_difference():
    """Each rank normalizes with the statistics of its own share of the batch."""
    recipe = Recipe(
        model="ResNet9", width=4, batch_size=32, steps=3, warmup_steps=1, threads=1, evaluate=False
    )
    (one, _), (two, _) = trained(recipe), trained(recipe.replace(replicas=2))
    assert 1e-5 < abs(one[0] - two[0]) < 0.3  # in the first step, before gradients are exchanged


@pytest.mark.parametrize("compression", ["fp16", "bf16", "powersgd"])
def test_training_with_compressed_gradients_learns(one_process, compression):
    losses, held_out = trained(SMALL.replace(replicas=2, compression=compression))
    assert losses[-5:].mean() < losses[:5].mean()
    assert abs(losses - one_process[0]).max() > 0
    assert held_out < 2.2  # guessing has a loss of 2.30


def test_micro_batches_share_one_all_reduce():
    phases = recorded_phases(SMALL.replace(replicas=2, accumulate=4, evaluate=False))
    assert phases.count("forward") == 4 * phases.count("update")
    assert phases.count("communication") == phases.count("update")


def test_small_buckets_send_more_messages():
    messages = {}
    for bucket_mb in (100, 0.02):
        recipe = SMALL.replace(replicas=2, bucket_mb=bucket_mb, steps=4, evaluate=False)
        phases = recorded_phases(recipe)
        messages[bucket_mb] = phases.count("communication") / phases.count("update")
    assert messages[100] == 1 < messages[0.02]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("numbers", [1, 7, 1000])  # fewer than ranks, uneven, many
def test_the_ring_sums_like_all_reduce(world, numbers):
    def reduce():
        torch.manual_seed(dist.get_rank())
        tensor, messages = torch.randn(numbers), []
        expected = tensor.clone()
        dist.all_reduce(expected)
        data_parallel.ring_all_reduce(tensor, messages.append)
        return (tensor - expected).abs().max().item(), messages, tensor.tolist()

    found = ranks(reduce, world)
    for difference, messages, sums in found:
        assert difference < 1e-5
        assert len(messages) == 2 * (world - 1)
        for size in messages:  # in bytes: each has 1/N of the tensor
            assert numbers // world <= size / 4 <= numbers // world + 1
        assert sums == found[0][2]  # to the last bit


def test_ring_ranks_train_on_all_images_and_test_each_once():
    events = list(run(SMALL.replace(replicas=3, steps=25, straggler_ms=5, strategy="ring")))
    ends = [event for event in events if isinstance(event, Finished)]
    tested = [event for event in events if isinstance(event, Evaluated)]
    assert {event.images for event in ends} == {25 * 72}
    assert sum(event.steps for event in ends) == 3 * 25
    assert len(tested) == 3 * 2  # 19 steps are an epoch
    figures = {(event.epoch, event.images, event.accuracy, event.loss) for event in tested}
    assert len(figures) == 2  # all ranks agree
    assert tested[0].images == 360
