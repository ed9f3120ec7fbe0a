"""Checkpoints: all that a run needs to go on where it was, written by all ranks together, whole or not at all."""

import os
import shutil
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from .events import Checkpointed
from .recipe import Refused

KEEP = 2         # the newest ones


def save(folder, step, *state):
    """Write `folder/step-N` with torch.distributed.checkpoint and return the event. Other numbers of ranks can load it.

    It takes its name only when all ranks have written their part: one that was interrupted is never loaded.
    """
    import torch.distributed.checkpoint as dcp        # here, for it takes half a second, which runs without checkpoints need not

    began, rank = time.perf_counter(), _rank()
    path = Path(folder).resolve() / f"step-{step:08}"
    part = path.with_suffix(".part")
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
    _meet()
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)      # rank 0's batch-norm statistics count, as in training
    with _quiet():
        try:
            dcp.save({**_values(*state), "step": step, f"random-{rank}": torch.get_rng_state()}, checkpoint_id=part, planner=planner)
        except OSError as error:
            raise _unwritable(folder, error) from None
    _meet()
    if rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
        for old in _kept(folder)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    return Checkpointed(rank=rank, step=step, path=str(path), took_s=time.perf_counter() - began)


def resume(folder, model, optimizer, schedule, scaler):
    """Load the newest checkpoint of `folder` into these; returns its step, 0 where there is none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    kept = _kept(folder)
    if not kept:
        return 0
    values = {**_values(model, optimizer, schedule, scaler), "step": 0, f"random-{_rank()}": torch.get_rng_state()}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)             # a rank that was not there before has no random state
    try:
        with _quiet():
            dcp.load(values, checkpoint_id=kept[-1], planner=planner)
        model.load_state_dict(values["model"])
        set_optimizer_state_dict(model, optimizer, values["optimizer"])
        schedule.load_state_dict(values["schedule"])
        scaler.load_state_dict(values["scaler"])
    except Exception as error:       # DCP wraps what went wrong in its own kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Refused(f"the checkpoint {kept[-1]} cannot be loaded: it is damaged, or of another recipe ({reason[-1]}). Delete it, and the "
                      f"run goes on from the one before.") from None
    torch.set_rng_state(values[f"random-{_rank()}"])
    return values["step"]


def check(folder, recipe):
    """Raise `Refused` where this recipe cannot keep checkpoints in that folder."""
    if recipe.strategy in ("local-sgd", "async"):
        raise Refused(f"strategy={recipe.strategy!r} keeps no checkpoints: its ranks differ at every moment. Take strategy='ddp'.")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    if not os.access(folder, os.W_OK):
        raise _unwritable(folder, PermissionError(13, "Permission denied"))


def _values(model, optimizer, schedule, scaler):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer),
            "schedule": schedule.state_dict(), "scaler": scaler.state_dict()}


def _kept(folder):
    return sorted(path for path in Path(folder).glob("step-*") if path.suffix != ".part")


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _meet():
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _quiet():
    """DCP warns that one process alone is one process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unwritable(folder, error):
    return Refused(f"cannot write checkpoints to {folder}: {error.strerror or error}. Name a folder that you may write to and that has room.")
