"""THE training loop: a generator of events for one rank. No printing, plotting or saving: that is its consumers' work."""

import os
from functools import partial
from itertools import count

import torch
import torch.distributed as dist
import torch.nn.functional as F

from . import data, speed
from .events import Evaluated, Finished, Progress, Started
from .model import build, parameters

REPORT_EVERY = 0.25      # seconds of training between two Progress events


def train(recipe, rank=0, world=1):
    """Train as the recipe says and yield events. With `world` ranks, the process group must be ready.

    Each rank takes its share of every global batch, so that the gradients averaged over all ranks are those of
    the whole batch. Speed figures begin after `recipe.warmup_steps`.
    """
    device = pick_device(recipe, rank)
    speed.set_threads(recipe, world)
    images_of = data.load(recipe)
    loader = data.train_loader(recipe, images_of.train, rank, world)
    network = build(recipe, images_of.shape)
    model = speed.prepare(network, recipe, device, world)
    steps = recipe.steps or recipe.epochs * len(loader)
    optimizer, schedule = make_optimizer(recipe, model, steps)
    scaler = speed.grad_scaler(recipe)
    layout = torch.channels_last if recipe.memory_format == "channels_last" else torch.contiguous_format
    shifts = torch.Generator().manual_seed(recipe.seed)      # the same in all ranks: a batch moves as one
    speed.set_seed(recipe.seed, rank)

    yield Started(rank=rank, world=world, recipe=recipe, pid=os.getpid(), parameters=parameters(network),
                  train_images=len(images_of.train), test_images=len(images_of.test), steps=steps)
    clock = speed.Clock(device)
    step, reported, accuracy, warm = 0, 0, None, (0, 0.0, 0.0)
    losses, correct = [], 0
    clock.resume()
    for epoch in count(1):
        for images, labels in clock.waited(loader):
            images = images.to(device, memory_format=layout, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            if recipe.augment == "shift":
                images = data.shifted(images, shifts)
            with speed.autocast(recipe):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()

            step += 1
            losses.append(loss.detach())
            correct += (logits.argmax(1) == labels).sum()
            last_of_epoch = recipe.evaluate and step % len(loader) == 0
            if clock.running() >= REPORT_EVERY or last_of_epoch or step in (recipe.warmup_steps, steps):
                before = clock.seconds
                clock.pause()
                took, done = clock.seconds - before, step - reported
                yield Progress(rank=rank, epoch=epoch, step=step, images=step * recipe.batch_size, seconds=clock.seconds,
                               losses=torch.stack(losses).tolist(), accuracy=int(correct) / (done * len(labels)),
                               images_per_s=done * recipe.batch_size / took, warming_up=step <= recipe.warmup_steps)
                losses, correct, reported = [], 0, step
                if step == recipe.warmup_steps:
                    warm = (step, clock.seconds, clock.waiting)
                clock.resume()
            if step == steps:
                break
        if recipe.evaluate:
            clock.pause()
            accuracy, mean_loss = evaluate(network, recipe, images_of.test, device, rank, world)
            yield Evaluated(rank=rank, epoch=epoch, step=step, seconds=clock.seconds, accuracy=accuracy, loss=mean_loss,
                            images=len(images_of.test))
            clock.resume()
        if step == steps:
            break

    timed, seconds = step - warm[0], clock.seconds - warm[1]
    waiting = (clock.waiting - warm[2]) / timed
    yield Finished(rank=rank, steps=step, images=step * recipe.batch_size, seconds=clock.seconds, warmup_s=warm[1],
                   images_per_s=timed * recipe.batch_size / seconds, step_s=seconds / timed, waiting_s=waiting,
                   compute_s=seconds / timed - waiting, peak_memory_mib=speed.peak_memory_mib(device), accuracy=accuracy)


@torch.no_grad()
def evaluate(network, recipe, dataset, device, rank=0, world=1):
    """(accuracy, mean loss) over all held-out images; each rank takes every `world`-th, so each is counted once."""
    if world > 1:
        for buffer in network.buffers():        # batch-norm statistics differ from rank to rank: take those of rank 0
            dist.broadcast(buffer, 0)
    network.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    share = [tensor[rank::world] for tensor in dataset.tensors]
    for images, labels in zip(*(tensor.split(512) for tensor in share)):
        images, labels = images.to(device), labels.to(device)
        with speed.autocast(recipe):
            logits = network(images)
        logits = logits.float()
        totals[0] += (logits.argmax(1) == labels).sum()
        totals[1] += F.cross_entropy(logits, labels, reduction="sum")
    if world > 1:
        dist.all_reduce(totals)
    network.train()
    return (totals / len(dataset)).tolist()


def make_optimizer(recipe, model, steps):
    """The optimizer (Adam, or SGD with momentum 0.9), and the schedule of its learning rate over `steps` steps."""
    optimizers = {"adam": torch.optim.Adam, "sgd": partial(torch.optim.SGD, momentum=0.9)}
    optimizer = optimizers[recipe.optimizer](model.parameters(), lr=recipe.learning_rate)
    schedules = {"constant": partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
                 "cosine": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)}
    return optimizer, schedules[recipe.schedule](optimizer)


def pick_device(recipe, rank):
    """The CPU, or the GPU of this rank: ranks share GPUs in turn where there are fewer."""
    if recipe.device == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", rank))
    return torch.device("cuda", local % torch.cuda.device_count())
