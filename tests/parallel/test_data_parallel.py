"""Replicas stay equal to one process, whatever the strategy; what is slow on purpose is as slow as it says."""

import os
import tempfile
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import kill_myself

from cnnlab import plots
from cnnlab.data import datasets, loader
from cnnlab.events import Evaluated, Finished, Progress
from cnnlab.launch import launcher
from cnnlab.launch.launcher import RankError, ranks, run
from cnnlab.parallel import async_sgd, data_parallel, simulated_network
from cnnlab.recipe import Recipe
from cnnlab.training import loop

pytestmark = pytest.mark.usefixtures("nothing_is_left")

SMALL = Recipe(
    batch_size=72, steps=20, warmup_steps=1, threads=1, optimizer="sgd", learning_rate=0.01
)


@pytest.fixture(scope="module")
def alone():
    """(losses, held-out loss) of one process."""
    return trained(SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"strategy": "ring"},
        {"accumulate": 2},
        {"bucket_mb": 0.02},
        {"strategy": "local-sgd", "sync_every": 1},
    ],
    ids=[
        "ddp",
        "ring",
        "ddp in two parts",
        "ddp in small buckets",
        "local SGD averaging each step",
    ],
)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_equal_one_process(alone, world, change):
    losses, held_out = trained(SMALL.replace(replicas=world, **change))
    np.testing.assert_allclose(losses, alone[0], atol=5e-5)  # rounding, after 20 steps
    assert held_out == pytest.approx(alone[1], abs=5e-5)


def test_one_rank_with_ddp_equals_one_without(alone):
    np.testing.assert_allclose(trained(SMALL.replace(strategy="ddp"))[0], alone[0], atol=5e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_asynchronous_ranks_that_may_not_be_ahead_are_synchronous(alone, world):
    events = list(run(SMALL.replace(replicas=world, strategy="async", staleness=0)))
    losses = [
        [
            loss
            for event in events
            if isinstance(event, Progress) and event.rank == rank
            for loss in event.losses
        ]
        for rank in range(world)
    ]
    np.testing.assert_allclose(np.mean(losses, axis=0), alone[0], atol=5e-5)
    assert [event.loss for event in events if isinstance(event, Evaluated)][
        -world:
    ] == pytest.approx([alone[1]] * world, abs=5e-5)


@pytest.mark.parametrize("strategy", ["ring", "local-sgd", "async"])
def test_alone_a_strategy_is_plain_training(alone, strategy):
    np.testing.assert_array_equal(trained(SMALL.replace(strategy=strategy))[0], alone[0])


def test_batch_norm_makes_a_real_but_small_difference():
    recipe = Recipe(
        model="ResNet9", width=4, batch_size=32, steps=3, warmup_steps=1, threads=1, evaluate=False
    )
    (one, _), (two, _) = trained(recipe), trained(recipe.replace(replicas=2))
    assert (
        1e-5 < abs(one[0] - two[0]) < 0.3
    )  # before any gradient was exchanged: each rank has means of its own


@pytest.mark.parametrize("compression", ["fp16", "bf16", "powersgd"])
def test_compressed_gradients_train(alone, compression):
    losses, held_out = trained(SMALL.replace(replicas=2, compression=compression))
    assert losses[-5:].mean() < losses[:5].mean()
    assert 0 < abs(losses - alone[0]).max() and held_out < 2.2  # 2.30 is what guessing costs


def test_parts_of_a_batch_share_one_exchange():
    events = list(run(SMALL.replace(replicas=2, accumulate=4, evaluate=False)))
    phases = [
        phase
        for phase, _, _ in [event for event in events if isinstance(event, Progress)][-1].spans
    ]
    assert phases.count("forward") == 4 * phases.count("update") and phases.count(
        "communication"
    ) == phases.count("update")


def test_small_buckets_send_more_messages():
    messages = {}
    for bucket_mb in (100, 0.02):
        events = list(run(SMALL.replace(replicas=2, bucket_mb=bucket_mb, steps=4, evaluate=False)))
        phases = [
            phase
            for phase, _, _ in [event for event in events if isinstance(event, Progress)][-1].spans
        ]
        messages[bucket_mb] = phases.count("communication") / phases.count("update")
    assert messages[100] == 1 < messages[0.02]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ring_gives_what_all_reduce_gives(world):
    def differences():
        found = []
        for numbers in (1, 7, 1000):  # fewer than ranks, uneven, many
            torch.manual_seed(dist.get_rank())
            mine, messages = torch.randn(numbers), []
            right = mine.clone()
            dist.all_reduce(right)
            data_parallel.ring_all_reduce(mine, messages.append)
            found.append(((mine - right).abs().max().item(), messages, numbers, mine.tolist()))
        return found

    all_found = ranks(differences, world)
    for found in all_found:
        for difference, messages, numbers, _ in found:
            assert difference < 1e-5 and len(messages) == 2 * (world - 1)
            assert all(
                numbers // world <= bytes / 4 <= numbers // world + 1 for bytes in messages
            )  # each has 1/N of the tensor
    assert all(
        [sums for *_, sums in found] == [sums for *_, sums in all_found[0]] for found in all_found
    )  # to the last bit


def test_every_part_of_every_batch_goes_to_one_rank_under_async():
    def dealt():
        shared = async_sgd.SharedParameters(torch.nn.Linear(1, 1), None)
        dataset = datasets.digits().train
        batches = loader.RankBatchSampler(
            dataset,
            60,
            torch.Generator().manual_seed(0),
            dist.get_rank(),
            3,
            steps=30,
            deal=shared.claim_batches,
        )
        return [[tuple(part) for part in batches] for epoch in range(2)]

    for epoch, steps in enumerate(
        (23, 7)
    ):  # 1,437 images make 23 batches; then the limit ends the second epoch
        parts = [part for found in ranks(dealt, 3) for part in found[epoch]]
        images = [image for part in parts for image in part]
        assert len(parts) == 3 * steps and len(set(images)) == len(images) == 60 * steps


@pytest.mark.parametrize(
    "change",
    [
        {"strategy": "ring"},
        {"strategy": "async"},
        {"strategy": "async", "staleness": 0},
        {"strategy": "async", "staleness": 2, "loader_workers": 1},
    ],
    ids=str,
)
def test_together_ranks_train_on_as_many_images_as_asked_for_and_test_each_once(change):
    events = list(
        run(SMALL.replace(replicas=3, steps=25, straggler_ms=5, **change))
    )  # 19 steps are an epoch
    ends, tested = finished_of(events), [event for event in events if isinstance(event, Evaluated)]
    assert {event.images for event in ends} == {25 * 72} and sum(
        event.steps for event in ends
    ) == 3 * 25
    assert (
        len(tested) == 6
        and len({(event.epoch, event.images, event.accuracy, event.loss) for event in tested}) == 2
        and tested[0].images == 360
    )


def weights_evaluated(rank, world, recipe):

    evaluate, found = loop.evaluate, []

    def watched(network, *args):
        figures = evaluate(network, *args)
        found.append(sum(float(parameter.double().sum()) for parameter in network.parameters()))
        return figures

    loop.evaluate = watched
    yield from (None for _ in loop.train(recipe, rank, world))
    yield found


@pytest.mark.parametrize("workers", [0, 1])
def test_under_async_all_ranks_evaluate_the_same_weights(workers):
    """Loader workers ask for parts ahead: a rank may have taken its last while others are still at theirs."""
    recipe = SMALL.replace(
        replicas=2, strategy="async", steps=25, straggler_ms=20, loader_workers=workers
    )
    first, second = filter(None, launcher.stream(weights_evaluated, (recipe,), 2))
    assert len(first) == 2 and first == second


def test_updates_of_all_ranks_add_up_and_are_counted():
    def added():
        model = torch.nn.Linear(64, 64)
        torch.nn.init.zeros_(model.weight)
        shared = async_sgd.SharedParameters(model, None)
        for _ in range(1000):
            with torch.no_grad():
                model.weight += dist.get_rank() + 1
            shared.push_pull(model)
        dist.barrier()
        shared.pull(model)
        return model.weight.min().item(), model.weight.max().item(), shared.total(), shared.own

    right = pytest.approx(1000 * (1 + 2 + 3) / 3, rel=1e-4)
    assert ranks(added, 3) == [(right, right, 3000, 1000)] * 3


def test_ranks_killed_before_they_share_their_parameters_leave_no_file():
    def shared():
        mkstemp = tempfile.mkstemp

        def told(**options):
            file = mkstemp(**options)
            print(file[1])
            return file

        tempfile.mkstemp, dist.barrier = (
            told,
            lambda: kill_myself(os.devnull),
        )  # the file is there, and all wait for all
        async_sgd.SharedParameters(torch.nn.Linear(1, 1), None)

    said = []
    with pytest.raises(RankError):
        ranks(shared, 2, say=said.append)
    [path] = [line.split("] ")[1] for line in said]
    assert os.path.isabs(path) and not os.path.exists(path)


def test_fast_ranks_take_over_batches_of_a_slow_one():
    steps = [
        event.steps
        for event in sorted(
            finished(SMALL.replace(replicas=2, strategy="async", straggler_ms=50, evaluate=False)),
            key=lambda e: e.rank,
        )
    ]
    assert sum(steps) == 2 * SMALL.steps and steps[0] > 2 * steps[1]


def test_no_rank_is_further_ahead_than_the_bound_allows():
    def leads():
        torch.manual_seed(0)
        model, seen = torch.nn.Linear(4, 4), []
        shared = async_sgd.SharedParameters(model, 2)
        for _ in shared.claim_batches(40):
            time.sleep(0.01 * dist.get_rank())
            if int(shared.steps.max()) < async_sgd.NO_STEPS_LEFT:  # nobody has come to the end
                seen.append(int(shared.steps.max() - shared.steps.min()))
            shared.push_pull(model)
        return max(seen)

    assert max(ranks(leads, 2)) == 3  # 2, and the step that is then waited in


@pytest.mark.parametrize("world", [2, 3])
def test_a_simulated_network_takes_what_the_model_says_and_changes_no_number(world):
    def timed(reduce):
        link = simulated_network.SimulatedLink(0.01, 1e6)
        simulated_network.simulate_network(link)
        tensors = [torch.full((25_000,), dist.get_rank() + 1.0) for _ in range(2)]  # 100 kB each
        dist.barrier()
        began = time.perf_counter()
        reduce(tensors, link)
        return time.perf_counter() - began, torch.cat(tensors).unique().tolist()

    def one_by_one(tensors, link):
        return [dist.all_reduce(tensor) for tensor in tensors]

    def at_once(tensors, link):  # the link carries one after the other
        return [
            work.wait() for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        ]

    def ring(tensors, link):
        return [data_parallel.ring_all_reduce(tensor, link.transfer) for tensor in tensors]

    for reduce in (one_by_one, at_once, ring):
        for seconds, values in ranks(timed, world, reduce):
            assert seconds >= 2 * simulated_network.all_reduce_seconds(
                100_000, world, 0.01, 1e6
            ) and values == [sum(range(1, world + 1))]


def test_a_rank_killed_behind_a_simulated_network_is_named():
    def reduced():
        simulated_network.simulate_network(simulated_network.SimulatedLink(0.001, 1e9))
        for step in range(1000):
            if step == 5 and dist.get_rank() == 1:
                kill_myself(os.devnull)
            dist.all_reduce(torch.ones(10))

    with pytest.raises(RankError) as caught:
        ranks(reduced, 2)
    assert caught.value.rank == 1 and caught.value.error == "the process was killed"


def test_training_over_a_simulated_network_gives_the_same_losses(alone):
    recipe = SMALL.replace(replicas=2, latency_ms=2.0, bandwidth_mbit=200.0)
    events = list(run(recipe))
    np.testing.assert_allclose(plots.loss_curve(events)[1], alone[0], atol=5e-5)
    least = simulated_network.all_reduce_seconds(4 * 25_290, 2, 0.002, 200e6 / 8)
    assert all(event.communication_s > least for event in events if isinstance(event, Finished))


def test_the_others_wait_for_a_straggler():
    waited = {
        event.rank: event.communication_s
        for event in finished(SMALL.replace(replicas=2, straggler_ms=60, evaluate=False))
    }
    assert waited[0] > 0.04 > waited[1]


def comes_late(rank, world, recipe):
    """Rank 1 asks for its first part when the others have taken all."""

    locked = async_sgd.SharedParameters._locked
    async_sgd.SharedParameters._locked = lambda shared: time.sleep(0.5 * rank) or locked(shared)
    yield from loop.train(recipe, rank, world)


def test_a_rank_that_is_left_nothing_to_do_has_figures_too():
    for event in finished_of(
        launcher.stream(comes_late, (SMALL.replace(replicas=2, strategy="async", steps=5),), 2)
    ):
        assert (
            event.steps == (10, 0)[event.rank]
            and event.images == 5 * 72
            and event.images_per_s > 0
            and event.seconds > 0.4
        )


def test_a_straggler_that_is_left_one_step_has_figures_too():
    """Under async the others may have done all while it was still at its warm-up."""
    for event in finished(SMALL.replace(replicas=2, strategy="async", straggler_ms=600, steps=5)):
        assert (
            event.images == 5 * 72
            and event.images_per_s > 0
            and event.step_s > 0
            and event.seconds > 0.5
        )


def trained(recipe):
    """(loss of each step, held-out loss at the end or None)."""
    events = list(run(recipe))
    held_out = [event.loss for event in events if isinstance(event, Evaluated)]
    return plots.loss_curve(events)[1], held_out[-1] if held_out else None


def finished(recipe):
    return finished_of(run(recipe))


def finished_of(events):
    return [event for event in events if isinstance(event, Finished)]
