"""Loss, accuracy and throughput of runs, while they train or afterwards."""

from collections.abc import Sequence

import numpy as np

from cnnlab.events import Evaluated, Event, Progress, Started
from cnnlab.plots.style import Axes, Runs, color_of, finish_curves, round_up, running_mean

Point = tuple[float, float, float]  # training images, seconds, loss


def loss(ax: Axes, runs: Runs, by: str = "images") -> None:
    """Draw the training loss of each step and its running mean, against `by`: images or seconds."""
    highest = 0.0
    for number, (label, events) in enumerate(runs.items()):
        x, losses = loss_curve(events, by)
        color = color_of(number)
        ax.plot(x, losses, color=color, alpha=0.3, linewidth=0.8)
        ax.plot(x, running_mean(losses), color=color, linewidth=1.8, label=label)
        highest = max([highest, *losses[np.isfinite(losses)]])
    ax.set_ylim(0, _loss_limit(highest))
    finish_curves(ax, runs, "training loss (cross-entropy)", by, "upper right")


def accuracy(ax: Axes, runs: Runs, by: str = "images") -> None:
    """Draw the accuracy on held-out images, and on training images as they came, against `by`."""
    for number, (label, events) in enumerate(runs.items()):
        color = color_of(number)
        training = [e for e in events if isinstance(e, Progress) and e.rank == 0]
        held_out = [e for e in events if isinstance(e, Evaluated) and e.rank == 0]
        x, y = _accuracy_curve(events, training, by)
        ax.plot(x, y, color=color, alpha=0.35, linewidth=1)
        x, y = _accuracy_curve(events, held_out, by)
        # The last point lies on the right edge of the axes, which would cut its marker in half.
        ax.plot(x, y, "o-", color=color, markersize=4, label=label, clip_on=False)
    ax.set_ylim(0, 102)
    finish_curves(ax, runs, "accuracy (%): held out (points), training (faint)", by, "lower right")


def throughput(ax: Axes, runs: Runs) -> None:
    """Draw images/s of all ranks together, without the warm-up, against seconds of training."""
    highest = 1.0
    for number, (label, events) in enumerate(runs.items()):
        progress = [e for e in events if isinstance(e, Progress) and e.rank == 0]
        timed = [e for e in progress if not e.warming_up]
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
    ranks: dict[int, list[Point]] = {}
    origins: dict[int, tuple[float, float]] = {}  # (images, seconds) where each rank (re)started
    expected = 0
    for event in events:
        if isinstance(event, Started):
            expected = 1 if event.recipe.strategy == "async" else event.world
            images = event.first_step * event.recipe.batch_size
            kept = [point for point in ranks.get(event.rank, []) if point[0] <= images]
            ranks[event.rank] = kept
            origins[event.rank] = (images, kept[-1][1] if kept else 0.0)
        elif isinstance(event, Progress) and event.rank in ranks:
            ranks[event.rank] += _new_points(event, ranks[event.rank], origins[event.rank])
    curves = [ranks.get(rank, []) for rank in range(expected)]
    common = min((len(curve) for curve in curves), default=0)
    if common == 0:
        return np.zeros(0), np.zeros(0)
    points = np.mean([curve[:common] for curve in curves], axis=0)
    column = 1 if by == "seconds" else 0
    return points[:, column], points[:, 2]


def _loss_limit(highest: float) -> float:
    """The upper limit of the loss axis: it starts above ln(10) and ignores divergence."""
    if highest <= 2.5:
        return 2.5
    return round_up(min(highest, 70.0))


def _new_points(event: Progress, points: list[Point], origin: tuple[float, float]) -> list[Point]:
    """The steps that `event` reports, spread evenly between the previous event and this one."""
    images, seconds = points[-1][:2] if points else origin
    steps = len(event.losses)
    x = np.linspace(images, event.images, steps + 1)[1:]
    t = np.linspace(seconds, origin[1] + event.seconds, steps + 1)[1:]
    return list(zip(x, t, event.losses, strict=True))


def _accuracy_curve(
    events: Sequence[Event], points: Sequence[Progress | Evaluated], by: str
) -> tuple[list[float], list[float]]:
    percent = [100 * point.accuracy for point in points]
    if by == "seconds":
        return [point.seconds for point in points], percent
    batch_size = next((e.recipe.batch_size for e in events if isinstance(e, Started)), 1)
    return [point.step * batch_size for point in points], percent
