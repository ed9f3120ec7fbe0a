"""Which rank failed, why, and where: the root cause among the failures of all ranks."""

import faulthandler
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import psutil

Kind = Literal["event", "print", "done", "rejected", "error", "stopped", "killed", "late"]
# The kinds of messages that report a failure, the most informative first.
FAILURE_KINDS = ("error", "stopped", "killed", "late")
# Texts in the tracebacks of ranks that failed only because another rank had failed.
PEER_ERRORS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "C10d store")
# In a stack dump, the frame of the worker that called the user's function.
WORKER_FRAME = os.path.join("launch", "worker.py") + '", line'


@dataclass(frozen=True)
class Message:
    """What a rank reports, or what the notebook notices about it."""

    rank: int
    kind: Kind
    content: Any = None  # the event, the printed line, or the reason
    error: str = ""  # of a failure: one line
    traceback: str = ""  # of a failure: its full text, or where the rank is


class RankError(RuntimeError):
    """A rank failed: `rank` says which, `error` why in one line, `traceback` is the full text."""

    def __init__(self, rank: int, error: str, traceback: str) -> None:
        super().__init__(f"rank {rank} failed: {error}\n\n{traceback}")
        self.rank = rank
        self.error = error
        self.traceback = traceback


def root_cause(failures: list[Message]) -> Message:
    """The failure that caused the others: peers of a failed rank raise secondary errors."""
    primary = [failure for failure in failures if not is_peer_error(failure)]
    # A rank whose collective times out closes its connections, and its peers report that.
    timeouts = [failure for failure in failures if is_collective_timeout(failure)]
    candidates = primary or timeouts or failures
    return min(candidates, key=lambda failure: FAILURE_KINDS.index(failure.kind))


def is_peer_error(failure: Message) -> bool:
    """Whether a rank raised an error because it lost the connection to another rank."""
    return failure.kind == "error" and any(text in failure.traceback for text in PEER_ERRORS)


def is_collective_timeout(failure: Message) -> bool:
    """Whether a rank raised an error because a collective took too long."""
    return is_peer_error(failure) and "imed out" in failure.traceback


def killed(rank: int) -> Message:
    """The failure of a rank whose connection ended without a last message."""
    text = (
        f"rank {rank} ended without an error: killed, out of memory, or crashed in native code.\n"
    )
    return Message(rank, "killed", error="the process was killed", traceback=text)


def find_stopped(pids: dict[int, int]) -> Message | None:
    """The failure of a stopped rank (SIGSTOP), or None. `pids`: {rank: process id}."""
    for rank, pid in pids.items():
        with suppress(psutil.Error):  # The process is gone, which its reader reports.
            if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                explanation = f"rank {rank} does not run: its process {pid} has been stopped.\n"
                error = "the process was stopped (SIGSTOP)"
                return Message(rank, "stopped", error=error, traceback=explanation)
    return None


def enable_stack_dumps(folder: Path, rank: int) -> None:
    """Prepare this process for `locate_hang`: on SIGUSR1 it writes its main thread's stack."""
    if hasattr(signal, "SIGUSR1"):
        file = os.open(_stack_file(folder, rank), os.O_WRONLY | os.O_CREAT)
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)


def locate_hang(failure: Message, pids: dict[int, int], folder: Path) -> Message:
    """`failure` with the rank that the others wait for, and its stack as the traceback.

    `pids`: those of the ranks that have not finished. If all of them wait, the failure keeps its
    rank.
    """
    # Without this file, the rank has not installed the handler yet, and the signal would kill it.
    ready = [rank for rank in sorted(pids) if _stack_file(folder, rank).exists()]
    for rank in ready:
        with suppress(OSError):  # The process has just ended.
            os.kill(pids[rank], signal.SIGUSR1)
    time.sleep(0.3)
    stacks = {rank: _stack_file(folder, rank).read_text() for rank in ready}
    busy = [rank for rank, stack in stacks.items() if not _is_waiting(stack)]
    rank = busy[0] if busy else failure.rank
    lines = stacks.get(rank, "").splitlines()
    frames = list(takewhile(lambda line: WORKER_FRAME not in line, lines))
    where = f"rank {rank} was still starting, or already ending."
    if frames:
        where = "\n".join([f"rank {rank} is here:", *frames])
    return replace(failure, rank=rank, traceback=where + "\n")


def _is_waiting(stack: str) -> bool:
    """Whether a rank is blocked in a collective, or waits for slower ranks (async)."""
    return "distributed_c10d" in stack or " in _wait_for" in stack


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"
