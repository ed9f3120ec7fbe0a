"""Instruments for measuring a device: functions timed in turn, CUDA graphs, a training step to hold on to, the memory that it takes."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch


def saved_tensor_bytes(function, but=()):
    """Bytes that autograd keeps from function() on for backward: each piece of memory once, those of the tensors `but` left out."""
    pieces = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()  # held until all is counted: no address comes twice
    for tensor in but:
        pieces.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(pieces.values())


def allocated_bytes(function, device):
    """(bytes that what function() returned keeps, most bytes at once meanwhile), above those before; by torch's allocator."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, result = torch.cuda.memory_allocated(), function()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes into the notebook
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    levels = np.cumsum([0, *(change for _, change in changes)])
    del result
    return int(levels[-1]), int(levels.max())
