"""Why a run is as fast as it is: which resource bounds it, by its own figures and the profiler, and what to try next."""

import os
from dataclasses import dataclass

import numpy as np

from . import machine
from .compare import slowest
from .events import Progress
from .recipe import Recipe, legend

STEPS = 10               # that are timed and profiled
PARTS = {"loader": "waiting for the loader", "arithmetic": "arithmetic: convolutions, matrix products", "memory": "memory: all other operations",
         "launch": "starting operations", "communication": "waiting for other ranks"}
ARITHMETIC = ("conv", "mm", "linear", "gemm", "cutlass", "xmma", "nvjet", "winograd", "wgrad", "dgrad", "fprop")    # in names of operations and GPU kernels
FUSED = ("triton_poi", "triton_per", "triton_red")        # generated kernels of other operations, though their names may tell what stood beside them
RANGES = ("enumerate(DataLoader)", "Optimizer.", "ProfilerStep", "autograd::", "Torch", "CompiledFunction", "DistributedDataParallel")


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where the seconds of a recipe's step go. `str()` says it in words."""

    recipe: Recipe
    images_per_s: float
    step_s: float
    parts: dict[str, float]               # seconds of a step, by the names of PARTS; they add up to `step_s`
    flops: int                            # of a step's convolutions and matrix products, forward and backward, a rank
    moved: int                            # bytes that a step's other operations read and write, a rank, as long as nothing is fused
    peak_flops: float                     # that this machine reaches at this precision, with the rank's threads, FLOP/s
    peak_copy: float                      # bytes/s that a copy moves with the rank's threads, read and written
    operations: int                       # started in a step

    @property
    def bound(self):
        """The name of the part that takes most of a step."""
        return max(self.parts, key=self.parts.get)

    @property
    def next(self):
        """(what to try next, the recipe's fields that do it; empty where it takes another machine, model or data)."""
        return advice(self.recipe, self.bound)

    def __str__(self):
        lines = [f"{self.recipe.model} on {self.recipe.data}, batch {self.recipe.batch_size}: {1000 * self.step_s:.1f} ms a step, "
                 f"{self.images_per_s:,.0f} images/s"]
        for name, seconds in self.parts.items():
            lines.append(f"  {PARTS[name]:42}{1000 * seconds:8.2f} ms {100 * seconds / self.step_s:4.0f}%  {self._note(name)}".rstrip())
        what, change = self.next
        lines.append(f"Most of a step is {PARTS[self.bound]}. Try next: {what}" + (f" ({', '.join(f'{k}={v!r}' for k, v in change.items())})." if change else "."))
        return "\n".join(lines)

    def _note(self, name):
        seconds = self.parts[name]
        if name == "communication" and self.recipe.device == "cuda" and self.recipe.replicas > 1:
            return "not told apart on a GPU"
        if name == "launch":
            return f"{self.operations:,} operations"
        if name == "arithmetic" and seconds:
            return f"{self.flops / seconds / 1e9:,.0f} GFLOP/s; {self.recipe.precision} reaches {self.peak_flops / 1e9:,.0f} here"
        if name == "memory" and seconds:
            if self.recipe.compiler != "eager":
                return f"{self.moved / 1e6:,.0f} MB before fusing"
            rate = self.moved / seconds
            slow = ": not the memory, their own code is the limit" if rate < 0.5 * self.peak_copy else ""
            return f"{self.moved / 1e6:,.0f} MB, {rate / 1e9:,.0f} GB/s; a copy reaches {self.peak_copy / 1e9:,.0f} here{slow}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two explanations side by side: which part of a step brought the difference."""

    a: Explanation
    b: Explanation

    def __str__(self):
        per_image = [{name: seconds / each.step_s / each.images_per_s for name, seconds in each.parts.items()} for each in (self.a, self.b)]
        gains = {name: 1e6 * (before - per_image[1][name]) for name, before in per_image[0].items()}
        main = max(gains, key=lambda name: abs(gains[name]))
        ratio = self.b.images_per_s / self.a.images_per_s
        verb = "saves" if gains[main] > 0 else "costs"
        return (f"A: {self.a}\n\nB ({legend(self.a.recipe, self.b.recipe)}): {self.b}\n\nB trains {ratio:.2f} times as many images/s as A. "
                f"An image takes {1e6 / self.a.images_per_s:,.0f} microseconds in A, {1e6 / self.b.images_per_s:,.0f} in B.\n"
                f"What changed most is {PARTS[main]}: B {verb} {abs(gains[main]):,.0f} microseconds an image.")


def explain(a, b=None, repeats=3, stop=None):
    """Run recipe `a` (and `b`, in turn) `repeats` times, profile each once, and say what bounds it: an `Explanation`, of two a `Comparison`.

    `b` is best `a.but(...)`. Each runs STEPS steps beyond its warm-up, in fresh processes. With a `stop` event set meanwhile, returns None.
    """
    from .launch import run, stream

    recipes = [recipe.but(steps=recipe.warmup_steps + STEPS, evaluate=False) for recipe in ([a] if b is None else [a, b])]
    ends = [[] for _ in recipes]
    for _ in range(repeats):
        for recipe, found in zip(recipes, ends):
            found.append(slowest(run(recipe, stop)))
            if found[-1] is None:
                return None
    found = [explained(recipe, end, profile) for recipe, end in zip(recipes, ends)
             for profile in stream(profile_rank, (alone(recipe),), 1, stop, backend=None)]
    if len(found) < len(recipes):
        return None
    return found[0] if b is None else Comparison(a=found[0], b=found[1])


def alone(recipe):
    """One rank's share of the recipe's work, without the others."""
    threads = recipe.threads or max(1, machine.cores() // recipe.replicas)
    return recipe.but(replicas=1, strategy=None, compression="none", bucket_mb=None, batch_size=recipe.batch_size // recipe.replicas, threads=threads,
                      latency_ms=0.0, bandwidth_mbit=None, straggler_ms=0.0)


def explained(recipe, ends, profile):
    """The `Explanation` of a recipe from the ends of its runs, and what `profiled` found.

    The runs say what a step takes, and of it waiting; the profiler, which slows a run down, only how the rest is shared out.
    """
    middle = sorted(ends, key=lambda end: end.step_s)[len(ends) // 2]
    rest = {name: profile[name] / sum(profile[name] for name in ("arithmetic", "memory", "launch")) * middle.compute_s
            for name in ("arithmetic", "memory", "launch")}
    parts = {"loader": middle.waiting_s, **rest, "communication": middle.communication_s or 0.0}
    return Explanation(recipe=recipe, images_per_s=float(np.median([end.images_per_s for end in ends])), step_s=middle.step_s, parts=parts,
                       **{name: profile[name] for name in ("flops", "moved", "peak_flops", "peak_copy", "operations")})


def profile_rank(rank, world, recipe):
    yield profiled(recipe)


def profiled(recipe):
    """Train under the profiler, in this process: seconds of arithmetic, memory and launch, and what else an `Explanation` needs of a rank.

    Launch is the time in which none of the operations ran. On a GPU the seconds are those of its kernels.
    """
    from torch.profiler import ProfilerActivity, profile

    from .train import train

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")          # else the profiler writes into the notebook
    gpu = recipe.device == "cuda"
    events = train(recipe)
    next(event for event in events if not recipe.warmup_steps or isinstance(event, Progress) and event.step == recipe.warmup_steps)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as profiler:
        end = list(events)[-1]
    seconds, operations = spent(profiler.events(), gpu, recipe.steps - recipe.warmup_steps)
    launch = max(0.0, end.compute_s - sum(seconds.values()))
    size = 8192 if gpu else 1024
    return {**seconds, "launch": launch, "operations": operations, **counted(recipe),
            "peak_flops": machine.peak_flops(recipe.precision, recipe.device, recipe.threads, size)[0],
            "peak_copy": machine.copy_bandwidth(recipe.device, recipe.threads, 256 if gpu else 64)[0]}


def spent(events, gpu, steps):
    """({"arithmetic": seconds, "memory": seconds}, number of operations) of one of `steps` steps, by the profiler's events; of the GPU's kernels only, if `gpu`."""
    from torch.autograd import DeviceType

    seconds, operations = {"arithmetic": 0.0, "memory": 0.0}, 0
    for event in events:
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        if gpu and event.device_type != DeviceType.CUDA:     # a call: it has the time of its kernels, which are events of their own
            continue
        if own and not event.name.startswith(RANGES) and not in_loader(event):
            operations += 1
            seconds["arithmetic" if is_arithmetic(event.name) else "memory"] += own / 1e6 / steps
    return seconds, operations // steps


def is_arithmetic(name):
    """Is the operation, or the GPU kernel, of that name a convolution or a matrix product?"""
    return any(word in name.lower() for word in ARITHMETIC) and not name.startswith(FUSED)


def in_loader(event):
    """Was the operation part of fetching a batch?"""
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event.name.startswith("enumerate(DataLoader)")


def counted(recipe):
    """Of one eager step, counted as it runs: FLOP of convolutions and matrix products, and bytes moved by all other operations."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    from . import data, speed
    from .model import build
    from .train import make_optimizer

    class Moved(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if not operation.is_view and not is_arithmetic(operation.name()):
                self.bytes += sum(value.nbytes for value in torch.utils._pytree.tree_leaves((args, result)) if isinstance(value, torch.Tensor))
            return result

    channels, size, classes = shape = data.load(recipe).shape
    network = build(recipe, shape).to(recipe.device)
    images = torch.randn(recipe.batch_size, channels, size, size, device=recipe.device)
    labels = torch.randint(classes, (recipe.batch_size,), device=recipe.device)
    optimizer, _ = make_optimizer(recipe, network, recipe.steps)
    with FlopCounterMode(display=False) as flops, Moved() as moved:
        with speed.autocast(recipe):
            loss = cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    return {"flops": flops.get_total_flops(), "moved": moved.bytes}


def advice(recipe, bound):
    """(what to try next against that bound, the recipe's fields that do it) for this machine."""
    here = machine.describe()
    fast = {"precision": "bf16"} if recipe.device == "cuda" or here.hardware["bf16"] else {}
    lower = recipe.precision in ("fp32", "tf32") and fast and ("bf16: half the bytes, and matrix units where there are some", fast)
    free = here.cores // recipe.replicas - recipe.loader_workers            # cores that a rank has for its threads
    threads = recipe.device == "cpu" and recipe.threads and free > recipe.threads and (f"{free} threads, since cores are idle", {"threads": free})
    gpu = recipe.device == "cpu" and here.gpus and ("the GPU", {"device": "cuda"})
    layout = recipe.memory_format == "contiguous" and ("channels_last, the layout that convolutions read", {"memory_format": "channels_last"})
    order = recipe.pooling == "after-relu" and ("max-pooling before ReLU: the same numbers, a quarter of ReLU's work", {"pooling": "before-relu"})
    fused = recipe.compiler == "eager" and here.compiler and ("torch.compile, which fuses operations", {"compiler": "inductor"})
    files = recipe.data == "photos"
    tries = {
        "loader": [not files and recipe.loader == "sample" and ("fetching whole batches", {"loader": "batch"}),
                   files and ("more loader workers, as long as cores are idle", {"loader_workers": recipe.loader_workers + 1}),
                   ("doing less for each image while loading", {})],
        "arithmetic": [threads, gpu, lower, layout, ("more cores, a GPU, or more machines", {})],
        "memory": [threads, gpu, lower, layout, order, fused, ("fewer passes over the data: fused or cheaper layers", {})],
        "launch": [fused, ("a larger batch: more work for each operation", {"batch_size": 2 * recipe.batch_size})],
        "communication": [("a larger batch: more work for each exchange", {"batch_size": 2 * recipe.batch_size})],
    }
    return next(each for each in tries[bound] if each)
