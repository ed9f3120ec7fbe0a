"""Runs in processes of their own: `run(recipe)` starts the ranks, streams their events, and always cleans up."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Client, Listener
from pathlib import Path

import cloudpickle

from . import data, machine
from .events import Failed
from .recipe import Refused
from .train import train

TIMEOUT = timedelta(seconds=60)      # a collective that takes longer has lost a rank
ENVIRONMENT = {                      # for the ranks, read when their libraries load; what the user has set stays
    "GOMP_SPINCOUNT": "40000",       # a thread of GNU OpenMP that waits soon sleeps: else it blocks a core that others need
    "MALLOC_TRIM_THRESHOLD_": str(2**30),     # glibc keeps freed memory: else, in some runs and not in others, every step
    "MALLOC_MMAP_THRESHOLD_": str(2**30),     # gives it back and fetches it anew: measured, a quarter of the speed
}
PRELOAD = ["torch", "torch._dynamo", "torch.distributed.elastic.multiprocessing.api", "sklearn.datasets", "cnnlab.launch"]


class RankError(RuntimeError):
    """A rank failed. `rank` says which, `traceback` is its full text."""

    def __init__(self, rank, error, traceback):
        super().__init__(f"rank {rank} failed: {error}\n\n{traceback}")
        self.rank, self.error, self.traceback = rank, error, traceback


def run(recipe, stop=None, env=None):
    """Train `recipe` in fresh processes, one a rank, and yield the events of all ranks as they come.

    `stop`: a `threading.Event`; when it is set, or when the iteration is abandoned, the processes are killed and
    the events end. `env`: environment variables for the ranks. Raises `Refused` before anything is started when
    this machine cannot run the recipe, and `RankError`, after a `Failed` event, when a rank fails.
    """
    lacking = machine.missing_for(recipe)
    if lacking:
        raise Refused(" ".join(lacking))
    data.fetch_all(recipe.data)             # here, so that a download happens once
    yield from stream(train_ranks, (recipe,), recipe.replicas, stop, env, backend(recipe))


def train_ranks(rank, world, recipe):
    return train(recipe, rank, world)


def backend(recipe):
    """NCCL wants a GPU for each rank; gloo carries everything else."""
    import torch
    return "nccl" if recipe.device == "cuda" and torch.cuda.device_count() >= recipe.replicas else "gloo"


def prewarm():
    """Start the process that ranks are forked from, torch already imported: the next run starts in 0.1 s."""
    if start_method() != "forkserver":
        return
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    ours = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        forkserver.ensure_running()
    finally:
        for name in ours:
            del os.environ[name]


def start_method():
    return "forkserver" if sys.platform == "linux" else "spawn"


def stream(function, args, world, stop=None, env=None, backend="gloo"):
    """Call the generator function(rank, world, *args) in `world` processes; yield what they yield, as it comes."""
    prewarm()
    folder = Path(tempfile.mkdtemp(prefix="cnnlab-"))
    listener = Listener(str(folder / "socket") if hasattr(os, "fork") else None, backlog=world)
    inbox = queue.Queue()                   # (rank, kind, content), from one thread a rank and the agent's
    over = threading.Event()                # ranks that are done wait for it: see _rank
    stopped = threading.Event()             # ranks that come later get no job
    pids = {}                               # filled by the readers: a rank can come while nobody asks for events
    job = cloudpickle.dumps((function, args, dict(env or {}), backend, str(folder / "store")))
    readers = [threading.Thread(target=_read, args=(listener, job, inbox, over, stopped, pids), daemon=True) for _ in range(world)]
    agent = threading.Thread(target=_supervise, args=(listener.address, world, str(folder), inbox), daemon=True)
    finished = False
    try:
        for thread in (*readers, agent):
            thread.start()
        yield from _events(inbox, world, stop)
        finished = not (stop and stop.is_set())
    finally:
        if not finished:
            stopped.set()
            _kill(pids)
        over.set()
        for _ in readers:                   # wake the readers that no rank has come to
            try:
                Client(listener.address).close()
            except OSError:
                break
        listener.close()                    # a rank that is only starting now finds no one, and ends
        agent.join(10)
        _kill(pids)
        shutil.rmtree(folder, ignore_errors=True)


def _events(inbox, world, stop):
    """Yield the ranks' events until all are done, one fails, or `stop` is set."""
    done = 0
    while done < world:
        if stop is not None and stop.is_set():
            return
        try:
            rank, kind, content = inbox.get(timeout=0.02 if stop is not None else None)
        except queue.Empty:
            continue
        if kind == "event":
            yield content
        elif kind == "done":
            done += 1
        elif kind == "refused":
            raise Refused(content)
        else:
            rank, error, text = _cause(inbox, (rank, kind, content))
            yield Failed(rank=rank, error=error, traceback=text)
            raise RankError(rank, error, text)


def _cause(inbox, first):
    """(rank, error, traceback) of what went wrong first: when a rank is lost, its peers fail too, with echoes."""
    found, deadline = [first], time.monotonic() + 0.3
    while (left := deadline - time.monotonic()) > 0:
        try:
            found.append(inbox.get(timeout=left))
        except queue.Empty:
            break
    found = [item for item in found if item[1] in ("error", "gone", "agent")]
    echoes = ("gloo", "NCCL", "Connection closed", "Connection reset")
    is_echo = lambda item: item[1] == "error" and any(word in item[2][1] for word in echoes)
    order = lambda item: ("error", "gone", "agent").index(item[1]) + 3 * is_echo(item)
    rank, kind, content = min(found, key=order)
    if kind == "error":
        return rank, *content
    if kind == "gone":
        text = f"rank {rank} ended without a word: it was killed, or ran out of memory, or crashed in native code.\n"
        return rank, "the process was killed", text
    return rank, "the process did not start", content


def _read(listener, job, inbox, over, stopped, pids):
    """One rank's pid into `pids`, and its messages, to its last word, into the inbox."""
    try:
        with listener.accept() as connection:
            rank, pid = connection.recv()
            pids[rank] = pid
            if stopped.is_set():            # asked after the pid is there to be killed: no rank can slip through
                return
            connection.send_bytes(job)
            kind = None
            try:
                while kind not in ("done", "error", "refused"):
                    kind, content = connection.recv()
                    inbox.put((rank, kind, content))
            except (EOFError, OSError):
                inbox.put((rank, "gone", None))
            if kind == "done":
                over.wait()
                connection.send("bye")
    except (EOFError, OSError):             # the listener closed, or was only woken
        return


def _supervise(address, world, folder, inbox):
    """torch's elastic agent, the engine of torchrun: starts the ranks and notices when one ends."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)           # errors reach the learner as events
    spec = WorkerSpec(role="cnnlab", local_world_size=world, entrypoint=_rank, args=(address,), rdzv_handler=_one_machine(),
                      max_restarts=0, monitor_interval=0.02)
    try:
        result = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder), start_method=start_method(), shutdown_timeout=2,
                                   exit_barrier_timeout=2).run()
        if result is None or result.is_failed():
            failures = result.failures if result else {}
            inbox.put((min(failures, default=0), "agent", "\n".join(failure.message for failure in failures.values())))
    except Exception:
        inbox.put((0, "agent", traceback.format_exc()))


def _one_machine():
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
            return rendezvous.RendezvousInfo(dist.HashStore(), 0, 1, rendezvous.RendezvousStoreInfo("localhost", 0))

    return OneMachine()


def _rank(address):
    """What each process runs: say hello, take the job, do it, send what it yields, say how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # an interrupt is for the notebook, which then stops us
    if hasattr(os, "setpgrp"):
        os.setpgrp()                                      # so that our loader workers can be stopped with us
    threading.Thread(target=_watch_parent, daemon=True).start()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with Client(address) as connection:
        connection.send((rank, os.getpid()))
        try:
            function, args, env, backend, store = pickle.loads(connection.recv_bytes())
            os.environ.update(env)
            if world > 1:
                _join(rank, world, backend, store)
            for event in function(rank, world, *args):
                connection.send(("event", event))
            connection.send(("done", None))
            connection.recv()     # all are done; a rank that dies in the agent's own barrier, further on, would hang the agent
        except Refused as refusal:
            connection.send(("refused", str(refusal)))
            os._exit(1)
        except BaseException as error:
            connection.send(("error", (f"{type(error).__name__}: {error}", traceback.format_exc())))
            os._exit(1)                                   # at once: peers may hold what a tidy exit would wait for


def _join(rank, world, backend, store):
    """The process group, through a file: one machine needs no port and no name service."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")   # loopback only
    dist.init_process_group(backend, store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=TIMEOUT)


def _watch_parent():
    """End with the notebook: without this, a killed kernel would leave its ranks running."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    _kill({0: os.getpid()})


def _kill(pids):
    for pid in list(pids.values()):
        try:
            os.killpg(pid, signal.SIGKILL) if hasattr(os, "killpg") else os.kill(pid, signal.SIGTERM)
        except OSError:                                   # already gone
            pass
