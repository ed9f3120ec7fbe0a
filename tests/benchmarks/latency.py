"""Waiting times: importing; from the call of `run` to the first step of all ranks; from Stop to the end of every process; from a
slider's release to the first point of the new run on the picture.

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


def seconds_of(code):
    """Of a fresh interpreter that runs `code`, which prints them."""
    return float(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )


def imports(rounds):
    timed = "import time; {first}; began = time.perf_counter(); {then}; print(time.perf_counter() - began)"
    for first, then in (
        ("pass", "import cnnlab.recipe, cnnlab.events, cnnlab.record, cnnlab.plot"),
        ("pass", "import cnnlab.compare"),
        ("import torch", "import cnnlab.launch"),
        ("import torch", "import cnnlab.panel"),
    ):
        times = [seconds_of(timed.format(first=first, then=then)) for _ in range(rounds)]
        print(f"{then:72} after {first:13} {1000 * statistics.median(times):5.0f} ms")


def starts_and_stops(rounds):
    prewarm()
    for replicas in (1, 2, 4):
        first, stopped = [], []
        for _ in range(rounds):
            stop, began, stepped = threading.Event(), time.perf_counter(), set()
            for event in run(
                Recipe(replicas=replicas, epochs=1000, evaluate=False, warmup_steps=1), stop
            ):
                if isinstance(event, Progress) and not stop.is_set():
                    stepped.add(event.rank)
                    if len(stepped) == replicas:
                        first.append(time.perf_counter() - began)
                        began = time.perf_counter()
                        stop.set()
            stopped.append(time.perf_counter() - began)
        print(
            f"{replicas} ranks: first step of all after {1000 * statistics.median(first):.0f} ms, all gone {1000 * statistics.median(stopped):.0f} ms after Stop"
        )


def slider_to_point(rounds):
    from cnnlab.widgets.panels import ScalingPanel

    board, drawn = (
        ScalingPanel(
            Recipe(batch_size=256, steps=4000, threads=1, evaluate=False), ranks=(1, 2, 4)
        ),
        [],
    )
    png = board.picture.png
    board.picture.png = lambda draw: (
        png(draw),
        drawn.append(
            (
                time.perf_counter(),
                {event.world for event in board.events if isinstance(event, Started)},
                any(isinstance(event, Progress) for event in board.events),
            )
        ),
    )[0]
    board.run()
    times = []
    for replicas in (2, 4, 1) * rounds:
        time.sleep(1.5)
        drawn.clear()
        began = time.perf_counter()
        board.controls["replicas"].value = replicas
        while not (there := [at for at, world, point in drawn if point and world == {replicas}]):
            time.sleep(0.005)
        times.append(there[0] - began)
    board.stop()
    board.wait()
    print(
        f"slider's release to the first new point: {1000 * statistics.median(times):.0f} ms, {1000 * max(times):.0f} at most"
    )


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    imports(count)
    starts_and_stops(count)
    slider_to_point(count)
