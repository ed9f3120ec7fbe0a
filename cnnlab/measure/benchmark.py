"""Instruments for measuring a device: functions timed in turn, CUDA graphs, a training step to hold on to, the memory that it takes."""

import gc
import time
from contextlib import contextmanager

import numpy as np
import torch

from cnnlab.training import clock, techniques

WARMUP_CALLS = 3  # steps before a CUDA graph is recorded, and before a GPU is timed: they allocate, and choose algorithms


@contextmanager
def benchmark_mode():
    """As a decorator: fp32 means fp32, cuDNN tries its algorithms out; afterwards all is as before, and the GPU's memory free again."""
    torch.compiler.reset()  # else a shape that differs from an earlier one is compiled for any shape, and slower
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    techniques.set_tf32(False)
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def cuda_graphed(step):
    """step() as one CUDA graph, recorded at the first call: one launch for all its kernels. What it returns lies at the same place each time.

    After "Whole-network capture" in the CUDA notes of PyTorch's documentation.
    """
    graph, recorded = torch.cuda.CUDAGraph(), []

    def replay():
        if not recorded:
            side = torch.cuda.Stream()  # warm-up must not run on the default stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP_CALLS):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            before = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph):
                    recorded.append(step())
            finally:
                torch.cuda.set_stream(before)  # a recording that fails leaves its own
        graph.replay()
        return recorded[0]

    return replay


def benchmark_interleaved(ways, device, repeats, calls=1, seconds=30.0):
    """Time each of {way: function} in turn, A B A B ...: {way: seconds of a call}, as median, q1, q3, n; until it returned (returned_s).

    The first call, which may compile (first_s), and some more come before. After `seconds` no third round or later begins. What
    raises an error in its first calls becomes {"failed": ...}.
    """
    found, times = {}, {}
    for way, function in ways.items():
        try:
            warm = [
                time_call(function, device) for _ in range(1 + WARMUP_CALLS * (device == "cuda"))
            ]
            found[way], times[way] = {"first_s": warm[0][1]}, []
        except Exception as error:
            found[way] = describe_failure(error)
    began = time.perf_counter()
    for repeat in range(repeats):
        if repeat < 2 or time.perf_counter() - began < seconds:
            for way, each in times.items():
                each.append(time_call(ways[way], device, calls))
    for way, each in times.items():
        returned, done = np.transpose(each)
        q1, median, q3 = np.percentile(done, (25, 50, 75)).tolist()
        found[way] |= {
            "median": median,
            "q1": q1,
            "q3": q3,
            "n": len(done),
            "returned_s": float(np.median(returned)),
        }
    return found


def time_call(function, device, calls=1):
    """Seconds of one of `calls` calls: (until it returned, until the device had done it)."""
    device = torch.device(device)
    clock.synchronize(device)  # what was asked before may still be running
    began = time.perf_counter()
    for _ in range(calls):
        function()
    returned = time.perf_counter() - began
    clock.synchronize(device)
    return returned / calls, (time.perf_counter() - began) / calls


def relative_error(got, exact):
    """The distance of two tensors, as a share of the second's length."""
    got, exact = got.detach().double().cpu(), exact.detach().double().cpu()
    return float((got - exact).norm() / exact.norm())


def describe_failure(error):
    return {"failed": f"{type(error).__name__}: " + " ".join(str(error).split())[:300]}
