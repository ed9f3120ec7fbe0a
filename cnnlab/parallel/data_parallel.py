"""How the replicas of a model stay equal: DDP and its hooks, the ring by hand, averaging, shared parameters; a slow network."""

import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from cnnlab.parallel.async_sgd import SharedParameters
from cnnlab.parallel.simulated_network import make_link


def wrap_ddp(model, recipe, device, clock):
    """One copy in each rank (DDP); gradients are averaged over all ranks, bucket by bucket, while backward goes on."""
    bucket_mb = (
        2**20 if recipe.compression == "powersgd" else recipe.bucket_mb
    )  # gloo takes PowerSGD in one bucket only
    model = nn.parallel.DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, bucket_cap_mb=bucket_mb
    )
    hook, state = {
        "none": (default_hooks.allreduce_hook, None),
        "fp16": (default_hooks.fp16_compress_hook, None),
        "bf16": (default_hooks.bf16_compress_hook, None),
        "powersgd": (
            powerSGD_hook.powerSGD_hook,
            powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2),
        ),
    }[recipe.compression]

    def timed(state, bucket):
        began = time.perf_counter()
        return hook(state, bucket).then(
            lambda sent: clock.record_communication(began) or sent.value()
        )

    if device.type == "cpu":
        model.register_comm_hook(state, timed)
    elif recipe.compression != "none":
        model.register_comm_hook(state, hook)
    return model


def gradient_sync(model, really):
    """Where not `really`: a context in which backward adds up gradients but sends none (DDP's `no_sync`)."""
    return nullcontext() if really or not hasattr(model, "no_sync") else model.no_sync()


def register_sync_hooks(optimizer, model, recipe, world, clock):
    """For the strategies beside DDP: what the ranks do just before or after each step of the optimizer.

    Returns the `SharedParameters` of strategy async, else None.
    """
    if world == 1 or recipe.strategy in (None, "ddp"):
        return None
    if recipe.strategy == "ring":
        optimizer.register_step_pre_hook(lambda *_: average_gradients(model, recipe, clock))
    elif recipe.strategy == "local-sgd":
        averager = PeriodicModelAverager(
            recipe.sync_every, warmup_steps=recipe.sync_every - 1
        )  # after every so many steps
        optimizer.register_step_post_hook(
            lambda *_: clock.timed_communication(
                averager.average_parameters, model.parameters()
            )
        )
    else:
        shared = SharedParameters(model, recipe.staleness, make_link(recipe))
        optimizer.register_step_post_hook(
            lambda *_: clock.timed_communication(shared.push_pull, model)
        )
        return shared


def average_gradients(model, recipe, clock):
    """Each gradient becomes its mean over all ranks, after backward, in one ring all-reduce of all of them."""
    gradients = [
        parameter.grad for parameter in model.parameters() if parameter.grad is not None
    ]
    flat = torch.cat(
        [gradient.reshape(-1) for gradient in gradients]
    ).cpu()  # gloo carries it: NCCL's sends would wait for each other
    link = make_link(recipe)
    clock.timed_communication(ring_all_reduce, flat, link and link.transfer)
    for gradient, mean in zip(
        gradients,
        (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients]),
    ):
        gradient.copy_(mean.view_as(gradient))


def ring_all_reduce(tensor, on_message=None):
    """The sum over all ranks, in place; each sends 2 (N - 1) messages of 1/N of the tensor to the next: Patarasuk and Yuan (2009).

    First every chunk travels once around and is added to (reduce-scatter), then the sums travel around (all-gather).
    `on_message(bytes)` is called after each message.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = tensor.tensor_split(world)
    for step in range(2 * (world - 1)):
        incoming = torch.empty_like(chunks[(rank - step - 1) % world])
        sent = dist.isend(chunks[(rank - step) % world], (rank + 1) % world)
        dist.recv(incoming, (rank - 1) % world)
        sent.wait()
        if on_message:
            on_message(incoming.nbytes)
        mine = chunks[(rank - step - 1) % world]
        mine.copy_(mine + incoming if step < world - 1 else incoming)


def average_model(model):
    """(For evaluation:) every parameter becomes its mean over the ranks, every buffer, such as a running mean, rank 0's."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)
        parameter.data /= dist.get_world_size()
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    return model
