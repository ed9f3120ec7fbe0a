"""Runs in processes of their own: `run(recipe)` and `ranks(function, n)` start them, stream what they say, and always clean up."""

import atexit
import linecache
import logging
import multiprocessing.spawn
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import closing, suppress
from multiprocessing.connection import Client, Listener
from pathlib import Path

import cloudpickle
import psutil

from cnnlab.data import datasets
from cnnlab.events import Failed, Restarted
from cnnlab.launch.worker import COLLECTIVE_TIMEOUT_S, PEER_ERRORS, check_runnable
from cnnlab.launch.worker import main as rank_main
from cnnlab.launch.worker import select_backend as rank_backend
from cnnlab.recipe import CnnlabError
from cnnlab.training.loop import train

STOPPED_CHECK_S = 1.0  # seconds between two looks whether a rank has been halted (SIGSTOP)


AGENT_THREAD = "cnnlab-agent"


RANK_ENVIRONMENT = {  # for the ranks, read when their libraries load; what the user has set stays
    "GOMP_SPINCOUNT": "40000",  # a thread of GNU OpenMP that waits soon sleeps: else it blocks a core that others need
    "MALLOC_TRIM_THRESHOLD_": str(
        2**30
    ),  # glibc keeps freed memory: else, in some runs and not in others, every step
    "MALLOC_MMAP_THRESHOLD_": str(
        2**30
    ),  # gives it back and fetches it anew: measured, a quarter of the speed
}


PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.elastic.multiprocessing.api",
    "sklearn.datasets",
    "cnnlab.rank",
]


class RankError(RuntimeError):
    """A rank failed. `rank` says which, `traceback` is its full text."""

    def __init__(self, rank, error, traceback):
        super().__init__(f"rank {rank} failed: {error}\n\n{traceback}")
        self.rank, self.error, self.traceback = rank, error, traceback


def run(recipe, stop=None, env=None, checkpoints=None, max_restarts=0, say=print):
    """Train `recipe` in fresh processes, one a rank, and yield the events of all ranks as they come.

    `stop`: a `threading.Event`; when it is set, or when the iteration is abandoned, the processes are killed and
    the events end. `env`: environment variables for the ranks. `checkpoints`: a folder to keep them in and to go on from.
    `max_restarts`: how often all ranks may be started anew after one has failed. `say`: what to do with the lines that
    ranks print. Raises `CnnlabError` before anything is started when this machine cannot run the recipe, and `RankError`,
    after a `Failed` event, when a rank fails: a killed one is noticed at once, a halted one within 2.5 s, one that does not
    come to a collective operation after `COLLECTIVE_TIMEOUT_S`.
    """
    if not isinstance(max_restarts, int) or max_restarts < 0:
        raise CnnlabError(
            f"max_restarts={max_restarts!r} is not allowed: it must be a whole number, 0 or more."
        )
    check_runnable(recipe, checkpoints)
    datasets.download(recipe)  # here, so that a download happens once
    folder = checkpoints and str(Path(checkpoints).resolve())
    together = recipe.replicas > 1 or recipe.strategy == "ddp"
    backend = rank_backend(recipe, recipe.replicas) if together else None
    for attempt in range(1, max_restarts + 2):
        told = {
            **(env or {}),
            "TORCHELASTIC_RESTART_COUNT": str(attempt - 1),
        }  # as torchrun tells its ranks
        with closing(
            stream(train_rank, (recipe, folder), recipe.replicas, stop, told, backend, say=say)
        ) as events:
            for event in events:
                if isinstance(event, Failed) and attempt <= max_restarts:
                    break
                yield event
            else:
                return
        yield Restarted(rank=event.rank, error=event.error, attempt=attempt)


def train_rank(rank, world, recipe, checkpoints):
    return train(recipe, rank, world, checkpoints)


def ranks(function, n, *args, timeout=None, env=None, say=print):
    """Call function(*args) in `n` processes at once; returns the list of what they return, rank 0's first.

    The process group is ready in each (gloo; `torch.distributed.get_rank()` tells them apart), and RANK, WORLD_SIZE and
    LOCAL_RANK are set, as under torchrun. The function, and what it uses, may be defined in notebook cells. What it prints
    is shown with its rank in front. `timeout`: seconds until all must have ended. Raises `RankError` when one fails.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise CnnlabError(f"n={n!r} is not allowed: it must be a whole number of ranks, 1 or more.")
    if not callable(function):
        raise CnnlabError(
            f"function={function!r} cannot be called: pass the function itself, and its arguments after n."
        )
    returned = {}
    for event in stream(call_once, (function, args), n, env=env, say=say, timeout=timeout):
        if not isinstance(event, Failed):  # a RankError follows
            returned[event[0]] = cloudpickle.loads(event[1])
    return [returned[rank] for rank in range(n)]


def stream(function, args, world, stop=None, env=None, backend="gloo", say=print, timeout=None):
    """Call the generator function(rank, world, *args) in `world` processes; yield what they yield, as it comes.

    `backend`: of the process group that is ready in each; None for none.
    """
    with RankProcesses(function, args, world, backend, env, say) as group:
        yield from group.events(stop, timeout)


def call_once(rank, world, function, args):
    yield rank, cloudpickle.dumps(function(*args))


def prewarm():
    """Start the process that ranks are forked from, torch already imported: the next run starts in 0.1 s."""
    if start_method() != "forkserver":
        return
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    ours = {name: value for name, value in RANK_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        forkserver.ensure_running()
    finally:
        for name in ours:
            os.environ.pop(name, None)  # another thread may have been here too


def _data_settings():
    """Where data are: the process that ranks are forked from may be older than these variables."""
    return {
        name: os.environ[name] for name in ("CNNLAB_DATA", "CNNLAB_MIRROR") if name in os.environ
    }


def start_method():
    return "forkserver" if sys.platform == "linux" else "spawn"


class RankProcesses:
    """The processes of one run, seen from the notebook: started on entering, gone on leaving.

    Each process runs `worker.main` and connects to a socket in a private folder; a thread a rank reads what it says into one
    inbox of (rank, kind, content). torch's elastic agent, the engine of torchrun, starts them, in a thread of its own.
    """

    def __init__(self, function, args, world, backend, env, say):
        prewarm()
        self.world, self.say, self.inbox = world, say, queue.Queue()
        self.closing = threading.Lock()
        self.over = threading.Event()  # ranks that are done wait for it: see worker.main
        self.stopped = threading.Event()  # ranks that come later get no job
        self.pids = {}  # filled by the readers: a rank can come while nobody asks for events
        self.silent = set(range(world))  # neither done nor failed
        self.folder = Path(_socket_folder())
        try:
            cells = {
                name: (entry[0], None, *entry[2:])
                for name, entry in list(linecache.cache.items())
                if len(entry) == 4 and not os.path.exists(name)
            }
            self.job = cloudpickle.dumps(
                {
                    "call": cloudpickle.dumps((function, args)),
                    "env": {**_data_settings(), **(env or {})},
                    "cells": cells,
                    "backend": backend,
                    "folder": str(self.folder),
                    "timeout": COLLECTIVE_TIMEOUT_S,
                }
            )
            self.listener = Listener(
                str(self.folder / "socket") if hasattr(os, "fork") else None, backlog=world
            )
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self.readers = [threading.Thread(target=self._read, daemon=True) for _ in range(world)]
        self.agent = threading.Thread(target=self._supervise, name=AGENT_THREAD, daemon=True)

    def __enter__(self):
        atexit.register(
            self._close
        )  # a program that ends with a run begun: later on, its threads stand still
        try:
            for thread in (*self.readers, self.agent):
                thread.start()
        except BaseException:  # an interrupt, and nobody else would clean up
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if not self.over.is_set():
            closing = threading.Thread(
                target=self._close
            )  # a thread, where a second, impatient interrupt does not come
            closing.start()
            closing.join()

    def _close(self):
        with self.closing:  # who comes second waits until all is done
            if self.over.is_set():
                return
            family = set()
            if self.silent:
                self.stopped.set()
                family = _process_tree(self.pids)
                _kill(self.pids)
            self.over.set()
            for _ in self.readers:  # wake the readers that no rank has come to
                try:
                    Client(self.listener.address).close()
                except OSError:
                    break
            self.listener.close()  # a rank that is only starting now finds no one, and ends
            if self.agent.ident:  # else it was never started
                self.agent.join(10)
            _kill(self.pids)
            _unlink_shared_memory(family)
            shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self._close)

    def events(self, stop=None, timeout=None):
        """Yield what the ranks yield until all are done, one fails, or `stop` is set."""
        deadline, look = (
            time.monotonic() + (timeout or float("inf")),
            time.monotonic() + STOPPED_CHECK_S,
        )
        while self.silent:
            if stop is not None and stop.is_set():
                return
            try:
                message = self.inbox.get(timeout=0.02 if stop is not None else 0.2)
            except queue.Empty:
                message = None
            if message is None or message[1] in ("event", "print"):
                now = time.monotonic()
                if now > deadline:
                    message = min(self.silent), "late", timeout
                elif now > look:
                    look = now + STOPPED_CHECK_S
                    message = self._halted() or message
            if message is None:
                continue
            rank, kind, content = message
            if kind == "event":
                yield content
            elif kind == "print":
                self.say(f"[rank {rank}] {content}")
            elif kind == "done":
                self.silent.discard(rank)
            elif kind == "refused":
                raise CnnlabError(content)
            else:
                rank, error, text = self._cause(message)
                yield Failed(rank=rank, error=error, traceback=text)
                raise RankError(rank, error, text)

    def _halted(self):
        """(rank, "halted", pid) of a rank that somebody has stopped (SIGSTOP), or None."""
        for rank, pid in list(self.pids.items()):
            try:
                if rank in self.silent and psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                    return rank, "halted", pid
            except psutil.Error:  # gone: its reader will say so
                pass

    def _cause(self, first):
        """(rank, error, traceback) of what went wrong first: when a rank is lost, its peers fail too, with echoes."""
        found, deadline = [first], time.monotonic() + 0.3
        while (left := deadline - time.monotonic()) > 0:
            try:
                found.append(self.inbox.get(timeout=left))
            except queue.Empty:
                break
        for rank, kind, line in found:
            if kind == "print":
                self.say(f"[rank {rank}] {line}")
            elif kind in ("done", "error"):
                self.silent.discard(rank)
        kinds = ("error", "halted", "gone", "late", "agent")
        found = [item for item in found if item[1] in kinds]
        is_echo = lambda item: (
            item[1] == "error" and any(word in item[2][1] for word in PEER_ERRORS)
        )
        rank, kind, content = min(
            found, key=lambda item: kinds.index(item[1]) + len(kinds) * is_echo(item)
        )
        if is_echo((rank, kind, content)) and self.silent and "imed out" in content[1]:
            return self._hanging(
                min(self.silent),
                f"it did not come to a collective operation in {COLLECTIVE_TIMEOUT_S} s",
            )
        if kind == "error":
            return rank, *content
        if kind == "late":
            return self._hanging(rank, f"it was not done in {content:g} s")
        return rank, *{
            "halted": (
                "the process was halted (SIGSTOP)",
                f"rank {rank} does not run: somebody has halted process {content}.\n",
            ),
            "gone": (
                "the process was killed",
                f"rank {rank} ended without a word: it was killed, or ran out of memory, or "
                "crashed in native code.\n",
            ),
            "agent": ("the process did not start", content),
        }[kind]

    def _hanging(self, otherwise, error):
        """(rank, error, where it is) of a rank that has not ended: of one that does not itself wait for others, if there is one."""
        for rank in self.silent:
            if (self.folder / f"stack-{rank}").exists():
                with suppress(OSError):  # gone in this moment
                    os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.3)
        stacks = {
            rank: path.read_text()
            for rank in sorted(self.silent)
            if (path := self.folder / f"stack-{rank}").exists()
        }
        waits = lambda stack: "distributed_c10d" in stack or " in _wait_for" in stack
        guilty = next((rank for rank, stack in stacks.items() if not waits(stack)), otherwise)
        here = [
            line
            for stack in [stacks.get(guilty, "")]
            for line in stack.split('rank.py", line')[0].splitlines()[:-1]
        ]
        where = (
            "\n".join([f"rank {guilty} is here:", *here])
            if here
            else f"rank {guilty} was only starting, or ending."
        )
        return guilty, error, where + "\n"

    def _read(self):
        """One rank's pid, and its messages, to its last word, into the inbox."""
        try:
            with self.listener.accept() as connection:
                rank, pid = connection.recv()
                self.pids[rank] = pid
                if (
                    self.stopped.is_set()
                ):  # asked after the pid is there to be killed: no rank can slip through
                    return
                connection.send_bytes(self.job)
                kind = None
                try:
                    while kind not in ("done", "error", "refused"):
                        kind, content = connection.recv()
                        self.inbox.put((rank, kind, content))
                except (EOFError, OSError):
                    self.inbox.put((rank, "gone", None))
                self.over.wait()  # hold the line until all is looked at: see _hanging
                connection.send("bye")
        except (EOFError, OSError):  # the listener closed, or was only woken
            return

    def _supervise(self):
        from torch.distributed.elastic.agent.server.api import WorkerSpec
        from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

        _skip_main_import()
        for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors reach the learner as events
        spec = WorkerSpec(
            role="cnnlab",
            local_world_size=self.world,
            entrypoint=rank_main,
            args=(self.listener.address,),
            rdzv_handler=_local_rendezvous(),
            max_restarts=0,
            monitor_interval=0.02,
        )
        try:
            result = LocalElasticAgent(
                spec,
                DefaultLogsSpecs(log_dir=str(self.folder)),
                start_method=start_method(),
                shutdown_timeout=2,
                exit_barrier_timeout=2,
            ).run()
            if result is None or result.is_failed():
                failures = result.failures if result else {}
                self.inbox.put(
                    (
                        min(failures, default=0),
                        "agent",
                        "\n".join(failure.message for failure in failures.values()),
                    )
                )
        except Exception:
            self.inbox.put((0, "agent", traceback.format_exc()))


def _local_rendezvous():
    """A rendezvous of one machine with itself: no port, no resolver, nothing to wait for."""
    import torch.distributed as dist
    from torch.distributed.elastic import rendezvous

    class OneMachine(rendezvous.RendezvousHandler):
        get_backend = lambda self: "one-machine"
        get_run_id = lambda self: "cnnlab"
        is_closed = lambda self: False
        set_closed = lambda self: None
        num_nodes_waiting = lambda self: 0
        shutdown = lambda self: True

        def next_rendezvous(self):
            return rendezvous.RendezvousInfo(
                dist.HashStore(), 0, 1, rendezvous.RendezvousStoreInfo("localhost", 0)
            )

    return OneMachine()


def _skip_main_import():
    """Ranks do not import the caller's script, as multiprocessing's children do: what they need of it comes pickled by value.

    So a script needs no `if __name__ == "__main__"`, and may come from standard input. Only the agent's thread is concerned.
    """
    before = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name):
        main = (
            ("init_main_from_path", "init_main_from_name")
            if threading.current_thread().name == AGENT_THREAD
            else ()
        )
        return {key: value for key, value in before(name).items() if key not in main}

    if before.__module__ != __name__:  # once
        multiprocessing.spawn.get_preparation_data = get_preparation_data


def _socket_folder():
    """A private folder whose socket's path stays, with what multiprocessing adds, below the 104 bytes that systems allow, wherever TMPDIR points."""
    folder = tempfile.mkdtemp(prefix="cnnlab-")
    if len(folder) < 80 or os.name == "nt":
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix="cnnlab-", dir="/tmp")


def _process_tree(pids):
    """The process ids of the ranks and of their groups: their loader workers."""
    ranks = set(pids.values())
    found = set(ranks)
    for process in psutil.Process().children(recursive=True) if hasattr(os, "getpgid") else ():
        with suppress(OSError):  # already gone
            if os.getpgid(process.pid) in ranks:
                found.add(process.pid)
    return found


def _unlink_shared_memory(family):
    """Remove the blocks of shared memory that these left, killed between torch's opening of a block and its unlinking."""
    pids = set(map(str, family))
    for block in Path("/dev/shm").glob("torch_*"):  # torch_<process id>_<random>_<number>, on Linux
        if block.name.split("_")[1] in pids:
            block.unlink(missing_ok=True)


def _kill(pids):
    for pid in list(pids.values()):
        try:
            os.killpg(pid, signal.SIGKILL) if hasattr(os, "killpg") else os.kill(
                pid, signal.SIGTERM
            )
        except OSError:  # already gone
            pass
