"""One function per technique; `prepare` applies a recipe's techniques in one visible order."""

import ctypes
import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cnnlab import machine
from cnnlab.parallel import data_parallel, simulated_network
from cnnlab.recipe import SHARDED, CnnlabError, Recipe
from cnnlab.training.clock import Clock

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# In the errors of torch, Python, C++ and oneDNN.
OUT_OF_MEMORY = ("allocate memory", "memoryerror", "of memory", "bad_alloc", "not create", "thread")


def prepare(
    model: nn.Module,
    recipe: Recipe,
    device: torch.device,
    world: int = 1,
    clock: Clock | None = None,
    mesh: Any = None,  # DeviceMesh of a sharded strategy
    shape: Any = None,  # (channels, size, classes) of the images
) -> nn.Module:
    """Apply the recipe's techniques to the model, in the order in which they must be applied."""
    if world > 1:
        simulated_network.simulate_straggler(model, recipe)
        if link := simulated_network.make_link(recipe):
            simulated_network.simulate_network(link)
    if recipe.pooling == "before-relu":
        model = pool_before_relu(model)
    model = model.to(device)
    if recipe.memory_format == "channels_last":
        model = channels_last(model)
    if device.type == "cuda":
        set_tf32(recipe.precision == "tf32")
        torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    if recipe.strategy in SHARDED:  # imported here, because DTensor takes a second
        from cnnlab.parallel import pipeline, sharding, tensor_parallel
    if recipe.strategy == "tensor":
        model = tensor_parallel.shard_layers(model, mesh["model"], clock)
    if recipe.strategy == "pipeline":
        with autocast(recipe):  # because it runs the layers to measure their times
            model = pipeline.split_stages(model, recipe, mesh["model"], shape)
    if recipe.recompute:
        model = recompute_activations(model)
    if recipe.strategy == "fsdp":
        model = sharding.shard_model(model, mesh["data"], clock)
    if recipe.strategy in ("ddp", "zero1") or (recipe.strategy is None and world > 1):
        model = data_parallel.wrap_ddp(model, recipe, device, clock)
    if recipe.compiler != "eager":
        graphs = recipe.compiler == "cudagraphs"
        model = compile_model(model, graphs)  # last, so that it compiles all of the above
    return model


def limit_memory(recipe: Recipe) -> None:
    """Let this rank allocate at most `recipe.memory_limit_mib` in addition to what it has now.

    Raises `CnnlabError` outside of a rank, because the limit holds for the whole process.
    """
    if recipe.memory_limit_mib is None:
        return
    if "RANK" not in os.environ:
        raise CnnlabError("memory_limit_mib needs processes of its own. Use cnnlab.run(recipe).")
    limit = recipe.memory_limit_mib * 2**20
    if recipe.device != "cpu":
        _, total = torch.accelerator.get_memory_info()
        gpus: Any = torch.get_device_module(recipe.device)
        gpus.set_per_process_memory_fraction(min(1.0, limit / total))
        return
    import resource  # not on Windows

    # Only what is in use shall count: glibc returns freed blocks of 64 KiB or more at once
    # (M_MMAP_THRESHOLD), and the stacks of torch's threads exist before.
    ctypes.CDLL(None).mallopt(-3, 2**16)
    torch.ones(2**20).sum()
    in_use = psutil.Process().memory_info().data
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + limit, hard))


def memory_limit_error(recipe: Recipe, error: BaseException) -> CnnlabError | None:
    """What to change if `error` says that the recipe's memory limit was exceeded, else None."""
    out_of_memory = any(text in repr(error).lower() for text in OUT_OF_MEMORY)
    if recipe.memory_limit_mib is None or not out_of_memory:
        return None
    return CnnlabError(
        f"training needs more than memory_limit_mib={recipe.memory_limit_mib} on a rank. Raise it, "
        "or divide the model over more ranks (strategy='fsdp' with replicas, 'pipeline' with "
        "stages, 'tensor' with tensor_ranks), or use recompute=True or a lower batch_size."
    )


def set_threads(recipe: Recipe, world: int = 1) -> None:
    """Use `recipe.threads`, or else all cores; several ranks keep what the launcher has set."""
    if recipe.threads or world == 1:
        torch.set_num_threads(recipe.threads or machine.cores())


def pin_to_cores(local_rank: int, local_world: int) -> list[int] | None:
    """Pin this rank to its share of the machine's cores; return them, or None if it cannot.

    With more ranks than cores, several ranks share a core.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // local_world)
    first = local_rank * share % len(cores)
    mine = cores[first : first + share]
    os.sched_setaffinity(0, mine)
    return mine


def set_seed(seed: int, rank: int = 0) -> None:
    """Make the run repeatable. Ranks get different seeds, so that dropout masks differ."""
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def pool_before_relu(model: nn.Module) -> nn.Module:
    """Swap each ReLU with the max-pooling that follows it: same outputs, same gradients.

    ReLU is monotonic. After 2x2 pooling it processes a quarter of the elements. `torch.compile`
    does not find this by itself.
    """
    for block in model.modules():
        if isinstance(block, nn.Sequential):
            for i in range(len(block) - 1):
                if isinstance(block[i], nn.ReLU) and isinstance(block[i + 1], nn.MaxPool2d):
                    block[i], block[i + 1] = block[i + 1], block[i]
    return model


def channels_last(model: nn.Module) -> nn.Module:
    """Store weights with channels innermost, as convolution kernels read them; same values.

    The gradient of `Flatten` arrives with channels outermost. It is converted once, right there,
    because otherwise each earlier layer would copy it.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Flatten):
            layer.register_forward_pre_hook(lambda _, inputs: _ChannelsLastGradient.apply(*inputs))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class _ChannelsLastGradient(torch.autograd.Function):
    """The identity; backward converts the gradient's memory format."""

    @staticmethod
    def forward(ctx, images):
        return images.view_as(images)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous(memory_format=torch.channels_last)


def recompute_activations(model: nn.Module) -> nn.Module:
    """Keep only the inputs of each stage; the backward pass computes the rest again.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016). One more forward pass, for
    less memory.
    """
    for stage in model.children():
        contexts = partial(_recomputation_contexts, stage)
        stage.forward = partial(  # type: ignore[method-assign]
            checkpoint, stage.forward, use_reentrant=False, context_fn=contexts
        )
    return model


def _recomputation_contexts(stage):
    return nullcontext(), _frozen_statistics(stage)


@contextmanager
def _frozen_statistics(stage: nn.Module) -> Iterator[None]:
    """Batch norm has seen this batch already: a second time, it does not update its statistics."""
    layers: Any = [m for m in stage.modules() if hasattr(m, "running_mean")]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def autocast(recipe: Recipe) -> AbstractContextManager:
    """A context in which convolutions and matrix products run in the recipe's bf16 or fp16."""
    if recipe.precision in AUTOCAST_DTYPES:
        return torch.autocast(recipe.device, AUTOCAST_DTYPES[recipe.precision])
    return nullcontext()


def grad_scaler(recipe: Recipe) -> torch.amp.GradScaler:
    """For fp16: scales the loss, because small gradients would underflow to zero."""
    return torch.amp.GradScaler(recipe.device, enabled=recipe.precision == "fp16")


def set_tf32(enabled: bool) -> None:
    """Let GPUs run fp32 convolutions and matrix products in TF32: 10 bits of mantissa, not 23."""
    precision = "tf32" if enabled else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


def compile_model(model: nn.Module, cuda_graphs: bool = False) -> nn.Module:
    """Compile the model into fused kernels. The first call compiles: seconds to a minute.

    With CUDA graphs, the second and third calls capture them; then one launch starts all kernels.
    """
    mode = "reduce-overhead" if cuda_graphs else "default"
    return torch.compile(model, mode=mode)  # type: ignore[return-value]
