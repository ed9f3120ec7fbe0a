"""Sharded data parallelism: ZeRO-1 by hand, and FSDP2."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def shard_copy(network: nn.Module, mesh: DeviceMesh | None) -> nn.Module:
    """A copy of the network with this rank's shard of each parameter, as a DTensor."""
    raise NotImplementedError


def register_zero1_hooks(optimizer, network, shards, clock) -> None:
    """ZeRO-1: each rank updates its shards only, then all gather the updated parameters."""
    raise NotImplementedError


def shard_model(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """ZeRO-3 by PyTorch: `fully_shard` each stage, then the whole model."""
    raise NotImplementedError
