"""The processes of the ranks: what they get, how torch's elastic agent starts them, cleanup."""

import linecache
import logging
import multiprocessing.spawn
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle
import psutil

from cnnlab.launch import worker
from cnnlab.launch.failures import Message

Env = Mapping[str, str] | None

AGENT_THREAD = "cnnlab-agent"
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
# Passed on, because the fork server may have been started before the user set them.
DATA_VARIABLES = ("CNNLAB_DATA", "CNNLAB_MIRROR")
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.elastic.multiprocessing.api",
    "sklearn.datasets",
    "cnnlab.launch.worker",
]


def prewarm() -> None:
    """Start the fork server, which imports torch once, so that the next run starts within 0.1 s."""
    if START_METHOD != "forkserver":
        return
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(PRELOAD)
    added = {name: value for name, value in RANK_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        forkserver.ensure_running()
    finally:
        for name in added:
            os.environ.pop(name, None)  # Another thread may have removed it already.


def run_agent(world: int, address: Any, folder: Path, report: Callable[[Message], None]) -> None:
    """Run `worker.main(address)` in `world` processes until they end, and report if one fails.

    Must be called in a thread named `AGENT_THREAD`. The agent is the engine of torchrun.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    _skip_main_import()
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # The user sees errors as events.
    spec = WorkerSpec(
        role="cnnlab",
        local_world_size=world,
        entrypoint=worker.main,
        args=(address,),
        rdzv_handler=_local_rendezvous(),
        max_restarts=0,
        monitor_interval=0.02,
    )
    logs = DefaultLogsSpecs(log_dir=str(folder))
    timeouts: dict[str, Any] = {"shutdown_timeout": 2, "exit_barrier_timeout": 2}
    rank = 0
    try:
        result = LocalElasticAgent(spec, logs, START_METHOD, **timeouts).run()
        if not result.is_failed():
            return
        rank = min(result.failures, default=0)
        text = "\n".join(failure.message for failure in result.failures.values())
    except Exception:
        text = traceback.format_exc()
    report(Message(rank, "agent", error="the process did not start", traceback=text))


def pack_job(function: Callable, args: tuple, backend: str | None, env: Env, folder: Path) -> bytes:
    """The pickled `worker.Job` for all ranks of a run."""
    data_env = {name: os.environ[name] for name in DATA_VARIABLES if name in os.environ}
    job = worker.Job(
        call=cloudpickle.dumps((function, args)),
        env={**data_env, **(env or {})},
        cells=_notebook_cells(),
        backend=backend,
        folder=str(folder),
        timeout=worker.COLLECTIVE_TIMEOUT_S,
    )
    return cloudpickle.dumps(job)


def kill_groups(pids: Iterable[int]) -> None:
    """Kill the ranks with these process ids and their loader workers."""
    for pid in pids:
        with suppress(OSError):  # Already gone.
            if hasattr(os, "killpg"):
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGTERM)


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


def make_socket_folder() -> Path:
    """Make a private folder with a short path: a socket's path may have at most 104 bytes."""
    is_long = len(tempfile.gettempdir()) >= 64 and os.name != "nt"
    return Path(tempfile.mkdtemp(prefix="cnnlab-", dir="/tmp" if is_long else None))


def _local_rendezvous():
    """A rendezvous of this machine with itself: no port, no name lookup, no waiting."""
    from torch.distributed import HashStore
    from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class LocalRendezvous(StaticTCPRendezvous):
        use_agent_store = False  # The ranks have their own store, see worker.Job.

        def next_rendezvous(self):
            return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("localhost", 0))

    return LocalRendezvous("localhost", 0, rank=0, world_size=1, run_id="cnnlab", timeout=0)


def _skip_main_import() -> None:
    """Keep the agent's processes from importing the caller's script, as multiprocessing would.

    They get what they need of it pickled by value. A script therefore needs no
    `if __name__ == "__main__"` and may come from standard input. Other processes are unaffected.
    """
    original = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name):
        data = original(name)
        if threading.current_thread().name == AGENT_THREAD:
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
