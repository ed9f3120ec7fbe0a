"""What the command line prints of a run, a rung, a prediction, and this machine."""

import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from tqdm.auto import tqdm

from cnnlab import events, machine


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
            if event.skipped_steps:
                memory += f"; steps skipped, because fp16 overflowed: {event.skipped_steps}"
            yield f"{total}, of which {warmup}; then {speed}{waits}); {memory}"


def rung_line(rung: Any) -> str:
    if rung.failed:
        return f"{rung.name:24} failed, left out: {rung.failed}"
    speed = f"{rung.measurement.quartiles[1]:10,.0f} images/s"
    speedup = f"{rung.over_baseline.value:5.2f}x baseline"
    verdict = "kept" if rung.kept else "does not pay, left out"
    line = f"{rung.name:24} {speed}  {speedup}  {verdict}: {rung.over_below}"
    if rung.accuracy_below is not None:  # the batches differ
        accuracy = rung.measurement.accuracy
        line += f"; batch {rung.recipe.batch_size}, accuracy {accuracy:.1%}, below "
        line += f"{rung.accuracy_below:.1%}"
    return line


def prediction_lines(result: dict[str, Any]) -> Iterator[str]:
    """A table of the predictions, in ms per step, and what they assume."""
    yield (
        f"{'devices':>9} {'images/s':>13} {'speedup':>10} {'efficiency':>10} {'step':>9} "
        f"{'compute':>9} {'exposed':>9} {'jitter':>9} {'idle':>9} ms, bound by"
    )
    for row in result["predictions"]:
        parts = ("step_s", "compute_s", "exposed_communication_s", "jitter_s", "idle_s")
        times = " ".join(f"{1000 * row[part]:9.1f}" for part in parts)
        speed = f"{row['images_per_s']:13,.0f} {row['speedup']:10,.1f} {row['efficiency']:10.1%}"
        yield f"{row['devices']:9,} {speed} {times}     {row['bound_by']}"
    yield ""
    for name, assumption in result["assumptions"].items():
        value = assumption["value"]
        if isinstance(value, list):
            value = f"{len(value)} given" if value else "none"
        elif isinstance(value, float):
            value = f"{value:.3g}"
        yield f"{name:24} {value!s:12} {assumption['origin']}"


def doctor_lines(
    here: machine.Machine, peaks: dict[str, float], gpu_peaks: dict[str, float]
) -> Iterator[str]:
    """What this machine can do, what it lacks, and why. Peaks: as measured, {} without a GPU."""
    gpus = [
        f"{gpu.name} (device={gpu.device!r}, {gpu.memory_gib} GiB, "
        f"capability {gpu.capability or 'unknown'})"
        for gpu in here.accelerators
    ]
    rows: dict[str, Any] = {
        "processor": here.name,
        "system": here.system,
        "cores": f"{here.physical_cores or 'unknown'} physical, {here.logical_cores} logical, "
        f"{here.cores} usable",
        "memory": f"{here.memory_gib} GiB",
        "instruction sets": ", ".join(here.units) or "none known",
        "GPUs": "; ".join(gpus) or "none",
        "C++ compiler": here.compiler or "none",
    }
    for label, answer in (("in hardware", True), ("emulated", False), ("unknown", None)):
        names = [name for name, found in here.hardware.items() if found is answer]
        rows[label] = ", ".join(names) or "none"
    rows |= here.versions
    for prefix, measured in (("", peaks), ("GPU ", gpu_peaks)):
        for name, value in measured.items():
            if name == "copy":
                rows[f"{prefix}copy bandwidth"] = (
                    f"{value / 1e9:,.1f} GB/s measured (reads and writes)"
                )
            else:
                rows[f"{prefix}peak {name}"] = f"{value / 1e9:,.0f} GFLOP/s measured"
    for name, value in rows.items():
        yield f"{name:24} {value}"
    for name, reason in here.missing.items():
        yield f"missing: {name:15} {reason}"
