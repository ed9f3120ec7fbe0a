"""Sharded data parallelism: ZeRO-1 by hand, and FSDP2."""

import copy
from functools import partial
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.tensor import DTensor, Shard


def shard_copy(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The network with this rank's shard of each parameter: a DTensor, and a view of its rows."""
    shared = {id(parameter): parameter for parameter in network.parameters()}
    shards = copy.deepcopy(network, shared)  # copies all but the parameters
    for name, parameter in network.named_parameters():
        layer, _, own_name = name.rpartition(".")
        shard = nn.Parameter(_shard_of(parameter.detach(), mesh))
        setattr(shards.get_submodule(layer), own_name, shard)
    return shards


def register_zero1_hooks(
    optimizer: torch.optim.Optimizer, network: nn.Module, shards: nn.Module, clock: Any
) -> None:
    """ZeRO-1: each rank updates its shards only, then all gather the updated parameters.

    Optimizer state takes 1/N of the memory (Rajbhandari et al., "ZeRO", 2020). DDP has averaged the
    gradients in `network`.
    """
    parameters = list(network.parameters())
    views: list[Any] = list(shards.parameters())
    mesh = views[0].device_mesh

    def shard_gradients(*_):
        for parameter, view in zip(parameters, views, strict=True):
            if parameter.grad is not None:
                view.grad = _shard_of(parameter.grad, mesh)
                parameter.grad = None

    optimizer.register_step_pre_hook(shard_gradients)
    optimizer.register_step_post_hook(
        lambda *_: clock.timed_communication(gather_rows, parameters, mesh.get_group())
    )


@torch.no_grad()
def gather_rows(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Take from each rank of the group its rows of each parameter, in one all-gather."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    own = torch.cat([_rows(parameter, rank, world).reshape(-1) for parameter in parameters])
    longest = sum(_rows(parameter, 0, world).numel() for parameter in parameters)
    padded = nn.functional.pad(own, (0, longest - len(own)))  # all ranks must send equally much
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    for sender, values in enumerate(gathered):
        rows = [_rows(parameter, sender, world) for parameter in parameters]
        sizes = [part.numel() for part in rows]
        for part, new in zip(rows, values[: sum(sizes)].split(sizes), strict=True):
            part.copy_(new.view_as(part))


def shard_model(model: nn.Module, mesh: DeviceMesh, clock: Any) -> nn.Module:
    """ZeRO-3 by PyTorch: `fully_shard` each stage, then the whole model.

    A rank keeps its rows of all parameters, gradients and optimizer state. Before a stage runs,
    forward and backward, an all-gather fetches the other rows. After backward, a reduce-scatter
    averages the gradients.
    """
    for part in (*model.children(), model):
        sharded = fully_shard(part, mesh=mesh)
        if mesh.device_type == "cpu":
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no average
            all_gather: Any = TimedCollective(DefaultAllGather(), clock)
            sharded.set_custom_all_gather(all_gather)
            reduce_scatter: Any = TimedCollective(DefaultReduceScatter(), clock)
            sharded.set_custom_reduce_scatter(reduce_scatter)
    return model


class TimedCollective:
    """A collective of FSDP, which blocks on the CPU, with its time recorded by the clock."""

    def __init__(self, collective: Any, clock: Any) -> None:
        self.collective = collective
        self.allocate = collective.allocate
        self.clock = clock

    def __call__(self, **arguments: Any) -> None:
        self.clock.timed_communication(partial(self.collective, **arguments))


def _rows(tensor: Tensor, rank: int, world: int) -> Tensor:
    """The rows of the rank, a view. The last ranks have fewer, or none."""
    size = ceil(len(tensor) / world)
    return tensor[rank * size : (rank + 1) * size]


def _shard_of(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    rows = _rows(tensor, mesh.get_local_rank(), mesh.size())
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], shape=shape, stride=stride)
