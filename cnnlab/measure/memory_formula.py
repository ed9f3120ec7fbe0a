"""The memory of each rank by formula: from the shapes of the layers and the strategy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from cnnlab.data import datasets
from cnnlab.model import build
from cnnlab.parallel.pipeline import balanced_cuts, list_units
from cnnlab.parallel.pipeline_schedule import action_order, stages_per_rank
from cnnlab.recipe import Recipe
from cnnlab.training.techniques import AUTOCAST_DTYPES

PARTS = ("parameters", "gradients", "optimizer state", "activations")
SHARDED_PARTS = {"zero1": ("optimizer state",), "fsdp": PARTS, "tensor": PARTS}


def saved_tensor_bytes(function: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for the backward pass of `function()`.

    Each storage counts once; those of the tensors in `exclude` do not count.
    """
    storages = set()

    def record_storage(tensor: Tensor) -> Tensor:
        storages.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
        function()
    storages -= {tensor.untyped_storage() for tensor in exclude}
    return sum(storage.nbytes() for storage in storages)


def state_formula(
    parameters: float,
    ranks: float = 1,
    strategy: str | None = None,
    bytes_each: tuple[int, int, int] = (4, 4, 8),
) -> dict[str, float]:
    """Bytes of parameters, gradients and optimizer state in each rank.

    ZeRO-1 divides the optimizer state by the number of ranks, ZeRO-3 (FSDP) and tensor parallelism
    all three (Rajbhandari et al., "ZeRO", 2020). `bytes_each`: of a parameter; the default is Adam
    in fp32. Mixed precision with a copy in fp32, as in the paper, takes (2, 2, 12).
    """
    sharded = SHARDED_PARTS.get(strategy or "", ())
    return {
        part: parameters * size / (ranks if part in sharded else 1)
        for part, size in zip(PARTS, bytes_each, strict=False)
    }


def memory_formula(recipe: Recipe, rank: int = 0) -> dict[str, float]:
    """Bytes of each part in a rank, when it is largest during a training step.

    The activations are what autograd saves, by the layers' shapes. This is an estimate: kernels and
    collectives need buffers in addition. A pipeline is cut by FLOPs here, by times when it runs.
    """
    stages = trace_stages(recipe)
    mine = stages[rank % recipe.stages :: recipe.stages]
    parameters = [parameter for stage in mine for parameter in stage.parameters]
    total, ranks = sum(p.numel() for p in parameters), float(recipe.tensor_ranks)
    if recipe.strategy in ("zero1", "fsdp"):  # which do not divide rows
        ranks = total / sum(ceil(len(p) / recipe.replicas) * p[0].numel() for p in parameters)
    moments = 2 if recipe.optimizer == "adam" else 1
    state = state_formula(total, ranks, recipe.strategy, (4, 4, 4 * moments))
    activations: float = sum(stage.saved for stage in stages)
    if recipe.recompute:  # the inputs of the stages before, and all of the one in the backward pass
        before = accumulate((stage.inputs for stage in stages), initial=0)
        activations = max(n + stage.saved for n, stage in zip(before, stages, strict=False))
    if recipe.strategy == "tensor":
        gathered = sum(stage.gathered for stage in stages)
        activations = gathered + (activations - gathered) / recipe.tensor_ranks
    if recipe.strategy == "pipeline":
        activations = _pipeline_activations(recipe, rank % recipe.stages, stages)
    return {**state, "activations": activations}


def _pipeline_activations(recipe, rank, stages):
    """Bytes of the micro-batches that wait for their backward pass, at their peak.

    `torch.distributed.pipelining` receives each activation and gradient of a step into a buffer of
    its own, and keeps the outputs of a stage. All ranks load the images.
    """
    between = [0, *(stage.inputs for stage in stages[1:]), 0]
    waiting = peak = 0
    order = action_order(recipe.pipeline_schedule, recipe.stages, recipe.micro_batches, rank)
    for number, phase, _ in order:
        inner = stages[number].saved - stages[number].inputs
        kept = between[number + 1] + (0 if recipe.recompute else inner)
        waiting += kept if phase == "forward" else -kept
        peak = max(peak, waiting + (inner if recipe.recompute else 0))
    received = sum(sum(pair) for pair in list(pairwise(between))[rank :: recipe.stages])
    return peak + recipe.micro_batches * (received + stages[0].inputs)


@dataclass(frozen=True, kw_only=True)
class TracedStage:
    """Consecutive layers, and bytes of one micro-batch in them."""

    parameters: list[nn.Parameter]
    inputs: int
    gathered: int  # inputs of convolutions, which tensor parallelism does not shard
    saved: int  # for the backward pass, with the inputs
    flops: int  # of the forward pass


def trace_stages(recipe: Recipe) -> list[TracedStage]:
    """Run the forward pass without computing: the stages of the pipeline, or else of the model."""
    channels, size, classes = datasets.load(recipe).shape
    count = recipe.batch_size // recipe.replicas // recipe.accumulate // recipe.micro_batches
    dtype = AUTOCAST_DTYPES.get(recipe.precision)
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with torch.random.fork_rng([]), FakeTensorMode(), autocast:
        network = build(recipe, (channels, size, classes))
        images = torch.empty(count, channels, size, size)
        if recipe.strategy != "pipeline":
            return _trace(network.children(), images)
        units = [[getattr(*layer) for layer in unit] for unit in list_units(network)]
        flops = [unit.flops for unit in _trace([nn.Sequential(*unit) for unit in units], images)]
        cuts = balanced_cuts(flops, recipe.stages * stages_per_rank(recipe.pipeline_schedule))
        parts = [nn.Sequential(*chain(*units[first:last])) for first, last in pairwise(cuts)]
        return _trace(parts, images)


def _trace(modules, images):
    stages = []
    for module in modules:
        stage, images = _trace_module(module, images)
        stages.append(stage)
    return stages


def _trace_module(module, images):
    tensors, gathered = [*module.parameters(), images], []

    def record(layer, inputs):
        if isinstance(layer, nn.Conv2d):
            gathered.append(inputs[0].nbytes)

    def forward():
        tensors.append(module(images))

    with register_module_forward_pre_hook(record), FlopCounterMode(display=False) as counter:
        saved = saved_tensor_bytes(forward, tensors)
    traced = TracedStage(
        parameters=list(module.parameters()),
        inputs=images.nbytes,
        gathered=sum(gathered),
        saved=images.nbytes + saved,
        flops=counter.get_total_flops(),
    )
    return traced, tensors[-1].detach().requires_grad_()
