"""One function per technique; `prepare` applies them in one visible order; `Clock` times the steps honestly."""

import os
import sys
import time
from collections import deque

import torch


def synchronize(device):
    """Wait until the device has done all it was given: a GPU's work runs on after the call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Times a training loop, in seconds. It stands still while a consumer of the loop's events is busy.

    `seconds` counts training only, up to the last pause; of it, `waiting` was spent on the loader, and `exposed` on other
    ranks with nothing else to do. Phases and communication are told apart on the CPU only: a GPU runs them on its own.
    """

    def __init__(self, device):
        self.device, self.spans, self.exchanges = device, [], []
        self.recent = deque(maxlen=4)  # (spans, exchanges) of the last steps
        self.seconds = self.waiting = self.exposed = self.resumed = self.marked = 0.0
        self.wall = time.time() - time.perf_counter()

    def resume(self):
        self.resumed = time.perf_counter()

    def pause(self):
        synchronize(self.device)  # first: what was asked of a GPU may still be running
        self.seconds += time.perf_counter() - self.resumed

    def elapsed(self):
        """Seconds since the last `resume`, not fenced."""
        return time.perf_counter() - self.resumed

    def iterate(self, loader):
        """The loader's batches; the time until each one is there counts as waiting. Each begins a step."""
        batches = iter(loader)
        while True:
            asked = self.marked = time.perf_counter()
            batch = next(batches, None)
            self.waiting += time.perf_counter() - asked
            if batch is None:
                return
            self.spans, self.exchanges = [], []
            self.recent.append((self.spans, self.exchanges))
            self.mark("waiting")
            yield batch

    def mark(self, phase):
        """All that was done since the last mark was `phase`: waiting, forward, backward, or update, which ends the step.

        Exchanges overlap with it until the last one begins; from then on it was all "exposed" communication.
        """
        before, self.marked = self.marked, time.perf_counter()
        here = [(begin, end) for begin, end in self.exchanges if begin >= before]
        if here:
            begin, end = (
                max(begin for begin, _ in here),
                min(self.marked, max(end for _, end in here)),
            )
            self._span(phase, before, begin)
            self._span("exposed", begin, end)
            self.exposed += end - begin
            before = end
        self._span(phase, before, self.marked)

    def _span(self, phase, begin, end):
        if self.device.type == "cpu":
            self.spans.append([phase, self.wall + begin, self.wall + end])

    def record_communication(self, began):
        """Something that began then (`time.perf_counter`) has now come from the other ranks. Any thread may call."""
        if self.device.type == "cpu":
            self.exchanges.append((began, time.perf_counter()))

    def timed_communication(self, function, *args):
        """Call the function; the time that it takes is communication."""
        began = time.perf_counter()
        function(*args)
        self.record_communication(began)

    def timeline(self):
        """[phase, begin, end] of the last steps, on the clock on the wall, so that the ranks' rows fit together.

        The phase "communication" may lie beside others.
        """
        shared = [
            ["communication", self.wall + begin, self.wall + end]
            for _, exchanges in self.recent
            for begin, end in exchanges
        ]
        return [span for spans, _ in self.recent for span in spans] + shared


def peak_memory_mib(device):
    """Most memory in use at once so far: allocated on a GPU, else resident in this process, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
