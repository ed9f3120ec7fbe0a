"""The solutions of lesson 08 against PyTorch and brute force, its simulators and its programs."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PROGRAMS = NOTEBOOKS / "programs"
SOLUTIONS = NOTEBOOKS / "solutions" / "08_writing_kernels.py"
LESSON = runpy.run_path(str(SOLUTIONS))
TASKS = LESSON["TASKS"]
simulate, cuda = LESSON["simulate"], LESSON["cuda"]
REAL_RUNS = f"""
import runpy, sys
import numpy as np
lesson = runpy.run_path({str(SOLUTIONS)!r})
from run_kernels import cuda_runner, triton_runner
photo = np.arange(20 * 40, dtype=np.float32).reshape(20, 40) % 7
weights = np.arange(49, dtype=np.float32).reshape(7, 7) % 3
for task_id in ("08.2", "08.4"):
    run, fetch = cuda_runner(lesson["TASKS"][task_id].reference, (2, 4), (32, 4), photo, weights)
    np.save(f"{{sys.argv[1]}}/{{task_id}}.npy", fetch())
kernel = lesson["TASKS"]["08.6"].reference
run, fetch = triton_runner(kernel, (3, 14), photo, weights, "cpu", block=16)
np.save(f"{{sys.argv[1]}}/08.6.npy", fetch())
np.save(f"{{sys.argv[1]}}/photo.npy", photo)
np.save(f"{{sys.argv[1]}}/weights.npy", weights)
"""


def solution(task_id):
    return TASKS[task_id].reference


def conv2d(photo, weights):
    photo, weights = torch.from_numpy(photo), torch.from_numpy(weights)
    return F.conv2d(photo[None, None], weights[None, None])[0, 0].numpy()


def arrays(*shape, size=7):
    return np.random.rand(*shape).astype(np.float32), np.random.rand(size, size).astype(np.float32)


@pytest.mark.parametrize("task_id", ["08.2", "08.4"])
def test_the_cuda_kernels_compute_the_convolution_of_pytorch(task_id):
    photo, weights = arrays(12, 45)
    output = LESSON["simulated"](solution(task_id), photo, weights, (2, 2), (32, 4))
    np.testing.assert_allclose(output, conv2d(photo, weights), rtol=1e-5)


def test_the_triton_kernel_computes_the_convolution_of_pytorch():
    photo, weights = arrays(9, 30, size=3)
    output = LESSON["run_triton"](solution("08.6"), photo, weights, 16)
    np.testing.assert_allclose(output, conv2d(photo, weights), rtol=1e-5)


def test_the_fused_kernel_is_relu_of_the_sum():
    x, bias = np.random.randn(4, 19).astype(np.float32), np.random.randn(4).astype(np.float32)
    output = LESSON["run_bias_relu"](solution("08.10"), x, bias, 32)
    np.testing.assert_array_equal(output, np.maximum(x + bias[:, None], 0))


def test_the_kernels_also_run_in_the_simulators_of_numba_and_triton(tmp_path):
    pytest.importorskip("numba")
    pytest.importorskip("triton")
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", REAL_RUNS, str(tmp_path)]
    subprocess.run(command, env=env, check=True, timeout=200)
    saved = {path.stem: np.load(path) for path in tmp_path.glob("*.npy")}
    expected = conv2d(saved["photo"], saved["weights"])
    for task_id in ("08.2", "08.4", "08.6"):
        np.testing.assert_allclose(saved[task_id], expected, rtol=1e-5)


@pytest.mark.parametrize("width, height", [(64, 8), (65, 9), (1, 1)])
def test_the_blocks_cover_the_image_and_none_is_outside(width, height):
    across, down = solution("08.1")(width, height, (32, 4))
    assert 32 * (across - 1) < width <= 32 * across
    assert 4 * (down - 1) < height <= 4 * down


def test_the_simulator_counts_what_the_formulas_predict():
    photo, weights = arrays(10, 39)
    output = np.zeros((4, 33), np.float32)
    naive, tiled = solution("08.9")(4, 33, 7, (32, 4))
    for task_id, expected in (("08.2", naive), ("08.4", tiled)):
        traffic = simulate(solution(task_id), (2, 1), (32, 4), photo, weights, output)
        assert 4 * traffic["photo"].accesses == expected
        assert traffic["output"].accesses == output.size


def test_the_simulator_counts_the_sectors_of_a_warp():
    def copy(source, target):
        x = cuda.grid(1)
        target[x] = source[3 * x]

    source, target = np.zeros(96, np.float32), np.zeros(32, np.float32)
    traffic = simulate(copy, (1, 1), (32, 1), source, target)
    addresses = [12 * thread for thread in range(32)]
    assert traffic["source"].sectors == solution("08.3")(addresses) == 12
    assert traffic["target"].sectors == 4


def test_the_simulator_finds_a_write_that_another_thread_still_reads():
    def shift(numbers):
        shared = cuda.shared.array(8, np.float32)
        x = cuda.threadIdx.x
        shared[x] = numbers[x]
        cuda.syncthreads()
        shared[x] = shared[(x + 1) % 8]

    with pytest.raises(Exception, match="without a barrier") as caught:
        simulate(shift, (1, 1), (8, 1), np.zeros(8, np.float32))
    assert caught.type.__name__ == "RaceError"


def test_occupancy_is_that_of_the_calculator():
    """A kernel of 32 threads, 8 registers and 12 KiB: shared memory limits it to 19 blocks."""
    sm = LESSON["H100"]
    assert solution("08.8")(32, 8, 12 * 1024, sm) == (19, 19 * 32 / 2048)
    assert solution("08.8")(1024, 32, 0, sm) == (2, 1.0)


def test_the_autotuner_remembers_each_problem():
    calls = []
    cache = {}
    for problem in ("small", "large", "small"):
        solution("08.7")(cache, problem, [1, 2], lambda number: calls.append(number) or number)
    assert calls == [1, 2, 1, 2] and cache == {"small": 1, "large": 1}


@pytest.mark.parametrize("file, local", [("convolve_strided.cl", None), ("convolve_tiled.cl", 1)])
def test_the_opencl_programs_compute_the_convolution_of_pytorch(file, local):
    pytest.importorskip("pyopencl")
    photo, weights = arrays(13, 45)
    launch, fetch = LESSON["build_opencl"]((PROGRAMS / file).read_text(), photo, weights)
    launch(*(((64, 8), (32, 4)) if local else ((7, 39),)))
    np.testing.assert_allclose(fetch(), conv2d(photo, weights), rtol=1e-5)


def test_each_published_peak_has_a_source():
    devices = runpy.run_path(str(PROGRAMS / "published_devices.py"))["DEVICES"]
    assert {kind for kind, *_ in devices.values()} == {"CPU", "GPU", "TPU", "FPGA", "ASIC"}
    for _, peak, bandwidth, source in devices.values():
        assert peak > bandwidth > 1e11 and len(source) > 30
