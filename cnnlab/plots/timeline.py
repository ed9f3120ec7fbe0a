"""Where the time of a training step goes: a timeline of the ranks, and the parts of a step."""

from collections.abc import Sequence

import numpy as np

from cnnlab.events import Finished, Progress, Started
from cnnlab.plots.style import COLORS, PHASES, Axes, Runs, hide_frame, legend_above_bars, round_up

PARTS = {
    "compute": COLORS[0],
    "waiting for data": PHASES["waiting"],
    "exposed communication": PHASES["exposed"],
}

# The legend leaves out exposed communication, which has the color of communication.
PHASE_LABELS = {"waiting": "waiting for data", "exposed": "_"}


def rank_timeline(ax: Axes, runs: Runs) -> None:
    """Draw the latest steps of the last run: a row for each rank, a bar for each phase.

    A thin bar below a row shows when the rank communicates. Communication in the row itself is
    exposed: the rank has nothing to compute meanwhile.
    """
    events = list(runs.values())[-1] if runs else []
    world = max((event.world for event in events if isinstance(event, Started)), default=1)
    spans = {e.rank: e.spans for e in events if isinstance(e, Progress) and e.spans}
    # Show only the time for which all ranks have reported.
    begin = max((min(span[1] for span in rank) for rank in spans.values()), default=0.0)
    end = min((max(span[2] for span in rank) for rank in spans.values()), default=0.0)
    for phase, color in PHASES.items():
        bars = [
            (rank, 1000 * (start - begin), 1000 * (stop - begin))
            for rank, rank_spans in spans.items()
            for name, start, stop in rank_spans
            if name == phase and stop > begin and start < end
        ]
        rows, left, right = np.array(bars).reshape(-1, 3).T
        shift, width = (0.38, 24) if phase == "communication" else (0, 75)
        label = PHASE_LABELS.get(phase, phase)
        ax.hlines(rows + shift, left, right, color, linewidth=width / max(world, 3), label=label)
    right = round_up(1.1 * 1000 * max(end - begin, 0.001))
    ax.set(xlim=(0, right), xlabel="milliseconds, latest steps")
    ax.set_ylim(world - 0.3, -1.1)  # the first row leaves room for the legend
    ax.set_yticks(range(world), [f"rank {rank}" for rank in range(world)])
    ax.spines[["top", "right"]].set_visible(False)
    legend_above_bars(ax, len(PHASES) - 1)


def step_breakdown(ax: Axes, runs: Runs) -> None:
    """Draw the milliseconds per step of each run: compute, data loading, exposed communication.

    A run in progress shows its latest steps.
    """
    steps = {label: parts for label, events in runs.items() if (parts := _step_parts(events))}
    rows = range(len(steps))
    left = np.zeros(len(steps))
    for number, (part, color) in enumerate(PARTS.items()):
        widths = np.array([step[number] for step in steps.values()])
        if part == "exposed communication" and not widths.any():
            continue
        ax.barh(rows, widths, left=left, height=0.5, color=color, label=part)
        left = left + widths
    ax.set(xlim=(0, round_up(1.15 * max([1.0, *left]))), xlabel="milliseconds per step")
    ax.set_ylim(max(len(steps), 2) - 0.4, -1.1)  # the first row leaves room for the legend
    ax.set_yticks(rows, list(steps))
    if steps:  # The legend of bars that are empty has wrong colors.
        legend_above_bars(ax, len(PARTS))
    hide_frame(ax)


def _step_parts(events):
    """Milliseconds per step of rank 0 for each of `PARTS`; None if the run has no figures yet."""
    for event in reversed(events):
        if isinstance(event, Finished) and event.rank == 0:
            parts = (event.compute_s, event.waiting_s, event.communication_s)
            return [1000 * (seconds or 0.0) for seconds in parts]
        if isinstance(event, Progress) and event.rank == 0:
            seconds = seconds_per_step(event.spans)
            if not seconds:
                return None
            compute = seconds["forward"] + seconds["backward"] + seconds["update"]
            return [1000 * part for part in (compute, seconds["waiting"], seconds["exposed"])]
    return None


def seconds_per_step(spans: Sequence) -> dict[str, float]:
    """The mean seconds of each phase in a step; {} if no step is complete."""
    steps = sum(phase == "waiting" for phase, _, _ in spans)
    if steps == 0:
        return {}
    seconds = dict.fromkeys(PHASES, 0.0)
    for phase, begin, end in spans:
        seconds[phase] += (end - begin) / steps
    return seconds
