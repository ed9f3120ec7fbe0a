"""Comparing recipes: interleaved runs, medians with quartiles, confidence intervals, fair pairs."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from cnnlab import machine
from cnnlab.events import Finished
from cnnlab.recipe import LEARNING_FIELDS, CnnlabError, Recipe
from cnnlab.values import full_or_quick

# Fields of a recipe that must not differ in a fair comparison. `TIMED_STEPS`: how long it trains.
TIMED_STEPS = {"epochs", "steps", "warmup_steps"}
DELAYS = {"latency_ms", "bandwidth_mbit", "straggler_ms"}
MUST_AGREE = LEARNING_FIELDS | TIMED_STEPS | DELAYS | {"checkpoint_every"}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The throughput of one recipe: images/s of each repeat, in the order in which they ran."""

    name: str
    recipe: Recipe
    images_per_s: tuple[float, ...] = ()
    compile_s: float | None = None  # the first repeat's warm-up beyond the time of its steps
    peak_memory_mib: float | None = None
    accuracy: float | None = None  # held out, after the recipe's steps

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """(first quartile, median, third quartile) of images/s."""
        q1, median, q3 = np.percentile(self.images_per_s, (25, 50, 75)).tolist()
        return q1, median, q3

    def add(self, finished: Finished) -> "Measurement":
        """The measurement with one more repeat."""
        compile_s = self.compile_s
        if compile_s is None:
            steps_s = self.recipe.warmup_steps * finished.step_s
            eager = self.recipe.compiler == "eager"
            compile_s = 0.0 if eager else max(0.0, finished.warmup_s - steps_s)
        return replace(
            self,
            images_per_s=(*self.images_per_s, finished.images_per_s),
            compile_s=compile_s,
            peak_memory_mib=max(self.peak_memory_mib or 0.0, finished.peak_memory_mib),
            accuracy=finished.accuracy if self.accuracy is None else self.accuracy,
        )


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """A speedup over the baseline of that name, with its 95% confidence interval."""

    value: float
    low: float
    high: float
    baseline: str

    @property
    def significant(self) -> bool:
        """False when the interval contains 1: both may be equally fast."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        if not np.isfinite(self.high):
            return f"{self.value:.2f}x the throughput of {self.baseline} (one run: no interval)"
        interval = f"95% CI {self.low:.2f} to {self.high:.2f}"
        if not self.significant:
            return f"no significant difference from {self.baseline} ({self.value:.2f}x, {interval})"
        if self.value < 1:
            return f"slower than {self.baseline} ({self.value:.2f}x, {interval})"
        return f"{self.value:.2f}x faster than {self.baseline} ({interval})"


def speedup(baseline: Measurement, other: Measurement) -> Speedup:
    """The `Speedup` of `other` over `baseline`: Student's t on the logarithms of their images/s.

    The two ran interleaved, so that repeat n of both met the same conditions, and only the ratio
    within each pair counts. The interval is unbounded for fewer than two repeats.
    """
    a, b = np.log(baseline.images_per_s), np.log(other.images_per_s)
    if len(a) != len(b):
        raise CnnlabError(
            f"{baseline.name} has {len(a)} repeats and {other.name} {len(b)}, but pairs need "
            "equally many. Run them interleaved, as `compare` does."
        )
    mean, margin = (b - a).mean(), np.inf
    if len(a) > 1:
        from scipy import stats

        margin = stats.t.ppf(0.975, len(a) - 1) * stats.sem(b - a)
    value, low, high = (float(np.exp(x)) for x in (mean, mean - margin, mean + margin))
    return Speedup(value=value, low=low, high=high, baseline=baseline.name)


def confounders(recipes: Sequence[Recipe]) -> dict[str, list[Any]]:
    """What differs among the recipes besides techniques: {field: its values}; {} if it is fair."""
    found = {}
    for field in fields(Recipe):
        values = list(dict.fromkeys(getattr(recipe, field.name) for recipe in recipes))
        if len(values) > 1 and field.name in MUST_AGREE:
            found[field.name] = values
    return found


def _reject_confounders(recipes: Iterable[Recipe]) -> None:
    if differences := confounders(list(recipes)):
        listed = [f"{name}: {', '.join(map(str, found))}" for name, found in differences.items()]
        raise CnnlabError(
            f"the comparison is not fair: besides the technique, it changes {'; '.join(listed)}. "
            "Make these equal, or use allow_confounders=True; plots then show the differences."
        )


def measure_interleaved(
    recipes: Mapping[str, Recipe],
    repeats: int | None = None,
    allow_confounders: bool = False,
    stop: threading.Event | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Measurement]]:
    """Run the recipes in the order A B B A A B ... and yield {name: Measurement} after each run.

    The order is reversed in every second repeat, because a machine that gets slower during a pair
    of runs would be unfair to the second one. `recipes`: {name: Recipe}, the baseline first.
    `repeats` is 5 by default, or 2 in quick mode. Only the first repeat evaluates. Raises
    `CnnlabError` if anything besides techniques differs, unless `allow_confounders`.
    """
    from cnnlab.launch.launcher import RankError, run

    repeats = full_or_quick(5, 2) if repeats is None else repeats
    if not isinstance(repeats, int) or repeats < 1:
        raise CnnlabError(
            f"repeats={repeats!r} is not allowed. Use an integer of 1 or more; a spread needs 2."
        )
    if not allow_confounders:
        _reject_confounders(recipes.values())
    found = {name: Measurement(name=name, recipe=recipe) for name, recipe in recipes.items()}
    for repeat in range(repeats):
        order = list(recipes.items())
        for name, recipe in order if repeat % 2 == 0 else reversed(order):
            evaluate = recipe.evaluate and repeat == 0
            try:
                events = run(recipe.replace(evaluate=evaluate), stop, env)
                slowest = slowest_rank(events, recipe.ranks)
            except RankError as error:
                error.recipe_name = name
                raise
            if slowest is None:  # stopped
                return
            found[name] = found[name].add(slowest)
            yield dict(found)


def compare(
    recipes: Mapping[str, Recipe], repeats: int | None = None, **options: Any
) -> dict[str, Measurement]:
    """Measure the recipes with a progress bar: the last result of `measure_interleaved`."""
    from tqdm.auto import tqdm

    repeats = full_or_quick(5, 2) if repeats is None else repeats
    steps = measure_interleaved(recipes, repeats, **options)
    latest: dict[str, Measurement] = {}
    for found in tqdm(steps, total=repeats * len(recipes), desc="measuring", leave=False):
        latest = found
    return latest


def slowest_rank(events: Iterable[Any], ranks: int = 1) -> Finished | None:
    """`Finished` of the slowest rank, which sets the pace; None unless `ranks` ranks finished."""
    finished = [event for event in events if isinstance(event, Finished)]
    if len(finished) < ranks:  # stopped
        return None
    return min(finished, key=lambda event: event.images_per_s)


def speedup_table(measurements: Mapping[str, Measurement]) -> str:
    """A line of text per measurement, with its speedup over the first.

    A last line names the CPU threads if they differ together with something else.
    """
    first = next(iter(measurements.values()))
    lines = [f"{'':24} {'images/s (IQR)':>24}  speedup"]
    for name, measurement in measurements.items():
        q1, median, q3 = measurement.quartiles
        spread = f"{median:,.0f} ({q1:,.0f} to {q3:,.0f})"
        gain = "the baseline" if measurement is first else str(speedup(first, measurement))
        lines.append(f"{name:24} {spread:>24}  {gain}")
    if any(_other_threads(first.recipe, other.recipe) for other in measurements.values()):
        threads = [f"{name} {cpu_threads(m.recipe)}" for name, m in measurements.items()]
        lines.append(f"CPU threads of all ranks together: {', '.join(threads)}")
    return "\n".join(lines)


def cpu_threads(recipe: Recipe) -> int:
    """CPU threads of all ranks together."""
    return recipe.ranks * (recipe.threads or max(1, machine.cores() // recipe.ranks))


def _other_threads(recipe: Recipe, other: Recipe) -> bool:
    """Whether `other` has other threads in addition to the technique that it tries."""
    on_cpu = recipe.device == other.device == "cpu"
    if not on_cpu or cpu_threads(recipe) == cpu_threads(other):
        return False
    return other.replace(threads=recipe.threads) != recipe
