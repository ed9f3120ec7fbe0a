"""How lesson 05 measures: several ways in turn, and messages between two ranks."""

import time

import numpy as np
import torch
import torch.distributed as dist

from cnnlab import Measurement, Recipe, Speedup, speedup


def measure_in_turn(ways, repeats):
    """Call each way once to warm up, then in the order A B B A. `ways`: {name: function}.

    Returns {name: seconds of each repeat}.
    """
    seconds = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name in list(ways) if repeat % 2 else reversed(ways):
            start = time.perf_counter()
            ways[name]()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def speedup_of(baseline: str, before, after) -> Speedup:
    """The `Speedup` over `baseline`, from the seconds of both, which were measured in pairs."""
    both = [
        Measurement(name=baseline, recipe=Recipe(), images_per_s=tuple(1 / np.array(seconds)))
        for seconds in (before, after)
    ]
    return speedup(*both)


def ping_pong(sizes, repeats=25):
    """In two ranks: median seconds of one message of so many bytes, for each size."""
    other = 1 - dist.get_rank()
    calls = [dist.send, dist.recv] if dist.get_rank() == 0 else [dist.recv, dist.send]
    medians = []
    for size in sizes:
        tensor, seconds = torch.zeros(size // 4), []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            for call in calls:
                call(tensor, other)
            seconds.append((time.perf_counter() - start) / 2)  # There and back are two messages.
        medians.append(float(np.median(seconds)))
    return medians
