"""The process group of the ranks: which backend it has, and how a rank joins it."""

import os
import warnings
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from cnnlab import machine
from cnnlab.recipe import SHARDED, CnnlabError, Recipe

Backend = Literal[None, "gloo", "nccl"]

GPU_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}  # They do not communicate CPU tensors.

# Keeps process groups alive: destroying one under a live DDP model hangs or crashes the process.
live_groups: list[dist.ProcessGroup] = []


def select_backend(recipe: Recipe, local_world: int) -> str:
    """The backend for a recipe: the GPUs' own if each rank has a GPU, else gloo."""
    return _backend(recipe.device, torch.accelerator.device_count() >= local_world)


def check_backend(backend: Backend, world: int) -> str:
    """The backend for `ranks`; None: the GPUs' own if each rank has a GPU, else gloo.

    Raises `CnnlabError` if it is unknown, or if it is "nccl" and a rank would have no GPU.
    """
    if backend not in (None, "gloo", "nccl"):
        raise CnnlabError(f"backend={backend!r} is not allowed. Use None, 'gloo' or 'nccl'.")
    device = machine.accelerator()
    if backend == "gloo" or device not in GPU_BACKENDS and backend is None:
        return "gloo"
    if backend == "nccl" and (obstacle := _nccl_obstacle(world)):
        raise CnnlabError(f"{obstacle} Use backend='gloo'.")
    return _backend(device, torch.accelerator.device_count() >= world)


def _backend(device: str, own_gpus: bool) -> str:
    if device not in GPU_BACKENDS:
        return "gloo"
    name = GPU_BACKENDS[device]
    if own_gpus:
        return f"cpu:gloo,{device}:{name}"
    warnings.warn(
        f"Ranks that share a GPU communicate through gloo, which is slower than {name}.",
        stacklevel=1,
    )
    return "gloo"


def _nccl_obstacle(world: int) -> str:
    """Why so many ranks cannot use NCCL here, or ""."""
    gpus = torch.accelerator.device_count() if machine.accelerator() == "cuda" else 0
    if gpus >= world:
        return ""
    return f"NCCL needs an NVIDIA or AMD GPU for each of the {world} ranks, and there are {gpus}."


def join_process_group(backend: str, local_rank: int = 0, **options: Any) -> None:
    """Join the process group; `options` go to `init_process_group`.

    When the user's function calls `init_process_group` again, it finds the group ready.
    """
    original = dist.init_process_group

    def init_process_group(*args, **options):
        if not dist.is_initialized():
            original(*args, **options)
            live_groups.append(dist.distributed_c10d._get_default_group())
        else:
            _answer(args[0] if args else options.get("backend"), backend)

    _, _, gpus = backend.partition(",")
    if gpus:
        device = torch.device(gpus.split(":")[0], local_rank % torch.accelerator.device_count())
        torch.accelerator.set_device_index(device)
        options["device_id"] = device
    init_process_group(backend, **options)
    dist.init_process_group = init_process_group
    dist.distributed_c10d.init_process_group = init_process_group


def join_under_torchrun(recipe: Recipe, timeout: timedelta) -> None:
    """Join the process group of torchrun's ranks.

    They use the GPUs' own backend if no two of them have the same GPU. Each may see all GPUs of its
    machine or only its own, as with Slurm's --gpus-per-task=1.
    """
    if recipe.device not in GPU_BACKENDS:
        join_process_group("gloo", timeout=timeout)
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    number = local_rank % torch.accelerator.device_count()
    properties = torch.get_device_module(recipe.device).get_device_properties(number)
    store.set(f"gpu of rank {rank}", str(properties.uuid))
    gpus = {store.get(f"gpu of rank {other}") for other in range(world)}
    own_gpus = len(gpus) == world
    if recipe.strategy in SHARDED and not own_gpus:
        raise CnnlabError(
            f"strategy={recipe.strategy!r} needs a GPU for each of its {world} ranks, and they "
            f"have {len(gpus)}. Use fewer ranks or strategy='ddp'."
        )
    join_process_group(
        _backend(recipe.device, own_gpus),
        local_rank,
        store=dist.PrefixStore("default_pg", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )


def _answer(asked: str | None, backend: str) -> None:
    """Say why the group has another backend than the one that the user's function asks for."""
    if asked is None or str(asked).lower() in backend or dist.get_rank() > 0:
        return
    reason = "Choose it with backend= of ranks()."
    if "nccl" in str(asked).lower():
        reason = _nccl_obstacle(dist.get_world_size()) or "Use ranks(..., backend='nccl')."
    warnings.warn(
        f"init_process_group({str(asked)!r}) keeps the process group that the ranks have, which "
        f"uses {backend}. {reason}",
        stacklevel=3,
    )
