"""Which resource bounds a training step, from its timings and a profile, and what to try next."""

import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cnnlab import machine
from cnnlab.data import datasets
from cnnlab.events import Finished
from cnnlab.launch import launcher
from cnnlab.measure import peaks
from cnnlab.measure.compare import slowest_rank
from cnnlab.measure.profile import Profile, profile_rank, sees_gpu, stream_profile
from cnnlab.measure.profile_events import is_arithmetic
from cnnlab.measure.techniques import TECHNIQUES, Changes
from cnnlab.model import build
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import techniques
from cnnlab.training.loop import make_optimizer
from cnnlab.values import full_or_quick

STEPS = 10  # timed and profiled
PARTS = {
    "loader": "waiting for the loader",
    "arithmetic": "arithmetic (convolutions, matrix products)",
    "memory": "other operations (elementwise, pooling)",
    "copies": "copies between CPU and GPU",
    "launch": "launch overhead",
    "communication": "waiting for other ranks",
}
SUGGESTIONS = {  # for each part of a step, the techniques that shorten it
    "loader": ("loader workers", "whole-batch loader"),
    "arithmetic": ("threads", "GPU", "bf16", "fp16", "channels_last"),
    "memory": (
        *("threads", "GPU", "bf16", "fp16", "channels_last"),
        *("pooling before ReLU", "torch.compile"),
    ),
    "copies": (),
    "launch": ("torch.compile", "larger batch"),
    "communication": ("micro-batches", "larger batch"),
}
LAST_RESORT = {  # advice once all of these are in use
    "loader": "less work per image while loading",
    "arithmetic": "more cores, a GPU, or more machines",
    "memory": "fewer passes over the data: fused or cheaper layers",
    "copies": "data that stays on the GPU, or smaller data types such as uint8",
}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where the time of a recipe's step goes; `str()` is the report."""

    recipe: Recipe
    images_per_s: float
    step_s: float
    parts: dict[str, float]  # seconds per step by the names of PARTS; they add up to `step_s`
    flops: int  # per step and rank, forward and backward, of convolutions and matrix products
    moved: int  # bytes per step and rank that the other operations read and write if not fused
    peak_flops: float  # FLOP/s measured at this precision with the rank's threads
    peak_copy: float  # bytes/s of a copy, reads and writes, with the rank's threads
    operations: int  # per step
    profile: Profile = field(repr=False)  # of one more run

    @property
    def bound(self) -> str:
        """The name of the part that takes most of a step."""
        return max(self.parts, key=lambda name: self.parts[name])

    def __str__(self) -> str:
        recipe = self.recipe
        lines = [
            f"{recipe.model} on {recipe.data}, batch {recipe.batch_size}: "
            f"{1000 * self.step_s:.1f} ms per step, {self.images_per_s:,.0f} images/s"
        ]
        for name, seconds in self.parts.items():
            if name == "copies" and recipe.device == "cpu":
                continue
            figures = f"{1000 * seconds:8.2f} ms {100 * seconds / self.step_s:4.0f}%"
            lines.append(f"  {PARTS[name]:44}{figures}  {self._note(name)}".rstrip())
        advice, change = suggest_next(self.recipe, self.bound)
        if change:
            advice += f" ({', '.join(f'{field}={value!r}' for field, value in change.items())})"
        lines.append(f"Most of a step is {PARTS[self.bound]}. Try next: {advice}.")
        return "\n".join(lines)

    def _note(self, name: str) -> str:
        """What the report says next to a part's time."""
        seconds, recipe = self.parts[name], self.recipe
        if name == "launch":
            return f"{self.operations:,} operations"
        if name == "arithmetic" and seconds:
            peak = f"measured {recipe.precision} peak {self.peak_flops / 1e9:,.0f}"
            return f"{self.flops / seconds / 1e9:,.0f} GFLOP/s; {peak}"
        if name == "memory" and recipe.compiler != "eager":
            return f"{self.moved / 1e6:,.0f} MB before fusion"
        if name == "memory" and seconds:
            rate = f"{self.moved / 1e6:,.0f} MB, {self.moved / seconds / 1e9:,.0f} GB/s"
            return f"{rate}; a copy reaches {self.peak_copy / 1e9:,.0f}"
        return ""


def explain(
    recipe: Recipe,
    repeats: int | None = None,
    stop: threading.Event | None = None,
) -> Explanation | None:
    """Run the recipe `repeats` times, profile it once, and explain its speed.

    `repeats` is 3 by default, or 1 in quick mode. Each run takes STEPS steps after its
    warm-up, in fresh processes. Returns None if `stop` was set meanwhile.
    """
    if recipe.device != "cpu" and not sees_gpu():
        raise CnnlabError("torch's profiler does not see this GPU's kernels. Use device='cpu'.")
    timed = recipe.replace(steps=recipe.warmup_steps + STEPS, evaluate=False)
    finished = []
    for _ in range(repeats or full_or_quick(3, 1)):
        slowest = slowest_rank(launcher.run(timed, stop), recipe.ranks)
        if slowest is None:
            return None
        finished.append(slowest)
    results = list(stream_profile(_profile_and_count, timed, STEPS, stop=stop))
    return _make_explanation(timed, finished, *results[0]) if results else None


def _profile_and_count(
    rank: int, world: int, recipe: Recipe, trace_file: Path
) -> Iterator[tuple[Finished, Profile, dict]]:
    """Of rank 0: what `profile_rank` yields, and the figures of its `Explanation`."""
    for finished, profile in profile_rank(rank, world, recipe, trace_file):
        size, mib = (1024, 64) if recipe.device == "cpu" else (8192, 256)
        threads = torch.get_num_threads()
        peak, _, _ = peaks.peak_flops(recipe.precision, recipe.device, threads, size)
        copied, _, _ = peaks.copy_bandwidth(recipe.device, threads, mib)
        counted = count_flops_and_bytes(recipe)
        figures = {name: number // recipe.model_ranks for name, number in counted.items()}
        yield finished, profile, {**figures, "peak_flops": peak, "peak_copy": copied}


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
    """`flops` of arithmetic and bytes `moved` by the rest in one eager step of one replica."""
    channels, size, classes = shape = datasets.load(recipe).shape
    network = build(recipe, shape).to(recipe.device)
    count = recipe.batch_size // recipe.replicas
    images = torch.randn(count, channels, size, size, device=recipe.device)
    labels = torch.randint(classes, (count,), device=recipe.device)
    optimizer, _ = make_optimizer(recipe, network, recipe.steps or 1)
    with FlopCounterMode(display=False) as flops, BytesMoved() as moved:
        with techniques.autocast(recipe):
            loss = cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    return {"flops": flops.get_total_flops(), "moved": moved.bytes}


def _make_explanation(recipe, finished, profiled, profile, figures):
    """The `Explanation` from the ends of the recipe's runs and the results of the profiled one.

    The runs give the time of a step and of waiting. The profiler slows a run down, so it only says
    how the computing time divides.
    """
    median = sorted(finished, key=lambda end: end.step_s)[len(finished) // 2]
    launch = max(0.0, profiled.compute_s - sum(profile.parts.values()))
    seconds = {**profile.parts, "launch": launch}
    scale = median.compute_s / sum(seconds.values())
    return Explanation(
        recipe=recipe,
        images_per_s=statistics.median(end.images_per_s for end in finished),
        step_s=median.step_s,
        parts={
            "loader": median.waiting_s,
            **{name: scale * profiled_s for name, profiled_s in seconds.items()},
            "communication": median.communication_s or 0.0,
        },
        operations=profile.num_operations,
        profile=profile,
        **figures,
    )


def suggest_next(recipe: Recipe, bound: str) -> tuple[str, Changes]:
    """(what to try next against that bound on this machine, the fields of the recipe to change).

    There is nothing to change where it takes another machine, model or data.
    """
    here = machine.describe()
    for name in SUGGESTIONS[bound]:
        technique = TECHNIQUES[name]
        if technique.suits(recipe, here):
            return technique.why, technique.changes_for(recipe, here)
    return LAST_RESORT[bound], {}
