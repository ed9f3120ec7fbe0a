"""Checkpoints: everything a run needs to resume, written by all ranks together, atomically."""

import errno
import json
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from cnnlab.events import Checkpointed
from cnnlab.recipe import LEARNING_FIELDS, CnnlabError, Recipe, changes
from cnnlab.record import cannot_write

MAX_KEPT = 2  # newest checkpoints; older ones are deleted
RECIPE_FILE = "recipe.json"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a training step changes, and so what a checkpoint holds."""

    network: nn.Module  # the plain model, or this rank's part of it: saved and evaluated
    model: nn.Module  # the same with DDP and compilation applied: trained
    updated: nn.Module  # the module whose parameters the optimizer updates
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    mesh: DeviceMesh | None = None  # the ranks as a table: a row for each replica of the model

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part of the model; None: all ranks."""
        return self.mesh["data"].get_group() if self.mesh else None


def save(folder: str, step: int, recipe: Recipe, state: TrainState) -> Checkpointed:
    """Write `folder/step-N`, which any number of ranks can load, or raise `CnnlabError`.

    It gets its name only when all ranks have written their parts, so that an interrupted checkpoint
    is never loaded.
    """
    import torch.distributed.checkpoint as dcp  # here, because importing it takes 0.5 s
    from torch.distributed.checkpoint.api import CheckpointException

    began, rank = time.perf_counter(), _rank()
    path = Path(folder).resolve() / f"step-{step:08}"
    part = path.with_suffix(".part")
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
    _barrier()
    values = {**_parts(state), **_rng_states(recipe), "step": step}
    # Batch-norm statistics differ between ranks: those of rank 0 count, as in evaluation.
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a single process has no process group
            dcp.save(values, checkpoint_id=part, planner=planner)
    except CheckpointException as error:  # the same in all ranks; not a subclass of Exception
        reason, _ = next(iter(error.failures.values()))
        raise cannot_write(folder, reason) from None
    _barrier()
    if rank == 0:
        try:
            (part / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
            shutil.rmtree(path, ignore_errors=True)
            os.replace(part, path)
        except OSError as error:
            raise cannot_write(folder, error) from None
        for old in _list_checkpoints(folder)[:-MAX_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return Checkpointed(rank=rank, step=step, path=str(path), took_s=time.perf_counter() - began)


def resume(folder: str, recipe: Recipe, state: TrainState, steps: int) -> int:
    """Load the newest checkpoint in `folder` into `state`; return its step, or 0 without one.

    Raises `CnnlabError` if it is damaged, of another recipe, or has already done all `steps`.
    """
    newest = [None, *_list_checkpoints(folder)][-1:]
    if dist.is_initialized():
        dist.broadcast_object_list(newest)  # network file systems may show ranks an older folder
    [path] = newest
    if path is None:
        return 0
    _check_recipe(path, recipe)
    first = _load(path, recipe, state)
    # A restarted run may have failed after its last step: then only the evaluation is left.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if first > steps or (first == steps and not restarted):
        raise CnnlabError(
            f"the newest checkpoint in {folder} has done {first} steps, and steps={steps} asks for "
            "no more. Raise epochs or steps, or choose another folder."
        )
    return first


def check_supported(folder: str | Path, recipe: Recipe) -> None:
    """Raise `CnnlabError` if this recipe cannot write checkpoints to that folder."""
    if recipe.strategy in ("local-sgd", "async"):
        raise CnnlabError(
            f"strategy={recipe.strategy!r} does not support checkpoints, because its ranks have "
            "different parameters. Use strategy='ddp'."
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise cannot_write(folder, error) from None


def _check_recipe(path: Path, recipe: Recipe) -> None:
    try:
        saved = Recipe.from_dict(json.loads((path / RECIPE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise _cannot_load(path, error) from None
    fixed = LEARNING_FIELDS
    if recipe.schedule == "cosine":
        fixed = fixed | {"epochs", "steps"}  # the learning rate has already followed them
    differing = [
        f"{name}={before}, now {now}"
        for name, (before, now) in changes(saved, recipe).items()
        if name in fixed
    ]
    if differing:
        raise CnnlabError(
            f"the checkpoint {path} is of another recipe ({'; '.join(differing)}). "
            "Use that recipe, or choose another folder."
        )


def _load(path: Path, recipe: Recipe, state: TrainState) -> int:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        rng_states = {name: rng for name, rng in _rng_states(recipe).items() if name in saved}
        values = {**_parts(state), **rng_states, "step": 0}
        if "scaler.scale" not in saved:  # by a run without fp16
            del values["scaler"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(values, checkpoint_id=path)
        # The run that saved this may have had other parts of the model, and no DTensors.
        [group] = values["optimizer"]["param_groups"]
        group["params"] = [name for name, _ in state.updated.named_parameters()]
        for name in ("foreach", "fused"):
            group[name] = state.optimizer.defaults[name]
        set_optimizer_state_dict(state.updated, state.optimizer, values["optimizer"])
    except (Exception, CheckpointException) as error:
        raise _cannot_load(path, error) from None
    for name in rng_states:  # none if the saved run did not have this rank
        [_, *device, _] = name.split("-")  # "random-0" or "random-cuda-0"
        generator: Any = torch.get_device_module(*device) if device else torch
        generator.set_rng_state(values[name])
    return values["step"]


def _parts(state: TrainState) -> dict[str, Any]:
    """What is saved. torch calls the `state_dict` and `load_state_dict` of the objects."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return {
        "model": state.network,
        "optimizer": get_optimizer_state_dict(state.updated, state.optimizer),
        "schedule": state.schedule,
        "scaler": state.scaler,
    }


def _rng_states(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The states of this rank's random number generators, by their names in a checkpoint."""
    states = {f"random-{_rank()}": torch.get_rng_state()}
    if recipe.device != "cpu":
        gpus: Any = torch.get_device_module(recipe.device)
        states[f"random-{recipe.device}-{_rank()}"] = gpus.get_rng_state()
    return states


def _list_checkpoints(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).glob("step-*") if path.suffix != ".part")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _cannot_load(path: Path, error: BaseException) -> CnnlabError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    older = [other.name for other in _list_checkpoints(str(path.parent)) if other < path]
    advice = "choose another folder, because this one has no older checkpoint"
    if older:
        advice = f"move it out of the folder, and the run resumes from {older[-1]}"
    return CnnlabError(
        f"the checkpoint {path} cannot be loaded: {lines[-1]}. If it is damaged, or of another "
        f"version, {advice}."
    )
