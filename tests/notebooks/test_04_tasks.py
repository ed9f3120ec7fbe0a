"""The solutions of lesson 04 against plain PyTorch and brute force, and its programs."""

import os
import queue
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PROGRAMS = NOTEBOOKS / "programs"
SOLUTIONS = runpy.run_path(str(NOTEBOOKS / "solutions" / "04_vectors_and_threads.py"))
TASKS = SOLUTIONS["TASKS"]

compiler = shutil.which("gcc") or shutil.which("clang")


def solution(task_id):
    return TASKS[task_id].reference


def conv2d(photo, kernel):
    photo, kernel = torch.from_numpy(photo), torch.from_numpy(kernel)
    return F.conv2d(photo[None, None], kernel[None, None])[0, 0].numpy()


def test_the_convolution_is_that_of_pytorch():
    photo, kernel = np.random.rand(2, 20, 20).astype(np.float32)
    kernel = kernel[:5, :5]
    np.testing.assert_allclose(solution("04.1")(photo, kernel), conv2d(photo, kernel), rtol=1e-5)


@pytest.mark.parametrize("rows, workers", [(419, 2), (10, 4), (3, 5), (1, 1)])
def test_the_parts_are_those_of_numpy(rows, workers):
    parts = [np.arange(first, end).tolist() for first, end in solution("04.2")(rows, workers)]
    assert parts == [part.tolist() for part in np.array_split(np.arange(rows), workers)]


def test_threads_over_parts_give_the_whole_convolution():
    photo, kernel = np.random.rand(30, 20), np.random.rand(3, 3)
    by_numpy = solution("04.1")
    parts = [photo[first : end + 2] for first, end in solution("04.2")(28, 3)]
    strips = solution("04.3")(lambda part: by_numpy(part, kernel), parts)
    np.testing.assert_array_equal(np.concatenate(strips), by_numpy(photo, kernel))


def test_no_schedule_beats_perfect_balance_or_the_longest_task():
    costs = np.random.randint(1, 50, 40).tolist()
    for chunk in (1, 3, 40):
        assert sum(costs) >= solution("04.5")(costs, 4, chunk) >= max(sum(costs) / 4, max(costs))
    assert solution("04.5")(costs, 1, 7) == sum(costs)


def test_a_large_copy_is_memory_bound_and_a_matrix_product_is_not():
    table = {"copy": (0, 2e9, 2e9), "product": (2e12, 1.2e9, 1.2e9)}
    limits = solution("04.6")(table, 1e12, [(1e6, 1e12), (1e9, 2e10)])
    assert limits == {"copy": "memory", "product": "compute"}


def test_the_ranks_together_have_at_most_a_thread_per_core():
    for ranks in range(1, 9):
        threads = solution("04.7")(8, 16, ranks)
        assert ranks * threads <= 8 < ranks * (threads + 1)


@pytest.mark.parametrize("size, line", [(8, 64), (64, 64), (100, 64), (8, 128)])
def test_no_two_counters_share_a_cache_line(size, line):
    offsets = solution("04.8")(5, size, line)
    lines = [set(range(offset // line, (offset + size - 1) // line + 1)) for offset in offsets]
    assert sum(map(len, lines)) == len(set.union(*lines))


def test_a_work_queue_computes_everything_once():
    calls = []
    results = solution("04.9")(lambda item: calls.append(item) or -item, range(50), 3)
    assert results == [-item for item in range(50)] and sorted(calls) == list(range(50))


def test_a_thread_that_waits_forever_is_an_error():
    with pytest.raises(TimeoutError, match="still waits"):
        SOLUTIONS["finish"](queue.SimpleQueue().get, seconds=0.1)


@pytest.fixture
def folder(tmp_path):
    """A folder with the input of the programs, and the arguments that describe it."""
    photo, kernel = np.random.rand(2, 24, 30).astype(np.float32)
    kernel = np.ascontiguousarray(kernel[:5, :5])
    photo.tofile(tmp_path / "photo.bin")
    kernel.tofile(tmp_path / "kernel.bin")
    np.arange(20, dtype=np.int32).tofile(tmp_path / "widths.bin")
    return tmp_path, conv2d(photo, kernel) * np.tri(20, 26, -1)


def run_convolution(command, folder):
    path, expected = folder
    arguments = [path, "24", "30", "5", "3", "1", "2"]
    env = {**os.environ, "NUMBA_NUM_THREADS": "2", "NUMBA_CACHE_DIR": str(path)}
    text = subprocess.check_output([*command, *arguments], env=env, text=True, timeout=60)
    assert sorted(line.split()[0] for line in text.splitlines()) == ["1"] * 3 + ["2"] * 3
    output = np.fromfile(path / "output.bin", np.float32).reshape(expected.shape)
    np.testing.assert_allclose(output, expected, rtol=1e-4)


def compiled(name, folder):
    program = folder / name
    command = [compiler, "-O3", "-fopenmp", "-Wall", "-Werror", PROGRAMS / f"{name}_openmp.c"]
    subprocess.run([*command, "-o", program], check=True)
    return program


@pytest.mark.skipif(not compiler or sys.platform != "linux", reason="needs a C compiler")
def test_the_c_program_computes_the_convolution(folder):
    run_convolution([compiled("convolve", folder[0])], folder)


@pytest.mark.skipif(not compiler or sys.platform != "linux", reason="needs a C compiler")
def test_the_program_with_counters_prints_the_time_of_each_repeat(tmp_path):
    command = [compiled("counters", tmp_path), "64", "1000", "3", "2"]
    assert len(subprocess.check_output(command, timeout=60).splitlines()) == 3


@pytest.mark.parametrize("layer", ["omp", "tbb"])
def test_the_numba_program_computes_the_convolution(layer, folder):
    pytest.importorskip("numba")
    pytest.importorskip("tbb" if layer == "tbb" else "numba")
    run_convolution([sys.executable, PROGRAMS / "convolve_numba.py", layer], folder)
