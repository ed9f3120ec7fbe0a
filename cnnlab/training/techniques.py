"""One function per technique; `prepare` applies them in one visible order; `Clock` times the steps honestly."""

import os
import random
from contextlib import nullcontext

import numpy as np
import torch

from cnnlab import machine
from cnnlab.parallel import data_parallel, simulated_network


def prepare(model, recipe, device, world=1, clock=None):
    """The recipe's model, ready to train: every technique in the order in which they must be applied."""
    if world > 1:
        simulated_network.simulate_straggler(model, recipe)
    if recipe.pooling == "before-relu":
        model = pool_before_relu(model)
    model = model.to(device)
    if recipe.memory_format == "channels_last":
        model = channels_last(model)
    if device.type == "cuda":
        set_tf32(recipe.precision == "tf32")
    if world > 1 and (link := simulated_network.make_link(recipe)):
        simulated_network.simulate_network(link)
    if recipe.strategy == "ddp" or recipe.strategy is None and world > 1:
        model = data_parallel.wrap_ddp(model, recipe, device, clock)
    if recipe.compiler == "inductor-except-pool":
        model = opaque_pooling(model)
    if recipe.compiler != "eager":  # last: it then sees, and compiles, all of the above
        model = compile_model(model)
    return model


def set_threads(recipe, world=1):
    """The recipe's threads for this rank; else all cores for one rank, while several keep what `rank` has shared out."""
    if recipe.threads or world == 1:
        torch.set_num_threads(recipe.threads or machine.cores())


def pin_to_cores(local_rank, local_world):
    """Keep this rank on its share of this machine's cores. Returns them; None where the system cannot pin.

    Ranks that outnumber the cores share them: each is pinned to one.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // local_world
    mine = (
        cores[local_rank * share : (local_rank + 1) * share]
        if share
        else [cores[local_rank % len(cores)]]
    )
    os.sched_setaffinity(0, mine)
    return mine


def set_seed(seed, rank=0):
    """Same seed, same run. Ranks differ, else all would draw the same dropout masks and augmentations."""
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def pool_before_relu(model):
    """Max-pooling before ReLU instead of after it: ReLU keeps the order of numbers, so they are the same, and so are all gradients.

    With windows of 2x2, ReLU then has a quarter of the work. `torch.compile` does not find this by itself.
    """
    for block in model.modules():
        if isinstance(block, torch.nn.Sequential):
            for at in range(len(block) - 1):
                if isinstance(block[at], torch.nn.ReLU) and isinstance(
                    block[at + 1], torch.nn.MaxPool2d
                ):
                    block[at], block[at + 1] = block[at + 1], block[at]
    return model


def channels_last(model):
    """Weights stored with their channels innermost, as convolutions read them. Same numbers, same shapes.

    A `Flatten` would send its gradient back with channels outermost, and each layer before it would copy it: it is laid out anew at once.
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.Flatten):
            layer.register_forward_pre_hook(
                lambda layer, inputs: _ChannelsLastGradient.apply(*inputs)
            )
    return model.to(memory_format=torch.channels_last)


class _ChannelsLastGradient(torch.autograd.Function):
    """Changes nothing on the way forward; on the way back, only the layout."""

    @staticmethod
    def forward(ctx, images):
        return images.view_as(images)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous(memory_format=torch.channels_last)


def autocast(recipe):
    """Where the recipe says bf16 or fp16: a context in which convolutions and matrix products run at that precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision)
    return torch.autocast(recipe.device, dtype) if dtype else nullcontext()


def grad_scaler(recipe):
    """Scales the loss up before, and gradients down after, backward: in fp16 small gradients would become 0."""
    return torch.amp.GradScaler(recipe.device, enabled=recipe.precision == "fp16")


def set_tf32(on):
    """fp32 matrix products and convolutions on the GPU's TF32 units: 10 bits of mantissa instead of 23. (Torch's default: half on.)"""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def compile_model(model):
    """The model as fused, generated code. The first call compiles: seconds to a minute, timed apart."""
    return torch.compile(model)


def opaque_pooling(model):
    """Max-pooling as an operation into which the compiler cannot look: on CPUs PyTorch's own code is much faster than what it would make."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.MaxPool2d):
            layer.forward = lambda images, size=layer.kernel_size: _max_pool(images, size)[0]
    return model


def _pooled(images: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima of size x size windows that do not overlap, and where they were."""
    return torch.ops.aten.max_pool2d_with_indices(images, [size, size])


def _unpooled(
    gradient: torch.Tensor, images: torch.Tensor, size: int, where: torch.Tensor
) -> torch.Tensor:
    return torch.ops.aten.max_pool2d_with_indices_backward(
        gradient, images, [size, size], [size, size], [0, 0], [1, 1], False, where
    )


def _remember(ctx, inputs, output):
    images, ctx.size = inputs
    ctx.save_for_backward(images, output[1])


def _backward(ctx, gradient, _):
    images, where = ctx.saved_tensors
    return _max_pool_backward(gradient, images, ctx.size, where), None


_max_pool = torch.library.custom_op("cnnlab::max_pool", _pooled, mutates_args=())


_max_pool_backward = torch.library.custom_op(
    "cnnlab::max_pool_backward", _unpooled, mutates_args=()
)


_max_pool.register_autograd(_backward, setup_context=_remember)


_max_pool.register_fake(
    _pooled
)  # shapes and layouts, for the compiler: PyTorch knows those of its own code


_max_pool_backward.register_fake(_unpooled)
