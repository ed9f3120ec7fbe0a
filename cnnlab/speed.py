"""One function per technique; `prepare` applies them in one visible order; `Clock` times the steps honestly."""

import os
import random
import sys
import time
from collections import deque
from contextlib import nullcontext

import numpy as np
import torch

from . import machine, replicas


def prepare(model, recipe, device, world=1, clock=None):
    """The recipe's model, ready to train: every technique in the order in which they must be applied."""
    if world > 1:
        replicas.straggling(model, recipe)
    if recipe.pooling == "before-relu":
        model = pool_first(model)
    model = model.to(device)
    if recipe.memory_format == "channels_last":
        model = channels_last(model)
    if device.type == "cuda":
        tf32(recipe.precision == "tf32")
    if world > 1 and (link := replicas.network(recipe)):
        replicas.slow_down(link)
    if recipe.strategy == "ddp" or recipe.strategy is None and world > 1:
        model = replicas.replicated(model, recipe, device, clock)
    if recipe.compiler == "inductor-except-pool":
        model = opaque_pooling(model)
    if recipe.compiler != "eager":          # last: it then sees, and compiles, all of the above
        model = compiled(model)
    return model


def set_threads(recipe, world=1):
    """The recipe's threads for this rank; else all cores for one rank, while several keep what `rank` has shared out."""
    if recipe.threads or world == 1:
        torch.set_num_threads(recipe.threads or machine.cores())


def pin(local_rank, local_world):
    """Keep this rank on its share of this machine's cores. Returns them; None where the system cannot pin.

    Ranks that outnumber the cores share them: each is pinned to one.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // local_world
    mine = cores[local_rank * share:(local_rank + 1) * share] if share else [cores[local_rank % len(cores)]]
    os.sched_setaffinity(0, mine)
    return mine


def set_seed(seed, rank=0):
    """Same seed, same run. Ranks differ, else all would draw the same dropout masks and augmentations."""
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def pool_first(model):
    """Max-pooling before ReLU instead of after it: ReLU keeps the order of numbers, so they are the same, and so are all gradients.

    With windows of 2x2, ReLU then has a quarter of the work. `torch.compile` does not find this by itself.
    """
    for block in model.modules():
        if isinstance(block, torch.nn.Sequential):
            for at in range(len(block) - 1):
                if isinstance(block[at], torch.nn.ReLU) and isinstance(block[at + 1], torch.nn.MaxPool2d):
                    block[at], block[at + 1] = block[at + 1], block[at]
    return model


def channels_last(model):
    """Weights stored with their channels innermost, as convolutions read them. Same numbers, same shapes.

    A `Flatten` would send its gradient back with channels outermost, and each layer before it would copy it: it is laid out anew at once.
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.Flatten):
            layer.register_forward_pre_hook(lambda layer, inputs: _ChannelsLastGradient.apply(*inputs))
    return model.to(memory_format=torch.channels_last)


class _ChannelsLastGradient(torch.autograd.Function):
    """Changes nothing on the way forward; on the way back, only the layout."""

    @staticmethod
    def forward(ctx, images):
        return images.view_as(images)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous(memory_format=torch.channels_last)


def autocast(recipe):
    """Where the recipe says bf16 or fp16: a context in which convolutions and matrix products run at that precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision)
    return torch.autocast(recipe.device, dtype) if dtype else nullcontext()


def grad_scaler(recipe):
    """Scales the loss up before, and gradients down after, backward: in fp16 small gradients would become 0."""
    return torch.amp.GradScaler(recipe.device, enabled=recipe.precision == "fp16")


def tf32(on):
    """fp32 matrix products and convolutions on the GPU's TF32 units: 10 bits of mantissa instead of 23. (Torch's default: half on.)"""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def compiled(model):
    """The model as fused, generated code. The first call compiles: seconds to a minute, timed apart."""
    return torch.compile(model)


def opaque_pooling(model):
    """Max-pooling as an operation into which the compiler cannot look: on CPUs PyTorch's own code is much faster than what it would make."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.MaxPool2d):
            layer.forward = lambda images, size=layer.kernel_size: _max_pool(images, size)[0]
    return model


def _pooled(images: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima of size x size windows that do not overlap, and where they were."""
    return torch.ops.aten.max_pool2d_with_indices(images, [size, size])


def _unpooled(gradient: torch.Tensor, images: torch.Tensor, size: int, where: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.max_pool2d_with_indices_backward(gradient, images, [size, size], [size, size], [0, 0], [1, 1], False, where)


def _remember(ctx, inputs, output):
    images, ctx.size = inputs
    ctx.save_for_backward(images, output[1])


def _backward(ctx, gradient, _):
    images, where = ctx.saved_tensors
    return _max_pool_backward(gradient, images, ctx.size, where), None


_max_pool = torch.library.custom_op("cnnlab::max_pool", _pooled, mutates_args=())
_max_pool_backward = torch.library.custom_op("cnnlab::max_pool_backward", _unpooled, mutates_args=())
_max_pool.register_autograd(_backward, setup_context=_remember)
_max_pool.register_fake(_pooled)                        # shapes and layouts, for the compiler: PyTorch knows those of its own code
_max_pool_backward.register_fake(_unpooled)


def fence(device):
    """Wait until the device has done all it was given: a GPU's work runs on after the call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Times a training loop, in seconds. It stands still while a consumer of the loop's events is busy.

    `seconds` counts training only, up to the last pause; of it, `waiting` was spent on the loader, and `exposed` on other
    ranks with nothing else to do. Phases and communication are told apart on the CPU only: a GPU runs them on its own.
    """

    def __init__(self, device):
        self.device, self.spans, self.exchanges = device, [], []
        self.recent = deque(maxlen=4)        # (spans, exchanges) of the last steps
        self.seconds = self.waiting = self.exposed = self.resumed = self.marked = 0.0
        self.wall = time.time() - time.perf_counter()

    def resume(self):
        self.resumed = time.perf_counter()

    def pause(self):
        fence(self.device)                   # first: what was asked of a GPU may still be running
        self.seconds += time.perf_counter() - self.resumed

    def running(self):
        """Seconds since the last `resume`, not fenced."""
        return time.perf_counter() - self.resumed

    def waited(self, loader):
        """The loader's batches; the time until each one is there counts as waiting. Each begins a step."""
        batches = iter(loader)
        while True:
            asked = self.marked = time.perf_counter()
            batch = next(batches, None)
            self.waiting += time.perf_counter() - asked
            if batch is None:
                return
            self.spans, self.exchanges = [], []
            self.recent.append((self.spans, self.exchanges))
            self.mark("waiting")
            yield batch

    def mark(self, phase):
        """All that was done since the last mark was `phase`: waiting, forward, backward, or update, which ends the step.

        Exchanges overlap with it until the last one begins; from then on it was all "exposed" communication.
        """
        before, self.marked = self.marked, time.perf_counter()
        here = [(begin, end) for begin, end in self.exchanges if begin >= before]
        if here:
            begin, end = max(begin for begin, _ in here), min(self.marked, max(end for _, end in here))
            self._span(phase, before, begin)
            self._span("exposed", begin, end)
            self.exposed += end - begin
            before = end
        self._span(phase, before, self.marked)

    def _span(self, phase, begin, end):
        if self.device.type == "cpu":
            self.spans.append([phase, self.wall + begin, self.wall + end])

    def communicated(self, began):
        """Something that began then (`time.perf_counter`) has now come from the other ranks. Any thread may call."""
        if self.device.type == "cpu":
            self.exchanges.append((began, time.perf_counter()))

    def communicating(self, function, *args):
        """Call the function; the time that it takes is communication."""
        began = time.perf_counter()
        function(*args)
        self.communicated(began)

    def timeline(self):
        """[phase, begin, end] of the last steps, on the clock on the wall, so that the ranks' rows fit together.

        The phase "communication" may lie beside others.
        """
        shared = [["communication", self.wall + begin, self.wall + end] for _, exchanges in self.recent for begin, end in exchanges]
        return [span for spans, _ in self.recent for span in spans] + shared


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
