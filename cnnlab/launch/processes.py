"""The processes of the ranks: how they are started, what they get, how they are cleaned up."""

import io
import linecache
import logging
import multiprocessing.spawn
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import CodeType
from typing import Any

import cloudpickle
import psutil

from cnnlab.launch import failures, worker
from cnnlab.launch.failures import Message
from cnnlab.launch.output import PAUSE_S, PipeReader
from cnnlab.recipe import CnnlabError

Env = Mapping[str, str] | None
Put = Callable[[Message], None]

RANK_NAME = "cnnlab-rank"  # of the processes, and of the threads that start them
START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
# Libraries of the ranks read these when they are loaded. The user's own values take precedence.
RANK_ENVIRONMENT = {
    # Idle threads of GNU OpenMP soon sleep: spinning, they block cores that other ranks need.
    "GOMP_SPINCOUNT": "40000",
    # glibc keeps freed memory. By default some runs return and fetch it in every step, which was
    # measured to cut the throughput to a quarter.
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}
# The environment variables that the fork server was started with. Ranks get later changes.
server_environment: dict[str, str] = {}
start_lock = threading.Lock()  # While a process is started, it needs more open files.
FILES_PER_RANK = 5  # in this process: the connection, the pipe, their other ends, the sentinel
SPARE_FILES = 32  # to start and inspect processes
LAST_KINDS = ("done", "error", "rejected")  # of messages
PRELOAD = ["torch", "torch.distributed.pipelining", "sklearn.datasets", "cnnlab.launch.worker"]


def prewarm() -> None:
    """Start the fork server, which imports torch once, so that the next run starts within 0.1 s."""
    if threads := os.environ.get("OMP_NUM_THREADS"):
        warnings.warn(
            f"Ranks ignore OMP_NUM_THREADS={threads} and use Recipe.threads. Unset it and restart "
            "the kernel. Otherwise the notebook has another number of threads than the ranks.",
            stacklevel=1,
        )
    if START_METHOD != "forkserver":
        return
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(PRELOAD)
    added = {name: value for name, value in RANK_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    current = dict(os.environ)
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    pid = server._forkserver_pid
    try:
        server.ensure_running()
        if pid != server._forkserver_pid:
            server_environment.clear()
            server_environment.update(current)
    finally:
        for name in added:
            os.environ.pop(name, None)  # Another thread may have removed it already.
    with suppress(OSError):  # A file may vanish while it is saved.
        if code_time() != _loaded_code_time(server._forkserver_pid):
            message = "Ranks run the code of cnnlab from before its last edits. Restart the kernel."
            warnings.warn(message, stacklevel=1)


def check_open_files(world: int) -> None:
    """Raise `CnnlabError` if so many ranks need more open files than this process may have."""
    if os.name != "posix":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = psutil.Process().num_fds() + FILES_PER_RANK * world + SPARE_FILES
    if needed > limit != resource.RLIM_INFINITY:
        raise CnnlabError(
            f"{world} ranks need {needed} open files, but this process may have {limit}. Use fewer "
            f"ranks, or run ulimit -n {2 * needed} in the shell that starts the notebook."
        )


def code_time() -> float:
    """The newest modification time of cnnlab's modules."""
    return max(path.stat().st_mtime for path in Path(worker.__file__).parents[1].rglob("*.py"))


@cache
def _loaded_code_time(server_pid: int) -> float:
    """The `code_time` of the modules that this fork server has imported."""
    return code_time()


def start_rank(rank: int, world: int, folder: Path) -> tuple[Any, Connection, Connection]:
    """Start a process that runs `worker.main`.

    Returns the process, the connection to it, and the pipe with what it prints.
    """
    _skip_main_import()
    context: Any = multiprocessing.get_context(START_METHOD)
    ours, theirs = context.Pipe()
    printed, prints = context.Pipe(duplex=False)
    args = (theirs, prints, rank, world, str(folder))
    process = context.Process(target=worker.main, args=args, name=RANK_NAME)
    with theirs, prints, start_lock:
        process.start()
    return process, ours, printed


def receive(rank: int, connection: Connection, pipe: Connection, put: Put) -> None:
    """Pass on the messages and lines of a rank, up to its last message.

    Raises `OSError` or `EOFError` if its process ends without one. `pipe` is closed then.
    """

    def take_line(line: str) -> None:
        put(Message(rank, "print", f"[rank {rank}] {line}"))
        if timeout := failures.watchdog_timeout(rank, line):
            put(timeout)

    reader = PipeReader(pipe, take_line)
    kind = ""
    try:
        while kind not in LAST_KINDS:
            sources = [connection] if pipe.closed else [connection, pipe]
            ready = wait(sources, PAUSE_S if reader.lines.rest.strip() else None)
            reader.read()  # first, because it was printed before the message was sent
            if connection in ready:
                message = connection.recv()
                kind = message.kind
                if kind in LAST_KINDS:
                    reader.finish()
                put(message)
            elif not ready:
                reader.lines.flush()
    finally:
        reader.finish()


def pack_job(function: Callable, args: tuple, backend: str | None, env: Env) -> bytes:
    """The pickled `worker.Job` for all ranks of a run."""
    job = worker.Job(
        call=_dumps((function, args)),
        env={**_environment_changes(), **(env or {})},
        cells=_notebook_cells(),
        log_level=logging.getLogger().level,
        backend=backend,
        timeout=worker.COLLECTIVE_TIMEOUT_S,
    )
    return cloudpickle.dumps(job)


def _reduce_code(code: CodeType) -> tuple:
    function, values = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return function, tuple(code.co_filename if v == "<dynamic-code>" else v for v in values)


class _Pickler(cloudpickle.Pickler):
    """Keeps file names, which cloudpickle 3.1.3 replaces: tracebacks need them to show a cell."""

    dispatch_table = ChainMap({CodeType: _reduce_code}, cloudpickle.Pickler.dispatch_table)


def _dumps(value: Any) -> bytes:
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def _environment_changes() -> dict[str, str | None]:
    """{name: value} of variables set since the fork server was started; None: deleted."""
    changes: dict[str, str | None] = {}
    for name in {*os.environ, *server_environment} - RANK_ENVIRONMENT.keys():
        if os.environ.get(name) != server_environment.get(name):
            changes[name] = os.environ.get(name)
    return changes


def kill_groups(pids: Iterable[int]) -> None:
    """Kill the ranks with these process ids and their loader workers."""
    for pid in pids:
        if hasattr(os, "killpg"):
            with suppress(OSError):  # Already gone, or not yet a group.
                os.killpg(pid, signal.SIGKILL)
        with suppress(OSError):  # Already gone.
            os.kill(pid, signal.SIGKILL if os.name == "posix" else signal.SIGTERM)


def process_tree(pids: Iterable[int]) -> set[int]:
    """The process ids of the ranks and of all processes in their groups (loader workers)."""
    leaders = set(pids)
    found = set(leaders)
    if hasattr(os, "getpgid"):
        for process in psutil.Process().children(recursive=True):
            with suppress(OSError):  # Already gone.
                if os.getpgid(process.pid) in leaders:
                    found.add(process.pid)
    return found


def unlink_shared_memory(pids: Iterable[int]) -> None:
    """Remove shared memory of processes that were killed before torch unlinked it."""
    owners = {str(pid) for pid in pids}
    for block in Path("/dev/shm").glob("torch_*"):  # torch_<process id>_<random>_<number>, on Linux
        if block.name.split("_")[1] in owners:
            block.unlink(missing_ok=True)


def make_folder() -> Path:
    """Make a private folder with a short path: a socket's path may have at most 104 bytes."""
    is_long = len(tempfile.gettempdir()) >= 64 and os.name != "nt"
    return Path(tempfile.mkdtemp(prefix="cnnlab-", dir="/tmp" if is_long else None))


def _skip_main_import() -> None:
    """Keep the ranks from importing the caller's script, as multiprocessing would.

    They get what they need of it pickled by value. A script therefore needs no
    `if __name__ == "__main__"` and may come from standard input. Other processes are unaffected.
    """
    original = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name):
        data = original(name)
        if name == RANK_NAME:
            data.pop("init_main_from_path", None)
            data.pop("init_main_from_name", None)
        return data

    if original.__module__ != __name__:  # Patch it only once.
        multiprocessing.spawn.get_preparation_data = get_preparation_data


def _notebook_cells() -> dict[str, tuple]:
    """Linecache entries of sources without a file, so that ranks show them in tracebacks."""
    cells = {}
    for name, entry in list(linecache.cache.items()):
        if len(entry) == 4 and not os.path.exists(name):  # Lazy entries are shorter.
            size, _, lines, full_name = entry
            cells[name] = (size, None, lines, full_name)  # No time, so that it never expires.
    return cells
