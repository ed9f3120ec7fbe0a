"""Data-parallel training: DDP, the ring all-reduce by hand, parameter averaging (local SGD)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from cnnlab.parallel.simulated_network import make_link
from cnnlab.recipe import Recipe

COMPRESSION_HOOKS: dict[str, Any] = {
    "none": default_hooks.allreduce_hook,
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
    "powersgd": powerSGD_hook.powerSGD_hook,
}


def wrap_ddp(model: nn.Module, recipe: Recipe, device: torch.device, clock: Any) -> nn.Module:
    """Average gradients over the ranks with DDP: bucket by bucket, while backward is running.

    `clock` (a `training.clock.Clock`) records when.
    """
    bucket_mb, state = recipe.bucket_mb, None
    if recipe.compression == "powersgd":
        bucket_mb = 2**20  # one bucket, because PowerSGD fails with several on gloo
        state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2)
    device_ids = [device.index] if device.type != "cpu" else None
    ddp = nn.parallel.DistributedDataParallel(model, device_ids, bucket_cap_mb=bucket_mb)
    hook = COMPRESSION_HOOKS[recipe.compression]

    def timed_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        began_at = clock.now()

        def record(reduced):
            clock.record_communication(began_at)
            return reduced.value()

        return hook(state, bucket).then(record)

    ddp.register_comm_hook(state, timed_hook)
    return ddp


def gradient_sync(model: Any, enabled: bool) -> AbstractContextManager:
    """Unless `enabled`, a context in which DDP accumulates gradients locally (`no_sync`)."""
    if enabled or not hasattr(model, "no_sync"):
        return nullcontext()
    return model.no_sync()


def register_sync_hooks(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    recipe: Recipe,
    world: int,
    clock: Any,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Let replicas without DDP communicate before or after each optimizer step.

    `group`: the ranks that hold the same part of the model; None: all ranks.
    """
    if world == recipe.model_ranks:  # one replica
        return
    if recipe.strategy in ("ring", "tensor", "pipeline"):
        optimizer.register_step_pre_hook(lambda *_: average_gradients(model, recipe, clock, group))
    elif recipe.strategy == "local-sgd":
        period = recipe.sync_every
        averager = PeriodicModelAverager(period, warmup_steps=period - 1)
        average = averager.average_parameters
        optimizer.register_step_post_hook(
            lambda *_: clock.timed_communication(average, model.parameters())
        )


def average_gradients(
    model: nn.Module, recipe: Recipe, clock: Any, group: dist.ProcessGroup | None = None
) -> None:
    """Average all gradients over the ranks of the group after backward, in one all-reduce."""
    gradients = [local_tensor(p.grad) for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    if recipe.strategy == "ring":
        flat = flat.cpu()  # for gloo, because NCCL's sends would deadlock in the ring
        link = make_link(recipe)
        clock.timed_communication(ring_all_reduce, flat, link and link.transfer)
    else:
        clock.timed_communication(dist.all_reduce, flat, dist.ReduceOp.SUM, group)
    flat /= dist.get_world_size(group)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))


def ring_all_reduce(tensor: Tensor, on_message: Callable[[int], object] | None = None) -> None:
    """Sum the tensor over all ranks, in place, with messages to the next rank only.

    Reduce-scatter: each chunk travels around the ring, and ranks add to it. All-gather: the sums
    travel around. Each rank sends 2 (N - 1) messages of 1/N of the tensor (Patarasuk and Yuan,
    2009) and calls `on_message(bytes)` after each.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = tensor.tensor_split(world)
    for step in range(2 * (world - 1)):
        outgoing = chunks[(rank - step) % world]
        chunk = chunks[(rank - step - 1) % world]
        incoming = torch.empty_like(chunk)
        sent: Any = dist.isend(outgoing, (rank + 1) % world)
        dist.recv(incoming, (rank - 1) % world)
        sent.wait()
        if on_message is not None:
            on_message(incoming.nbytes)
        if step < world - 1:
            chunk += incoming
        else:
            chunk.copy_(incoming)


def average_model(model: nn.Module) -> nn.Module:
    """Average the parameters over the ranks, in place, and take rank 0's buffers."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)
        parameter.data /= dist.get_world_size()
    broadcast_buffers(model)
    return model


def broadcast_buffers(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Take the buffers of the group's first rank: batch-norm statistics differ between ranks."""
    for buffer in model.buffers():
        dist.broadcast(local_tensor(buffer), group=group, group_src=0)


def local_tensor(tensor: Any) -> Tensor:
    """This rank's part of a tensor that may be a DTensor; they share memory."""
    # Asked this way, because importing DTensor takes a second.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
