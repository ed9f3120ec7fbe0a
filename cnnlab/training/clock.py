"""The clock of a training loop: what the time of a step is spent on."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has executed its queue: kernel launches return before the kernels end."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Step(NamedTuple):
    """What a clock records in a step, in moments of `Clock.now`."""

    phases: list[tuple]  # (name, begin, end, transfers that blocked the rank meanwhile)
    transfers: list[tuple]  # (begin, end)


class Clock:
    """Times a training loop, in seconds. It is paused while a consumer handles an event.

    `seconds` is the training time up to the last pause. Of it, `waiting` was spent on the loader
    and `exposed` on communication that did not overlap with computation.

    On a GPU, moments are events in its queue, because kernel launches return before the kernels
    end. While the GPU has work in its queue, it does not wait for the loader.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = self.waiting = self.exposed = 0.0
        self.resumed_at = 0.0
        self.to_wall_clock = time.time() - time.perf_counter()
        self.marked_at: Any = None
        self.resumed: Any = None
        self.step = Step([], [])
        self.blocked: list[tuple] = []  # transfers that the current phase waited for
        self.steps: list[Step] = []  # since `resume`
        self.recent: deque[list[tuple]] = deque(maxlen=4)  # (phase, begin, end) of the last steps

    def now(self) -> Any:
        """This moment: seconds, or on a GPU an event that its queue will reach."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))  # of this thread
        return event

    def resume(self) -> None:
        self.resumed_at = time.perf_counter()
        self.resumed = self.now()  # reached at once, because `pause` has emptied the queue
        self.steps = []

    def pause(self) -> None:
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.resumed_at
        for step in self.steps:
            self._add(step)
        self.steps = []

    def elapsed(self) -> float:
        """Seconds since `resume`, without synchronizing."""
        return time.perf_counter() - self.resumed_at

    def iterate(self, loader: Iterable) -> Iterator[Any]:
        """Yield the loader's batches; the time until each arrives counts as waiting."""
        batches = iter(loader)
        while True:
            self.marked_at = self.now()
            batch = next(batches, None)
            self.step, self.blocked = Step([], []), []
            self.steps.append(self.step)
            self.mark("waiting")
            if batch is None:
                return
            yield batch

    def mark(self, phase: str) -> None:
        """End a phase of the step: waiting, forward, backward, update, or exposed communication.

        `timed_communication` is exposed: the rank has nothing else to do meanwhile. Without it,
        communication overlaps with computation until the last transfer of the phase begins.
        """
        begin, self.marked_at = self.marked_at, self.now()
        self.step.phases.append((phase, begin, self.marked_at, self.blocked))
        self.blocked = []

    def record_communication(self, began_at: Any) -> None:
        """Record a transfer from `began_at`, a moment of `now`, to now, from any thread."""
        self.step.transfers.append((began_at, self.now()))

    def timed_communication(self, function: Callable, *args: Any) -> None:
        """Call the function and record the time that it takes as exposed communication."""
        began_at = self.now()
        function(*args)
        transfer = (began_at, self.now())
        self.step.transfers.append(transfer)
        self.blocked.append(transfer)

    def _add(self, step: Step) -> None:
        """Add the times of a step, which the GPU has executed."""
        transfers = [self._seconds(transfer) for transfer in step.transfers]
        spans = []
        for phase, *moments, blocked in step.phases:
            exposed = [self._seconds(transfer) for transfer in blocked]
            spans += split_phase(phase, self._seconds(moments), exposed, transfers)
        for phase, begin, end in spans:
            self.waiting += (end - begin) * (phase == "waiting")
            self.exposed += (end - begin) * (phase == "exposed")
        if len(spans) > 1:  # not only the end of an epoch
            self.recent.append(spans + [("communication", *transfer) for transfer in transfers])

    def _seconds(self, moments):
        """The moments in seconds, as of `time.perf_counter`."""
        if self.device.type == "cpu":
            return tuple(moments)
        since = [self.resumed.elapsed_time(moment) / 1000 for moment in moments]
        return tuple(self.resumed_at + seconds for seconds in since)

    def timeline(self) -> list[list]:
        """[phase, begin, end] of the last steps, in wall clock time, which all ranks share.

        "communication" comes last in a step and may overlap with the other phases.
        """
        offset = self.to_wall_clock
        spans = [span for step in self.recent for span in step]
        return [[phase, offset + begin, offset + end] for phase, begin, end in spans]


def split_phase(
    phase: str, times: tuple, exposed: Sequence[tuple], transfers: Iterable[tuple]
) -> list[tuple]:
    """[(phase or "exposed", begin, end)]: what a phase was spent on, in seconds.

    `times`: its (begin, end). `exposed`: (begin, end) of the transfers in it that blocked the rank.
    Without them, the last of the `transfers` that begin in it is exposed until all end.
    """
    begin, end = times
    inside = [transfer for transfer in transfers if begin <= transfer[0] < end]
    if inside and not exposed:
        exposed = [(max(inside)[0], min(end, max(stop for _, stop in inside)))]
    spans = []
    for start, stop in exposed:
        spans += [(phase, begin, start), ("exposed", start, stop)]
        begin = stop
    return [*spans, (phase, begin, end)]


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
