"""Profiles: the operations of the last training steps on a timeline, and the most expensive ones.

A `Profile` comes from a recipe, or from any `torch.profiler.profile` of a lesson.
"""

import os
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from cnnlab.events import Finished, Progress
from cnnlab.launch import launcher, worker
from cnnlab.measure.profile_events import Span, find_steps, make_lanes, sorted_events
from cnnlab.recipe import Recipe

SHOWN_STEPS = 2  # on the timeline, the last ones


class Operation(NamedTuple):
    """All calls of an operation, per step."""

    name: str
    calls: float
    seconds: float  # in which at least one call lasts
    share: float  # of the step


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a process and its GPU did in training steps; `str()` is a table."""

    title: str
    steps: int  # profiled
    step_s: float  # under the profiler, which slows a program down
    idle_s: float  # per step without an operation: Python, and gaps between kernels
    operations: list[Operation]  # the most expensive first
    lanes: dict[str, list[Span]]  # of the last steps; LANES has their order
    parts: dict[str, float]  # seconds per step of arithmetic, memory and copies
    num_operations: int  # per step: GPU kernels, or operations on the CPU
    trace_file: Path | None

    def __str__(self) -> str:
        title = f"{self.title}: " if self.title else ""
        lines = [
            f"{title}{1000 * self.step_s:.2f} ms per step under the profiler ({self.steps} steps)",
            f"  {'operation':36}{'calls/step':>10}{'ms/step':>10}{'share':>7}",
        ]
        for row in self.operations[:12]:
            figures = f"{row.calls:10.1f}{1000 * row.seconds:10.3f}{row.share:7.0%}"
            lines.append(f"  {row.name[:35]:36}{figures}")
        idle = f"{1000 * self.idle_s:20.3f}{self.idle_s / self.step_s:7.0%}"
        lines.append(f"  {'(no operation)':36}{idle}")
        if self.trace_file:
            lines.append(f"Trace file: {self.trace_file}\nOpen it at https://ui.perfetto.dev")
        return "\n".join(lines)


def profile(recipe: Recipe, steps: int = 10, folder: str | Path | None = None) -> Profile:
    """Train in fresh processes and profile rank 0 for `steps` steps after the warm-up.

    The trace file is written to a new folder in `folder`, by default the one for temporary files.
    """
    [(_, found)] = stream_profile(profile_rank, recipe, steps, folder)
    return found


def stream_profile(
    function: Callable,
    recipe: Recipe,
    steps: int,
    folder: str | Path | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Any]:
    """Yield what function(rank, world, recipe, trace_file) yields in the ranks of the recipe."""
    recipe = recipe.replace(steps=recipe.warmup_steps + steps, evaluate=False)
    backend = launcher.prepare_run(recipe)
    name = f"{recipe.model}-batch{recipe.batch_size}-{recipe.device}.json.gz"
    parent = Path(folder or tempfile.gettempdir()).expanduser().resolve()
    parent.mkdir(parents=True, exist_ok=True)
    trace_file = Path(tempfile.mkdtemp(prefix="cnnlab-profile-", dir=parent)) / name
    yield from launcher.stream(function, (recipe, trace_file), recipe.ranks, stop, backend=backend)


def profile_rank(
    rank: int, world: int, recipe: Recipe, trace_file: Path
) -> Iterator[tuple[Finished, Profile]]:
    """Train one rank. Rank 0 is profiled after the warm-up; it yields its end and its profile."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print into the notebook
    events = worker.train_rank(rank, world, recipe, None)
    if rank > 0:
        deque(events, maxlen=0)
        return
    for event in events:
        warmed_up = isinstance(event, Progress) and event.step >= recipe.warmup_steps
        if warmed_up or not recipe.warmup_steps:
            break
    activities = {ProfilerActivity.CPU}
    if recipe.device != "cpu":
        activities = torch.profiler.supported_activities()
    with torch.profiler.profile(activities=activities) as profiler:
        *_, finished = events
    assert isinstance(finished, Finished)
    title = f"{recipe.model} on {recipe.data}, batch {recipe.batch_size}, {recipe.device}"
    if recipe.device != "cpu" and not sees_gpu():
        title += ", whose kernels torch's profiler does not see"
    yield finished, summarize_profile(profiler, None, trace_file, title)


def sees_gpu() -> bool:
    """Whether torch's profiler records the kernels of this machine's GPU: not of Apple's."""
    return torch.profiler.supported_activities() != {ProfilerActivity.CPU}


def summarize_profile(
    profiler: Any,
    steps: int | None = None,
    trace_file: str | Path | None = None,
    title: str = "",
) -> Profile:
    """The `Profile` of a finished `torch.profiler.profile`, whose trace is saved as `trace_file`.

    `steps`: in the profile. By default it counts `profiler.step()`, or else `optimizer.step()`.
    """
    if trace_file is not None:
        profiler.export_chrome_trace(str(trace_file))
    events = sorted_events(profiler)
    starts, counted = find_steps(events)
    steps = steps or counted or getattr(profiler, "step_num", 0) or 1
    lanes, leaves = make_lanes(events)
    on_gpu = any(name.startswith("GPU") for name in lanes)
    not_busy = ("labels", "CPU") if on_gpu else ("labels",)
    busy = [span for name in lanes if not name.startswith(not_busy) for span in lanes[name]]
    step_s = max(1e-9, max((span.end for span in busy), default=0.0) - starts[0]) / steps
    parts = dict.fromkeys(("arithmetic", "memory", "copies"), 0.0)
    for part, seconds in leaves:
        parts[part] += seconds / steps
    return Profile(
        title=title,
        steps=steps,
        step_s=step_s,
        idle_s=max(0.0, step_s - union_s(busy) / steps),
        operations=_sum_operations(busy, steps, step_s),
        lanes=_last_lanes(lanes, starts[-SHOWN_STEPS:][0]),
        parts=parts,
        num_operations=len(leaves) // steps,
        trace_file=Path(trace_file) if trace_file else None,
    )


def union_s(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans lasts."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def _sum_operations(spans, steps, step_s):
    """An `Operation` for each name, the most expensive first."""
    groups = defaultdict(list)
    for span in spans:
        groups[span.name].append(span)
    rows = []
    for name, calls in groups.items():
        seconds = union_s(calls) / steps
        rows.append(Operation(name, len(calls) / steps, seconds, seconds / step_s))
    return sorted(rows, key=lambda row: -row.seconds)


def _last_lanes(lanes, first):
    """The spans from `first` on, with times relative to it, without threads that hardly work."""
    end = max((spans[-1].end for spans in lanes.values()), default=first)
    last: dict[str, list[Span]] = {}
    for name, spans in lanes.items():
        shown = [span for span in spans if span.start >= first]
        is_helper = name.startswith("CPU") and name[-1].isdigit()
        if not is_helper or union_s(shown) > 0.01 * (end - first):
            last[name] = [
                span._replace(start=span.start - first, end=span.end - first) for span in shown
            ]
    return last
