"""The schedule of a pipeline, simulated, next to the idle time that was measured."""

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
    forward_s, backward_s = [1.0] * ranks, [2.0] * ranks
    if all(measured):
        forward_s = [_seconds_per_step(spans, "forward") / count for spans in measured]
        backward_s = [_seconds_per_step(spans, "backward") / count for spans in measured]
    held = stages_per_rank(schedule)
    forward_s = [seconds / held for seconds in forward_s] * held
    backward_s = [seconds / held for seconds in backward_s] * held
    boxes = simulate_schedule(schedule, forward_s, backward_s, count)
    _draw_boxes(ax, boxes, ranks, 1000 if all(measured) else 1)
    title = f"bubble: formula {equal_stages_bubble(schedule, ranks, count):.0%}"
    if all(measured):
        title += f", simulated {bubble_fraction(boxes, ranks):.0%}"
        title += f", measured {_measured_bubble(measured):.0%}"
    ax.set_title(title, fontsize=8, loc="right", y=1.0)
    ax.set_xlabel("milliseconds, simulated" if all(measured) else "time, if all stages were equal")


def _draw_boxes(ax, boxes, ranks, scale):
    right = round_up(scale * max(end for *_, end in boxes))
    pixel = right / ax.bbox.width
    ax.set(xlim=(0, right), ylim=(ranks - 0.3, -1.1))  # the first row leaves room for the legend
    for phase, color in BOX_COLORS.items():
        own = [box for box in boxes if box[1] == phase]
        bars = ax.barh(
            [stage % ranks for stage, *_ in own],
            [scale * (end - begin) for *_, begin, end in own],
            left=[scale * begin for *_, begin, _ in own],
            height=[0.7 if stage < ranks else 0.45 for stage, *_ in own],
            color=PHASES[phase],
            edgecolor="white",
            linewidth=[0.5 if scale * (end - begin) > 4 * pixel else 0 for *_, begin, end in own],
            label=phase,
        )
        for bar, (_, _, number, _, _) in zip(bars, own, strict=True):
            if bar.get_width() >= pixel * (4 + 7 * len(str(number))):
                ax.text(
                    *bar.get_center(), number, color=color, fontsize=7.5, ha="center", va="center"
                )
    ax.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    ax.spines[["top", "right"]].set_visible(False)
    legend_above_bars(ax, 2)


def _seconds_per_step(spans, phase):
    steps = sum(name == "waiting" for name, _, _ in spans)
    return sum(end - begin for name, begin, end in spans if name == phase) / steps


def _measured_bubble(ranks):
    """The share of waiting for other ranks in their time without data loading and updates."""
    waiting = sum(_seconds_per_step(spans, "exposed") for spans in ranks)
    computing = sum(
        _seconds_per_step(spans, phase) for spans in ranks for phase in ("forward", "backward")
    )
    return waiting / (waiting + computing)
