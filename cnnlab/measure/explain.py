"""Why a run is as fast as it is: which resource bounds it, by its own figures and the profiler, and what to try next."""

from dataclasses import dataclass

import numpy as np

from cnnlab import machine
from cnnlab.measure.compare import slowest_rank
from cnnlab.measure.profile import profile_rank
from cnnlab.recipe import Recipe, format_changes

STEPS = 10  # that are timed and profiled


PARTS = {
    "loader": "waiting for the loader",
    "arithmetic": "arithmetic: convolutions, matrix products",
    "memory": "memory: all other operations",
    "launch": "starting operations",
    "communication": "waiting for other ranks",
}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where the seconds of a recipe's step go. `str()` says it in words."""

    recipe: Recipe
    images_per_s: float
    step_s: float
    parts: dict[str, float]  # seconds of a step, by the names of PARTS; they add up to `step_s`
    flops: int  # of a step's convolutions and matrix products, forward and backward, a rank
    moved: int  # bytes that a step's other operations read and write, a rank, as long as nothing is fused
    peak_flops: (
        float  # that this machine reaches at this precision, with the rank's threads, FLOP/s
    )
    peak_copy: float  # bytes/s that a copy moves with the rank's threads, read and written
    operations: int  # started in a step

    @property
    def bound(self):
        """The name of the part that takes most of a step."""
        return max(self.parts, key=self.parts.get)

    @property
    def next(self):
        """(what to try next, the recipe's fields that do it; empty where it takes another machine, model or data)."""
        return suggest_next(self.recipe, self.bound)

    def __str__(self):
        lines = [
            f"{self.recipe.model} on {self.recipe.data}, batch {self.recipe.batch_size}: {1000 * self.step_s:.1f} ms a step, "
            f"{self.images_per_s:,.0f} images/s"
        ]
        for name, seconds in self.parts.items():
            lines.append(
                f"  {PARTS[name]:42}{1000 * seconds:8.2f} ms {100 * seconds / self.step_s:4.0f}%  {self._note(name)}".rstrip()
            )
        what, change = self.next
        lines.append(
            f"Most of a step is {PARTS[self.bound]}. Try next: {what}"
            + (f" ({', '.join(f'{k}={v!r}' for k, v in change.items())})." if change else ".")
        )
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
            slow = (
                ": not the memory, their own code is the limit"
                if rate < 0.5 * self.peak_copy
                else ""
            )
            return f"{self.moved / 1e6:,.0f} MB, {rate / 1e9:,.0f} GB/s; a copy reaches {self.peak_copy / 1e9:,.0f} here{slow}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two explanations side by side: which part of a step brought the difference."""

    a: Explanation
    b: Explanation

    def __str__(self):
        per_image = [
            {
                name: seconds / each.step_s / each.images_per_s
                for name, seconds in each.parts.items()
            }
            for each in (self.a, self.b)
        ]
        gains = {name: 1e6 * (before - per_image[1][name]) for name, before in per_image[0].items()}
        main = max(gains, key=lambda name: abs(gains[name]))
        ratio = self.b.images_per_s / self.a.images_per_s
        verb = "saves" if gains[main] > 0 else "costs"
        return (
            f"A: {self.a}\n\nB ({format_changes(self.a.recipe, self.b.recipe)}): {self.b}\n\nB trains {ratio:.2f} times as many images/s as A. "
            f"An image takes {1e6 / self.a.images_per_s:,.0f} microseconds in A, {1e6 / self.b.images_per_s:,.0f} in B.\n"
            f"What changed most is {PARTS[main]}: B {verb} {abs(gains[main]):,.0f} microseconds an image."
        )


def explain(a, b=None, repeats=3, stop=None):
    """Run recipe `a` (and `b`, in turn) `repeats` times, profile each once, and say what bounds it: an `Explanation`, of two a `Comparison`.

    `b` is best `a.replace(...)`. Each runs STEPS steps beyond its warm-up, in fresh processes. With a `stop` event set meanwhile, returns None.
    """
    from cnnlab.launch.launcher import run, stream

    recipes = [
        recipe.replace(steps=recipe.warmup_steps + STEPS, evaluate=False)
        for recipe in ([a] if b is None else [a, b])
    ]
    ends = [[] for _ in recipes]
    for _ in range(repeats):
        for recipe, found in zip(recipes, ends):
            found.append(slowest_rank(run(recipe, stop)))
            if found[-1] is None:
                return None
    found = [
        make_explanation(recipe, end, profile)
        for recipe, end in zip(recipes, ends)
        for profile in stream(profile_rank, (single_rank_recipe(recipe),), 1, stop, backend=None)
    ]
    if len(found) < len(recipes):
        return None
    return found[0] if b is None else Comparison(a=found[0], b=found[1])


def single_rank_recipe(recipe):
    """One rank's share of the recipe's work, without the others."""
    threads = recipe.threads or max(1, machine.cores() // recipe.replicas)
    return recipe.replace(
        replicas=1,
        strategy=None,
        compression="none",
        bucket_mb=None,
        batch_size=recipe.batch_size // recipe.replicas,
        threads=threads,
        latency_ms=0.0,
        bandwidth_mbit=None,
        straggler_ms=0.0,
    )


def make_explanation(recipe, ends, profile):
    """The `Explanation` of a recipe from the ends of its runs, and what `profiled` found.

    The runs say what a step takes, and of it waiting; the profiler, which slows a run down, only how the rest is shared out.
    """
    middle = sorted(ends, key=lambda end: end.step_s)[len(ends) // 2]
    rest = {
        name: profile[name]
        / sum(profile[name] for name in ("arithmetic", "memory", "launch"))
        * middle.compute_s
        for name in ("arithmetic", "memory", "launch")
    }
    parts = {"loader": middle.waiting_s, **rest, "communication": middle.communication_s or 0.0}
    return Explanation(
        recipe=recipe,
        images_per_s=float(np.median([end.images_per_s for end in ends])),
        step_s=middle.step_s,
        parts=parts,
        **{
            name: profile[name]
            for name in ("flops", "moved", "peak_flops", "peak_copy", "operations")
        },
    )


def suggest_next(recipe, bound):
    """(what to try next against that bound, the recipe's fields that do it) for this machine."""
    here = machine.describe()
    fast = {"precision": "bf16"} if recipe.device == "cuda" or here.hardware["bf16"] else {}
    lower = (
        recipe.precision in ("fp32", "tf32")
        and fast
        and ("bf16: half the bytes, and matrix units where there are some", fast)
    )
    free = (
        here.cores // recipe.replicas - recipe.loader_workers
    )  # cores that a rank has for its threads
    threads = (
        recipe.device == "cpu"
        and recipe.threads
        and free > recipe.threads
        and (f"{free} threads, since cores are idle", {"threads": free})
    )
    gpu = recipe.device == "cpu" and here.gpus and ("the GPU", {"device": "cuda"})
    layout = recipe.memory_format == "contiguous" and (
        "channels_last, the layout that convolutions read",
        {"memory_format": "channels_last"},
    )
    order = recipe.pooling == "after-relu" and (
        "max-pooling before ReLU: the same numbers, a quarter of ReLU's work",
        {"pooling": "before-relu"},
    )
    fused = (
        recipe.compiler == "eager"
        and here.compiler
        and ("torch.compile, which fuses operations", {"compiler": "inductor"})
    )
    files = recipe.data == "photos"
    tries = {
        "loader": [
            not files
            and recipe.loader == "sample"
            and ("fetching whole batches", {"loader": "batch"}),
            files
            and (
                "more loader workers, as long as cores are idle",
                {"loader_workers": recipe.loader_workers + 1},
            ),
            ("doing less for each image while loading", {}),
        ],
        "arithmetic": [threads, gpu, lower, layout, ("more cores, a GPU, or more machines", {})],
        "memory": [
            threads,
            gpu,
            lower,
            layout,
            order,
            fused,
            ("fewer passes over the data: fused or cheaper layers", {}),
        ],
        "launch": [
            fused,
            ("a larger batch: more work for each operation", {"batch_size": 2 * recipe.batch_size}),
        ],
        "communication": [
            ("a larger batch: more work for each exchange", {"batch_size": 2 * recipe.batch_size})
        ],
    }
    return next(each for each in tries[bound] if each)
