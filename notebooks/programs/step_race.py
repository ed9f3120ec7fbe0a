"""Measure several ways of the same work in turn, and the panel that does it live (lesson 11)."""

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from cnnlab import Measurement, Recipe, plots
from cnnlab.widgets import Panel, Picture, slider

PROGRAM = Path(__file__).with_name("step_worker.py")
CALLS = 5  # in a repeat, which is their median


class Worker:
    """A process that measures one way, and waits between two measurements.

    `.first`: {batch: {"first_s": seconds of the first call, which compiles, "result": its result}}.
    """

    def __init__(self, *arguments):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, str(PROGRAM), *arguments]
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.answers, self.asked, self.first = queue.Queue(), 0, {}
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.answers.put(json.loads(line))
        self.answers.put({"error": "its process has ended"})

    def ask(self, batch, calls, stop=None):
        """{"seconds": of each call}, or {"error": a sentence}; None if `stop` is set before."""
        try:
            self.process.stdin.write(f"{batch} {calls}\n")
            self.process.stdin.flush()
        except OSError:
            return {"error": "its process has ended"}
        self.asked += 1
        while stop is None or not stop.is_set():
            try:
                answer = self.answers.get(timeout=0.2)
            except queue.Empty:
                continue
            self.asked -= 1
            if "first_s" in answer:
                self.first[answer["batch"]] = answer
            if "error" in answer or self.asked == 0:  # not one that an earlier Stop left behind
                return answer
        return None

    def close(self):
        """End the process."""
        self.process.kill()
        self.process.wait()


class Race:
    """Processes that do the same work in different ways; only one of them measures at a time."""

    def __init__(self, work, ways, device, cores):
        self.workers = {way: Worker(work, way, device, cores) for way in ways}
        self.lock = threading.Lock()

    def first(self, way, batch):
        """{"first_s": seconds of the first call, which compiles, "result": its result}."""
        return self.workers[way].first[batch]

    def seconds(self, way, batch, calls=CALLS, stop=None):
        """Seconds of each call of one way; [] if it was stopped, or failed, which is printed."""
        found = self.workers[way].ask(batch, calls, stop)
        if found and "error" in found:
            print(f"{way} does not work here, and is left out: {found['error']}")
            self.workers.pop(way).close()
        return found.get("seconds", []) if found else []

    def rounds(self, batch, repeats, stop=None):
        """Measure in the order A B C C B A ..., and yield {way: images/s of each repeat so far}."""
        with self.lock:
            for way in list(self.workers):  # compile, and warm up
                self.seconds(way, batch, 2, stop)
            rates = {way: [] for way in self.workers}
            for number in range(repeats):
                for way in list(rates) if number % 2 == 0 else reversed(rates):
                    seconds = self.seconds(way, batch, stop=stop)
                    if not seconds:
                        return
                    rates[way].append(batch / np.median(seconds))
                yield {way: tuple(values) for way, values in rates.items()}

    def measure(self, batch, repeats):
        """{way: Measurement}, the first way is the baseline."""
        *_, rates = self.rounds(batch, repeats)
        return as_measurements(rates)

    def seconds_by_size(self, sizes, repeats, limit):
        """{way: {size: seconds of each call}}. A call that would take longer is left out."""
        found = {way: {} for way in self.workers}
        for size in sizes:
            for way in list(self.workers):
                before = [size / n * np.median(times) for n, times in found[way].items()]
                expected = before[-1] if before else 0
                if expected > limit:
                    print(f"{way}, {size} images: left out, would take about {expected:.0f} s")
                    continue
                calls = repeats if repeats * expected < limit else 1
                if times := self.seconds(way, size, calls):
                    found[way][size] = times
        return found

    def close(self):
        """End all processes."""
        for worker in self.workers.values():
            worker.close()


def as_measurements(rates):
    """{way: Measurement} of {way: images/s of each repeat}."""
    recipe = Recipe(threads=1)
    return {
        way: Measurement(name=way, recipe=recipe, images_per_s=tuple(map(float, values)))
        for way, values in rates.items()
    }


class RacePanel(Panel):
    """A slider of batch sizes. Run measures all ways, and draws them next to the other batches."""

    def __init__(self, race, batches, repeats):
        self.race, self.repeats = race, repeats
        self.batches = sorted(batches)
        self.batch = batches[0]
        self.found = {}  # {batch: {way: Measurement}}
        controls = {"batch": slider("batch", batches, self.batch)}
        picture = Picture(2, (10, 3.8))
        picture.figure.subplots_adjust(left=0.1, right=0.98, wspace=0.25, bottom=0.15)
        work = self._work
        super().__init__(controls, work, lambda progress: progress, self.draw_race, picture)

    def draw_race(self, axes):
        """Draw the chosen batch into the first axes, and all batches into the second ones."""
        bars, curves = axes
        now = self.found.get(self.batch, {})
        medians = [measurement.quartiles[1] for measurement in now.values()]
        drawn = bars.barh(list(now), medians, color=plots.COLORS[: len(now)], height=0.6)
        bars.bar_label(drawn, fmt="{:,.0f}", padding=3)
        bars.invert_yaxis()
        bars.margins(x=0.2)
        bars.set_xlabel("images/s (median)")
        bars.set_title(f"batch {self.batch}", fontsize=10)
        for number, way in enumerate(self.race.workers):
            medians = {
                batch: ways[way].quartiles[1]
                for batch, ways in sorted(self.found.items())
                if way in ways
            }
            color = plots.COLORS[number]
            curves.plot(list(medians), list(medians.values()), "o-", color=color, label=way)
        curves.set(xscale="log", xlabel="batch size", ylabel="images/s (median)", ylim=(0, None))
        curves.set_xticks(self.batches, self.batches)
        curves.set_xlim(0.7 * self.batches[0], 1.4 * self.batches[-1])
        curves.minorticks_off()
        curves.set_title("all batch sizes so far", fontsize=10)
        curves.legend(frameon=False, loc="upper left")

    def _work(self, values, stop):
        self.batch = values["batch"]
        yield 0.0, f"batch {self.batch}: compiling, which can take a minute ..."
        for number, rates in enumerate(self.race.rounds(self.batch, self.repeats, stop), start=1):
            self.found[self.batch] = as_measurements(rates)
            best = max(rates, key=lambda way: np.median(rates[way]))
            yield number / self.repeats, f"batch {self.batch}: fastest here: <b>{best}</b>"
