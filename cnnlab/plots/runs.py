"""Loss, accuracy and throughput of runs, while they train or afterwards."""

from collections.abc import Sequence

import numpy as np

from cnnlab.events import Evaluated, Event, Progress, Started
from cnnlab.plots.style import Axes, Runs, color_of, finish_curves, round_up, running_mean


def loss(ax: Axes, runs: Runs, by: str = "images") -> None:
    """Draw the training loss of each step and its running mean, against `by`: images or seconds."""
    highest = 0.0
    for number, (label, events) in enumerate(runs.items()):
        x, losses = loss_curve(events, by)
        color = color_of(number)
        ax.plot(x, losses, color=color, alpha=0.3, linewidth=0.8)
        ax.plot(x, running_mean(losses), color=color, linewidth=1.8, label=label)
        highest = max([highest, *losses[np.isfinite(losses)]])
    # Above ln(10), the loss of a guess among ten classes; a loss that diverges would hide the rest.
    ax.set_ylim(0, 2.5 if highest <= 2.5 else round_up(min(highest, 70.0)))
    finish_curves(ax, runs, "training loss (cross-entropy)", by, "upper right")


def accuracy(ax: Axes, runs: Runs, by: str = "images") -> None:
    """Draw the accuracy on held-out images, and on training images as they came, against `by`."""
    for number, (label, events) in enumerate(runs.items()):
        color = color_of(number)
        ax.plot(*_accuracy_curve(events, Progress, by), color=color, alpha=0.35, linewidth=1)
        x, y = _accuracy_curve(events, Evaluated, by)
        # The last point lies on the right edge of the axes, which would cut its marker in half.
        ax.plot(x, y, "o-", color=color, markersize=4, label=label, clip_on=False)
    ax.set_ylim(0, 102)
    finish_curves(ax, runs, "accuracy (%): held out (points), training (faint)", by, "lower right")


def throughput(ax: Axes, runs: Runs) -> None:
    """Draw images/s of all ranks together, without the warm-up, against seconds of training."""
    highest = 1.0
    for number, (label, events) in enumerate(runs.items()):
        timed = [e for e in events if isinstance(e, Progress) and e.rank == 0 and not e.warming_up]
        rates = [e.images_per_s for e in timed]
        ax.plot([e.seconds for e in timed], rates, ".-", color=color_of(number), label=label)
        highest = max([highest, *rates])
    ax.set_ylim(0, round_up(1.1 * highest))
    finish_curves(ax, runs, "images/s", "seconds", "lower right")


def loss_curve(events: Sequence[Event], by: str = "images") -> tuple[np.ndarray, np.ndarray]:
    """Training images or seconds (`by`) and the loss of every step, mean over the ranks.

    The curve ends where the slowest rank is. Under async, where each rank takes its own steps, it
    shows rank 0. Steps that are trained again after a restart count once.
    """
    curves: dict[int, list] = {}  # of each rank: (images, seconds, loss), first where it started
    resumed_s: dict[int, float] = {}  # of each rank: training time before its latest start
    expected = 0
    for event in events:
        if isinstance(event, Started):
            expected = 1 if event.recipe.strategy == "async" else event.world
            images = event.first_step * event.recipe.batch_size
            kept = [point for point in curves.get(event.rank, [])[1:] if point[0] <= images]
            curves[event.rank] = [(images, 0.0, np.nan), *kept]
            resumed_s[event.rank] = curves[event.rank][-1][1]
        elif isinstance(event, Progress) and event.rank in curves:
            curve = curves[event.rank]
            end = (event.images, resumed_s[event.rank] + event.seconds)
            # The steps lie evenly between the previous event and this one.
            x, t = np.linspace(curve[-1][:2], end, len(event.losses) + 1)[1:].T
            curve += zip(x, t, event.losses, strict=True)
    shortest = min((len(curves.get(rank, [])) for rank in range(expected)), default=0)
    if shortest < 2:
        return np.zeros(0), np.zeros(0)
    points = np.mean([curves[rank][1:shortest] for rank in range(expected)], axis=0)
    column = 1 if by == "seconds" else 0
    return points[:, column], points[:, 2]


def _accuracy_curve(events, kind, by):
    points = [event for event in events if isinstance(event, kind) and event.rank == 0]
    percent = [100 * point.accuracy for point in points]
    if by == "seconds":
        return [point.seconds for point in points], percent
    batch_size = next((e.recipe.batch_size for e in events if isinstance(e, Started)), 1)
    return [point.step * batch_size for point in points], percent
