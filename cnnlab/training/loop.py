"""THE training loop: a generator of events for one rank. No printing, plotting or saving: that is its consumers' work."""

import copy
import os
from functools import partial
from itertools import islice
from math import ceil

import torch
import torch.distributed as dist
import torch.nn.functional as F

from cnnlab import machine
from cnnlab.data import datasets
from cnnlab.data.loader import random_shifts, shift_images, train_loader
from cnnlab.events import Evaluated, Finished, Progress, Started
from cnnlab.model import build, count_parameters
from cnnlab.parallel import data_parallel
from cnnlab.recipe import CnnlabError
from cnnlab.training import checkpoint, techniques
from cnnlab.training.clock import Clock, peak_memory_mib

REPORT_EVERY = 0.25  # seconds of training between two Progress events


def train(recipe, rank=0, world=1, checkpoints=None):
    """Train as the recipe says and yield events. With `world` ranks, the process group must be ready.

    Each rank takes its share of every global batch, so that the gradients averaged over all ranks are those of
    the whole batch. Speed figures begin after `recipe.warmup_steps`. With a folder `checkpoints`, one is written every
    `recipe.checkpoint_every` steps, and the run goes on from the newest that is there.
    """
    device = select_device(recipe, rank)
    techniques.set_threads(recipe, world)
    images_of = datasets.load(recipe)
    network = build(recipe, images_of.shape)
    clock = Clock(device)
    model = techniques.prepare(network, recipe, device, world, clock)
    steps = datasets.num_steps(recipe, images_of)
    optimizer, schedule = make_optimizer(recipe, model, steps)
    scaler = techniques.grad_scaler(recipe)
    shared = data_parallel.register_sync_hooks(optimizer, network, recipe, world, clock)
    layout = (
        torch.channels_last if recipe.memory_format == "channels_last" else torch.contiguous_format
    )
    techniques.set_seed(recipe.seed, rank)
    state = recipe, network, optimizer, schedule, scaler
    first = step = checkpoint.resume(checkpoints, *state) if checkpoints else 0
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if (
        first > steps or first == steps and not restarted
    ):  # a rank may have died after the last step, and only the evaluation is left
        raise CnnlabError(
            f"the newest checkpoint in {checkpoints} has done {first} steps, and steps={steps} asks for no more: raise epochs or "
            f"steps, or name another folder."
        )
    loader = train_loader(
        recipe,
        images_of.train,
        rank,
        world,
        first=first,
        steps=steps,
        deal=shared and shared.claim_batches,
    )
    shifts = islice(random_shifts(recipe.seed), first, None)

    yield Started(
        rank=rank,
        world=world,
        recipe=recipe,
        pid=os.getpid(),
        parameters=count_parameters(network),
        train_images=len(images_of.train),
        test_images=len(images_of.test),
        steps=steps,
        first_step=first,
        threads=torch.get_num_threads(),
        cores=machine.cpu_affinity(),
    )
    share = recipe.batch_size // world  # images of a rank's part of a batch
    parts = lambda: (
        shared.total() if shared else step * world
    )  # of batches, done by all ranks together
    accuracy, losses, correct, last = None, [], 0, ceil(steps / len(loader))
    reported = warm = start = (step, parts(), 0.0, 0.0, 0.0)

    def progress():
        """Pause the clock, and say what happened since the last time."""
        nonlocal losses, correct, reported
        clock.pause()
        before, reported = reported, (step, parts(), clock.seconds, clock.waiting, clock.exposed)
        event = Progress(
            rank=rank,
            epoch=epoch,
            step=parts() // world,
            images=parts() * share,
            seconds=clock.seconds,
            losses=torch.stack(losses).tolist(),
            accuracy=int(correct) / ((step - before[0]) * share),
            images_per_s=(reported[1] - before[1]) * share / (clock.seconds - before[2]),
            warming_up=step - first <= recipe.warmup_steps,
            spans=clock.timeline(),
        )
        losses, correct = [], 0
        return event

    clock.resume()
    for epoch in range(1, last + 1):
        for images, labels in clock.iterate(loader):
            images = images.to(device, memory_format=layout, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            if recipe.augment == "shift":
                images = shift_images(images, next(shifts))
            losses.append(0.0)
            pieces = list(zip(images.chunk(recipe.accumulate), labels.chunk(recipe.accumulate)))
            for number, (some, theirs) in enumerate(pieces, start=1):
                with (
                    techniques.autocast(recipe),
                    data_parallel.gradient_sync(model, number == len(pieces)),
                ):
                    logits = model(some)
                    loss = F.cross_entropy(logits, theirs) / len(pieces)
                clock.mark("forward")
                scaler.scale(loss).backward()
                clock.mark("backward")
                losses[-1] += loss.detach()
                correct += (logits.argmax(1) == theirs).sum()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
            clock.mark("update")

            step += 1
            keep = checkpoints and step % recipe.checkpoint_every == 0
            if keep or clock.elapsed() >= REPORT_EVERY or step - first == recipe.warmup_steps:
                yield progress()
                if step - first == recipe.warmup_steps:
                    warm = reported
                if keep:
                    yield checkpoint.save(checkpoints, step, *state)
                clock.resume()
        if shared:
            dist.barrier()  # where loader workers ask ahead for parts, others are still at theirs
        if losses:
            yield progress()
        elif shared:  # the others have gone on
            clock.pause()
            reported = step, parts(), clock.seconds, clock.waiting, clock.exposed
        if recipe.evaluate and (epoch * len(loader) > first or epoch == last):
            accuracy, mean_loss = evaluate(
                network, recipe, images_of.test, device, rank, world, shared
            )
            yield Evaluated(
                rank=rank,
                epoch=epoch,
                step=parts() // world,
                seconds=clock.seconds,
                accuracy=accuracy,
                loss=mean_loss,
                images=len(images_of.test),
            )
        clock.resume()

    if (
        reported[1] == warm[1]
    ):  # nothing was left to do: a run that goes on from near its end, or a slow rank under async
        warm = start
    timed, trained, seconds, waiting, exposed = (now - then for now, then in zip(reported, warm))
    timed = max(1, timed)  # under async, the others may have left this rank nothing to do
    exchanged = exposed / timed if device.type == "cpu" else None
    yield Finished(
        rank=rank,
        steps=step,
        images=parts() * share,
        seconds=clock.seconds,
        warmup_s=warm[2],
        images_per_s=trained * share / seconds if seconds else 0.0,
        step_s=seconds / timed,
        waiting_s=waiting / timed,
        communication_s=exchanged,
        compute_s=(seconds - waiting - exposed) / timed,
        peak_memory_mib=peak_memory_mib(device),
        accuracy=accuracy,
        staleness=shared.stale / max(1, shared.own) if shared else None,
    )


@torch.no_grad()
def evaluate(network, recipe, dataset, device, rank=0, world=1, shared=None):
    """(accuracy, mean loss) over all held-out images; each rank takes every `world`-th, so each is counted once."""
    if shared:
        shared.pull(network)
    if (
        world > 1 and recipe.strategy == "local-sgd"
    ):  # between two averagings the ranks differ: evaluate their mean
        network = data_parallel.average_model(copy.deepcopy(network))
    elif world > 1:
        for buffer in (
            network.buffers()
        ):  # batch-norm statistics differ from rank to rank: take those of rank 0
            dist.broadcast(buffer, 0)
    network.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    share = [tensor[rank::world] for tensor in dataset.tensors]
    for images, labels in zip(*(tensor.split(512) for tensor in share)):
        images, labels = images.to(device), labels.to(device)
        with techniques.autocast(recipe):
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
    schedules = {
        "constant": partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        "cosine": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    }
    return optimizer, schedules[recipe.schedule](optimizer)


def select_device(recipe, rank):
    """The CPU, or the GPU of this rank: ranks share GPUs in turn where there are fewer."""
    if recipe.device == "cpu":
        return torch.device("cpu")
    device = torch.device(
        "cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count()
    )
    torch.cuda.set_device(device)  # what NCCL and `cuda` without a number then mean
    return device
