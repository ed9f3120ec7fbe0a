"""Which resource bounds a training step, from its timings and a profile, and what to try next."""

import statistics
import threading
from dataclasses import dataclass

from cnnlab import machine
from cnnlab.launch import launcher
from cnnlab.measure.compare import slowest_rank
from cnnlab.measure.profile import profile_steps
from cnnlab.measure.techniques import TECHNIQUES, Changes
from cnnlab.recipe import MODEL_PARALLEL_FIELDS, Recipe
from cnnlab.values import full_or_quick

STEPS = 10  # timed and profiled
PARTS = {
    "loader": "waiting for the loader",
    "arithmetic": "arithmetic (convolutions, matrix products)",
    "memory": "other operations (elementwise, pooling)",
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
    "launch": ("torch.compile", "larger batch"),
    "communication": ("micro-batches", "larger batch"),
}
LAST_RESORT = {  # advice once all of these are in use
    "loader": "less work per image while loading",
    "arithmetic": "more cores, a GPU, or more machines",
    "memory": "fewer passes over the data: fused or cheaper layers",
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
        if name == "communication" and recipe.device == "cuda" and recipe.ranks > 1:
            return "not measured separately on a GPU"
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
    recipe: Recipe, repeats: int | None = None, stop: threading.Event | None = None
) -> Explanation | None:
    """Run the recipe `repeats` times, profile it once, and explain its speed.

    `repeats` is 3 by default, or 1 in quick mode. Each run takes STEPS steps after its
    warm-up, in fresh processes. Returns None if `stop` was set meanwhile.
    """
    recipe = recipe.replace(steps=recipe.warmup_steps + STEPS, evaluate=False)
    finished = []
    for _ in range(repeats or full_or_quick(3, 1)):
        slowest = slowest_rank(launcher.run(recipe, stop), recipe.ranks)
        if slowest is None:
            return None
        finished.append(slowest)
    arguments = (single_rank_recipe(recipe),)
    profiles = list(launcher.stream(profile_steps, arguments, 1, stop, backend=None))
    return _make_explanation(recipe, finished, *profiles[0]) if profiles else None


def single_rank_recipe(recipe: Recipe) -> Recipe:
    """One rank's share of the recipe's work, without the other ranks."""
    share = recipe.batch_size // recipe.replicas
    threads = recipe.threads or max(1, machine.cores() // recipe.ranks)
    alone = {name: getattr(Recipe, name) for name in MODEL_PARALLEL_FIELDS}
    alone |= {"replicas": 1, "strategy": None}
    return recipe.replace(**alone, batch_size=share, threads=threads)


def _make_explanation(recipe, finished, seconds, figures):
    """The `Explanation` from the ends of the recipe's runs and the results of `profile_steps`.

    The runs give the time of a step and of waiting. The profiler slows a run down, so it only says
    how the computing time divides.
    """
    median = sorted(finished, key=lambda end: end.step_s)[len(finished) // 2]
    scale = median.compute_s / sum(seconds.values())
    for name in ("flops", "moved", "operations"):  # of a whole replica
        figures[name] //= recipe.model_ranks
    return Explanation(
        recipe=recipe,
        images_per_s=statistics.median(end.images_per_s for end in finished),
        step_s=median.step_s,
        parts={
            "loader": median.waiting_s,
            **{name: scale * profiled for name, profiled in seconds.items()},
            "communication": median.communication_s or 0.0,
        },
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
