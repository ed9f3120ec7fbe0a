"""Instruments for measuring a device: functions timed in turn, CUDA graphs, a training step to hold on to, the memory that it takes."""

import gc
import json
import math
import os
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from . import data, speed
from .model import build
from .train import make_optimizer

WARM = 3                # steps before a CUDA graph is recorded, and before a GPU is timed: they allocate, and choose algorithms


@contextmanager
def settled():
    """As a decorator: fp32 means fp32, cuDNN tries its algorithms out; afterwards all is as before, and the GPU's memory free again."""
    torch.compiler.reset()                       # else a shape that differs from an earlier one is compiled for any shape, and slower
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    speed.tf32(False)
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def graphed(step):
    """step() as one CUDA graph, recorded at the first call: one launch for all its kernels. What it returns lies at the same place each time.

    After "Whole-network capture" in the CUDA notes of PyTorch's documentation.
    """
    graph, recorded = torch.cuda.CUDAGraph(), []

    def replay():
        if not recorded:
            side = torch.cuda.Stream()           # warm-up must not run on the default stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            before = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph):
                    recorded.append(step())
            finally:
                torch.cuda.set_stream(before)    # a recording that fails leaves its own
        graph.replay()
        return recorded[0]
    return replay


def chain(size, products, device, dtype=torch.float32):
    """A function that multiplies two (size, size) matrices so many times."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(a)

    def work():
        for _ in range(products):
            torch.mm(a, b, out=result)
    return work


def trainer(recipe, dtype=torch.float32, fused=False):
    """The recipe's network in training, on the same synthetic images again and again, which are on the device.

    `step()` does forward, backward and update, and returns the loss without waiting for it. `fused`: SGD as one kernel.
    """
    device, kind = torch.device(recipe.device), partial(torch.optim.SGD, lr=recipe.learning_rate, momentum=0.9, fused=True)
    images, labels = data.synthetic(recipe.batch_size, recipe.image_size, recipe.classes, recipe.seed).train.tensors
    layout = torch.channels_last if recipe.memory_format == "channels_last" else torch.contiguous_format
    images, labels = images.to(device, dtype, memory_format=layout), labels.to(device)
    network = build(recipe, (3, recipe.image_size, recipe.classes)).to(dtype)
    model = speed.prepare(network, recipe, device)
    optimizer = kind(model.parameters()) if fused else make_optimizer(recipe, model, steps=1)[0]
    scaler = torch.amp.GradScaler(recipe.device, init_scale=1024.0, enabled=recipe.precision == "fp16")     # torch's 65536 may skip the first steps

    def loss():
        with speed.autocast(recipe):
            return F.cross_entropy(model(images), labels)

    def step():
        lost = loss()
        scaler.scale(lost).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        return lost.detach()
    return SimpleNamespace(network=network, model=model, optimizer=optimizer, images=images, loss=loss, step=step)


def trained(recipe, dtype=torch.float32, steps=6):
    """{"logits", "gradients", "losses"}: of the first forward and backward pass, and of a few steps."""
    work = trainer(recipe, dtype)
    with speed.autocast(recipe):
        logits = work.model(work.images).detach()
    gradients = torch.autograd.grad(1024 * work.loss(), list(work.network.parameters()))     # 1024: small ones are 0 in fp16 otherwise
    return {"logits": logits, "gradients": torch.cat([gradient.flatten() for gradient in gradients]),
            "losses": torch.stack([work.step() for _ in range(steps)])}


def kept_for_backward(function, but=()):
    """Bytes that autograd keeps from function() on for backward: each piece of memory once, those of the tensors `but` left out."""
    pieces = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()                      # held until all is counted: no address comes twice
    for tensor in but:
        pieces.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(pieces.values())


def allocated(function, device):
    """(bytes that what function() returned keeps, most bytes at once meanwhile), above those before; by torch's allocator."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, result = torch.cuda.memory_allocated(), function()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")      # else the profiler writes into the notebook
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["args"]["Ev Idx"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    levels = np.cumsum([0, *(change for _, change in changes)])
    del result
    return int(levels[-1]), int(levels.max())


def in_turn(ways, device, repeats, calls=1, seconds=30.0):
    """Time each of {way: function} in turn, A B A B ...: {way: seconds of a call}, as median, q1, q3, n; until it returned (returned_s).

    The first call, which may compile (first_s), and some more come before. After `seconds` no third round or later begins. What
    raises an error in its first calls becomes {"failed": ...}.
    """
    found, times = {}, {}
    for way, function in ways.items():
        try:
            warm = [timed(function, device) for _ in range(1 + WARM * (device == "cuda"))]
            found[way], times[way] = {"first_s": warm[0][1]}, []
        except Exception as error:
            found[way] = failure(error)
    began = time.perf_counter()
    for repeat in range(repeats):
        if repeat < 2 or time.perf_counter() - began < seconds:
            for way, each in times.items():
                each.append(timed(ways[way], device, calls))
    for way, each in times.items():
        returned, done = np.transpose(each)
        q1, median, q3 = np.percentile(done, (25, 50, 75)).tolist()
        found[way] |= {"median": median, "q1": q1, "q3": q3, "n": len(done), "returned_s": float(np.median(returned))}
    return found


def timed(function, device, calls=1):
    """Seconds of one of `calls` calls: (until it returned, until the device had done it)."""
    device = torch.device(device)
    speed.fence(device)                          # what was asked before may still be running
    began = time.perf_counter()
    for _ in range(calls):
        function()
    returned = time.perf_counter() - began
    speed.fence(device)
    return returned / calls, (time.perf_counter() - began) / calls


def relative(got, exact):
    """The distance of two tensors, as a share of the second's length."""
    got, exact = got.detach().double().cpu(), exact.detach().double().cpu()
    return float((got - exact).norm() / exact.norm())


def finite(number):
    """The number; None where it is none, for JSON has no word for it."""
    return number if math.isfinite(number) else None


def failure(error):
    return {"failed": f"{type(error).__name__}: " + " ".join(str(error).split())[:300]}
