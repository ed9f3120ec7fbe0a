"""The table of techniques: the ladder tries them, and `explain` suggests them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cnnlab.machine import Machine
from cnnlab.recipe import Recipe

Changes = dict[str, Any]  # fields of a recipe and their new values
PLAIN = {"cpu", "fp32", "tf32", "contiguous", "after-relu", "eager", "sample", False}  # to improve
ONE_CORE = "this process may use only one core"


def use_idle_cores(recipe: Recipe, machine: Machine) -> Changes:
    """A thread per core that neither other ranks nor loader workers use; {} if no core is idle."""
    cores = machine.cores // recipe.ranks - recipe.loader_workers
    if recipe.device != "cpu" or recipe.threads is None or cores <= recipe.threads:
        return {}
    return {"threads": cores}


def use_gpu(recipe: Recipe, machine: Machine) -> Changes:
    """The GPU; {} without one, or for several ranks on Apple's, which cannot communicate."""
    device = machine.accelerator
    several = recipe.ranks > 1 or recipe.strategy is not None
    if recipe.device != "cpu" or device == "cpu" or (device == "mps" and several):
        return {}
    return {"device": device}


def use_fp16(recipe: Recipe, machine: Machine) -> Changes:
    """fp16 instead of fp32 or TF32; {} where a strategy does not support it."""
    if recipe.precision not in PLAIN or recipe.strategy not in (None, "ddp"):
        return {}
    return {"precision": "fp16"}


def add_loader_worker(recipe: Recipe, machine: Machine) -> Changes:
    """One worker more; {} for data that is in memory and needs no decoding."""
    return {"loader_workers": recipe.loader_workers + 1} if recipe.data == "photos" else {}


def double_micro_batches(recipe: Recipe, machine: Machine) -> Changes:
    """Twice as many, if each has an image; {} without a pipeline."""
    count = 2 * recipe.micro_batches
    if recipe.strategy != "pipeline" or recipe.batch_size // recipe.replicas % count:
        return {}
    return {"micro_batches": count}


def double_batch(recipe: Recipe, machine: Machine) -> Changes:
    return {"batch_size": 2 * recipe.batch_size}


@dataclass(frozen=True, kw_only=True)
class Technique:
    """One way to train faster: what it changes and what it needs."""

    changes: Changes | Callable[[Recipe, Machine], Changes]
    why: str  # as advice: "Try next: ..."
    needs: str = ""  # "several cores", or a capability as `Machine.missing` names it
    hardware: str = ""  # a precision that is slow where it is emulated

    def changes_for(self, recipe: Recipe, machine: Machine) -> Changes:
        return self.changes(recipe, machine) if callable(self.changes) else self.changes

    def why_not(self, machine: Machine) -> str | None:
        """Why this machine cannot run it, or None."""
        if self.needs == "several cores" and machine.cores == 1:
            return ONE_CORE
        return machine.missing.get(self.needs)

    def suits(self, recipe: Recipe, machine: Machine) -> bool:
        """Whether the recipe does without it, and this machine is likely to run it fast."""
        in_hardware: Any = machine.hardware.get(self.hardware, True)
        if recipe.device != "cpu" and self.hardware and machine.accelerators:
            in_hardware = self.hardware in machine.accelerators[0].precisions
        if not in_hardware or self.why_not(machine):
            return False
        if callable(self.changes):
            return bool(self.changes(recipe, machine))
        return all(getattr(recipe, name) in PLAIN for name in self.changes)


TECHNIQUES = {
    "threads": Technique(
        changes=use_idle_cores, why="more threads, because cores are idle", needs="several cores"
    ),
    "GPU": Technique(changes=use_gpu, why="the GPU"),
    "bf16": Technique(
        changes={"precision": "bf16"},
        why="bf16, which halves memory traffic and uses Tensor Cores or AMX where available",
        hardware="bf16",
    ),
    "fp16": Technique(
        changes=use_fp16,
        why="fp16, the 16-bit format of Apple's GPUs and of NVIDIA's before Ampere",
        hardware="fp16",
    ),
    "channels_last": Technique(
        changes={"memory_format": "channels_last"},
        why="channels_last, the memory format in which convolutions are fastest",
    ),
    "pooling before ReLU": Technique(
        changes={"pooling": "before-relu"},
        why="max-pooling before ReLU, which gives the same results with a quarter of ReLU's work",
    ),
    "torch.compile": Technique(
        changes={"compiler": "inductor"},
        why="torch.compile, which fuses operations",
        needs="C++ compiler",
    ),
    "fused optimizer": Technique(
        changes={"fused_optimizer": True},
        why="a fused optimizer, which updates all parameters in one kernel",
    ),
    "loader workers": Technique(
        changes=add_loader_worker, why="more loader workers, as long as cores are idle"
    ),
    "whole-batch loader": Technique(changes={"loader": "batch"}, why="fetching whole batches"),
    "micro-batches": Technique(
        changes=double_micro_batches, why="more micro-batches, which make the bubble smaller"
    ),
    "larger batch": Technique(
        changes=double_batch, why="a larger batch: more work per kernel launch and per all-reduce"
    ),
}
