"""Honest speedups: interleaved repeats, medians with spread, confidence intervals, and a refusal of unfair pairs."""

from dataclasses import dataclass

import numpy as np

from cnnlab.events import Finished
from cnnlab.recipe import CnnlabError, Recipe, changes

TECHNIQUE_FIELDS = (
    "device",
    "threads",
    "loader",
    "loader_workers",
    "precision",
    "memory_format",
    "pooling",
    "compiler",
    "replicas",
    "strategy",
    "compression",
    "bucket_mb",
    "accumulate",
    "sync_every",
    "staleness",
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The speed of one recipe: images/s of each repeat, in the order in which they ran."""

    name: str
    recipe: Recipe
    images_per_s: tuple[float, ...] = ()
    compile_s: float | None = (
        None  # of the first repeat, above what its warm-up steps take once compiled
    )
    peak_memory_mib: float | None = None
    accuracy: float | None = None  # held out, after the recipe's steps

    @property
    def quartiles(self):
        """(first quartile, median, third quartile) of images/s."""
        return tuple(float(q) for q in np.percentile(self.images_per_s, (25, 50, 75)))

    def add(self, finished):
        """With the figures of one more repeat."""
        compile_s = self.compile_s
        if compile_s is None:
            compiled = self.recipe.compiler != "eager"
            compile_s = (
                max(0.0, finished.warmup_s - self.recipe.warmup_steps * finished.step_s)
                if compiled
                else 0.0
            )
        return Measurement(
            name=self.name,
            recipe=self.recipe,
            images_per_s=(*self.images_per_s, finished.images_per_s),
            compile_s=compile_s,
            peak_memory_mib=max(self.peak_memory_mib or 0.0, finished.peak_memory_mib),
            accuracy=finished.accuracy if self.accuracy is None else self.accuracy,
        )


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """How many times faster than a named baseline, with its 95% confidence interval."""

    value: float
    low: float
    high: float
    baseline: str

    @property
    def significant(self):
        """False when the interval holds 1: the two may be equally fast."""
        return not self.low <= 1 <= self.high

    def __str__(self):
        interval = f"95% confidence {self.low:.2f} to {self.high:.2f}"
        if not self.significant:
            return f"no significant difference from {self.baseline} ({self.value:.2f}x, {interval})"
        return f"{self.value:.2f}x {self.baseline} ({interval})"


def speedup(baseline, other, paired=True):
    """The `Speedup` of one `Measurement` over another, from the logarithms of their images/s (Student's t).

    `paired`: the two ran in turn, so that the n-th repeats share whatever else the machine was doing, and only the ratio
    of each pair counts; otherwise Welch's test for unequal variances. With fewer than two repeats the interval
    is unbounded: one run proves nothing.
    """
    a, b = np.log(baseline.images_per_s), np.log(other.images_per_s)
    if paired and len(a) != len(b):
        raise CnnlabError(
            f"{baseline.name} has {len(a)} repeats and {other.name} {len(b)}: pairs need as many of each; take paired=False."
        )
    value = float(np.exp((b - a).mean() if paired else b.mean() - a.mean()))
    if min(len(a), len(b)) < 2:
        return Speedup(value=value, low=0.0, high=float("inf"), baseline=baseline.name)
    from scipy import stats

    if paired:
        mean, error, freedom = (b - a).mean(), stats.sem(b - a), len(a) - 1
        interval = stats.t.interval(0.95, freedom, mean, error) if error else (mean, mean)
    else:
        interval = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    return Speedup(
        value=value,
        low=float(np.exp(interval[0])),
        high=float(np.exp(interval[1])),
        baseline=baseline.name,
    )


def confounders(recipes, technique=TECHNIQUE_FIELDS):
    """What differs among the recipes beside the technique's fields: {field: its values}. Empty for a fair comparison.

    Whether they evaluate is no difference: that is not timed.
    """
    first, *others = recipes
    names = {
        name: None
        for other in others
        for name in changes(first, other)
        if name not in (*technique, "evaluate")
    }  # in order, once
    return {
        name: list(dict.fromkeys(getattr(recipe, name) for recipe in recipes)) for name in names
    }


def measure_interleaved(
    recipes, repeats=5, technique=TECHNIQUE_FIELDS, allow_confounders=False, stop=None, env=None
):
    """Run the recipes in turn, A B A B ..., and yield {name: Measurement} after each run, ever fuller.

    `recipes`: {name: Recipe}, the baseline first. Raises `CnnlabError` when anything but the technique's fields differs,
    unless `allow_confounders`; plots then say what does. Only the first repeat evaluates: accuracy is not speed.
    """
    from cnnlab.launch.launcher import run

    if not isinstance(repeats, int) or repeats < 1:
        raise CnnlabError(
            f"repeats={repeats!r} is not allowed: it must be a whole number, 1 or more; a spread needs at least 2."
        )
    difference = confounders(list(recipes.values()), technique)
    if difference and not allow_confounders:
        said = "; ".join(
            f"{name}: {', '.join(map(str, values))}" for name, values in difference.items()
        )
        raise CnnlabError(
            f"this comparison would not be fair: beside the technique it changes {said}. Make these equal, or pass "
            f"allow_confounders=True, and the plot will say so."
        )
    found = {name: Measurement(name=name, recipe=recipe) for name, recipe in recipes.items()}
    for repeat in range(repeats):
        for name, recipe in recipes.items():
            ends = [
                event
                for event in run(
                    recipe.replace(evaluate=recipe.evaluate and repeat == 0), stop, env
                )
                if isinstance(event, Finished)
            ]
            if len(ends) < recipe.replicas:  # stopped
                return
            found[name] = found[name].add(slowest_rank(ends))
            yield dict(found)


def compare(recipes, repeats=5, **options):
    """The last word of `measure`, with a progress bar: {name: Measurement}."""
    from tqdm.auto import tqdm

    bar = tqdm(
        measure_interleaved(recipes, repeats, **options),
        total=repeats * len(recipes),
        desc="measuring",
        leave=False,
    )
    return list(bar)[-1]


def slowest_rank(events):
    """Of the ranks' `Finished` events that of the slowest, for a run is as fast as the last of its ranks; None where the run was stopped."""
    return min(
        (event for event in events if isinstance(event, Finished)),
        key=lambda event: event.images_per_s,
        default=None,
    )


def speedup_table(measurements, baseline=None):
    """The measurements as text, a line each; speedups over the first, or over the one named `baseline`."""
    first = measurements[baseline] if baseline else next(iter(measurements.values()))
    lines = [f"{'':24} {'images/s (IQR)':>24}  speedup"]
    for name, measurement in measurements.items():
        q1, median, q3 = measurement.quartiles
        gain = "the baseline" if measurement is first else str(speedup(first, measurement))
        lines.append(f"{name:24} {f'{median:,.0f} ({q1:,.0f} to {q3:,.0f})':>24}  {gain}")
    return "\n".join(lines)
