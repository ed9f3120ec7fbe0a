"""Pipeline parallelism: each rank holds consecutive layers, and micro-batches pass through."""

import copy
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.benchmark import Timer

from cnnlab.parallel.pipeline_schedule import stages_per_rank
from cnnlab.recipe import CnnlabError, Recipe


class Stage(nn.Sequential):
    """Consecutive layers: stage `number`, from 0, of `count`.

    `inputs` and `outputs` are meta tensors like what it takes and returns for one micro-batch.
    """

    def __init__(
        self, layers: list[nn.Module], number: int, count: int, inputs: Tensor, outputs: Tensor
    ) -> None:
        super().__init__(*layers)
        self.number = number
        self.count = count
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).contiguous()  # as messages must be


def split_stages(
    network: nn.Module, recipe: Recipe, mesh: DeviceMesh, shape: tuple[int, int, int]
) -> nn.ModuleList:
    """Keep only this rank's layers in `network`, and return them as its stages.

    Stages are cut so that the slowest one is as fast as possible, by times that rank 0 measures.
    The remaining layers keep their names, so that checkpoints have those of the whole network.
    `network(images)` then is collective: the logits reach all ranks, without gradients. `shape`:
    (channels, size, classes) of the images.
    """
    ranks, rank = mesh.size(), mesh.get_local_rank()
    count = ranks * stages_per_rank(recipe.pipeline_schedule)
    units = list_units(network)
    if len(units) < count:
        raise CnnlabError(
            f"stages={ranks} with pipeline_schedule={recipe.pipeline_schedule!r} cuts the model "
            f"into {count} parts, but {recipe.model} has only {len(units)} layers with parameters. "
            "Lower stages or choose a deeper model."
        )
    plan: list[Any] = [None, None]
    if dist.get_rank() == 0:
        seconds, examples = _measure_units(units, _example_images(network, recipe, shape))
        plan = [balanced_cuts(seconds, count), examples]
    dist.broadcast_object_list(plan)  # to all replicas, because they average their gradients
    cuts, examples = plan
    stages = nn.ModuleList()
    for number in range(count):
        part = slice(cuts[number], cuts[number + 1])
        layers = [layer for unit in units[part] for layer in unit]
        if number % ranks == rank:
            modules = [getattr(parent, name) for parent, name in layers]
            stages.append(Stage(modules, number, count, examples[part.start], examples[part.stop]))
        else:
            for parent, name in layers:
                delattr(parent, name)
    network.forward = partial(_forward_through_stages, stages, mesh, examples[-1])  # type: ignore
    return stages


def list_units(network: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The parts between which to cut: a layer with parameters, and those without that follow it.

    Each layer is given as (parent, name). So every stage has parameters to train, and activations
    are sent after pooling.
    """
    units: list[list[tuple[nn.Module, str]]] = []
    for parent, name in _list_layers(network):
        if not units or any(True for _ in getattr(parent, name).parameters()):
            units.append([])
        units[-1].append((parent, name))
    return units


def _list_layers(module):
    for name, child in module.named_children():
        if type(child).forward is nn.Sequential.forward:
            yield from _list_layers(child)
        else:
            yield module, name


def _example_images(network, recipe, shape):
    channels, size, _ = shape
    count = recipe.batch_size // recipe.replicas // recipe.micro_batches
    parameter = next(network.parameters())
    return torch.rand(count, channels, size, size, dtype=parameter.dtype, device=parameter.device)


def _measure_units(units, activations):
    """Seconds of each unit for a micro-batch, forward and backward, and examples of activations.

    At any time, only the activations and gradients of one unit are in memory.
    """
    seconds, examples = [], [activations.to("meta")]
    for unit in units:
        layers = [getattr(parent, name) for parent, name in unit]
        copied = copy.deepcopy(nn.Sequential(*layers))  # whose batch norm and gradients may change
        inputs = activations.detach().requires_grad_(activations.requires_grad)
        timer = Timer(
            "layers(inputs).sum().backward()",
            globals={"layers": copied, "inputs": inputs},
            num_threads=torch.get_num_threads(),
        )
        # The fastest, because other processes slow down the rest.
        seconds.append(min(timer.timeit(1).median for _ in range(3)))
        activations = copied(inputs)
        shape, dtype = activations.shape, activations.dtype
        examples.append(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True))
    return seconds, examples


def balanced_cuts(seconds: Sequence[float], count: int) -> list[int]:
    """Where to cut the units into `count` parts, [0, ..., len(seconds)]: the slowest is fastest."""

    @cache
    def cut(begin, count):
        """The seconds of the slowest of `count` parts from `begin` on, and where they end."""
        if count == 1:
            return sum(seconds[begin:]), [len(seconds)]
        options = []
        for end in range(begin + 1, len(seconds) - count + 2):
            slowest, ends = cut(end, count - 1)
            options.append((max(sum(seconds[begin:end]), slowest), [end, *ends]))
        return min(options)

    return [0, *cut(0, count)[1]]


@torch.no_grad()
def _forward_through_stages(stages, mesh, logits, images):
    """The logits of any number of images, on all ranks of the mesh."""
    group, ranks, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    activations = images
    for stage in stages:
        if stage.number > 0:
            activations = _empty_like(stage.inputs, images)
            dist.recv(activations, group=group, group_src=(rank - 1) % ranks)
        activations = stage(activations)
        if stage.number < stage.count - 1:
            dist.send(activations, group=group, group_dst=(rank + 1) % ranks)
    if rank != ranks - 1:
        activations = _empty_like(logits, images)
    dist.broadcast(activations, group=group, group_src=ranks - 1)
    return activations


def _empty_like(example, images):
    """Room for activations like those of a micro-batch, for as many images as given."""
    shape = (len(images), *example.shape[1:])
    return torch.empty(shape, dtype=example.dtype, device=images.device)
