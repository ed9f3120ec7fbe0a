"""Pictures of runs: pure `draw(ax, data)` functions, the same for live, recorded and tested plots.

The curves can be drawn again on the same axes with more data: a line that is there already only gets new points.
"""

import numpy as np

from cnnlab.events import Finished, Progress, Started
from cnnlab.plots.style import (
    COLORS,
    PHASES,
    _curve,
    _fit,
    _legend_of_bars,
    _plain,
)


def rank_timeline(ax, runs):
    """The last steps of the newest run, a row a rank: what it did when; in a lane below, when exchanges with other ranks were on.

    Communication in the bar itself is "exposed": the rank had nothing else left to do.
    """
    events = list(runs.values())[-1] if runs else []
    last = {}
    for event in events:
        if isinstance(event, Progress) and event.spans:
            last[event.rank] = event
    world = max((event.world for event in events if isinstance(event, Started)), default=1)
    until = min((max(end for _, _, end in event.spans) for event in last.values()), default=0.0)
    since = max((min(begin for _, begin, _ in event.spans) for event in last.values()), default=0.0)
    for phase, colour in PHASES.items():
        shared = phase == "communication"
        spans = [
            (rank + 0.34 * shared, begin, end)
            for rank, event in last.items()
            for name, begin, end in event.spans
            if name == phase and end > since and begin < until
        ]
        x = [1000 * (time - since) for _, begin, end in spans for time in (begin, end, np.nan)]
        y = [row for row, _, _ in spans for _ in range(3)]
        _curve(
            ax,
            phase,
            x,
            y,
            color=colour,
            linewidth=(30 if shared else 90) / max(world, 3),
            solid_capstyle="butt",
            label="" if phase == "exposed" else phase,
        )
    _fit(ax, 1000 * max(until - since, 0.001), 1.1)
    ax.set_ylim(world - 0.3, -1.1)  # room above for the legend
    if len(ax.get_yticklabels()) != world or not ax.get_legend():
        ax.set_yticks(range(world), [f"rank {rank}" for rank in range(world)])
        ax.set_xlabel("milliseconds: the last steps")
        ax.spines[["top", "right"]].set_visible(False)
        _legend_of_bars(ax, 5)


def step_breakdown(ax, runs):
    """Milliseconds a step of each run, a bar each: computing, waiting for the loader, for other ranks. `runs`: {label: events}.

    Of a run under way, those of its last steps; on a GPU, nothing before it has finished.
    """
    steps = {label: parts for label, events in runs.items() if (parts := _step_parts(events))}
    parts = {
        "compute": COLORS[0],
        "waiting for data": PHASES["waiting"],
        "waiting for other ranks": PHASES["exposed"],
    }
    for number, (part, colour) in enumerate(parts.items()):
        if number == 2 and not any(step[2] for step in steps.values()):
            continue
        x = [
            at
            for step in steps.values()
            for at in (sum(step[:number]), sum(step[: number + 1]), np.nan)
        ]
        y = [row for row, step in enumerate(steps.values()) for _ in range(3)]
        _curve(
            ax,
            part,
            x,
            y,
            color=colour,
            linewidth=min(22, 110 / max(len(steps), 1)),
            solid_capstyle="butt",
            label=part,
        )
    _fit(ax, max((sum(step) for step in steps.values()), default=1.0), 1.15)
    if [label.get_text() for label in ax.get_yticklabels()] != list(steps) or not ax.get_legend():
        ax.set_yticks(range(len(steps)), list(steps))
        ax.set_ylim(max(len(steps), 1) - 0.4, -1.3)  # room above for the legend
        ax.set_xlabel("milliseconds a step")
        _legend_of_bars(ax, 3)
        _plain(ax)


def _step_parts(events):
    """Milliseconds (computing, waiting for data, for other ranks) of a step of rank 0; None where the run has not told yet."""
    end = next((event for event in events if isinstance(event, Finished) and event.rank == 0), None)
    if end:
        return [
            1000 * (seconds or 0.0)
            for seconds in (end.compute_s, end.waiting_s, end.communication_s)
        ]
    spans = next(
        (
            event.spans
            for event in reversed(events)
            if isinstance(event, Progress) and event.rank == 0
        ),
        [],
    )
    steps = sum(phase == "waiting" for phase, _, _ in spans)
    sums = [
        sum(end - begin for phase, begin, end in spans if phase in some)
        for some in (("forward", "backward", "update"), ("waiting",), ("exposed",))
    ]
    return [1000 * seconds / steps for seconds in sums] if steps else None
