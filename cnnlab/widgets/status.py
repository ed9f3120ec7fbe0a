"""What the status line of a panel says about a run."""

from collections.abc import Sequence

from cnnlab import machine
from cnnlab.events import Event, Finished, Progress, Started
from cnnlab.recipe import Recipe


def status_line(event: Event, events: Sequence[Event]) -> tuple[float, str] | None:
    """(fraction done, status line) of an event, given the run's events; None if it has no news."""
    if isinstance(event, Progress):
        started = next(e for e in events if isinstance(e, Started))
        line = f"step {event.step} of {started.steps}, epoch {event.epoch}: "
        line += f"loss {event.losses[-1]:.3f}, {event.images_per_s:,.0f} images/s"
        line += oversubscription_note(started.world, started.threads)
        return event.step / started.steps, line + simulated_note(started.recipe)
    if isinstance(event, Finished):
        line = f"{event.images:,} images in {event.seconds:.1f} s: "
        line += f"{event.images_per_s:,.0f} images/s"
        if event.accuracy is not None:
            line += f", held-out accuracy {100 * event.accuracy:.1f}%"
        if event.skipped_steps:
            line += f", {plural(event.skipped_steps, 'step')} skipped (fp16 overflow)"
        return 1.0, line
    return None


def simulated_note(recipe: Recipe) -> str:
    """A warning for figures that a simulated network has slowed down; empty for others."""
    return ", SIMULATED network" if recipe.latency_ms or recipe.bandwidth_mbit else ""


def oversubscription_note(ranks: int, threads: int | None) -> str:
    """A note for ranks that have fewer cores than threads; empty for others."""
    cores = machine.cores()
    threads = threads or 1
    if ranks == 1 or ranks * threads <= cores:
        return ""
    return f" &ndash; {ranks} ranks of {plural(threads, 'thread')} share {plural(cores, 'core')}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
