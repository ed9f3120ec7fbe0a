"""Asynchronous training: equal to synchronous training if bound to it, else nobody waits."""

import time

import numpy as np
import pytest

from cnnlab import plots
from cnnlab.events import Evaluated, Finished, Progress
from cnnlab.launch import launcher
from cnnlab.launch.launcher import run
from cnnlab.parallel.async_sgd import SharedParameters
from cnnlab.recipe import Recipe
from cnnlab.training import async_loop

pytestmark = pytest.mark.usefixtures("nothing_is_left")

SMALL = Recipe(
    batch_size=72, steps=20, warmup_steps=1, threads=1, optimizer="sgd", learning_rate=0.01
)
ASYNC = SMALL.replace(strategy="async", replicas=2)


def only(kind, events):
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("world", [2, 4])
def test_with_a_staleness_of_0_training_is_synchronous(world):
    expected = list(run(SMALL))
    events = list(run(ASYNC.replace(replicas=world, staleness=0)))
    losses = [[] for _ in range(world)]
    for event in only(Progress, events):
        losses[event.rank] += event.losses
    np.testing.assert_allclose(np.mean(losses, axis=0), plots.loss_curve(expected)[1], atol=5e-5)
    held_out = [event.loss for event in only(Evaluated, events)][-world:]
    assert held_out == pytest.approx([only(Evaluated, expected)[-1].loss] * world, abs=5e-5)


@pytest.mark.parametrize("change", [{}, {"staleness": 0}, {"staleness": 2, "loader_workers": 1}])
def test_ranks_train_on_all_images_together_and_test_each_once(change):
    events = list(run(ASYNC.replace(replicas=3, steps=25, straggler_ms=5, **change)))
    ends, tested = only(Finished, events), only(Evaluated, events)
    assert {event.images for event in ends} == {25 * 72}
    assert sum(event.steps for event in ends) == 3 * 25
    assert len(tested) == 3 * 2  # 19 steps are an epoch
    figures = {(event.epoch, event.images, event.accuracy, event.loss) for event in tested}
    assert len(figures) == 2  # all ranks agree
    assert tested[0].images == 360


def evaluated_weights(rank, world, recipe):
    evaluate, sums = async_loop.evaluate, []

    def evaluate_and_sum(state, *args):
        figures = evaluate(state, *args)
        parameters = state.network.parameters()
        sums.append(sum(float(parameter.double().sum()) for parameter in parameters))
        return figures

    async_loop.evaluate = evaluate_and_sum
    for _ in async_loop.train_async(recipe, rank, world):
        pass
    yield sums


@pytest.mark.parametrize("workers", [0, 1])
def test_all_ranks_evaluate_the_same_weights(workers):
    """Loader workers claim ahead: a rank may have got its last batch while others still train."""
    recipe = ASYNC.replace(steps=25, straggler_ms=20, loader_workers=workers)
    first, second = launcher.stream(evaluated_weights, (recipe,), 2)
    assert len(first) == 2
    assert first == second


def test_fast_ranks_take_over_batches_of_a_slow_one():
    ends = only(Finished, run(ASYNC.replace(straggler_ms=200, evaluate=False)))
    steps = {event.rank: event.steps for event in ends}
    assert steps[0] + steps[1] == 2 * SMALL.steps
    assert steps[0] > 2 * steps[1]


def train_late(rank, world, recipe):
    """Rank 1 claims its first batch when rank 0 has claimed all."""
    locked = SharedParameters._locked

    def locked_later(shared):
        time.sleep(2 * rank)
        return locked(shared)

    SharedParameters._locked = locked_later
    yield from async_loop.train_async(recipe, rank, world)


def test_a_rank_without_any_step_reports_figures_too():
    for event in only(Finished, launcher.stream(train_late, (ASYNC.replace(steps=5),), 2)):
        assert event.steps == (10, 0)[event.rank]
        assert event.images == 5 * 72
        assert event.images_per_s > 0
        assert event.seconds > 0.4


def test_a_straggler_with_one_step_reports_figures_too():
    """The other rank may have done all other steps during its warm-up."""
    for event in only(Finished, run(ASYNC.replace(straggler_ms=600, steps=5))):
        assert event.images == 5 * 72
        assert event.images_per_s > 0
        assert event.step_s > 0
        assert event.seconds > 0.5


def test_staleness_is_the_mean_number_of_other_updates():
    """In lockstep, a rank's copy lacks none to all of the others' updates: (N - 1) / 2."""
    ends = only(Finished, run(ASYNC.replace(staleness=0)))
    assert np.mean([event.staleness for event in ends]) == pytest.approx(0.5)
    assert [event.staleness for event in only(Finished, run(SMALL.replace(strategy="async")))] == [
        None
    ]
