"""One function per technique; `prepare` applies them in one visible order; `Clock` times the steps honestly."""

import os
import random
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from . import machine


def prepare(model, recipe, device, world=1):
    """The recipe's model, ready to train: every technique in the order in which they must be applied."""
    model = model.to(device)
    if recipe.memory_format == "channels_last":
        model = channels_last(model)
    if recipe.precision == "tf32":
        tf32()
    if world > 1:
        model = replicated(model, device)
    if recipe.compiler == "inductor":       # last: it then sees, and compiles, all of the above
        model = compiled(model)
    return model


def set_threads(recipe, world=1):
    """The recipe's threads for this rank, or its share of the cores: more threads than cores slow each other down."""
    torch.set_num_threads(recipe.threads or max(1, machine.cores() // world))


def set_seed(seed, rank=0):
    """Same seed, same run. Ranks differ, else all would draw the same dropout masks and augmentations."""
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def channels_last(model):
    """Weights stored with their channels innermost, as convolutions read them. Same numbers, same shapes."""
    return model.to(memory_format=torch.channels_last)


def autocast(recipe):
    """Where the recipe says bf16 or fp16: a context in which convolutions and matrix products run at that precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision)
    return torch.autocast(recipe.device, dtype) if dtype else nullcontext()


def grad_scaler(recipe):
    """Scales the loss up before, and gradients down after, backward: in fp16 small gradients would become 0."""
    return torch.amp.GradScaler(recipe.device, enabled=recipe.precision == "fp16")


def tf32():
    """fp32 matrix products and convolutions on the GPU's TF32 units: 10 bits of mantissa instead of 23."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def compiled(model):
    """The model as fused, generated code. The first call compiles: seconds to a minute, timed apart."""
    return torch.compile(model)


def replicated(model, device):
    """One copy in each rank; gradients are averaged over all ranks during backward."""
    return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def fence(device):
    """Wait until the device has done all it was given: a GPU's work runs on after the call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Times a training loop, in seconds. It stands still while a consumer of the loop's events is busy.

    `seconds` counts training only, up to the last pause; `waiting` is the part of it spent on the loader.
    """

    def __init__(self, device):
        self.device = device
        self.seconds = self.waiting = self.resumed = 0.0

    def resume(self):
        self.resumed = time.perf_counter()

    def pause(self):
        fence(self.device)                   # first: what was asked of a GPU may still be running
        self.seconds += time.perf_counter() - self.resumed

    def running(self):
        """Seconds since the last `resume`, not fenced."""
        return time.perf_counter() - self.resumed

    def waited(self, loader):
        """The loader's batches; the time until each one is there counts as waiting."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waiting += time.perf_counter() - asked
            if batch is None:
                return
            yield batch


def peak_memory_mib(device):
    """Most memory in use at once so far: allocated on a GPU, else resident in this process, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if os.name == "nt":
        import psutil
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
