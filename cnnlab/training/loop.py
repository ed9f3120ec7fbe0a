"""THE training loop: a generator of events for one rank. It does not print, plot or save runs."""

import copy
import os
from collections.abc import Iterator
from itertools import islice
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler
from torch.utils.data import TensorDataset

from cnnlab.data import datasets
from cnnlab.data.loader import random_shifts, shift_images, train_loader
from cnnlab.events import Event
from cnnlab.model import build
from cnnlab.parallel import data_parallel
from cnnlab.parallel.mesh import make_mesh
from cnnlab.recipe import Recipe
from cnnlab.training import checkpoint, techniques
from cnnlab.training.checkpoint import TrainState
from cnnlab.training.clock import Clock
from cnnlab.training.meter import Meter


def train(
    recipe: Recipe, rank: int = 0, world: int = 1, checkpoints: str | None = None
) -> Iterator[Event]:
    """Train as the recipe says and yield events. With several ranks, the process group is ready.

    Each rank trains on its share of every batch, so that the gradients averaged over all ranks are
    those of the whole batch. Speed figures leave out the first `recipe.warmup_steps` steps.
    `checkpoints` is a folder: the run resumes from its newest checkpoint, and writes one every
    `recipe.checkpoint_every` steps.
    """
    device = select_device(recipe, rank)
    clock = Clock(device)
    splits, steps, state = set_up(recipe, device, world, clock)
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    replica, replicas = rank // recipe.model_ranks, world // recipe.model_ranks
    techniques.set_seed(recipe.seed, replica)
    first = checkpoint.resume(checkpoints, recipe, state, steps) if checkpoints else 0
    loader = train_loader(recipe, splits.train, replica, replicas, first=first, steps=steps)
    shifts = islice(random_shifts(recipe.seed), first, None)
    meter = Meter(recipe, rank, world, clock, first)
    epochs = ceil(steps / len(loader))
    accuracy = None

    yield meter.started(state.network, splits, steps)
    clock.resume()
    for epoch in range(1, epochs + 1):
        for images, labels in clock.iterate(loader):
            images, labels = to_device(images, labels, recipe, device)
            if recipe.augment == "shift":
                images = shift_images(images, next(shifts))
            inputs, targets = images.chunk(recipe.accumulate), labels.chunk(recipe.accumulate)
            for i in range(recipe.accumulate):
                is_last = i == recipe.accumulate - 1
                with techniques.autocast(recipe), data_parallel.gradient_sync(model, is_last):
                    logits = model(inputs[i])
                    loss = F.cross_entropy(logits, targets[i]) / recipe.accumulate
                clock.mark("forward")
                scaler.scale(loss).backward()
                clock.mark("backward")
                meter.add(loss, logits, targets[i])
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < scale  # because fp16 gradients overflowed
            optimizer.zero_grad()
            if not skipped:
                state.schedule.step()
            clock.mark("update")
            meter.end_step(skipped)
            yield from report(epoch, meter, state, checkpoints)
        if meter.losses:
            yield meter.progress(epoch)
        # A resumed run does not evaluate the epochs that it skips, except for the last.
        if recipe.evaluate and (epoch * len(loader) > first or epoch == epochs):
            accuracy, test_loss = evaluate(state, recipe, splits.test, device, rank, world)
            yield meter.evaluated(epoch, accuracy, test_loss, len(splits.test))
        clock.resume()
    yield meter.finished(accuracy)


def report(
    epoch: int, meter: Meter, state: TrainState, checkpoints: str | None = None
) -> Iterator[Event]:
    """What there is to report after a step: its progress now and then, and a checkpoint."""
    save_to = checkpoints if meter.step % meter.recipe.checkpoint_every == 0 else None
    if save_to or meter.report_due():
        yield meter.progress(epoch)
        if save_to:
            yield checkpoint.save(save_to, meter.step, meter.recipe, state)
        meter.clock.resume()


def set_up(
    recipe: Recipe, device: torch.device, world: int, clock: Clock
) -> tuple[datasets.ImageSplits, int, TrainState]:
    """Load the data and build what is trained: (splits, number of steps, state)."""
    techniques.set_threads(recipe, world)
    splits = datasets.load(recipe)
    if recipe.loader == "device":
        splits = splits.to(device)
    steps = datasets.num_steps(recipe, splits)
    mesh: Any = make_mesh(recipe, device)
    techniques.limit_memory(recipe)
    network = build(recipe, splits.shape)
    model = techniques.prepare(network, recipe, device, world, clock, mesh, splits.shape)
    updated = network
    if recipe.strategy == "zero1":
        from cnnlab.parallel import sharding  # here, because importing DTensor takes a second

        updated = sharding.shard_copy(network, mesh["data"])
    optimizer, schedule = make_optimizer(recipe, updated, steps)
    scaler = techniques.grad_scaler(recipe)
    state = TrainState(
        network=network,
        model=model,
        updated=updated,
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        mesh=mesh,
    )
    if recipe.strategy == "zero1":
        sharding.register_zero1_hooks(optimizer, network, updated, clock)
    else:
        group = state.data_group
        data_parallel.register_sync_hooks(optimizer, network, recipe, world, clock, group)
    return splits, steps, state


def select_device(recipe: Recipe, rank: int) -> torch.device:
    """The CPU, or this rank's GPU. With fewer GPUs than ranks, ranks share them."""
    if recipe.device == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = torch.device(recipe.device, local_rank % torch.accelerator.device_count())
    torch.accelerator.set_device_index(device)  # the default GPU of NCCL and of "cuda"
    return device


def make_optimizer(recipe: Recipe, model: nn.Module, steps: int) -> tuple[Optimizer, LRScheduler]:
    """The optimizer (Adam, or SGD with momentum 0.9) and its learning rate schedule."""
    optimizer: Optimizer
    parameters = list(model.parameters())
    options: Any = {"lr": recipe.learning_rate}
    if recipe.fused_optimizer:
        options["fused"] = True
    elif all(hasattr(parameter, "to_local") for parameter in parameters):
        # An operation on a DTensor takes tens of microseconds: update all parameters together.
        options["foreach"] = True
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, **options)
    else:
        optimizer = torch.optim.SGD(parameters, momentum=0.9, **options)
    if recipe.schedule == "cosine":
        return optimizer, CosineAnnealingLR(optimizer, T_max=steps)
    return optimizer, ConstantLR(optimizer, factor=1.0)


def to_device(
    images: Tensor, labels: Tensor, recipe: Recipe, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Copy a batch to the device, its images in the recipe's memory format."""
    channels_last = recipe.memory_format == "channels_last"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(device, memory_format=memory_format, non_blocking=True)
    return images, labels.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(
    state: TrainState,
    recipe: Recipe,
    dataset: TensorDataset,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> tuple[float, float]:
    """(accuracy, mean loss) over all held-out images, which the replicas split.

    Where replicas differ, they evaluate their mean parameters and the first one's batch-norm
    statistics.
    """
    network = state.network
    replica, replicas = rank // recipe.model_ranks, world // recipe.model_ranks
    if world > 1 and recipe.strategy == "local-sgd":
        network = data_parallel.average_model(copy.deepcopy(network))
    elif replicas > 1:
        data_parallel.broadcast_buffers(network, state.data_group)
    network.eval()
    totals = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64)
    totals = totals.to(device)
    # Equally many batches in all replicas, because the forward pass of FSDP is collective.
    count = ceil(len(dataset) / replicas / 512)
    batches = [tensor[replica::replicas].tensor_split(count) for tensor in dataset.tensors]
    for images, labels in zip(*batches, strict=True):
        images, labels = images.to(device), labels.to(device)
        with techniques.autocast(recipe):
            logits = network(images)
        logits = logits.float()
        totals[0] += (logits.argmax(1) == labels).sum()
        totals[1] += F.cross_entropy(logits, labels, reduction="sum")
    if world > 1:
        dist.all_reduce(totals)
        totals /= recipe.model_ranks
    network.train()
    return tuple((totals / len(dataset)).tolist())
