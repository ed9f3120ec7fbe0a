"""The one timer: functions run interleaved; figures are medians with quartiles."""

from collections.abc import Callable, Mapping
from timeit import default_timer
from typing import Any

import numpy as np
from torch.utils.benchmark import timer

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


def describe_failure(error: Exception) -> dict[str, str]:
    """{"failed": message}, on one line and at most 300 characters long."""
    return {"failed": f"{type(error).__name__}: " + " ".join(str(error).split())[:300]}
