"""Tensor parallelism: each rank holds and computes a part of every layer.

Shoeybi et al., "Megatron-LM" (2019), applied to a CNN. PyTorch's `parallelize_module` shards linear
layers but not convolutions: a DTensor convolution with a sharded weight computes this rank's
channels and labels them as all channels (PyTorch 2.13).
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call

from cnnlab.parallel.data_parallel import local_tensor
from cnnlab.recipe import CnnlabError

CHANNEL_WISE = (nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)  # each channel by itself
ELEMENTWISE = (nn.ReLU, nn.Dropout)


def shard_layers(model: nn.Module, mesh: DeviceMesh, clock: Any) -> nn.Module:
    """Keep this rank's part of each convolution and linear layer of the model, in place.

    Parameters keep their names and become DTensors. All ranks must have the same parameters.
    `clock` (a `training.clock.Clock`) records the communication of the convolutions. Raises
    `CnnlabError` if the channels cannot be divided equally.
    """
    for layers in model.modules():
        if type(layers) is nn.Sequential:
            shard_convolutions(layers, mesh, clock)
            shard_linears(layers, mesh)
    return model


def shard_convolutions(layers: nn.Sequential, mesh: DeviceMesh, clock: Any) -> None:
    """Shard each convolution, with the channel-wise layers that follow it, by output channel."""
    blocks: list[nn.Sequential] = []
    for layer in layers:
        if isinstance(layer, CHANNEL_WISE) and blocks and isinstance(blocks[-1][0], nn.Conv2d):
            blocks[-1].append(layer)
        else:
            blocks.append(nn.Sequential(layer))
        if isinstance(blocks[-1][0], nn.Conv2d):
            _shard_tensors(layer, mesh)
    forward = partial(_forward, blocks, mesh.get_group(), clock)
    layers.forward = forward  # type: ignore[method-assign]


def _shard_tensors(layer: nn.Module, mesh: DeviceMesh) -> None:
    for name, tensor in layer.state_dict(keep_vars=True).items():
        if tensor.ndim == 0:  # the number of batches that batch norm has seen
            continue
        if len(tensor) % mesh.size():
            raise CnnlabError(
                f"tensor_ranks={mesh.size()} does not divide the {len(tensor)} channels of a "
                f"convolution. Use a width that is a multiple of {mesh.size()}."
            )
        # Without a source rank nothing is sent, because all ranks have the same values.
        shard = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
        setattr(layer, name, nn.Parameter(shard) if isinstance(tensor, nn.Parameter) else shard)


def _forward(
    blocks: list[nn.Sequential], group: dist.ProcessGroup, clock: Any, images: Tensor
) -> Tensor:
    """The forward pass: all channels go into a block and come out of it.

    They are gathered after the last layer of the block, because pooling makes them 4x smaller.
    """
    for block in blocks:
        if isinstance(block[0], nn.Conv2d):
            images = SumGradients.apply(images, group, clock)
            tensors = block.state_dict(keep_vars=True)
            shards = {name: local_tensor(tensor) for name, tensor in tensors.items()}
            images = functional_call(block, shards, images)
            images = GatherChannels.apply(images, group, clock)
        else:
            images = block(images)
    return images


class SumGradients(torch.autograd.Function):
    """The identity. Backward adds what the channels of all ranks contribute (f in Megatron-LM)."""

    @staticmethod
    def forward(ctx, images, group, clock):
        ctx.group, ctx.clock = group, clock
        return images.view_as(images)

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        ctx.clock.timed_communication(dist.all_reduce, total, dist.ReduceOp.SUM, ctx.group)
        return total, None, None


class GatherChannels(torch.autograd.Function):
    """The channels of all ranks. Backward takes its own from the gradient, equal in all ranks."""

    @staticmethod
    def forward(ctx, images, group, clock):
        ctx.group = group
        parts = [torch.empty_like(images) for _ in range(group.size())]
        clock.timed_communication(dist.all_gather, parts, images, group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(ctx.group.size(), dim=1)[ctx.group.rank()], None, None


def shard_linears(layers: nn.Sequential, mesh: DeviceMesh) -> None:
    """Shard linear layers in pairs, which communicate once: by output, then by input features.

    A layer without a partner is sharded by input features, so that any number of classes works.
    """
    shard = partial(parallelize_module, device_mesh=mesh, src_data_rank=None)
    linears = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    while linears:
        first = linears.pop(0)
        between = list(layers)[first + 1 : linears[0]] if linears else []
        if not linears or not all(isinstance(layer, ELEMENTWISE) for layer in between):
            shard(layers[first], parallelize_plan=RowwiseParallel(input_layouts=Replicate()))
            continue
        shard(layers[first], parallelize_plan=ColwiseParallel())
        shard(layers[linears.pop(0)], parallelize_plan=RowwiseParallel())
        for layer in between:
            if isinstance(layer, nn.Dropout):
                layer.forward = partial(_drop_features, layer, mesh)  # type: ignore[method-assign]


def _drop_features(dropout: nn.Dropout, mesh: DeviceMesh, features: Tensor) -> Tensor:
    """Dropout of this rank's features, with its part of the mask of one process.

    The ranks have the same seed: without this, their masks would be equal.
    """
    ones = features.new_ones(*features.shape[:-1], features.shape[-1] * mesh.size())
    mask = F.dropout(ones, dropout.p, dropout.training)
    return features * mask.chunk(mesh.size(), dim=-1)[mesh.get_local_rank()]
