"""The timer, and the measured peaks of this machine: FLOP/s by precision, copy bandwidth."""

from collections.abc import Callable
from functools import partial
from timeit import default_timer
from typing import Any

import numpy as np
import torch
from torch import bfloat16, float16, float32
from torch.nn.functional import conv2d
from torch.utils.benchmark import set_torch_threads, timer

from cnnlab.machine import cores, describe

DTYPES = {"fp32": float32, "tf32": float32, "bf16": bfloat16, "fp16": float16}
Rate = tuple[float, float, float]  # per second: (median, first quartile, third quartile)


def time_call(function: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
    """Mean seconds of one of `calls` calls: (until it returned, until the device finished)."""
    start = timer()  # synchronizes first: earlier work may still be running
    for _ in range(calls):
        function()
    returned = default_timer()
    finished = timer()  # synchronizes first: a GPU works on after the call has returned
    return (returned - start) / calls, (finished - start) / calls


def peak_flops(
    precision: str = "fp32", device: str = "cpu", threads: int | None = None, size: int = 2048
) -> Rate:
    """FLOP/s of the fastest large operation: (median, first quartile, third quartile).

    The operation is a (size, size) matrix product of 2 size^3 FLOP or, on a CPU, a 3x3 convolution
    of 128 channels and about as many FLOP: they come from different libraries.
    """
    dtype = DTYPES[precision]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    operations = [(2 * size**3, partial(torch.mm, a, b))]
    if device == "cpu":
        images = max(1, size**3 // (32 * 32 * 128 * 128 * 9))
        x = torch.randn(images, 128, 32, 32).to(dtype, memory_format=torch.channels_last)
        w = torch.randn(128, 128, 3, 3).to(dtype, memory_format=torch.channels_last)
        flop = 2 * images * 32 * 32 * 128 * 128 * 9
        operations.append((flop, partial(conv2d, x, w, padding=1)))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        with torch.no_grad():
            return max(_rate(flop, function, device, threads) for flop, function in operations)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def copy_bandwidth(device: str = "cpu", threads: int | None = None, mib: int = 256) -> Rate:
    """Bytes/s of a copy, reads and writes counted: (median, first quartile, third quartile)."""
    source = torch.ones(mib * 2**18, device=device)
    target = torch.empty_like(source)
    return _rate(2 * source.nbytes, partial(target.copy_, source), device, threads)


def peaks(device: str = "cpu") -> dict[str, float]:
    """The measured roofline: {precision: FLOP/s} and 'copy': bytes/s, all medians."""
    on_cpu = device == "cpu"
    names = ("fp32", "bf16", "fp16") if on_cpu else describe().accelerators[0].precisions
    size = 1024 if on_cpu else 8192
    measured = {name: peak_flops(name, device, size=size)[0] for name in names}
    return {**measured, "copy": copy_bandwidth(device)[0]}


def _rate(work: float, function: Callable[[], Any], device: str, threads: int | None) -> Rate:
    """`work` per second of a call."""
    calls = 1 if device == "cpu" else 10  # of a GPU's short calls, to amortize synchronization
    with set_torch_threads(threads or cores()):
        time_call(function, calls)  # allocates, and chooses algorithms
        times: list[float] = []
        start = default_timer()
        while len(times) < 2 or default_timer() - start < 0.2:
            times.append(time_call(function, calls)[1])
    q1, median, q3 = np.percentile(times, (25, 50, 75)).tolist()
    return work / median, work / q3, work / q1
