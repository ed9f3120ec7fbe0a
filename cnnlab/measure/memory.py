"""The memory that a training step takes: what autograd saves, and what the allocator reports."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.autograd.profiler import profile


def saved_tensor_bytes(function: Callable[[], Any], exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd saves for the backward pass of `function()`.

    Each storage counts once; those of the tensors in `exclude` do not count.
    """
    storages: dict[int, int] = {}

    def record_storage(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
        result = function()
    for tensor in exclude:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result  # kept until here, so that no address was used twice
    return sum(storages.values())


def allocated_bytes(function: Callable[[], Any], device: str) -> tuple[int, int]:
    """(bytes that the result of `function()` keeps allocated, peak during the call).

    Both count from the memory allocated before. From torch's CUDA allocator, or the CPU profiler.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return torch.cuda.memory_allocated() - before, peak
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print into the notebook
    with profile(profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    levels = np.cumsum([0, *(event.nbytes() for event in events)])
    del result  # only now: the profile must not contain its release
    return int(levels[-1]), int(levels.max())
