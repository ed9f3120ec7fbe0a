"""Profiling one rank: seconds by category, FLOP and bytes of a step."""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cnnlab.data import datasets
from cnnlab.events import Finished, Progress
from cnnlab.measure import peaks
from cnnlab.model import build
from cnnlab.recipe import Recipe
from cnnlab.training import techniques
from cnnlab.training.loop import make_optimizer, train

# In the names of operations and of GPU kernels:
ARITHMETIC = re.compile("conv|mm|linear|gemm|cutlass|xmma|nvjet|winograd|wgrad|dgrad|fprop")
# Generated kernels, whose names also list what was fused into them:
FUSED_PREFIXES = ("triton_poi", "triton_per", "triton_red")
RANGES = re.compile(  # at the start of the names of events that span other operations
    r"enumerate\(DataLoader\)|Optimizer\.|ProfilerStep|autograd::|Torch|CompiledFunction"
)


def profile_steps(rank: int, world: int, recipe: Recipe) -> Iterator[tuple[dict, dict]]:
    """Train under the profiler, in this process: (seconds per step by category, other figures).

    The categories are `arithmetic`, `memory` and `launch`, the time in which no operation ran; on a
    GPU they are those of its kernels. The figures are `operations`, `flops` and `moved` (bytes) per
    step, and the measured `peak_flops` and `peak_copy` with the recipe's threads.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print into the notebook
    gpu = recipe.device == "cuda"
    events = train(recipe)
    for event in events:
        warmed_up = isinstance(event, Progress) and event.step == recipe.warmup_steps
        if warmed_up or not recipe.warmup_steps:
            break
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        *_, finished = events
    assert isinstance(finished, Finished)
    steps = finished.steps - recipe.warmup_steps
    seconds, operations = time_by_category(profiler.events(), gpu, steps)
    seconds["launch"] = max(0.0, finished.compute_s - sum(seconds.values()))
    size, mib = (8192, 256) if gpu else (1024, 64)
    peak, _, _ = peaks.peak_flops(recipe.precision, recipe.device, recipe.threads, size)
    copied, _, _ = peaks.copy_bandwidth(recipe.device, recipe.threads, mib)
    figures = {"operations": operations, "peak_flops": peak, "peak_copy": copied}
    yield seconds, figures | count_flops_and_bytes(recipe)


def time_by_category(events: Iterable[Any], gpu: bool, steps: int) -> tuple[dict[str, float], int]:
    """({"arithmetic": seconds, "memory": seconds}, number of operations) per step.

    `events` of the profiler cover `steps` steps. With `gpu`, only GPU kernels count.
    """
    seconds, operations = {"arithmetic": 0.0, "memory": 0.0}, 0
    for event in events:
        if gpu and event.device_type != DeviceType.CUDA:
            continue  # a call; its kernels are events of their own
        own_us = event.self_device_time_total if gpu else event.self_cpu_time_total
        if own_us and not RANGES.match(event.name) and not in_loader(event):
            category = "arithmetic" if is_arithmetic(event.name) else "memory"
            seconds[category] += own_us / 1e6 / steps
            operations += 1
    return seconds, operations // steps


def is_arithmetic(name: str) -> bool:
    """Whether the operation or GPU kernel of that name is a convolution or a matrix product."""
    return bool(ARITHMETIC.search(name.lower())) and not name.startswith(FUSED_PREFIXES)


def in_loader(event: Any) -> bool:
    """Whether the operation was part of fetching a batch."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event.name.startswith("enumerate(DataLoader)")


class BytesMoved(TorchDispatchMode):
    """Counts the bytes that operations other than arithmetic read and write."""

    bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view and not is_arithmetic(operation.name()):
            tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def count_flops_and_bytes(recipe: Recipe) -> dict[str, int]:
    """`flops` of arithmetic and bytes `moved` by all other operations in one eager step."""
    channels, size, classes = shape = datasets.load(recipe).shape
    network = build(recipe, shape).to(recipe.device)
    images = torch.randn(recipe.batch_size, channels, size, size, device=recipe.device)
    labels = torch.randint(classes, (recipe.batch_size,), device=recipe.device)
    optimizer, _ = make_optimizer(recipe, network, recipe.steps or 1)
    with FlopCounterMode(display=False) as flops, BytesMoved() as moved:
        with techniques.autocast(recipe):
            loss = cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    return {"flops": flops.get_total_flops(), "moved": moved.bytes}
