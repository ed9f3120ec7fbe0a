"""Which rank failed, why, and where: the root cause among the failures of all ranks."""

import faulthandler
import linecache
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import psutil

Kind = Literal[
    "event", "print", "done", "rejected", "error", "stopped", "killed", "returned", "late"
]
# The kinds of messages that report a failure, the most informative first.
FAILURE_KINDS = ("error", "stopped", "killed", "returned", "late")
# Texts in the tracebacks of ranks that failed only because another rank had failed.
PEER_ERRORS = (
    "gloo",
    "NCCL",
    "XCCL",
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "C10d store",
)
# In a line that NCCL's watchdog prints in each rank whose collective takes too long.
WATCHDOG_TIMEOUT = "Watchdog caught collective operation timeout"
UNKNOWN_EXIT = 255  # what multiprocessing says when the fork server has gone
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
# A rank that is blocked uses less CPU time and waits fewer times between two checks.
IDLE_CPU_S = 0.03
IDLE_WAITS = 10
# In a stack dump, the frame of the worker that called the user's function.
WORKER_FRAME = os.path.join("launch", "worker.py") + '", line'
# In a line of code: it waits until the GPU has computed a value.
SYNCHRONIZING = re.compile(r"synchronize\(|\.(item|tolist|cpu|numpy|to)\(|\b(float|int|print)\(")
# In a stack dump, functions of PyTorch that wait for other ranks, and async's own.
WAITING_CODE = ("distributed_c10d", "_functional_collectives", " in _wait_for")
# The same, if they are the innermost: DDP waits in native code.
WAITING_CALLS = ("_engine_run_backward", os.path.join("parallel", "distributed.py"), " in _verify_")


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
        self.recipe_name = ""  # if recipes are compared, the one that failed


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
    texts = ("imed out", WATCHDOG_TIMEOUT, "wait timeout")
    return is_peer_error(failure) and any(text in failure.traceback for text in texts)


def watchdog_timeout(rank: int, line: str) -> Message | None:
    """The failure that a printed line of NCCL's watchdog reports, or None.

    The watchdog ends the process up to a minute later. The rank itself may be waiting for its GPU.
    """
    if WATCHDOG_TIMEOUT not in line:
        return None
    error = "a collective did not finish in time. All ranks must make the same collective calls"
    return Message(rank, "error", error=error, traceback=f"{line}\n")


def killed(rank: int, exit_code: int | None) -> Message:
    """The failure of a rank whose connection ended without a last message."""
    error = "the process was killed"
    if exit_code is None or exit_code == UNKNOWN_EXIT:
        pass
    elif exit_code >= 0:
        error = f"the process ended with exit code {exit_code}"
    elif signal.Signals(-exit_code).name in CRASHES:
        error = f"the process crashed in native code ({signal.Signals(-exit_code).name})"
    text = (
        f"rank {rank} ended without an error: killed, out of memory, or crashed in native code. "
        "What it printed may say why.\n"
    )
    return Message(rank, "killed", error=error, traceback=text)


def find_stopped(pids: dict[int, int]) -> Message | None:
    """The failure of a stopped rank (SIGSTOP), or None. `pids`: {rank: process id}."""
    for rank, pid in pids.items():
        with suppress(psutil.Error):  # The process is gone, which its reader reports.
            if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                explanation = f"rank {rank} does not run: its process {pid} has been stopped.\n"
                error = "the process was stopped (SIGSTOP)"
                return Message(rank, "stopped", error=error, traceback=explanation)
    return None


def returned(ranks: set[int], where: str) -> Message:
    """The failure of ranks that have returned while others wait for them. `where` they wait."""
    error = "it has returned, but other ranks wait for it in a collective"
    text = f"All ranks must make the same collective calls. Returned: {sorted(ranks)}.\n{where}"
    return Message(min(ranks), "returned", error=error, traceback=text)


def activity(pids: dict[int, int]) -> dict[int, tuple[float, int]]:
    """{rank: (CPU seconds, how often it has waited)}, of the processes that still exist."""
    found = {}
    for rank, pid in pids.items():
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            times = process.cpu_times()
            found[rank] = (times.user + times.system, process.num_ctx_switches().voluntary)
    return found


def is_idle(before: tuple[float, int] | None, now: tuple[float, int] | None) -> bool:
    """Whether a process did nothing between two `activity` reports.

    On a busy machine, one that gets little CPU time still waits for many messages.
    """
    if before is None or now is None:
        return False
    return now[0] - before[0] < IDLE_CPU_S and now[1] - before[1] < IDLE_WAITS


def find_blocked(pids: dict[int, int], finished: set[int], folder: Path) -> Message | None:
    """The failure of the `finished` ranks if all other ranks, `pids`, are blocked, or None."""
    before = activity(pids)
    stacks = _dump_stacks(pids, folder)
    if len(stacks) < len(pids) or not all(map(_is_waiting, stacks.values())):
        return None
    if _dump_stacks(pids, folder) != stacks:
        return None
    now = activity(pids)
    if not all(is_idle(before.get(rank), now.get(rank)) for rank in pids):
        return None
    return returned(finished, "".join(_describe(rank, stacks[rank]) for rank in stacks))


def enable_stack_dumps(folder: Path, rank: int) -> None:
    """Prepare this process for `_dump_stacks`: on SIGUSR1 it writes its main thread's stack."""
    if hasattr(signal, "SIGUSR1"):
        file = os.open(_stack_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)


def locate_hang(
    failure: Message, pids: dict[int, int], folder: Path, report: Message | None = None
) -> Message:
    """`failure` with the rank that the others wait for, and its stack as the traceback.

    `pids`: those of the ranks that have not finished. If all of them wait, the failure keeps its
    rank. A rank that waits for its GPU may be late, or the GPU may wait for another rank. If there
    is no other candidate, that is unknown: the result is `report`, of a collective that took too
    long, with the stacks of all.
    """
    stacks = _dump_stacks(pids, folder)
    busy = [rank for rank, stack in stacks.items() if not _is_waiting(stack)]
    late = [rank for rank in busy if not _is_synchronizing(stacks[rank])]
    if busy and not late and report is not None and WATCHDOG_TIMEOUT in report.traceback:
        places = "".join(_describe(rank, stacks[rank]) for rank in stacks)
        return replace(report, traceback=report.traceback + places)
    rank = [*late, *busy, failure.rank][0]
    return replace(failure, rank=rank, traceback=_describe(rank, stacks.get(rank, "")))


def _dump_stacks(pids: dict[int, int], folder: Path) -> dict[int, str]:
    """{rank: stack of its main thread, innermost call first} of the ranks that have started."""
    # Without this file, the rank has not installed the handler yet, and the signal would kill it.
    ready = [rank for rank in sorted(pids) if _stack_file(folder, rank).exists()]
    for rank in ready:
        os.truncate(_stack_file(folder, rank), 0)
        with suppress(OSError):  # The process has just ended.
            os.kill(pids[rank], signal.SIGUSR1)
    time.sleep(0.3)
    return {rank: _stack_file(folder, rank).read_text() for rank in ready}


def _describe(rank: int, stack: str) -> str:
    """Where a rank is, without the frames of the worker that called its function."""
    frames = list(takewhile(lambda line: WORKER_FRAME not in line, stack.splitlines()))
    if not frames:
        return f"rank {rank} was still starting, or already ending.\n"
    return "\n".join([f"rank {rank} is here:", *frames, ""])


def _is_waiting(stack: str) -> bool:
    """Whether a rank is blocked in a collective, or waits for slower ranks (async)."""
    if any(code in stack for code in WAITING_CODE):
        return True
    innermost = re.search(r'File "(.*)", line (\d+) in .*', stack)
    if innermost is None:
        return False
    is_call = any(call in innermost[0] for call in WAITING_CALLS)
    # An asynchronous collective waits in native code, without a frame of its own.
    return is_call or ".wait(" in linecache.getline(innermost[1], int(innermost[2]))


def _is_synchronizing(stack: str) -> bool:
    """Whether a rank waits for its GPU, which may wait for a collective."""
    innermost = re.search(r'File "(.*)", line (\d+) in (.*)', stack)
    if innermost is None:
        return False
    line = linecache.getline(innermost[1], int(innermost[2]))
    return innermost[3] == "synchronize" or bool(SYNCHRONIZING.search(line))


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"
