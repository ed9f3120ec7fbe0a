"""Pipeline parallelism: each rank holds consecutive layers, and micro-batches pass through."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from cnnlab.recipe import Recipe


def split_stages(
    network: nn.Module, recipe: Recipe, mesh: DeviceMesh, shape: tuple[int, int, int] | None
) -> nn.Module:
    """Keep this rank's layers in `network`, and return its stages as an `nn.ModuleList`."""
    raise NotImplementedError
