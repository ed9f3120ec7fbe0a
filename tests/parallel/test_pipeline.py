"""Stages of a pipeline: which layers each rank keeps, and what all of them compute together."""

import itertools

import pytest
import torch
from torch import nn

from cnnlab.launch import launcher
from cnnlab.launch.launcher import run
from cnnlab.model import build
from cnnlab.parallel import pipeline
from cnnlab.parallel.pipeline_schedule import (
    action_order,
    bubble_fraction,
    equal_stages_bubble,
    simulate_schedule,
)
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import loop
from cnnlab.training.clock import Clock

pytestmark = pytest.mark.usefixtures("nothing_is_left")

RESNET = Recipe(
    model="ResNet9",
    width=4,
    batch_size=32,
    steps=2,
    warmup_steps=1,
    threads=1,
    strategy="pipeline",
    stages=2,
)
INTERLEAVED = {"micro_batches": 2, "pipeline_schedule": "interleaved"}
CPU = torch.device("cpu")
EVALUATED = 7  # images, fewer than a micro-batch

# (schedule, ranks, micro-batches)
SCHEDULES = [
    ("gpipe", 2, 1),
    ("gpipe", 4, 6),
    ("1f1b", 2, 2),
    ("1f1b", 4, 4),
    ("1f1b", 4, 9),
    ("interleaved", 2, 2),
    ("interleaved", 2, 6),
    ("interleaved", 4, 4),
    ("interleaved", 4, 8),
]


# Stages


def stages_of_a_rank(rank, world, recipe):
    """(names of its parameters, stage numbers, parameters of each stage, logits)."""
    splits, _, state = loop.set_up(recipe, CPU, world, Clock(CPU))
    names = [name for name, _ in state.network.named_parameters()]
    numbers = [stage.number for stage in state.model]
    sizes = [sum(p.numel() for p in stage.parameters()) for stage in state.model]
    state.network.eval()
    logits = state.network(splits.test.tensors[0][:EVALUATED])
    yield names, numbers, sizes, logits.numpy()


@pytest.mark.parametrize(
    "change, numbers",
    [
        ({}, [[0], [1]]),
        ({"stages": 4}, [[0], [1], [2], [3]]),
        (INTERLEAVED, [[0, 2], [1, 3]]),
        ({"memory_format": "channels_last"}, [[0], [1]]),
        ({"recompute": True}, [[0], [1]]),
        ({"replicas": 2}, [[0], [1]] * 2),
    ],
    ids=str,
)
def test_ranks_divide_the_layers_and_together_compute_the_logits(change, numbers):
    recipe = RESNET.replace(**change)
    found = list(launcher.stream(stages_of_a_rank, (recipe,), recipe.ranks))
    found.sort(key=lambda rank: rank[1])
    assert sorted(rank[1] for rank in found) == sorted(numbers)
    splits = loop.datasets.load(recipe)
    whole = build(recipe, splits.shape).eval()
    names = [name for rank in found for name in rank[0]]
    expected = [name for name, _ in whole.named_parameters()]
    assert sorted(names) == sorted(expected * recipe.replicas)
    assert all(size > 0 for rank in found for size in rank[2])  # each stage has something to train
    with torch.no_grad():
        logits = whole(splits.test.tensors[0][:EVALUATED])
    for rank in found:
        torch.testing.assert_close(torch.tensor(rank[3]), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", range(1, 7))
def test_the_slowest_part_is_as_fast_as_possible(parts):
    seconds = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    found = pipeline.balanced_cuts(seconds, parts)

    def slowest(cuts):
        return max(sum(seconds[a:b]) for a, b in itertools.pairwise(cuts))

    assert len(found) == parts + 1
    assert all(a < b for a, b in itertools.pairwise(found))
    inner = itertools.combinations(range(1, 8), parts - 1)
    assert slowest(found) == min(slowest([0, *cuts, 8]) for cuts in inner)


def test_measuring_layers_changes_nothing_and_finds_the_expensive_one():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 64, 9), nn.Conv2d(64, 1, 1)
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    units = pipeline.list_units(network)
    assert [[name for _, name in unit] for unit in units] == [["0"], ["1", "2"], ["3"], ["4"]]
    seconds, examples = pipeline._measure_units(units, torch.rand(8, 1, 40, 40))
    assert seconds.index(max(seconds)) == 2
    assert [tuple(example.shape) for example in examples] == [
        (8, 1, 40, 40),
        (8, 2, 40, 40),
        (8, 2, 40, 40),
        (8, 64, 32, 32),
        (8, 1, 32, 32),
    ]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("change", [{"stages": 4}, INTERLEAVED], ids=str)
def test_too_few_layers_for_the_stages_are_rejected_with_a_fix(change):
    with pytest.raises(CnnlabError, match="4 parts.*SmallCNN has only 3 layers.*deeper model"):
        list(run(RESNET.replace(model="SmallCNN", **change)))


# Schedules


def orders_of_torch(rank, world, cases):
    """The actions of this rank in a step of torch.distributed.pipelining, for each schedule."""
    from torch.distributed import pipelining

    for schedule, micro_batches in cases:
        numbers = [rank, rank + world] if schedule == "interleaved" else [rank]
        layer, example = nn.Linear(1, 1), torch.zeros(1, 1, requires_grad=True)
        options = {"input_args": example, "output_args": example}
        stages = [
            pipelining.PipelineStage(layer, number, world * len(numbers), CPU, **options)
            for number in numbers
        ]
        actions = []
        for stage in stages:
            stage.forward_one_chunk = noted(stage, "forward", stage.forward_one_chunk, actions)
            stage.backward_one_chunk = noted(stage, "backward", stage.backward_one_chunk, actions)
        kind = {
            "gpipe": pipelining.ScheduleGPipe,
            "1f1b": pipelining.Schedule1F1B,
            "interleaved": pipelining.ScheduleInterleaved1F1B,
        }[schedule]
        argument = stages if schedule == "interleaved" else stages[0]
        inputs = [torch.zeros(micro_batches, 1)] if rank == 0 else []
        target = torch.zeros(micro_batches, 1)
        kind(argument, micro_batches, nn.functional.mse_loss).step(*inputs, target=target)
        yield schedule, micro_batches, rank, actions


def noted(stage, phase, function, actions):
    def call(micro_batch, *args, **options):
        actions.append((stage.stage_index, phase, micro_batch))
        return function(micro_batch, *args, **options)

    return call


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_acts_in_the_order_of_torch(ranks):
    cases = [(schedule, count) for schedule, world, count in SCHEDULES if world == ranks]
    orders = list(launcher.stream(orders_of_torch, (cases,), ranks))
    assert len(orders) == len(cases) * ranks
    for schedule, micro_batches, rank, actions in orders:
        assert action_order(schedule, ranks, micro_batches, rank) == actions


@pytest.mark.parametrize("schedule, ranks, micro_batches", SCHEDULES)
def test_with_equal_stages_the_simulated_bubble_is_that_of_the_formula(
    schedule, ranks, micro_batches
):
    stages = ranks * (2 if schedule == "interleaved" else 1)
    spans = simulate_schedule(schedule, [1.0] * stages, [2.0] * stages, micro_batches)
    assert len(spans) == 2 * stages * micro_batches
    expected = equal_stages_bubble(schedule, ranks, micro_batches)
    assert bubble_fraction(spans, ranks) == pytest.approx(expected)


@pytest.mark.parametrize("schedule, ranks, micro_batches", SCHEDULES)
def test_a_simulated_action_begins_when_its_rank_and_its_input_are_ready(
    schedule, ranks, micro_batches
):
    stages = ranks * (2 if schedule == "interleaved" else 1)
    times = {"forward": [1.0, 2.5, 0.5, 1.0] * 2, "backward": [3.0, 2.0, 0.5, 4.0] * 2}
    forward_s, backward_s = times["forward"][:stages], times["backward"][:stages]
    spans = simulate_schedule(schedule, forward_s, backward_s, micro_batches)
    ends = {span[:3]: span[-1] for span in spans}
    for rank in range(ranks):
        free_at = 0.0
        for stage, phase, number, begin, end in spans:
            if stage % ranks != rank:
                continue
            if phase == "forward":
                ready_at = ends.get((stage - 1, phase, number), 0.0)
            else:
                last = ends[stages - 1, "forward", number]
                ready_at = ends.get((stage + 1, phase, number), last)
            assert begin == max(free_at, ready_at)
            assert end == pytest.approx(begin + times[phase][stage])
            free_at = end


def test_more_micro_batches_make_the_simulated_bubble_of_unequal_stages_smaller():
    bubbles = [
        bubble_fraction(simulate_schedule("gpipe", [1.0, 3.0], [2.0, 4.0], count), 2)
        for count in (1, 2, 4, 8)
    ]
    assert bubbles == sorted(bubbles, reverse=True)
    assert bubbles[0] == 0.5
    assert bubbles[-1] > equal_stages_bubble("gpipe", 2, 8)  # the slow stage never waits, others do
