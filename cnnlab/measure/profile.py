"""Why a run is as fast as it is: which resource bounds it, by its own figures and the profiler, and what to try next."""

import os

from cnnlab.events import Progress
from cnnlab.measure import peaks

ARITHMETIC = (
    "conv",
    "mm",
    "linear",
    "gemm",
    "cutlass",
    "xmma",
    "nvjet",
    "winograd",
    "wgrad",
    "dgrad",
    "fprop",
)  # in names of operations and GPU kernels


FUSED_PREFIXES = (
    "triton_poi",
    "triton_per",
    "triton_red",
)  # generated kernels of other operations, though their names may tell what stood beside them


RANGE_PREFIXES = (
    "enumerate(DataLoader)",
    "Optimizer.",
    "ProfilerStep",
    "autograd::",
    "Torch",
    "CompiledFunction",
    "DistributedDataParallel",
)


def profile_rank(rank, world, recipe):
    yield profile_steps(recipe)


def profile_steps(recipe):
    """Train under the profiler, in this process: seconds of arithmetic, memory and launch, and what else an `Explanation` needs of a rank.

    Launch is the time in which none of the operations ran. On a GPU the seconds are those of its kernels.
    """
    from torch.profiler import ProfilerActivity, profile

    from cnnlab.training.loop import train

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes into the notebook
    gpu = recipe.device == "cuda"
    events = train(recipe)
    next(
        event
        for event in events
        if not recipe.warmup_steps
        or isinstance(event, Progress)
        and event.step == recipe.warmup_steps
    )
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as profiler:
        end = list(events)[-1]
    seconds, operations = time_by_category(
        profiler.events(), gpu, recipe.steps - recipe.warmup_steps
    )
    launch = max(0.0, end.compute_s - sum(seconds.values()))
    size = 8192 if gpu else 1024
    return {
        **seconds,
        "launch": launch,
        "operations": operations,
        **count_flops_and_bytes(recipe),
        "peak_flops": peaks.peak_flops(recipe.precision, recipe.device, recipe.threads, size)[0],
        "peak_copy": peaks.copy_bandwidth(recipe.device, recipe.threads, 256 if gpu else 64)[0],
    }


def time_by_category(events, gpu, steps):
    """({"arithmetic": seconds, "memory": seconds}, number of operations) of one of `steps` steps, by the profiler's events; of the GPU's kernels only, if `gpu`."""
    from torch.autograd import DeviceType

    seconds, operations = {"arithmetic": 0.0, "memory": 0.0}, 0
    for event in events:
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        if (
            gpu and event.device_type != DeviceType.CUDA
        ):  # a call: it has the time of its kernels, which are events of their own
            continue
        if own and not event.name.startswith(RANGE_PREFIXES) and not in_loader(event):
            operations += 1
            seconds["arithmetic" if is_arithmetic(event.name) else "memory"] += own / 1e6 / steps
    return seconds, operations // steps


def is_arithmetic(name):
    """Is the operation, or the GPU kernel, of that name a convolution or a matrix product?"""
    return any(word in name.lower() for word in ARITHMETIC) and not name.startswith(FUSED_PREFIXES)


def in_loader(event):
    """Was the operation part of fetching a batch?"""
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event.name.startswith("enumerate(DataLoader)")


def count_flops_and_bytes(recipe):
    """Of one eager step, counted as it runs: FLOP of convolutions and matrix products, and bytes moved by all other operations."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    from cnnlab.data import datasets
    from cnnlab.model import build
    from cnnlab.training import techniques
    from cnnlab.training.loop import make_optimizer

    class Moved(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if not operation.is_view and not is_arithmetic(operation.name()):
                self.bytes += sum(
                    value.nbytes
                    for value in torch.utils._pytree.tree_leaves((args, result))
                    if isinstance(value, torch.Tensor)
                )
            return result

    channels, size, classes = shape = datasets.load(recipe).shape
    network = build(recipe, shape).to(recipe.device)
    images = torch.randn(recipe.batch_size, channels, size, size, device=recipe.device)
    labels = torch.randint(classes, (recipe.batch_size,), device=recipe.device)
    optimizer, _ = make_optimizer(recipe, network, recipe.steps)
    with FlopCounterMode(display=False) as flops, Moved() as moved:
        with techniques.autocast(recipe):
            loss = cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    return {"flops": flops.get_total_flops(), "moved": moved.bytes}
