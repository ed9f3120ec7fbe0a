"""Checkpoints: all that a run needs to go on where it was, written by all ranks together, whole or not at all."""

import json
import os
import shutil
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from cnnlab.events import Checkpointed
from cnnlab.recipe import CnnlabError, Recipe, changes

MAX_KEPT = 2  # the newest ones


RESUME_FIELDS = (
    "model",
    "width",
    "data",
    "images",
    "image_size",
    "classes",
    "batch_size",
    "augment",
    "optimizer",
    "learning_rate",
    "schedule",
    "seed",
)  # fields of the recipe that a run cannot change half-way


RECIPE_FILE = "recipe.json"


def save(folder, step, recipe, *state):
    """Write `folder/step-N` with torch.distributed.checkpoint and return the event. Other numbers of ranks can load it.

    It takes its name only when all ranks have written their part: one that was interrupted is never loaded.
    """
    import torch.distributed.checkpoint as dcp  # here, for it takes half a second, which runs without checkpoints need not
    from torch.distributed.checkpoint.api import CheckpointException

    began, rank = time.perf_counter(), _rank()
    path = Path(folder).resolve() / f"step-{step:08}"
    part = path.with_suffix(".part")
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
    _barrier()
    planner = dcp.DefaultSavePlanner(
        dedup_save_to_lowest_rank=True
    )  # rank 0's batch-norm statistics count, as in training
    with _suppress_warnings():
        try:
            dcp.save(
                {**_state_dicts(*state), **_rng_states(recipe), "step": step},
                checkpoint_id=part,
                planner=planner,
            )
        except CheckpointException as error:  # the same in all ranks, and no Exception
            raise _cannot_write(folder, next(iter(error.failures.values()))[0]) from None
    _barrier()
    if rank == 0:
        try:
            (part / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
            shutil.rmtree(path, ignore_errors=True)
            os.replace(part, path)
        except OSError as error:
            raise _cannot_write(folder, error) from None
        for old in _list_checkpoints(folder)[:-MAX_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return Checkpointed(rank=rank, step=step, path=str(path), took_s=time.perf_counter() - began)


def resume(folder, recipe, model, optimizer, schedule, scaler):
    """Load the newest checkpoint of `folder` into these; returns its step, 0 where there is none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    newest = _list_checkpoints(folder)[-1:] or [None]
    if dist.is_initialized():
        dist.broadcast_object_list(
            newest
        )  # rank 0's choice: over a network, other machines may see the folder as it was before
    [newest] = newest
    if newest is None:
        return 0
    _check_recipe(newest, recipe)
    try:
        known = dcp.FileSystemReader(newest).read_metadata().state_dict_metadata
        random = {
            name: state for name, state in _rng_states(recipe).items() if name in known
        }  # else this rank was not there before
        values = {**_state_dicts(model, optimizer, schedule, scaler), **random, "step": 0}
        with _suppress_warnings():
            dcp.load(values, checkpoint_id=newest)
        model.load_state_dict(values["model"])
        set_optimizer_state_dict(model, optimizer, values["optimizer"])
        schedule.load_state_dict(values["schedule"])
        scaler.load_state_dict(values["scaler"])
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise _cannot_load(newest, reason[-1]) from None
    for name in random:
        (torch.cuda if "cuda" in name else torch).set_rng_state(values[name])
    return values["step"]


def check_supported(folder, recipe):
    """Raise `CnnlabError` where this recipe cannot keep checkpoints in that folder."""
    if recipe.strategy in ("local-sgd", "async"):
        raise CnnlabError(
            f"strategy={recipe.strategy!r} keeps no checkpoints: its ranks differ at every moment. Take strategy='ddp'."
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    if not os.access(folder, os.W_OK):
        raise _cannot_write(folder, PermissionError(13, "Permission denied"))


def _check_recipe(path, recipe):
    try:
        before = Recipe.from_dict(json.loads((path / RECIPE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise _cannot_load(path, error) from None
    same = RESUME_FIELDS + (
        ("epochs", "steps") if recipe.schedule == "cosine" else ()
    )  # it has come down, and would go up again
    differing = [
        f"{name}={then}, now {now}"
        for name, (then, now) in changes(before, recipe).items()
        if name in same
    ]
    if differing:
        raise CnnlabError(
            f"the checkpoint {path} is of another recipe ({'; '.join(differing)}). Take that recipe, or name another folder."
        )


def _state_dicts(model, optimizer, schedule, scaler):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "schedule": schedule.state_dict(),
        "scaler": scaler.state_dict(),
    }


def _rng_states(recipe):
    """The states of this rank's random numbers, by their names in a checkpoint."""
    states = {f"random-{_rank()}": torch.get_rng_state()}
    if recipe.device == "cuda":
        states[f"random-cuda-{_rank()}"] = torch.cuda.get_rng_state()
    return states


def _list_checkpoints(folder):
    return sorted(path for path in Path(folder).glob("step-*") if path.suffix != ".part")


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier():
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _suppress_warnings():
    """DCP warns that one process alone is one process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _cannot_load(path, reason):
    return CnnlabError(
        f"the checkpoint {path} cannot be loaded: it is damaged, or of another version ({reason}). Delete it, and the run goes on "
        f"from the one before."
    )


def _cannot_write(folder, error):
    return CnnlabError(
        f"cannot write checkpoints to {folder}: {getattr(error, 'strerror', None) or error}. Name a folder that you may write to and that has room."
    )
