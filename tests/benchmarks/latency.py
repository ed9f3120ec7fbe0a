"""Waiting times: importing, from the call of `run` to its first event, from Stop to the end of every process.

    python tests/benchmarks/latency.py [ROUNDS]
"""

import statistics
import subprocess
import sys
import threading
import time

from cnnlab.events import Progress
from cnnlab.launch import prewarm, run
from cnnlab.recipe import Recipe


def seconds_of(code):
    """Of a fresh interpreter that runs `code`, which prints them."""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def imports(rounds):
    timed = "import time; {first}; began = time.perf_counter(); {then}; print(time.perf_counter() - began)"
    for first, then in (("pass", "import cnnlab.recipe, cnnlab.events, cnnlab.record, cnnlab.plot"), ("pass", "import cnnlab.compare"),
                        ("import torch", "import cnnlab.launch"), ("import torch", "import cnnlab.panel")):
        times = [seconds_of(timed.format(first=first, then=then)) for _ in range(rounds)]
        print(f"{then:72} after {first:13} {1000 * statistics.median(times):5.0f} ms")


def starts_and_stops(rounds):
    prewarm()
    for replicas in (1, 2, 4):
        first, stopped = [], []
        for _ in range(rounds):
            stop, began = threading.Event(), time.perf_counter()
            for event in run(Recipe(replicas=replicas, epochs=1000, evaluate=False, warmup_steps=1), stop):
                if isinstance(event, Progress) and not stop.is_set():
                    first.append(time.perf_counter() - began)
                    began = time.perf_counter()
                    stop.set()
            stopped.append(time.perf_counter() - began)
        print(f"{replicas} ranks: first step after {1000 * statistics.median(first):.0f} ms, all gone {1000 * statistics.median(stopped):.0f} ms after Stop")


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    imports(count)
    starts_and_stops(count)
