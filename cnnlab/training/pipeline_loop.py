"""The loop of pipeline-parallel training: a schedule runs forward and backward passes."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from cnnlab.data.loader import random_shifts, shift_images, train_loader
from cnnlab.events import Event
from cnnlab.model import build
from cnnlab.recipe import Recipe
from cnnlab.training import checkpoint, techniques
from cnnlab.training.checkpoint import TrainState
from cnnlab.training.clock import Clock
from cnnlab.training.loop import evaluate, report, select_device, set_up, to_device
from cnnlab.training.meter import Meter


def train_pipeline(
    recipe: Recipe, rank: int, world: int, checkpoints: str | None = None
) -> Iterator[Event]:
    """Train with strategy='pipeline' and yield the same events as `loop.train`.

    All ranks of a replica load its share of each batch: the first stage needs the images, the last
    one the labels.
    """
    device = select_device(recipe, rank)
    clock = Clock(device)
    clock.recent = deque(maxlen=2)  # of more steps, a timeline would not show each micro-batch
    splits, steps, state = set_up(recipe, device, world, clock)
    schedule = make_schedule(recipe, state, device, clock)
    replica, replicas = rank // recipe.stages, world // recipe.stages
    techniques.set_seed(recipe.seed, replica)
    first = checkpoint.resume(checkpoints, recipe, state, steps) if checkpoints else 0
    loader = train_loader(recipe, splits.train, replica, replicas, first=first, steps=steps)
    shifts = islice(random_shifts(recipe.seed), first, None)
    meter = Meter(recipe, rank, world, clock, first)
    epochs = ceil(steps / len(loader))
    accuracy = None

    with torch.device("meta"):
        whole = build(recipe, splits.shape)
    yield meter.started(whole, splits, steps)
    clock.resume()
    for epoch in range(1, epochs + 1):
        for images, labels in clock.iterate(loader):
            images, labels = to_device(images, labels, recipe, device)
            if recipe.augment == "shift":
                images = shift_images(images, next(shifts))
            _train_step(images, labels, state, schedule, meter)
            yield from report(epoch, meter, state, checkpoints)
        if meter.losses:
            yield meter.progress(epoch)
        if recipe.evaluate and (epoch * len(loader) > first or epoch == epochs):
            accuracy, test_loss = evaluate(state, recipe, splits.test, device, rank, world)
            yield meter.evaluated(epoch, accuracy, test_loss, len(splits.test))
        clock.resume()
    yield meter.finished(accuracy)


def _train_step(images, labels, state, schedule, meter):
    """Each rank passes on what its stages compute. All learn the loss from the last one."""
    group = state.mesh["model"].get_group()
    losses: list = []
    totals = torch.zeros(2, dtype=torch.float64, device=images.device)
    meter.clock.mark("forward")  # copying and moving the images
    inputs = [images] if dist.get_rank(group) == 0 else []
    logits = schedule.step(*inputs, target=labels, losses=losses)
    if logits is not None:
        totals[0] = torch.stack(losses).mean()
        totals[1] = (logits.argmax(1) == labels).sum()
    dist.broadcast(totals, group=group, group_src=meter.recipe.stages - 1)
    meter.clock.mark("exposed")
    meter.step_loss += totals[0]
    meter.correct += totals[1]
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.schedule.step()
    meter.clock.mark("update")
    meter.end_step()


def make_schedule(recipe: Recipe, state: TrainState, device: torch.device, clock: Clock) -> Any:
    """The recipe's schedule of `torch.distributed.pipelining` for this rank's parts of the model.

    The clock records when they compute; what is left of a step is exposed communication.
    """
    from torch.distributed import pipelining  # here, because it imports torch._dynamo

    def timed(phase: str, function: Callable) -> Callable:
        def call(*args, **options):
            clock.mark("exposed")  # since the last computation, waiting for other ranks
            with techniques.autocast(recipe) if phase == "forward" else nullcontext():
                result = function(*args, **options)
            clock.mark(phase)
            return result

        return call

    mesh: Any = state.mesh
    parts: Any = state.model
    stages: list[Any] = []
    for part in parts:
        examples = {"input_args": part.inputs, "output_args": part.outputs}
        stage: Any = pipelining.PipelineStage(
            part, part.number, part.count, device, group=mesh["model"].get_group(), **examples
        )
        stage.forward_one_chunk = timed("forward", stage.forward_one_chunk)
        stage.backward_one_chunk = timed("backward", stage.backward_one_chunk)
        stages.append(stage)
    count = recipe.micro_batches
    loss = timed("forward", F.cross_entropy)
    if recipe.pipeline_schedule == "interleaved":
        return pipelining.ScheduleInterleaved1F1B(stages, count, loss)
    if recipe.pipeline_schedule == "1f1b":
        return pipelining.Schedule1F1B(stages[0], count, loss)
    return pipelining.ScheduleGPipe(stages[0], count, loss)
