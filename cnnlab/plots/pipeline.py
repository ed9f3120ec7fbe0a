"""The schedule of a pipeline, simulated, next to the idle time that was measured."""

from collections import defaultdict

from cnnlab.events import Progress, Started
from cnnlab.parallel.pipeline_schedule import (
    bubble_fraction,
    equal_stages_bubble,
    simulate_schedule,
    stages_per_rank,
)
from cnnlab.plots.style import PHASES, Axes, Runs, legend_above_bars, round_up
from cnnlab.plots.timeline import seconds_per_step

TEXT_COLORS = {"forward": "black", "backward": "white"}


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
    measured = [seconds_per_step(latest.get(rank, [])) for rank in range(ranks)]  # first replica
    times = {"forward": [1.0] * ranks, "backward": [2.0] * ranks}  # of a micro-batch, each rank
    title = f"bubble: formula {equal_stages_bubble(schedule, ranks, count):.0%}"
    ax.set_xlabel("time, if all stages were equal")
    if all(measured):
        for phase in times:
            times[phase] = [1000 * step[phase] / count for step in measured]
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
    own = defaultdict(list)
    for stage, phase, number, begin, end in boxes:
        own[stage, phase].append((begin, end - begin))
        if end - begin >= pixel * (4 + 7 * len(str(number))):
            center, color = (begin + end) / 2, TEXT_COLORS[phase]
            ax.text(center, stage % ranks, number, size=7.5, color=color, ha="center", va="center")
    for (stage, phase), bars in own.items():
        height = 0.7 if stage < ranks else 0.45
        width = 0.5 if bars[0][1] > 4 * pixel else 0  # of the edge, which would hide short boxes
        style = {"facecolor": PHASES[phase], "edgecolor": "white", "linewidth": width}
        label = phase if stage == 0 else "_"
        ax.broken_barh(bars, (stage % ranks - height / 2, height), label=label, **style)
    ax.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    ax.spines[["top", "right"]].set_visible(False)
    legend_above_bars(ax, 2)


def _measured_bubble(ranks):
    """The share of waiting for other ranks in the time without loading and updates."""
    waiting = sum(step["exposed"] for step in ranks)
    computing = sum(step["forward"] + step["backward"] for step in ranks)
    return waiting / (waiting + computing)
