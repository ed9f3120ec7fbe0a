"""The one timer: functions run interleaved; figures are medians with quartiles."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from timeit import default_timer
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import timer

from cnnlab.training import techniques

WARMUP_CALLS = 3  # on a GPU, before timing and graph capture: they allocate and choose algorithms


def time_call(function: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
    """Mean seconds of one of `calls` calls: (until it returned, until the device finished)."""
    start = timer()  # synchronizes first: earlier work may still be running
    for _ in range(calls):
        function()
    returned = default_timer()
    finished = timer()  # synchronizes first: a GPU works on after the call has returned
    return (returned - start) / calls, (finished - start) / calls


def benchmark_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    device: str,
    repeats: int,
    calls: int = 1,
    seconds: float = 30.0,
) -> dict[str, dict[str, Any]]:
    """Time functions in the order A B A B ..., each repeat as the mean of `calls` calls.

    Returns {name: figures}, in seconds per call: `median`, `q1`, `q3` and `n` of the repeats,
    `returned_s` (the median until the call returned) and `first_s` (the first call, which may
    compile). No third or later repeat starts after `seconds`. A function that raises during its
    warm-up gets {"failed": message}; the others are still timed.
    """
    figures: dict[str, dict[str, Any]] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    for name, function in functions.items():
        try:
            figures[name] = {"first_s": time_call(function)[1]}
            if device == "cuda":
                time_call(function, WARMUP_CALLS)
            times[name] = []
        except Exception as error:
            figures[name] = describe_failure(error)
    start = default_timer()
    for repeat in range(repeats):
        if repeat >= 2 and default_timer() - start >= seconds:
            break
        for name in times:
            times[name].append(time_call(functions[name], calls))
    for name in times:
        returned, finished = np.transpose(times[name])
        q1, median, q3 = np.percentile(finished, (25, 50, 75)).tolist()
        figures[name] |= {"median": median, "q1": q1, "q3": q3, "n": len(finished)}
        figures[name]["returned_s"] = float(np.median(returned))
    return figures


@contextmanager
def benchmark_mode() -> Iterator[None]:
    """Turn TF32 off and cuDNN's autotuning on; afterwards restore both and free GPU memory."""
    torch.compiler.reset()  # else shapes that differ from earlier ones compile as dynamic: slower
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


def cuda_graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    """`step` as a CUDA graph, captured at the first call: one launch for all its kernels.

    Each call overwrites the result of the one before. See "Whole-network capture" in the CUDA
    semantics notes of PyTorch's documentation.
    """
    graph = torch.cuda.CUDAGraph()
    captured: list[Any] = []

    def replay() -> Any:
        if not captured:
            captured.append(_capture(graph, step))
        graph.replay()
        return captured[0]

    return replay


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of `exact`."""
    result, exact = result.detach().double().cpu(), exact.detach().double().cpu()
    return float((result - exact).norm() / exact.norm())


def describe_failure(error: Exception) -> dict[str, str]:
    """{"failed": message}, on one line and at most 300 characters long."""
    return {"failed": f"{type(error).__name__}: " + " ".join(str(error).split())[:300]}


def _capture(graph: torch.cuda.CUDAGraph, step: Callable[[], Any]) -> Any:
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):  # warm-up must not run on the default stream
        for _ in range(WARMUP_CALLS):
            step()
    main.wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            return step()
    finally:
        torch.cuda.set_stream(main)  # a capture that fails leaves its own stream current
