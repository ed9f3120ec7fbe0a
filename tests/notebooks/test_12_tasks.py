"""The solutions of lesson 12 against one process, torch.distributed, and the package."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DistributedSampler

from cnnlab import Recipe, all_reduce_seconds, ranks, ring_all_reduce, run
from cnnlab.events import Finished, Progress

FILE = Path(__file__).parents[2] / "notebooks" / "solutions" / "12_data_parallel.py"
TASKS = runpy.run_path(str(FILE))["TASKS"]
reference = {task_id: task.reference for task_id, task in TASKS.items()}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def one_process(model, images, labels):
    loss = F.cross_entropy(model(images), labels)
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("task_id", ["12.1", "12.2", "12.7"])
def test_all_ranks_have_the_gradients_of_one_process(task_id):
    task = TASKS[task_id]
    for arguments in task.inputs():
        expected = one_process(*arguments[:3])
        for result in task.run(task.reference, *arguments).values():
            for gradient, right in zip(result["gradients"], expected, strict=True):
                torch.testing.assert_close(gradient, right)


def test_accumulation_needs_one_all_reduce():
    task = TASKS["12.7"]
    results = task.run(task.reference, *next(iter(task.inputs())))
    assert [result["all-reduces"] for result in results.values()] == [1, 1]


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_of_the_ring_sends_twice_the_tensor_but_for_two_chunks(world):
    task, tensors = TASKS["12.3"], torch.randn(world, 4 * world)
    for result in task.run(task.reference, tensors).values():
        torch.testing.assert_close(result["tensor"], tensors.sum(0))
        assert result["bytes sent"] == 2 * (world - 1) * tensors[0].nbytes // world


def test_the_ring_is_that_of_the_package_and_of_torch():
    ring = reference["12.3"]

    def difference():
        tensors = [torch.arange(12.0) * (dist.get_rank() + 1) for _ in range(3)]
        for tensor, way in zip(tensors, (ring, ring_all_reduce, dist.all_reduce), strict=True):
            way(tensor)
        return max((tensor - tensors[0]).abs().max().item() for tensor in tensors)

    assert max(ranks(difference, 3)) == 0


@pytest.mark.parametrize("count, world", [(1437, 2), (1437, 4), (12, 3), (10, 8)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_rank_gets_the_images_of_the_distributed_sampler(count, world, epoch):
    for rank in range(world):
        sampler = DistributedSampler(range(count), num_replicas=world, rank=rank, seed=5)
        sampler.set_epoch(epoch)
        assert reference["12.6"](count, rank, world, epoch, 5) == list(sampler)


def test_a_single_bucket_does_not_overlap():
    message_s = all_reduce_seconds(1000, 4, 0.01, 1e5)
    step_s = reference["12.4"](0.2, [0.2], [1000], 4, 0.01, 1e5)
    assert step_s == pytest.approx(0.2 + message_s)


def test_exposed_communication_of_a_run_is_about_that_of_its_meter():
    recipe = Recipe(replicas=2, threads=1, steps=8, bandwidth_mbit=20.0, evaluate=False)
    events = list(run(recipe))
    spans = [e for e in events if isinstance(e, Progress) and e.rank == 0][-1].spans
    steps = sum(phase == "waiting" for phase, _, _ in spans)
    computing = [tuple(s[1:]) for s in spans if s[0] in ("forward", "backward", "update")]
    messages = [tuple(s[1:]) for s in spans if s[0] == "communication"]
    finished = [e for e in events if isinstance(e, Finished) and e.rank == 0][0]
    exposed_s = reference["12.5"](computing, messages) / steps
    assert exposed_s == pytest.approx(finished.communication_s, rel=0.5)
