"""The loop of asynchronous training: no rank waits for another one's gradients."""

from collections.abc import Iterator
from math import ceil

import torch.distributed as dist
import torch.nn.functional as F

from cnnlab.data.loader import random_shifts, shift_images, train_loader
from cnnlab.events import Event
from cnnlab.parallel.async_sgd import SharedParameters
from cnnlab.parallel.simulated_network import make_link
from cnnlab.recipe import Recipe
from cnnlab.training import techniques
from cnnlab.training.clock import Clock
from cnnlab.training.loop import evaluate, report, select_device, set_up, to_device
from cnnlab.training.meter import Meter


def train_async(recipe: Recipe, rank: int, world: int) -> Iterator[Event]:
    """Train with strategy='async' and yield the same events as `loop.train`.

    Ranks claim their shares of batches one by one: a fast rank takes more steps than a slow one.
    """
    device = select_device(recipe, rank)
    clock = Clock(device)
    splits, steps, state = set_up(recipe, device, world, clock)
    shared = SharedParameters(state.network, recipe.staleness, make_link(recipe))
    techniques.set_seed(recipe.seed, rank)
    claim = shared.claim_batches
    loader = train_loader(recipe, splits.train, rank, world, steps=steps, claim_batches=claim)
    shifts = random_shifts(recipe.seed)
    meter = Meter(recipe, rank, world, clock, shared=shared)
    accuracy = None

    yield meter.started(state.network, splits, steps)
    clock.resume()
    for epoch in range(1, ceil(steps / len(loader)) + 1):
        for images, labels in clock.iterate(loader):
            images, labels = to_device(images, labels, recipe, device)
            if recipe.augment == "shift":
                images = shift_images(images, next(shifts))
            _train_step(images, labels, state, shared, meter)
            yield from report(epoch, meter, state)
        dist.barrier()  # other ranks may still train, because loader workers claim ahead
        if meter.losses:
            yield meter.progress(epoch)
        else:
            meter.read()
        if recipe.evaluate:
            shared.pull(state.network)
            accuracy, test_loss = evaluate(state, recipe, splits.test, device, rank, world)
            yield meter.evaluated(epoch, accuracy, test_loss, len(splits.test))
        clock.resume()
    yield meter.finished(accuracy)


def _train_step(images, labels, state, shared, meter):
    with techniques.autocast(meter.recipe):
        logits = state.model(images)
        loss = F.cross_entropy(logits, labels)
    meter.clock.mark("forward")
    loss.backward()
    meter.clock.mark("backward")
    meter.add(loss, logits, labels)
    state.optimizer.step()
    meter.clock.timed_communication(shared.push_pull, state.network)
    state.optimizer.zero_grad()
    meter.clock.mark("update")
    meter.end_step()
