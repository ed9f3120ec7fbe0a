"""What the command line prints of a run and of a ladder's rungs."""

import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from tqdm.auto import tqdm

from cnnlab import events


def show(stream: Iterable[events.Event]) -> None:
    """Print a run: a bar while it trains, and a line for each event worth one."""
    stream = iter(stream)
    first = list(islice(stream, 1))  # before the bar: an error then stands on a line of its own
    with tqdm(unit="step", file=sys.stderr, leave=False, disable=None) as bar:
        for event in chain(first, stream):
            for line in event_lines(event):
                bar.write(line, file=sys.stdout)
            match event:
                case events.Started(rank=0):
                    bar.reset(event.steps)
                    bar.update(event.first_step)
                case events.Progress(rank=0):
                    bar.update(event.step - bar.n)
                    speed = f"{event.images_per_s:,.0f} images/s"
                    bar.set_postfix_str(f"loss {event.losses[-1]:.3f}, {speed}")


def event_lines(event: events.Event) -> Iterator[str]:
    """What is printed of an event. Except for failures, rank 0 speaks for all ranks."""
    match event:
        case events.Failed():
            yield f"rank {event.rank} failed: {event.error}"
        case events.Restarted():
            yield f"rank {event.rank} failed: {event.error}. Restart {event.attempt} of all ranks"
        case events.Started(rank=0):
            if event.first_step:
                yield f"resuming from the checkpoint of step {event.first_step}"
            ranks = "1 rank" if event.world == 1 else f"{event.world} ranks"
            images = f"{event.train_images:,} images to train on, {event.test_images:,} held out"
            yield f"{event.recipe.model}, {event.parameters:,} parameters; {images}; {ranks}"
        case events.Checkpointed(rank=0):
            yield f"step {event.step:5}: checkpoint written in {event.took_s:.2f} s"
        case events.Evaluated(rank=0):
            accuracy = f"{100 * event.accuracy:.1f}%"
            yield f"epoch {event.epoch:3}: held-out accuracy {accuracy}, loss {event.loss:.3f}"
        case events.Finished(rank=0):
            total = f"{event.images:,} images in {event.seconds:.1f} s"
            warmup = f"{event.warmup_s:.1f} s warm-up"
            waits = f"{1000 * event.waiting_s:.1f} waiting for data"
            if event.communication_s is not None:
                waits += f", {1000 * event.communication_s:.1f} for other ranks"
            speed = f"{event.images_per_s:,.0f} images/s ({1000 * event.step_s:.1f} ms per step: "
            memory = f"peak memory {event.peak_memory_mib:,.0f} MiB"
            yield f"{total}, of which {warmup}; then {speed}{waits}); {memory}"


def rung_line(rung: Any) -> str:
    if rung.failed:
        return f"{rung.name:24} failed, left out: {rung.failed}"
    speed = f"{rung.measurement.quartiles[1]:10,.0f} images/s"
    speedup = f"{rung.over_baseline.value:5.2f}x baseline"
    verdict = "kept" if rung.kept else "does not pay, left out"
    return f"{rung.name:24} {speed}  {speedup}  {verdict}: {rung.over_below}"
