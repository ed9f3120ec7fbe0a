"""Latency of everything a person waits for. Prints medians.

- importing the package, in a fresh interpreter
- from the call of `run` to the first step of all ranks
- from Stop to the end of every process
- from releasing a slider to the first point of the new run in the picture

    python tests/benchmarks/latency.py [ROUNDS]
"""

import statistics
import subprocess
import sys
import threading
import time

from cnnlab.events import Progress, Started
from cnnlab.launch.launcher import prewarm, run
from cnnlab.recipe import Recipe

TIMED_IMPORT = """
import time
{first}
began = time.perf_counter()
{then}
print(time.perf_counter() - began)
"""
IMPORTS = [  # (what is imported before the clock starts, what is timed)
    ("pass", "import cnnlab.recipe, cnnlab.events, cnnlab.record, cnnlab.plots"),
    ("pass", "import cnnlab.measure.compare"),
    ("import torch", "import cnnlab.launch.launcher"),
    ("import torch", "import cnnlab.widgets"),
]


def median_ms(seconds):
    return f"{1000 * statistics.median(seconds):.0f} ms"


def seconds_printed_by(code):
    """Run `code` in a fresh interpreter. Returns the number that it prints."""
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def imports(rounds):
    for first, then in IMPORTS:
        code = TIMED_IMPORT.format(first=first, then=then)
        times = [seconds_printed_by(code) for _ in range(rounds)]
        print(f"{then:72} after {first:13} {median_ms(times):>8}")


def first_step_and_stop(replicas):
    """Seconds from the call of `run` to the first step of all ranks, and from Stop to the end."""
    recipe = Recipe(replicas=replicas, epochs=1000, evaluate=False, warmup_steps=1)
    stop = threading.Event()
    stepped = set()
    began = time.perf_counter()
    for event in run(recipe, stop):
        if isinstance(event, Progress) and not stop.is_set():
            stepped.add(event.rank)
            if len(stepped) == replicas:
                first_step = time.perf_counter()
                stop.set()
    return first_step - began, time.perf_counter() - first_step


def starts_and_stops(rounds):
    prewarm()
    for replicas in (1, 2, 4):
        first_steps, ends = [], []
        for _ in range(rounds):
            first_step, end = first_step_and_stop(replicas)
            first_steps.append(first_step)
            ends.append(end)
        print(
            f"{replicas} ranks: first step of all ranks after {median_ms(first_steps)}, "
            f"all processes gone {median_ms(ends)} after Stop"
        )


def record_pictures(panel):
    """The list that gets an entry for each picture of the panel: (time, world sizes, has a point).

    A picture shows a point of the run once one of the panel's events is a `Progress`.
    """
    pictures = []
    png = panel.picture.png

    def recording_png(*args, **options):
        image = png(*args, **options)
        worlds = {event.world for event in panel.events if isinstance(event, Started)}
        has_point = any(isinstance(event, Progress) for event in panel.events)
        pictures.append((time.perf_counter(), worlds, has_point))
        return image

    panel.picture.png = recording_png
    return pictures


def wait_for_point(pictures, replicas):
    """The time of the first picture with a point of a run of so many ranks."""
    while True:
        for at, worlds, has_point in list(pictures):
            if has_point and worlds == {replicas}:
                return at
        time.sleep(0.005)


def slider_to_point(rounds):
    from cnnlab.widgets import ScalingPanel

    recipe = Recipe(batch_size=256, steps=4000, threads=1, evaluate=False)
    panel = ScalingPanel(recipe, ranks=(1, 2, 4))
    pictures = record_pictures(panel)
    panel.run()
    times = []
    for replicas in (2, 4, 1) * rounds:
        time.sleep(1.5)
        pictures.clear()
        began = time.perf_counter()
        panel.controls["replicas"].value = replicas
        times.append(wait_for_point(pictures, replicas) - began)
    panel.stop()
    panel.wait()
    print(
        f"slider's release to the first new point: {median_ms(times)}, "
        f"at most {1000 * max(times):.0f} ms"
    )


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    imports(count)
    starts_and_stops(count)
    slider_to_point(count)
