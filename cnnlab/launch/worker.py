"""What runs in a rank: take the job from the notebook, do it, and report how it ended."""

import builtins
import linecache
import logging
import multiprocessing.context
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
import torch.distributed as dist

from cnnlab import machine
from cnnlab.data import datasets
from cnnlab.data.loader import system_limit_error
from cnnlab.events import Event
from cnnlab.launch import output
from cnnlab.launch.backends import join_process_group, join_under_torchrun
from cnnlab.launch.failures import Kind, Message, enable_stack_dumps
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import checkpoint, techniques
from cnnlab.training.async_loop import train_async
from cnnlab.training.loop import train
from cnnlab.training.pipeline_loop import train_pipeline

COLLECTIVE_TIMEOUT_S = 60  # A collective that takes longer has lost a rank.


def main(connection: Connection, pipe: Connection, rank: int, world: int, folder: str) -> None:
    """Do the job that comes through the connection, and print into the pipe.

    The entry point of each process.
    """
    output.redirect(pipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The notebook handles interrupts.
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # So that loader workers can be killed together with their rank.
    threading.Thread(target=_watch_parent, args=(folder,), daemon=True).start()
    multiprocessing.set_start_method(None, force=True)  # The user's function may set it.
    if sys.platform == "linux":
        # Loader workers fork from the rank: they start at once and leave no semaphores behind.
        default: Any = multiprocessing.context._default_context  # type: ignore[attr-defined]
        default._default_context = multiprocessing.get_context("fork")
    with connection:
        channel = Channel(connection, rank)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=partial(_after_fork, connection))
        try:
            job = pickle.loads(connection.recv_bytes())
            _set_up(job, rank, world, Path(folder))
            # After the setup, because unpickling imports modules that may depend on it.
            function, args = pickle.loads(job.call)
            for event in function(rank, world, *args):
                channel.send("event", event)
            output.flush()
            channel.send("done")
            connection.recv()  # Until all are done: peers may still use connections to this rank.
        except CnnlabError as error:
            channel.send("rejected", str(error))
            os._exit(1)
        except BaseException as error:
            output.flush()
            message = f"{type(error).__name__}: {error}"
            channel.send("error", error=message, traceback=_format_traceback(error))
            connection.poll(10)  # The notebook inspects the other ranks, then kills them all.
            os._exit(1)  # A normal exit could block on resources that peers hold.


def _format_traceback(error: BaseException) -> str:
    """The traceback from the first call outside of this file."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    lines = traceback.format_exception(type(error), error, frames or error.__traceback__)
    return "".join(lines)


def call_once(rank: int, world: int, function: Callable, args: tuple) -> Iterator[tuple]:
    """Yield one event: the rank, and the pickled value of function(*args), None after exit(0)."""
    value = None
    try:
        value = function(*args)
    except SystemExit as error:
        if error.code:
            raise
    if isinstance(value, Generator):
        raise CnnlabError(
            "The function returned a generator, which cannot be sent to the notebook. "
            "Return a list instead of using yield."
        )
    yield rank, cloudpickle.dumps(value)


def train_rank(rank: int, world: int, recipe: Recipe, checkpoints: str | None) -> Iterator[Event]:
    """Train one rank of `recipe` and yield its events."""
    try:
        if recipe.strategy == "async" and world > 1:
            yield from train_async(recipe, rank, world)
        elif recipe.strategy == "pipeline":
            yield from train_pipeline(recipe, rank, world, checkpoints)
        else:
            yield from train(recipe, rank, world, checkpoints)
    except (RuntimeError, MemoryError, OSError) as error:
        if cause := techniques.memory_limit_error(recipe, error) or system_limit_error(error):
            raise cause from error
        raise


def train_under_torchrun(recipe: Recipe, checkpoints: str | Path | None = None) -> Iterator[Event]:
    """Train the rank that torchrun started, and yield its events; rank 0 then yields those of all.

    torchrun must have started `recipe.ranks` ranks.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if recipe.ranks != world:
        raise CnnlabError(
            f"torchrun started {world} ranks, but strategy={recipe.strategy!r} needs a multiple of "
            f"stages * tensor_ranks = {recipe.model_ranks}. Change --nproc-per-node."
        )
    if recipe.strategy == "async" and local_world != world:
        raise CnnlabError("strategy='async' runs on one machine only. Use 'ddp' or 'local-sgd'.")
    check_runnable(recipe, checkpoints)
    _configure_process(local_rank, local_world)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    join_under_torchrun(recipe, timeout)

    # One rank of each machine downloads, which may take longer than a collective is allowed to.
    download_group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    if local_rank == 0:
        datasets.download(recipe)
    dist.barrier(download_group)

    events = []
    folder = str(checkpoints) if checkpoints else None
    for event in train_rank(rank, world, recipe, folder):
        events.append(event)
        yield event
    gathered: list[list[Event]] = [[]] * world  # On rank 0, the events of all ranks.
    dist.gather_object(events, gathered if rank == 0 else None)
    for others in gathered[1:]:
        yield from others


def check_runnable(recipe: Recipe, checkpoints: str | Path | None = None) -> None:
    """Raise `CnnlabError` if this machine cannot run the recipe or write its checkpoints there."""
    if missing := machine.missing_for(recipe):
        raise CnnlabError(" ".join(missing))
    if checkpoints:
        checkpoint.check_supported(checkpoints, recipe)


def _set_up(job: "Job", rank: int, world: int, folder: Path) -> None:
    """Everything a rank needs before the user's function is unpickled and called."""
    # Temporary files of Python and cnnlab disappear with the run's folder.
    multiprocessing.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]
    for name, value in job.env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world)
    linecache.cache.update(job.cells)
    enable_stack_dumps(folder, rank)
    builtins.input = sys.breakpointhook = _reject_input
    if job.log_level != logging.WARNING:  # the default
        logging.basicConfig(level=job.log_level)
    _configure_process(rank, world)
    if job.backend:
        if os.name == "posix":  # All ranks are on this machine.
            loopback = "lo0" if sys.platform == "darwin" else "lo"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        store = dist.FileStore(str(folder / "store"), world)
        options = {"store": store, "rank": rank, "world_size": world}
        timeout = timedelta(seconds=job.timeout)
        join_process_group(job.backend, rank, timeout=timeout, **options)


def _reject_input(*_: Any, **__: Any) -> Any:
    raise CnnlabError(
        "input() and breakpoint() do not work in a rank, which has no keyboard. "
        "Print the values, or debug the function by calling it in the notebook itself."
    )


def _configure_process(local_rank: int, local_world: int) -> None:
    """Pin the rank to its share of the cores, with as many threads, and seed numpy."""
    # A lesson may use more loader workers than there are cores, to show what happens.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    threads = max(1, machine.cores() // local_world)  # Before pinning, which changes the count.
    techniques.pin_to_cores(local_rank, local_world)
    torch.set_num_threads(threads)
    np.random.seed()  # Forked ranks would all draw the same numbers.


def _after_fork(connection: Connection) -> None:
    """In a loader worker, give up the rank's connection.

    An open copy of it would hide from the notebook that the rank was killed.
    """
    connection.close()


def _watch_parent(folder: str) -> None:
    """End with the notebook: a killed kernel cannot stop its ranks or remove their folder."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    if hasattr(os, "killpg"):
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the notebook sends to each rank."""

    call: bytes  # the pickled generator function and its arguments
    env: dict[str, str | None]  # None: the variable is deleted
    cells: dict[str, tuple]  # linecache entries of notebook cells, for tracebacks
    log_level: int  # of the root logger
    backend: str | None  # of the process group; None: there is none
    timeout: float  # of a collective, in seconds


class Channel:
    """The connection to the notebook, shared by the threads of a rank."""

    def __init__(self, connection: Connection, rank: int) -> None:
        self.connection = connection
        self.rank = rank
        self.lock = threading.Lock()

    def send(self, kind: Kind, content: Any = None, **failure: str) -> None:
        """Send a `Message`; end the process if the notebook no longer listens."""
        with self.lock:
            try:
                self.connection.send(Message(self.rank, kind, content, **failure))
            except OSError:  # The notebook kills this process, or is gone: see _watch_parent.
                time.sleep(10)
                os._exit(1)
