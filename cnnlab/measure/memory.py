"""What training takes of each rank: memory, by formula and measured, and bytes sent."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cnnlab.data import datasets
from cnnlab.events import Failed
from cnnlab.launch import launcher, worker
from cnnlab.model import build
from cnnlab.parallel import data_parallel
from cnnlab.parallel.data_parallel import local_tensor
from cnnlab.parallel.pipeline import balanced_cuts, list_units
from cnnlab.parallel.pipeline_schedule import action_order, stages_per_rank
from cnnlab.recipe import Recipe
from cnnlab.training.techniques import AUTOCAST_DTYPES

PARTS = ("parameters", "gradients", "optimizer state", "activations")
SHARDED_PARTS = {"zero1": ("optimizer state",), "fsdp": PARTS, "tensor": PARTS}

# How often a ring passes (N - 1) / N of the bytes of a collective (Patarasuk and Yuan, 2009).
RING_PASSES = {"allreduce": 2, "all_reduce": 2, "allgather": 1, "all_gather": 1, "scatter": 1}


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


def measure_memory(
    recipe: Recipe, stop: launcher.Stop = None, fake: bool = False
) -> list[dict[str, int]]:
    """Bytes of each part in each rank, when it is largest, in real training steps of the recipe.

    Activations are the tensors that the forward pass creates, as long as they exist. With `fake`,
    only rank 0 is measured, in one process: with torch's fake process group, whose collectives do
    nothing, there may be thousands of ranks.
    """
    return [sizes for sizes, _ in _measure(recipe, stop, fake)]


def bytes_sent(recipe: Recipe, stop: launcher.Stop = None) -> float:
    """Bytes that a rank sends in a training step, measured: of the rank that sends the most.

    All collectives are taken as rings, whatever the backend does. Broadcasts are not counted.
    """
    return max((sent for _, sent in _measure(recipe, stop)), default=0.0)


def _measure(recipe, stop, fake=False):
    worker.check_runnable(recipe)
    datasets.download(recipe)
    steps = max(2, recipe.sync_every) if recipe.strategy == "local-sgd" else 2
    backend = None if fake else worker.select_backend(recipe, recipe.ranks)
    args, world = (recipe, steps, fake), 1 if fake else recipe.ranks
    found = {}
    for event in launcher.stream(_measure_rank, args, world, stop, backend=backend):
        if not isinstance(event, Failed):  # a RankError follows a Failed
            rank, found[rank] = event
    return [found[rank] for rank in sorted(found)]


def _measure_rank(rank: int, world: int, recipe: Recipe, steps: int, fake: bool) -> Iterator[tuple]:
    """Train, and yield (rank, ({part: bytes}, bytes sent per step))."""
    if fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        world = recipe.ranks
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        # DDP reads answers, which a fake group does not give. A rank holds the same without it.
        data_parallel.wrap_ddp = lambda model, *_: model
    layers: dict[nn.Module, None] = {}  # a set in the order in which they run
    sizes, counter = dict.fromkeys(PARTS, 0), Counter()

    def before_step(*_):
        counter.in_step = True
        parameters = [p for layer in layers for p in layer.parameters(recurse=False)]
        sizes["parameters"] = _storage_bytes(parameters)
        sizes["gradients"] = _storage_bytes(p.grad for p in parameters if p.grad is not None)

    def after_step(optimizer, *_):
        counter.in_step = False
        moments = [tensor for tensor in _tensors(list(optimizer.state.values())) if tensor.ndim]
        sizes["optimizer state"] = _storage_bytes(moments)

    recipe = recipe.replace(steps=steps, warmup_steps=1, evaluate=False)
    events = worker.train_rank(rank, world, recipe, None)
    next(events)  # the training is set up
    register_module_forward_pre_hook(lambda layer, _: layers.setdefault(layer))
    optimizers.register_optimizer_step_pre_hook(before_step)
    optimizers.register_optimizer_step_post_hook(after_step)
    with counter:
        for _ in events:
            pass
    yield rank, ({**sizes, "activations": counter.peak}, counter.sent / steps)


class Counter(TorchDispatchMode):
    """Sees all operators: `peak` are the most bytes of activations at a time, `sent` those sent.

    Activations are the results of operators in the forward pass, and in the backward pass where
    gradients are enabled, because there it computes activations again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_step = False  # of the optimizer
        self.storages: weakref.WeakSet = weakref.WeakSet()  # of activations that still exist
        self.peak = 0
        self.sent = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(hasattr(kind, "to_local") for kind in types):  # DTensor
            return NotImplemented  # it calls the operator again, with local tensors
        result = function(*args, **(kwargs or {}))
        self.sent += ring_bytes(function, result, args, kwargs)
        in_backward = torch._C._current_graph_task_id() != -1
        if self.in_step or (in_backward and not torch.is_grad_enabled()):
            return result
        known = {tensor.untyped_storage() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            # Not views, flat buffers of collectives, and fake tensors, with which DTensor plans.
            counts = tensor.ndim > 1 and not isinstance(tensor, FakeTensor)
            if counts and tensor.untyped_storage() not in known:
                self.storages.add(tensor.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return result


def ring_bytes(function: Any, result: Any, args: tuple, kwargs: Any) -> float:
    """Bytes that this rank sends in an operator: 0 unless it is a collective or a send."""
    library, _, name = function.name().partition("::")
    if "c10d" not in library:
        return 0.0
    if name == "send":
        return sum(tensor.nbytes for tensor in args[0])
    passes = next((passes for part, passes in RING_PASSES.items() if part in name), 0)
    if not passes:
        return 0.0
    from torch.distributed._tools.fake_collectives import CollectiveOp  # here: it takes a second

    ranks = CollectiveOp.get_process_group(function, args).size()
    size = CollectiveOp.get_comm_tensor_size(function, result, args, kwargs)
    return passes * (ranks - 1) / ranks * size


def _storage_bytes(tensors):
    storages = {local_tensor(tensor).untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages)


def _tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
