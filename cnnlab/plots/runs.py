"""Pictures of runs: pure `draw(ax, data)` functions, the same for live, recorded and tested plots.

The curves can be drawn again on the same axes with more data: a line that is there already only gets new points.
"""

import numpy as np

from cnnlab.events import Evaluated, Progress, Started
from cnnlab.plots.style import (
    BY,
    COLORS,
    _curve,
    _frame,
    _recipe,
    _round_up,
    _running_mean,
)


def loss(ax, runs, by="images"):
    """Training loss of each step, mean over the ranks. `runs`: {label: its events so far}; `by`: "images" seen, or "seconds"."""
    highest = 0.0
    for number, (label, events) in enumerate(runs.items()):
        x, losses = loss_curve(events, by)
        colour = COLORS[number % len(COLORS)]
        _curve(ax, f"{number} raw", x, losses, color=colour, alpha=0.3, linewidth=0.8)
        _curve(
            ax, f"{number} mean", x, _running_mean(losses), color=colour, linewidth=1.8, label=label
        )
        highest = max([highest, *losses])
    _frame(ax, "training loss (cross-entropy)", BY[by], runs)
    ax.set_ylim(
        0,
        2.5
        if highest < 2.5
        else min(2.0 ** np.ceil(np.log2(highest)), 64)
        if np.isfinite(highest)
        else 64,
    )


def accuracy(ax, runs, by="images"):
    """Accuracy against images seen, or seconds: held-out images as points, training images, as they came, as a faint line."""
    for number, (label, events) in enumerate(runs.items()):
        colour = COLORS[number % len(COLORS)]
        shown = [event for event in events if event.rank == 0]
        progress = [event for event in shown if isinstance(event, Progress)]
        held_out = [event for event in shown if isinstance(event, Evaluated)]
        batch = _recipe(shown).batch_size if progress or held_out else 1
        x = lambda event: event.seconds if by == "seconds" else event.step * batch
        _curve(
            ax,
            f"{number} train",
            [x(e) for e in progress],
            [100 * e.accuracy for e in progress],
            color=colour,
            alpha=0.35,
            linewidth=1,
        )
        _curve(
            ax,
            f"{number} test",
            [x(e) for e in held_out],
            [100 * e.accuracy for e in held_out],
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1.5,
            label=label,
        )
    _frame(ax, "accuracy (%): held out (points), training (faint)", BY[by], runs)
    ax.set_ylim(0, 102)


def throughput(ax, runs):
    """Images/s, all ranks together, against seconds of training; the warm-up left out."""
    highest = 1.0
    for number, (label, events) in enumerate(runs.items()):
        progress = [
            e for e in events if isinstance(e, Progress) and e.rank == 0 and not e.warming_up
        ]
        rates = [e.images_per_s for e in progress]
        _curve(
            ax,
            f"{number}",
            [e.seconds for e in progress],
            rates,
            color=COLORS[number % len(COLORS)],
            linewidth=1.5,
            marker=".",
            label=label,
        )
        highest = max([highest, *rates])
    _frame(ax, "images/s", "seconds of training", runs)
    ax.set_ylim(0, _round_up(1.1 * highest))


def loss_curve(events, by="images"):
    """(images seen, or seconds of training; loss) of every step: mean over the ranks, as far as all have reported.

    Under async, whose ranks take steps of their own, those of rank 0. What was trained again after a restart counts once.
    """
    ranks, begun, world, alone = (
        {},
        {},
        0,
        False,
    )  # {rank: [(images, seconds, loss)]}, {rank: (images, seconds) at its start}
    for event in events:
        if isinstance(event, Started):
            world, alone = event.world, event.recipe.strategy == "async"
            images = event.first_step * event.recipe.batch_size
            kept = ranks[event.rank] = [
                point for point in ranks.get(event.rank, []) if point[0] <= images
            ]
            begun[event.rank] = images, kept[-1][1] if kept else 0.0
        elif isinstance(event, Progress) and event.rank in ranks:
            points, steps = ranks[event.rank], len(event.losses)
            images, seconds = points[-1][:2] if points else begun[event.rank]
            new = np.linspace(
                (images, seconds), (event.images, begun[event.rank][1] + event.seconds), steps + 1
            )[1:]
            points += [(*at, loss) for at, loss in zip(new, event.losses)]
    if alone:
        ranks, world = {0: ranks.get(0, [])}, 1
    done = min(map(len, ranks.values())) if ranks and len(ranks) >= world else 0
    if not done:
        return [], []
    points = np.mean([points[:done] for points in ranks.values()], axis=0)
    return points[:, 1 if by == "seconds" else 0], points[:, 2]
