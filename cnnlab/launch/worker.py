"""What runs in each process of a run: it joins the others, does its job, says how it ends, and never outlives the notebook."""

import faulthandler
import linecache
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cnnlab import machine
from cnnlab.data import datasets
from cnnlab.recipe import CnnlabError
from cnnlab.training import checkpoint, techniques
from cnnlab.training.loop import train

COLLECTIVE_TIMEOUT_S = 60  # seconds: a collective that takes longer has lost a rank


PEER_ERRORS = (
    "gloo",
    "NCCL",
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "C10d store",
)  # what peers of a lost rank say


kept = []  # the process group: destroyed while a model of it lives, it would take the process down or hang it


def main(address):
    """Say hello, take the job, do it, send what it yields, say how it ended. (The entry point that the agent starts.)"""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # an interrupt is for the notebook, which then stops us
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # so that our loader workers can be stopped with us
    threading.Thread(target=_watch_parent, args=(address,), daemon=True).start()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if (
        sys.platform == "linux"
    ):  # as where no fork server is: loader workers are there at once, and leave no semaphores
        multiprocessing.set_start_method("fork", force=True)
    try:
        connection = Client(address)
    except OSError:  # the run was stopped before we came
        os._exit(1)
    with connection:
        say = Channel(connection)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: _after_fork(connection))
        say(rank, os.getpid())
        try:
            job = pickle.loads(connection.recv_bytes())
            multiprocessing.current_process()._config["tempdir"] = job[
                "folder"
            ]  # of what Python and we put into files, to go with it
            os.environ.update(job["env"])
            linecache.cache.update(
                job["cells"]
            )  # so that a traceback shows the lines of notebook cells
            if hasattr(signal, "SIGUSR1"):  # asked for when we hang: see launch._hanging
                faulthandler.register(
                    signal.SIGUSR1,
                    open(Path(job["folder"]) / f"stack-{rank}", "w"),
                    all_threads=False,
                )
            sys.stdout = sys.stderr = StdoutForwarder(say)
            _configure_process(rank, world)
            if job["backend"]:
                join_process_group(
                    job["backend"],
                    store=dist.FileStore(str(Path(job["folder"]) / "store"), world),
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=job["timeout"]),
                )
            function, args = pickle.loads(
                job["call"]
            )  # last: what it names is imported as the rank has it
            for event in function(rank, world, *args):
                say("event", event)
            sys.stdout.flush()
            say("done", None)
            connection.recv()  # all are done; a rank that dies in the agent's own barrier, further on, would hang the agent
        except CnnlabError as refusal:
            say("refused", str(refusal))
            os._exit(1)
        except BaseException as error:
            sys.stdout.flush()
            say("error", (f"{type(error).__name__}: {error}", traceback.format_exc()))
            connection.poll(10)  # the notebook looks at the other ranks, and then ends us all
            os._exit(1)  # at once: peers may hold what a tidy exit would wait for


def join_process_group(backend, **how):
    """The process group; `how` goes to `init_process_group`. Later calls of that, in a learner's function, find it ready."""
    init = dist.init_process_group

    def init_process_group(*args, **options):
        if not dist.is_initialized():
            init(*args, **options)
            kept.append(dist.group.WORLD)

    if "store" in how and os.name == "posix":
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo"
        )  # this machine only: loopback
    init_process_group(backend, **how)
    dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group


def check_runnable(recipe, checkpoints=None):
    """Raise `CnnlabError` where this machine cannot run the recipe, or keep its checkpoints in that folder."""
    if lacking := machine.missing_for(recipe):
        raise CnnlabError(" ".join(lacking))
    if checkpoints:
        checkpoint.check_supported(checkpoints, recipe)


def train_under_torchrun(recipe, checkpoints=None):
    """Under torchrun, which has started `recipe.replicas` ranks: the events of this one, and at the end, in rank 0, those of all."""
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if recipe.strategy == "async" and os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        raise CnnlabError(
            "strategy='async' is for one machine: its ranks share memory. Take 'ddp' or 'local-sgd' for several."
        )
    check_runnable(recipe, checkpoints)
    _configure_process(local, int(os.environ["LOCAL_WORLD_SIZE"]))
    join_process_group(
        select_backend(recipe, int(os.environ["LOCAL_WORLD_SIZE"])),
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    patient = dist.new_group(
        backend="gloo", timeout=timedelta(hours=2)
    )  # a download may take longer than a collective operation
    for turn in (True, False):  # one rank of each machine downloads, then the others find the files
        if turn == (local == 0):
            datasets.download(recipe)
        dist.barrier(patient)
    events = []
    for event in train(recipe, rank, world, checkpoints):
        events.append(event)
        yield event
    everyone = [None] * world if rank == 0 else None
    dist.gather_object(events, everyone)
    for others in (everyone or ())[1:]:
        yield from others


def select_backend(recipe, local_world):
    """NCCL wants a GPU for each rank, and takes nothing from the CPU; gloo carries everything else."""
    return (
        "cpu:gloo,cuda:nccl"
        if recipe.device == "cuda" and torch.cuda.device_count() >= local_world
        else "gloo"
    )


def _configure_process(local_rank, local_world):
    """On its own cores, with as many threads; numpy's random numbers its own, for forked ranks would all draw the same."""
    warnings.filterwarnings(
        "ignore", "This DataLoader will create"
    )  # more loader workers than cores: to see what that does may be the lesson
    threads = max(
        1, machine.cores() // local_world
    )  # asked before pinning, which changes the answer
    techniques.pin_to_cores(local_rank, local_world)
    torch.set_num_threads(threads)
    np.random.seed()


class Channel:
    """The connection, for several threads."""

    def __init__(self, connection):
        self.connection, self.lock = connection, threading.Lock()

    def __call__(self, kind, content):
        with self.lock:
            try:
                self.connection.send((kind, content))
            except (
                OSError
            ):  # the notebook has stopped us, or has gone: then the thread that watches it ends us
                if multiprocessing.connection.wait(
                    [multiprocessing.parent_process().sentinel], 0.2
                ):
                    time.sleep(10)
                os._exit(1)


class StdoutForwarder:
    """Standard output of a rank: whole lines go to the notebook."""

    def __init__(self, say):
        self.say, self.rest, self.lock = say, "", threading.RLock()

    def write(self, text):
        with self.lock:
            *lines, self.rest = (self.rest + text).split("\n")
            for line in lines:
                self.say("print", line)
        return len(text)

    def flush(self):
        with self.lock:
            if self.rest:
                self.write("\n")

    def isatty(self):
        return False


def _after_fork(connection):
    """In a loader worker: it would keep the line open when its rank is killed, and what it prints would get into the rank's words."""
    connection.close()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def _watch_parent(address):
    """End with the notebook: without this, a killed kernel would leave its ranks, and its folder, behind."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    if isinstance(address, str):
        shutil.rmtree(Path(address).parent, ignore_errors=True)
    os.killpg(0, signal.SIGKILL) if hasattr(os, "killpg") else os._exit(1)
