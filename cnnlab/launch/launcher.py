"""The notebook's side of a run: start a process per rank, stream their events, always clean up."""

import atexit
import math
import queue
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle

from cnnlab.data import datasets
from cnnlab.events import Event, Failed, Restarted
from cnnlab.launch import failures, processes, worker
from cnnlab.launch.backends import Backend, check_backend, select_backend
from cnnlab.launch.failures import Message, RankError
from cnnlab.launch.processes import RANK_NAME, Env, prewarm
from cnnlab.launch.worker import train_rank
from cnnlab.recipe import CnnlabError, Recipe

CHECK_S = 1.0  # between two checks whether a rank was stopped (SIGSTOP) or all are blocked

Say = Callable[[str], Any]
Stop = threading.Event | None


def run(
    recipe: Recipe,
    stop: Stop = None,
    env: Env = None,
    checkpoints: str | Path | None = None,
    max_restarts: int = 0,
    say: Say = print,
) -> Iterator[Event]:
    """Train `recipe` in fresh processes, one per rank, and yield the events of all ranks.

    Setting `stop`, or closing the iterator, kills the processes. `env`: environment variables for
    the ranks. `checkpoints`: a folder to write them to and resume from. `max_restarts`: how often
    all ranks may be restarted after one has failed. `say` gets each line that a rank prints.

    Raises `CnnlabError` before any process starts if this machine cannot run the recipe, and
    `RankError`, after a `Failed` event, if a rank fails: at once if it raises or is killed, within
    2.5 s if it is stopped, after `COLLECTIVE_TIMEOUT_S` if it does not reach a collective.
    """
    if not isinstance(max_restarts, int) or max_restarts < 0:
        raise CnnlabError(f"max_restarts={max_restarts!r} is not allowed. Use an integer >= 0.")
    if checkpoints:  # Ranks may have another working directory.
        checkpoints = str(Path(checkpoints).expanduser().resolve())
    backend = prepare_run(recipe, checkpoints)
    for attempt in range(1, max_restarts + 2):
        failed = None
        args = (recipe, checkpoints)
        env = {**(env or {}), "TORCHELASTIC_RESTART_COUNT": str(attempt - 1)}  # As torchrun.
        with closing(stream(train_rank, args, recipe.ranks, stop, env, backend, say)) as events:
            for event in events:
                if isinstance(event, Failed) and attempt <= max_restarts:
                    failed = event
                    break
                yield event
        if failed is None:
            return
        yield Restarted(rank=failed.rank, error=failed.error, attempt=attempt)


def prepare_run(recipe: Recipe, checkpoints: str | Path | None = None) -> str | None:
    """Check that the recipe can run here, download its data, and return its ranks' backend."""
    worker.check_runnable(recipe, checkpoints)
    datasets.download(recipe)  # Once, before the ranks need the files.
    if recipe.ranks == 1 and recipe.strategy != "ddp":
        return None
    return select_backend(recipe, recipe.ranks)


def ranks(
    function: Callable,
    n: int,
    *args: Any,
    timeout: float | None = None,
    env: Env = None,
    say: Say = print,
    backend: Backend = None,
) -> list:
    """Call function(*args) in `n` processes at once and return the list of values, rank 0's first.

    In each, the process group is ready, and RANK, WORLD_SIZE and LOCAL_RANK are set, as by
    torchrun. The function, and what it uses, may be defined in notebook cells. What it prints is
    shown after its rank. `timeout`: seconds until all must have finished. `backend`: "nccl" (with
    gloo for CPU tensors), "gloo", or None: nccl if each rank has a GPU of its own, else gloo.
    Raises `RankError` if a rank fails.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise CnnlabError(f"n={n!r} is not allowed. Use a number of ranks: an integer >= 1.")
    if not callable(function):
        raise CnnlabError(f"function={function!r} cannot be called. Pass the function itself.")
    values = {}
    call, chosen = (function, args), check_backend(backend, n)
    for event in stream(worker.call_once, call, n, None, env, chosen, say, timeout):
        if not isinstance(event, Failed):  # A RankError follows a Failed.
            rank, value = event
            values[rank] = cloudpickle.loads(value)
    return [values[rank] for rank in range(n)]


def stream(
    function: Callable,
    args: tuple,
    world: int,
    stop: Stop = None,
    env: Env = None,
    backend: str | None = "gloo",
    say: Say = print,
    timeout: float | None = None,
) -> Generator[Any, None, None]:
    """Call the generator function(rank, world, *args) in `world` processes; yield what they yield.

    `backend`: of the process group that is ready in each; None: there is none.
    """
    with RankProcesses(function, args, world, backend, env, say) as group:
        yield from group.events(stop, timeout)


class RankProcesses:
    """The processes of one run, seen from the notebook: a context manager starts and ends them.

    One thread per rank starts its process, which runs `worker.main`, and puts its messages into the
    inbox.
    """

    def __init__(
        self, function: Callable, args: tuple, world: int, backend: str | None, env: Env, say: Say
    ) -> None:
        processes.check_open_files(world)
        prewarm()
        self.say = say
        self.world = world
        self.inbox: queue.Queue[Message] = queue.Queue()
        self.pids: dict[int, int] = {}
        self.unfinished = set(range(world))  # Ranks that are neither done nor failed.
        self.done: set[int] = set()
        self.activity: dict[int, tuple[float, int]] = {}  # of unfinished ranks at the last check
        self.close_lock = threading.Lock()
        self.cancelled = threading.Event()  # Ranks that start from now on are killed.
        self.closed = threading.Event()  # Ranks that are done wait for it: see worker.main.
        self.job = processes.pack_job(function, args, backend, env)
        self.folder = processes.make_folder()
        self.threads = [
            threading.Thread(target=self._run_rank, args=(rank,), name=RANK_NAME, daemon=True)
            for rank in range(world)
        ]

    def __enter__(self) -> "RankProcesses":
        atexit.register(self._close)  # For programs that exit during a run.
        try:
            for thread in self.threads:
                thread.start()
        except BaseException:  # An interrupt: __exit__ is not called if __enter__ raises.
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.closed.is_set():
            # In a thread, which a second interrupt does not reach.
            closing = threading.Thread(target=self._close)
            closing.start()
            closing.join()

    def _close(self) -> None:
        with self.close_lock:  # A second caller waits until everything is cleaned up.
            if self.closed.is_set():
                return
            killed: set[int] = set()
            if len(self.done) < self.world:
                self.cancelled.set()
                killed = processes.process_tree(list(self.pids.values()))
                processes.kill_groups(list(self.pids.values()))
            self.closed.set()
            deadline = time.monotonic() + 10
            for thread in self.threads:
                if thread.ident:  # It has been started.
                    thread.join(max(0, deadline - time.monotonic()))
            processes.kill_groups(list(self.pids.values()))
            processes.unlink_shared_memory(killed)
            shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self._close)

    def events(self, stop: Stop = None, timeout: float | None = None) -> Iterator[Any]:
        """Yield what the ranks yield until all are done, one fails, or `stop` is set."""
        deadline = time.monotonic() + (timeout or math.inf)
        next_check = time.monotonic() + CHECK_S
        while self.unfinished:
            if stop is not None and stop.is_set():
                return
            message: Message | None = None
            with suppress(queue.Empty):
                message = self.inbox.get(timeout=0.2 if stop is None else 0.02)
            if message is None or message.kind in ("event", "print"):
                if time.monotonic() > deadline:
                    error = f"it did not finish within {timeout:g} s"
                    message = Message(min(self.unfinished), "late", error=error)
                elif time.monotonic() > next_check:
                    next_check = time.monotonic() + CHECK_S
                    stopped = failures.find_stopped(self._unfinished_pids())
                    message = stopped or self._find_blocked() or message
            if message is None:
                continue
            match message.kind:
                case "event":
                    yield message.content
                case "print":
                    self.say(message.content)
                case "done":
                    self.unfinished.discard(message.rank)
                    self.done.add(message.rank)
                case "rejected":
                    raise CnnlabError(message.content)
                case _:
                    cause = self._root_cause(message)
                    yield Failed(rank=cause.rank, error=cause.error, traceback=cause.traceback)
                    raise RankError(cause.rank, cause.error, cause.traceback)

    def _unfinished_pids(self) -> dict[int, int]:
        return {rank: pid for rank, pid in list(self.pids.items()) if rank in self.unfinished}

    def _find_blocked(self) -> Message | None:
        """The failure of ranks that are done while all others wait for them, or None."""
        pids = self._unfinished_pids()
        before, now = self.activity, failures.activity(pids)
        self.activity = now
        idle = [failures.is_idle(before.get(rank), now.get(rank)) for rank in self.unfinished]
        if self.done and all(idle):
            return failures.find_blocked(pids, self.done, self.folder)
        return None

    def _root_cause(self, first: Message) -> Message:
        """The failure that came before all others; `first` is the one that was received first."""
        messages = [first]
        # Failures of other ranks arrive within this time; each NCCL watchdog looks now and then.
        time.sleep(2 if failures.WATCHDOG_TIMEOUT in first.traceback else 0.3)
        while not self.inbox.empty():
            messages.append(self.inbox.get())
        for message in messages:
            if message.kind == "print":
                self.say(message.content)
            elif message.kind in ("done", "error"):
                self.unfinished.discard(message.rank)
            if message.kind == "done":
                self.done.add(message.rank)
        reports = [message for message in messages if message.kind in failures.FAILURE_KINDS]
        first_reports: dict[int, Message] = {}
        for message in reports:
            first_reports.setdefault(message.rank, message)
        cause = failures.root_cause([*first_reports.values()])
        if failures.is_collective_timeout(cause) and self.unfinished:
            error = f"it did not reach a collective within {worker.COLLECTIVE_TIMEOUT_S} s"
            late = Message(min(self.unfinished), "late", error=error)
            return failures.locate_hang(late, self._unfinished_pids(), self.folder, cause)
        elif failures.is_collective_timeout(cause) and self.done:
            return failures.returned(self.done, f"rank {cause.rank} was here:\n{cause.traceback}")
        if cause.kind == "late":
            return failures.locate_hang(cause, self._unfinished_pids(), self.folder)
        return cause

    def _run_rank(self, rank: int) -> None:
        """Start a rank, put its messages into the inbox, up to the last, and wait for its end."""
        try:
            process, connection, pipe = processes.start_rank(rank, self.world, self.folder)
        except Exception:
            error, text = "the process did not start", traceback.format_exc()
            self.inbox.put(Message(rank, "error", error=error, traceback=text))
            return
        self.pids[rank] = process.pid
        with connection, pipe:
            if self.cancelled.is_set():  # Checked after noting the pid, so that no rank escapes.
                process.kill()
            else:
                self._exchange_messages(rank, process, connection, pipe)
        process.join()

    def _exchange_messages(
        self, rank: int, process: Any, connection: Connection, pipe: Connection
    ) -> None:
        try:
            connection.send_bytes(self.job)
            processes.receive(rank, connection, pipe, self.inbox.put)
        except (EOFError, OSError):
            process.join(1)
            self.inbox.put(failures.killed(rank, process.exitcode))
        except Exception as problem:  # The rank sent an object of a class that is unknown here.
            error = f"its message cannot be read here: {problem}. Restart the kernel."
            self.inbox.put(Message(rank, "error", error=error, traceback=traceback.format_exc()))
        self.closed.wait()  # The process stays until `_root_cause` has looked at it.
        with suppress(OSError):
            connection.send("bye")
