"""The solutions of lesson 05 against one process, torch.distributed, and the package."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cnnlab import amdahl, fit_serial_fraction, gustafson, ranks

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TASKS = runpy.run_path(str(NOTEBOOKS / "solutions" / "05_processes_and_messages.py"))["TASKS"]
sys.path.insert(0, str(NOTEBOOKS / "programs"))

from smoothing import smooth, smooth_array  # noqa: E402
from start_mpi import run_mpi  # noqa: E402

reference = {task_id: task.reference for task_id, task in TASKS.items()}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_ranks_compute_all_rows_once(world):
    image = torch.rand(13, 6)
    borders = [reference["05.1"](rank, world, len(image)) for rank in range(world)]
    parts = [smooth(image[first:last]) for first, last in borders]
    assert torch.equal(torch.cat(parts), smooth(image))
    sent = sum(image[first:last].nbytes for first, last in borders)
    assert reference["05.2"](13, 6, world) == (sent, smooth(image).nbytes)


def test_workers_with_shared_memory_compute_the_rows_of_one_process():
    image = torch.rand(12, 8)
    together = torch.zeros(12, 8)
    for first, last in (reference["05.1"](rank, 2, 12) for rank in range(2)):
        result = TASKS["05.3"].run(reference["05.3"], image, first, last)
        assert torch.equal(result["first image"], image)
        together += result["second image"]
    assert torch.equal(together[1:-1], smooth(image))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_that_exchange_halos_compute_the_image_of_one_process(world):
    image = torch.rand(11, 6)
    rows_needed, exchange_halos = reference["05.1"], reference["05.4"]

    def smooth_part():
        first, last = rows_needed(dist.get_rank(), dist.get_world_size(), len(image))
        part = image[first:last].clone()
        for _ in range(4):
            part[1:-1] = smooth(part)
            exchange_halos(part)
        return part[1:-1]

    whole = image.clone()
    for _ in range(4):
        whole[1:-1] = smooth(whole)
    assert torch.equal(torch.cat(ranks(smooth_part, world)), whole[1:-1])


def test_all_reduce_and_broadcast_by_hand_are_those_of_torch():
    tensors = torch.randn(5, 7)
    sum_over_ranks, broadcast_tree = reference["05.5"], reference["05.10"]

    def call():
        both = []
        for by_hand, packaged in (
            (sum_over_ranks, dist.all_reduce),
            (broadcast_tree, lambda tensor: dist.broadcast(tensor, 0)),
        ):
            for function in (by_hand, packaged):
                both.append(tensors[dist.get_rank()].clone())
                function(both[-1])
        return both

    for summed, all_reduced, copied, broadcast in ranks(call, 5):
        torch.testing.assert_close(summed, all_reduced)
        assert torch.equal(copied, broadcast)


@pytest.mark.parametrize("serial, n", [(0.0, 4), (0.2, 2), (0.05, 64)])
def test_the_laws_are_those_of_the_package(serial, n):
    same, larger = reference["05.6"](3 * serial, 3 * (1 - serial), n)
    assert same == pytest.approx(amdahl(n, serial))
    assert larger == pytest.approx(gustafson(n, serial))
    assert reference["05.8"](1.0, 1 / same, n) == pytest.approx(serial)
    assert fit_serial_fraction([n], [same]) == pytest.approx(serial)


def test_each_rank_gets_the_same_work_with_the_tall_image():
    image = torch.rand(7, 3)
    tall = reference["05.7"](image, 4)
    rows = [reference["05.1"](rank, 4, len(tall)) for rank in range(4)]
    assert [last - first - 2 for first, last in rows] == [len(image) - 2] * 4


def test_flat_regions_and_edges_of_an_image_stay_and_noise_shrinks():
    image = torch.cat([torch.zeros(6, 8), torch.ones(6, 8)])
    torch.testing.assert_close(smooth(image), image[1:-1])
    noisy = image + 0.02 * torch.randn_like(image)
    assert (smooth(noisy) - image[1:-1]).std() < 0.8 * (noisy - image)[1:-1].std()
    assert np.array_equal(smooth_array(noisy.numpy()), smooth(noisy).numpy())


@pytest.mark.parametrize("world", [1, 3])
def test_the_mpi_program_runs(world):
    """The lesson goes on without a program that fails, so nbval would not notice."""
    pytest.importorskip("mpi4py")
    printed = run_mpi("halo_mpi.py", world)
    assert f"MPI, {world} ranks" in printed
    assert "largest difference from one process 0e+00" in printed
    assert ("as a buffer" in printed) == (world > 1)
