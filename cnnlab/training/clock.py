"""The clock of a training loop: what the time of a step is spent on."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has executed its queue: kernel launches return before the kernels end."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Clock:
    """Times a training loop, in seconds. It is paused while a consumer handles an event.

    `seconds` is the training time up to the last pause. Of it, `waiting` was spent on the loader
    and `exposed` on communication that did not overlap with computation. Phases and communication
    are recorded on the CPU only, because a GPU executes them asynchronously.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = self.waiting = self.exposed = 0.0
        self.resumed_at = self.marked_at = 0.0
        self.to_wall_clock = time.time() - time.perf_counter()
        self.phases: list[tuple] = []  # (phase, begin, end) in the current step
        self.transfers: list[tuple] = []  # ("communication", begin, end) in the current step
        self.blocked: list[tuple] = []  # (begin, end) of those that the current phase waited for
        self.recent: deque[tuple[list, list]] = deque(maxlen=4)  # both, of the last steps

    def resume(self) -> None:
        self.resumed_at = time.perf_counter()

    def pause(self) -> None:
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.resumed_at

    def elapsed(self) -> float:
        """Seconds since `resume`, without synchronizing."""
        return time.perf_counter() - self.resumed_at

    def iterate(self, loader: Iterable) -> Iterator[Any]:
        """Yield the loader's batches; the time until each arrives counts as waiting."""
        batches = iter(loader)
        while True:
            self.marked_at = asked_at = time.perf_counter()
            batch = next(batches, None)
            self.waiting += time.perf_counter() - asked_at
            if batch is None:
                return
            self.phases, self.transfers, self.blocked = [], [], []
            self.recent.append((self.phases, self.transfers))
            self.mark("waiting")
            yield batch

    def mark(self, phase: str) -> None:
        """End a phase of the step: waiting, forward, backward, update, or exposed communication.

        `timed_communication` is exposed: the rank has nothing else to do meanwhile. Without it,
        communication overlaps with computation until the last transfer of the phase begins.
        """
        begin, end = self.marked_at, time.perf_counter()
        self.marked_at = end
        if self.device.type != "cpu":
            return
        exposed, self.blocked = self.blocked, []
        transfers = [(start, stop) for _, start, stop in self.transfers if start >= begin]
        if transfers and not exposed:
            exposed = [(max(transfers)[0], min(end, max(stop for _, stop in transfers)))]
        for start, stop in exposed:
            self.exposed += stop - start
            self.phases.append((phase, begin, start))
            self.phases.append(("exposed", start, stop))
            begin = stop
        if phase == "exposed":
            self.exposed += end - begin
        self.phases.append((phase, begin, end))

    def record_communication(self, began_at: float) -> None:
        """Record a transfer from `began_at` (`time.perf_counter`) to now, from any thread."""
        if self.device.type == "cpu":
            self.transfers.append(("communication", began_at, time.perf_counter()))

    def timed_communication(self, function: Callable, *args: Any) -> None:
        """Call the function and record the time that it takes as exposed communication."""
        began_at = time.perf_counter()
        function(*args)
        self.record_communication(began_at)
        self.blocked.append((began_at, time.perf_counter()))

    def timeline(self) -> list[list]:
        """[phase, begin, end] of the last steps, in wall clock time, which all ranks share.

        "communication" comes last and may overlap with the other phases.
        """
        spans = [span for phases, _ in self.recent for span in phases]
        spans += [span for _, transfers in self.recent for span in transfers]
        offset = self.to_wall_clock
        return [[phase, offset + begin, offset + end] for phase, begin, end in spans]


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far: allocated by torch on a GPU, else resident, including libraries."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**20
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes, KiB
