"""What training takes of each rank, measured: memory, and bytes sent."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cnnlab.events import Failed
from cnnlab.launch import launcher, worker
from cnnlab.measure.memory_formula import PARTS
from cnnlab.parallel import data_parallel
from cnnlab.parallel.data_parallel import local_tensor
from cnnlab.recipe import CnnlabError, Recipe

# How often a ring passes (N - 1) / N of the bytes of a collective (Patarasuk and Yuan, 2009).
RING_PASSES = {"allreduce": 2, "all_reduce": 2, "allgather": 1, "all_gather": 1, "scatter": 1}


def measure_memory(
    recipe: Recipe, stop: launcher.Stop = None, fake: bool = False
) -> list[dict[str, int]]:
    """Bytes of each part in each rank, when it is largest, in real training steps of the recipe.

    Activations are the tensors that the forward pass creates, as long as they exist. With `fake`,
    only rank 0 is measured, in one process: with torch's fake process group, whose collectives do
    nothing, there may be thousands of ranks.
    """
    if fake and recipe.strategy == "pipeline":
        raise CnnlabError("fake=True does not work with strategy='pipeline'. Use memory_formula.")
    return [sizes for sizes, _ in measure_ranks(recipe, stop, fake)]


def bytes_sent(recipe: Recipe, stop: launcher.Stop = None) -> float:
    """Bytes that a rank sends in a training step, measured: of the rank that sends the most.

    All collectives are taken as rings, whatever the backend does. Broadcasts are not counted.
    """
    return max((sent for _, sent in measure_ranks(recipe, stop)), default=0.0)


def measure_ranks(
    recipe: Recipe, stop: launcher.Stop = None, fake: bool = False
) -> list[tuple[dict[str, int], float]]:
    """What `measure_memory` and `bytes_sent` say of each rank, from one run."""
    backend = launcher.prepare_run(recipe)
    steps = max(2, recipe.sync_every) if recipe.strategy == "local-sgd" else 2
    args, world = (recipe, steps, fake), recipe.ranks
    if fake:
        backend, world = None, 1
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
