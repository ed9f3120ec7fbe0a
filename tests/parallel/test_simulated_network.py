"""A simulated network is as slow as its model says, and changes no numbers."""

import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import kill_myself

from cnnlab import plots
from cnnlab.events import Finished
from cnnlab.launch.launcher import RankError, ranks, run
from cnnlab.parallel.data_parallel import ring_all_reduce
from cnnlab.parallel.simulated_network import (
    SimulatedLink,
    all_reduce_seconds,
    make_link,
    simulate_network,
)
from cnnlab.recipe import Recipe

pytestmark = pytest.mark.usefixtures("nothing_is_left")

SMALL = Recipe(
    batch_size=72, steps=20, warmup_steps=1, threads=1, optimizer="sgd", learning_rate=0.01
)


def one_by_one(tensors, link):
    for tensor in tensors:
        dist.all_reduce(tensor)


def at_once(tensors, link):  # the link carries one after the other
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


def by_ring(tensors, link):
    for tensor in tensors:
        ring_all_reduce(tensor, link.transfer)


@pytest.mark.parametrize("reduce", [one_by_one, at_once, by_ring])
@pytest.mark.parametrize("world", [2, 3])
def test_an_all_reduce_takes_as_long_as_the_model_says_and_changes_no_numbers(world, reduce):
    def timed():
        link = SimulatedLink(0.01, 1e6)
        simulate_network(link)
        tensors = [torch.full((25_000,), dist.get_rank() + 1.0) for _ in range(2)]  # 100 kB each
        dist.barrier()
        began = time.perf_counter()
        reduce(tensors, link)
        return time.perf_counter() - began, torch.cat(tensors).unique().tolist()

    for seconds, values in ranks(timed, world):
        assert seconds >= 2 * all_reduce_seconds(100_000, world, 0.01, 1e6)
        assert values == [sum(range(1, world + 1))]


def test_a_rank_killed_behind_a_simulated_network_is_named():
    def reduce():
        simulate_network(SimulatedLink(0.001, 1e9))
        for step in range(1000):
            if step == 5 and dist.get_rank() == 1:
                kill_myself(os.devnull)
            dist.all_reduce(torch.ones(10))

    with pytest.raises(RankError) as caught:
        ranks(reduce, 2)
    assert caught.value.rank == 1
    assert caught.value.error == "the process was killed"


def test_training_over_a_simulated_network_gives_the_same_losses():
    recipe = SMALL.replace(replicas=2, latency_ms=2.0, bandwidth_mbit=200.0)
    events = list(run(recipe))
    expected = plots.loss_curve(list(run(SMALL)))[1]
    np.testing.assert_allclose(plots.loss_curve(events)[1], expected, atol=5e-5)
    least = all_reduce_seconds(4 * 25_290, 2, 0.002, 200e6 / 8)
    assert all(event.communication_s > least for event in events if isinstance(event, Finished))


def test_the_other_ranks_wait_for_a_straggler():
    events = run(SMALL.replace(replicas=2, straggler_ms=60, evaluate=False))
    ends = [event for event in events if isinstance(event, Finished)]
    communication_s = {event.rank: event.communication_s for event in ends}
    assert communication_s[0] > 0.04 > communication_s[1]


def test_only_recipes_with_a_latency_or_a_bandwidth_have_a_link():
    assert make_link(Recipe()) is None
    link = make_link(Recipe(replicas=2, latency_ms=2.0))
    assert (link.latency_s, link.bytes_per_s) == (0.002, float("inf"))
    link = make_link(Recipe(replicas=2, bandwidth_mbit=80.0))
    assert (link.latency_s, link.bytes_per_s) == (0.0, 10e6)
