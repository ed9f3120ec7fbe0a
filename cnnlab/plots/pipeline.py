"""The schedule of a pipeline, simulated, next to the idle time that was measured."""

import numpy as np

from cnnlab.events import Progress, Started
from cnnlab.parallel.pipeline_schedule import (
    bubble_fraction,
    equal_stages_bubble,
    simulate_schedule,
    stages_per_rank,
)
from cnnlab.plots.style import PHASES, Axes, Runs, legend_above_bars, round_up

BOX_COLORS = {"forward": "black", "backward": "white"}  # of the numbers


def schedule_diagram(ax: Axes, runs: Runs) -> None:
    """Draw one step of the last run, simulated: a row for each rank, a box for each micro-batch.

    The simulation takes each rank's mean times in the latest steps. Before there are any, and on a
    GPU, stages are equal, and backward takes twice as long as forward. Lower boxes belong to the
    second stage of a rank. The title compares the bubble, which is the share of idle time: by the
    formula for equal stages, simulated, and measured.
    """
    events = list(runs.values())[-1] if runs else []
    recipe = next((event.recipe for event in events if isinstance(event, Started)), None)
    if recipe is None or recipe.strategy != "pipeline":
        ax.set_axis_off()
        return
    schedule, ranks, count = recipe.pipeline_schedule, recipe.stages, recipe.micro_batches
    latest = {event.rank: event.spans for event in events if isinstance(event, Progress)}
    measured = [latest.get(rank) for rank in range(ranks)]  # of the first replica
    times = {"forward": [1.0] * ranks, "backward": [2.0] * ranks}  # of a micro-batch, each rank
    title = f"bubble: formula {equal_stages_bubble(schedule, ranks, count):.0%}"
    ax.set_xlabel("time, if all stages were equal")
    if all(measured):
        for phase in times:
            times[phase] = [1000 * _seconds_per_step(spans, phase) / count for spans in measured]
        ax.set_xlabel("milliseconds, simulated")
    held = stages_per_rank(schedule)
    forward, backward = ([time / held for time in own] * held for own in times.values())
    boxes = simulate_schedule(schedule, forward, backward, count)
    _draw_boxes(ax, boxes, ranks)
    if all(measured):
        title += f", simulated {bubble_fraction(boxes, ranks):.0%}"
        title += f", measured {_measured_bubble(measured):.0%}"
    ax.set_title(title, fontsize=8, loc="right", y=1.0)


def _draw_boxes(ax, boxes, ranks):
    right = round_up(max(end for *_, end in boxes))
    pixel = right / ax.bbox.width
    ax.set(xlim=(0, right), ylim=(ranks - 0.3, -1.1))  # the first row leaves room for the legend
    for phase, color in BOX_COLORS.items():
        stages, _, numbers, begins, ends = zip(*(b for b in boxes if b[1] == phase), strict=True)
        widths = np.subtract(ends, begins)
        bars = ax.barh(
            np.array(stages) % ranks,
            widths,
            left=begins,
            height=np.where(np.array(stages) < ranks, 0.7, 0.45),
            color=PHASES[phase],
            edgecolor="white",
            linewidth=np.where(widths > 4 * pixel, 0.5, 0),
            label=phase,
        )
        for bar, number in zip(bars, numbers, strict=True):
            if bar.get_width() >= pixel * (4 + 7 * len(str(number))):
                x, y = bar.get_center()
                ax.text(x, y, number, color=color, fontsize=7.5, ha="center", va="center")
    ax.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    ax.spines[["top", "right"]].set_visible(False)
    legend_above_bars(ax, 2)


def _seconds_per_step(spans, phase):
    steps = sum(name == "waiting" for name, _, _ in spans)
    return sum(end - begin for name, begin, end in spans if name == phase) / steps


def _measured_bubble(ranks):
    """The share of waiting for other ranks in the time without loading and updates."""
    waiting, forward, backward = (
        sum(_seconds_per_step(spans, phase) for spans in ranks)
        for phase in ("exposed", "forward", "backward")
    )
    return waiting / (waiting + forward + backward)
