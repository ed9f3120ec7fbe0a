"""The solutions of lesson 13 against plain PyTorch, known noise, and the package."""

import itertools
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from cnnlab import Recipe, data, ranks, run
from cnnlab.events import Evaluated
from cnnlab.model import SmallCNN

FILE = Path(__file__).parents[2] / "notebooks" / "solutions" / "13_large_batches.py"
TASKS = runpy.run_path(str(FILE))["TASKS"]
reference = {task_id: task.reference for task_id, task in TASKS.items()}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def test_one_lucky_evaluation_does_not_reach_the_target():
    accuracies = [0.5, 0.99, 0.6, 0.95, 0.96]
    assert reference["13.1"](range(5), accuracies, 0.9, 1) == 1
    assert reference["13.1"](range(5), accuracies, 0.9, 2) == 4
    assert reference["13.1"](range(5), accuracies, 0.9, 3) == float("inf")


def test_the_warmup_is_the_linear_schedule_of_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 16, 1.0, total_iters=10)
    for step in range(20):
        assert reference["13.2"](step, 256, 10, 0.05, 16) == pytest.approx(
            schedule.get_last_lr()[0]
        )
        optimizer.step()
        schedule.step()


def test_the_noise_scale_of_known_noise():
    signal = torch.full((1000,), 0.1)  # |G|^2 = 10, and tr(S) = 1000 * 0.4^2 = 160
    small = signal + 0.4 * torch.randn(2000, 1000) / 4**0.5
    large = signal + 0.4 * torch.randn(2000, 1000) / 64**0.5
    assert reference["13.3"](small, large, 4, 64) == pytest.approx(16, rel=0.03)


def test_local_sgd_trains_as_the_packaged_one():
    local_sgd_round = reference["13.4"]

    def train():
        torch.manual_seed(0)
        model, order = SmallCNN(channels=1), torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        loader = DataLoader(data.digits().train, 64, shuffle=True, generator=order)
        own = [(x[dist.get_rank() :: 2], y[dist.get_rank() :: 2]) for x, y in loader]
        for first in (0, 4):
            local_sgd_round(model, optimizer, own[first : first + 4])
        images, labels = data.digits().test[:]
        return F.cross_entropy(model(images), labels).item()

    recipe = Recipe(strategy="local-sgd", sync_every=4, replicas=2, threads=1, steps=8)
    events = run(recipe.replace(optimizer="sgd", learning_rate=0.01))
    packaged = [event.loss for event in events if isinstance(event, Evaluated)][-1]
    assert ranks(train, 2) == pytest.approx([packaged] * 2, abs=1e-4)


def test_the_server_applies_all_gradients_and_answers_with_new_parameters():
    start, gradients = torch.randn(4), torch.randn(2, 3, 2)
    result = TASKS["13.5"].run(reference["13.5"], start, gradients, 0.5)
    after = start - 0.5 * torch.cat([gradients[0].sum(0), gradients[1].sum(0)])
    torch.testing.assert_close(result["rank 0"]["parameters"], after)
    assert result["rank 0"]["order, sorted"] == [1, 1, 1, 2, 2, 2]
    for worker in (1, 2):
        part = slice(2 * worker - 2, 2 * worker)
        expected = start[part] - 0.5 * gradients[worker - 1].cumsum(0)
        torch.testing.assert_close(torch.stack(result[f"rank {worker}"]["received"]), expected)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_that_take_turns_have_a_staleness_of_all_others(workers):
    order = list(range(workers)) * 4
    assert reference["13.6"](order)[workers:] == [workers - 1] * (3 * workers)


def test_throughput_and_updates_agree_without_and_with_waiting():
    step_ms = [5, 20, 25]
    synchronous, asynchronous = reference["13.7"]([ms / 1000 for ms in step_ms], 32)
    waiting, free = (sum(reference["13.10"](step_ms, bound, 1000)) for bound in (0, float("inf")))
    assert synchronous == pytest.approx(32 * waiting)
    assert asynchronous == pytest.approx(32 * free)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_no_rank_is_further_ahead_than_the_package_allows(bound):
    """A rank of the package works while its steps are at most `bound` ahead of the slowest."""
    counts = [reference["13.10"]([4, 9, 30], bound, ms) for ms in range(300)]
    assert max(max(count) - min(count) for count in counts) == bound + 1
    for before, after in itertools.pairwise(counts):
        moved = [rank for rank in range(3) if after[rank] > before[rank]]
        assert all(before[rank] - min(before) <= bound for rank in moved)


def test_the_straggler_is_the_rank_that_does_not_wait():
    assert reference["13.8"]([[9.0, 9.0, 0.1], [0.1, 0.1, 9.0], [8.0, 8.0, 8.0]]) == 1


def test_equal_runs_have_a_speedup_of_one_and_half_of_the_time_one_of_two():
    (ours, baseline, target), _ = TASKS["13.9"].inputs()
    assert reference["13.9"](ours, ours, target) == 1
    slower = [{**run, "seconds": [2 * s for s in run["seconds"]]} for run in ours]
    assert reference["13.9"](ours, slower, target) == pytest.approx(2)
