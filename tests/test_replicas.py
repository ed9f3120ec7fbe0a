"""Replicas stay equal to one process, whatever the strategy; what is slow on purpose is as slow as it says."""

import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cnnlab import data, plot, replicas, scaling
from cnnlab.events import Evaluated, Finished, Progress
from cnnlab.launch import ranks, run
from cnnlab.recipe import Recipe

SMALL = Recipe(batch_size=72, steps=20, warmup_steps=1, threads=1, optimizer="sgd", learning_rate=0.01)


@pytest.fixture(scope="module")
def alone():
    """(losses, held-out loss) of one process."""
    return trained(SMALL)


@pytest.mark.parametrize("change", [{}, {"strategy": "ring"}, {"accumulate": 2}, {"bucket_mb": 0.02}, {"strategy": "local-sgd", "sync_every": 1}],
                         ids=["ddp", "ring", "ddp in two parts", "ddp in small buckets", "local SGD averaging each step"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_equal_one_process(alone, world, change):
    losses, held_out = trained(SMALL.but(replicas=world, **change))
    np.testing.assert_allclose(losses, alone[0], atol=5e-5)           # rounding, after 20 steps
    assert held_out == pytest.approx(alone[1], abs=5e-5)


def test_one_rank_with_ddp_equals_one_without(alone):
    np.testing.assert_allclose(trained(SMALL.but(strategy="ddp"))[0], alone[0], atol=5e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_asynchronous_ranks_that_may_not_be_ahead_are_synchronous(alone, world):
    assert trained(SMALL.but(replicas=world, strategy="async", staleness=0))[1] == pytest.approx(alone[1], abs=1e-3)


def test_batch_norm_makes_a_real_but_small_difference():
    recipe = Recipe(model="ResNet9", width=4, batch_size=32, steps=3, warmup_steps=1, threads=1, evaluate=False)
    (one, _), (two, _) = trained(recipe), trained(recipe.but(replicas=2))
    assert 1e-5 < abs(one[0] - two[0]) < 0.3                          # before any gradient was exchanged: each rank has means of its own


@pytest.mark.parametrize("compression", ["fp16", "bf16", "powersgd"])
def test_compressed_gradients_train(alone, compression):
    losses, held_out = trained(SMALL.but(replicas=2, compression=compression))
    assert losses[-5:].mean() < losses[:5].mean()
    assert 0 < abs(losses - alone[0]).max() and held_out < 2.2        # 2.30 is what guessing costs


def test_parts_of_a_batch_share_one_exchange():
    events = list(run(SMALL.but(replicas=2, accumulate=4, evaluate=False)))
    phases = [phase for phase, _, _ in [event for event in events if isinstance(event, Progress)][-1].spans]
    assert phases.count("forward") == 4 * phases.count("update") and phases.count("communication") == phases.count("update")


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ring_gives_what_all_reduce_gives(world):
    def differences():
        found = []
        for numbers in (1, 7, 1000):                                  # fewer than ranks, uneven, many
            torch.manual_seed(dist.get_rank())
            mine, messages = torch.randn(numbers), []
            right = mine.clone()
            dist.all_reduce(right)
            replicas.ring_all_reduce(mine, messages.append)
            found.append(((mine - right).abs().max().item(), len(messages)))
        return found

    for found in ranks(differences, world):
        assert all(difference < 1e-5 and messages == 2 * (world - 1) for difference, messages in found)


def test_every_part_of_every_batch_goes_to_one_rank_under_async():
    def dealt():
        shared = replicas.SharedParameters(torch.nn.Linear(1, 1), None)
        dataset = data.digits().train
        batches = data.RankBatches(dataset, 60, torch.Generator().manual_seed(0), dist.get_rank(), 3, steps=30, deal=shared.deal)
        return [[tuple(part) for part in batches] for epoch in range(2)]

    for epoch, steps in enumerate((23, 7)):                           # 1,437 images make 23 batches; then the limit ends the second epoch
        parts = [part for found in ranks(dealt, 3) for part in found[epoch]]
        images = [image for part in parts for image in part]
        assert len(parts) == 3 * steps and len(set(images)) == len(images) == 60 * steps


def test_fast_ranks_take_over_batches_of_a_slow_one():
    steps = [event.steps for event in sorted(finished(SMALL.but(replicas=2, strategy="async", straggler_ms=50, evaluate=False)), key=lambda e: e.rank)]
    assert sum(steps) == 2 * SMALL.steps and steps[0] > 2 * steps[1]


def test_no_rank_is_further_ahead_than_the_bound_allows():
    def leads():
        torch.manual_seed(0)
        model, seen = torch.nn.Linear(4, 4), []
        shared = replicas.SharedParameters(model, 2)
        for _ in shared.deal(40):
            time.sleep(0.01 * dist.get_rank())
            if int(shared.steps.max()) < replicas.FAR:                # nobody has come to the end
                seen.append(int(shared.steps.max() - shared.steps.min()))
            shared.exchange(model)
        return max(seen)

    assert max(ranks(leads, 2)) == 3                                  # 2, and the step that is then waited in


def test_a_simulated_network_takes_what_the_model_says_and_changes_no_number():
    def timed():
        replicas.slow_down(replicas.Network(0.01, 1e6))
        tensor = torch.full((25_000,), dist.get_rank() + 1.0)         # 100 kB
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        return time.perf_counter() - began, tensor.unique().tolist()

    for seconds, values in ranks(timed, 2):
        assert seconds >= scaling.all_reduce_s(100_000, 2, 0.01, 1e6) and values == [3.0]


def test_training_over_a_simulated_network_gives_the_same_losses(alone):
    recipe = SMALL.but(replicas=2, latency_ms=2.0, bandwidth_mbit=200.0)
    events = list(run(recipe))
    np.testing.assert_allclose(plot.losses_of(events)[1], alone[0], atol=5e-5)
    least = scaling.all_reduce_s(4 * 25_290, 2, 0.002, 200e6 / 8)
    assert all(event.communication_s > least for event in events if isinstance(event, Finished))


def test_the_others_wait_for_a_straggler():
    waited = {event.rank: event.communication_s for event in finished(SMALL.but(replicas=2, straggler_ms=60, evaluate=False))}
    assert waited[0] > 0.04


def trained(recipe):
    """(loss of each step, held-out loss at the end or None)."""
    events = list(run(recipe))
    held_out = [event.loss for event in events if isinstance(event, Evaluated)]
    return plot.losses_of(events)[1], held_out[-1] if held_out else None


def finished(recipe):
    return [event for event in run(recipe) if isinstance(event, Finished)]
