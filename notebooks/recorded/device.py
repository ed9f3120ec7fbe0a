"""Measure one device for the lessons: correctness, clock, copies, batch sizes, memory, fast steps.

    python notebooks/recorded/device.py DIR [--device cpu|cuda] [--quick]

writes DIR/device-NAME.json, which lessons show on machines that lack the device.
"""

import argparse
import copy
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from timeit import default_timer
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from cnnlab import machine, record
from cnnlab.data import datasets
from cnnlab.measure import peaks
from cnnlab.measure.memory_formula import saved_tensor_bytes
from cnnlab.model import build
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import techniques
from cnnlab.training.loop import make_optimizer

Device = Literal["cpu", "cuda"]
Figures = dict[str, Any]  # JSON-safe
LIMITS = {  # of relative errors, by precision
    "fp32": {"logits": 1e-4, "losses": 1e-3},
    "tf32": {"logits": 1e-2, "losses": 1e-2},
    "fp16": {"logits": 1e-2, "losses": 1e-2},
    "bf16": {"logits": 5e-2, "losses": 1e-2},
}
WARMUP_CALLS = 3  # on a GPU, before timing and graph capture: they allocate and choose algorithms
ONLY_GPU = (
    "needs device='cuda': a CPU executes each operation at once, so there is no kernel launch "
    "to batch and no copy to overlap."
)


# Workloads


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A network in training on one batch of synthetic images, which stays on the device."""

    network: nn.Module
    model: nn.Module  # the network with the recipe's techniques
    optimizer: torch.optim.Optimizer
    images: torch.Tensor
    loss: Callable[[], torch.Tensor]  # forward
    step: Callable[[], torch.Tensor]  # forward, backward, update; does not synchronize


@contextmanager
def benchmark_mode() -> Iterator[None]:
    """Turn TF32 off and cuDNN's autotuning on; afterwards restore both and free GPU memory."""
    torch.compiler.reset()  # else shapes that differ from earlier ones compile as dynamic: slower
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark
    techniques.set_tf32(False)
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark = before
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def cuda_graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    """`step` as a CUDA graph, captured at the first call: one launch for all its kernels.

    Each call overwrites the result of the one before. See "Whole-network capture" in the CUDA
    semantics notes of PyTorch's documentation.
    """
    graph = torch.cuda.CUDAGraph()
    captured: list[Any] = []

    def replay() -> Any:
        if not captured:
            captured.append(_capture(graph, step))
        graph.replay()
        return captured[0]

    return replay


def _capture(graph: torch.cuda.CUDAGraph, step: Callable[[], Any]) -> Any:
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):  # warm-up must not run on the default stream
        for _ in range(WARMUP_CALLS):
            step()
    main.wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            return step()
    finally:
        torch.cuda.set_stream(main)  # a capture that fails leaves its own stream current


def benchmark_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    device: str,
    repeats: int,
    calls: int = 1,
    seconds: float = 30.0,
) -> dict[str, dict[str, Any]]:
    """Time functions in the order A B A B ..., each repeat as the mean of `calls` calls.

    Returns {name: figures}, in seconds per call: `median`, `q1`, `q3` and `n` of the repeats,
    `returned_s` (the median until the call returned) and `first_s` (the first call, which may
    compile). No third or later repeat starts after `seconds`. A function that raises during its
    warm-up gets {"failed": message}; the others are still timed.
    """
    figures: dict[str, dict[str, Any]] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    for name, function in functions.items():
        try:
            figures[name] = {"first_s": peaks.time_call(function)[1]}
            if device == "cuda":
                peaks.time_call(function, WARMUP_CALLS)
            times[name] = []
        except Exception as error:
            figures[name] = describe_failure(error)
    start = default_timer()
    for repeat in range(repeats):
        if repeat >= 2 and default_timer() - start >= seconds:
            break
        for name in times:
            times[name].append(peaks.time_call(functions[name], calls))
    for name in times:
        returned, finished = np.transpose(times[name])
        q1, median, q3 = np.percentile(finished, (25, 50, 75)).tolist()
        figures[name] |= {"median": median, "q1": q1, "q3": q3, "n": len(finished)}
        figures[name]["returned_s"] = float(np.median(returned))
    return figures


def describe_failure(error: Exception) -> dict[str, str]:
    """{"failed": message}, on one line and at most 300 characters long."""
    return {"failed": f"{type(error).__name__}: " + " ".join(str(error).split())[:300]}


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of `exact`."""
    result, exact = result.detach().double().cpu(), exact.detach().double().cpu()
    return float((result - exact).norm() / exact.norm())


def make_trainer(recipe: Recipe, dtype: torch.dtype = torch.float32) -> Trainer:
    """The `Trainer` of a recipe, on a GPU with the algorithms that cuDNN finds fastest."""
    recipe = recipe.replace(cudnn_benchmark=recipe.device == "cuda")
    device = torch.device(recipe.device)
    data = datasets.synthetic(recipe.batch_size, recipe.image_size, recipe.classes, recipe.seed)
    images, labels = data.train.tensors
    channels_last = recipe.memory_format == "channels_last"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images, labels = images.to(device, dtype, memory_format=layout), labels.to(device)
    network = build(recipe, (3, recipe.image_size, recipe.classes)).to(dtype)
    model = techniques.prepare(network, recipe, device)
    optimizer, _ = make_optimizer(recipe, model, steps=1)
    fp16 = recipe.precision == "fp16"
    # torch's default scale of 65536 may overflow and skip the first steps
    scaler = torch.amp.GradScaler(recipe.device, init_scale=1024.0, enabled=fp16)

    def compute_loss() -> torch.Tensor:
        with techniques.autocast(recipe):
            return F.cross_entropy(model(images), labels)

    def step() -> torch.Tensor:
        loss = compute_loss()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return Trainer(
        network=network,
        model=model,
        optimizer=optimizer,
        images=images,
        loss=compute_loss,
        step=step,
    )


def train_steps(
    recipe: Recipe, dtype: torch.dtype = torch.float32, steps: int = 6
) -> dict[str, torch.Tensor]:
    """`logits` and `gradients` of the first forward and backward pass, `losses` of a few steps."""
    trainer = make_trainer(recipe, dtype)
    with techniques.autocast(recipe):
        logits = trainer.model(trainer.images).detach()
    loss = 1024 * trainer.loss()  # else small gradients underflow in fp16
    gradients = torch.autograd.grad(loss, list(trainer.network.parameters()))
    return {
        "logits": logits,
        "gradients": torch.cat([gradient.flatten() for gradient in gradients]),
        "losses": torch.stack([trainer.step() for _ in range(steps)]),
    }


def matmul_chain(
    size: int, products: int, device: Device, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """A function that computes `products` products of two (size, size) matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=result)

    return multiply


def fast_recipe(device: Device, quick: bool) -> Recipe:
    """ResNet9 as it trains fast without compilation, with a batch that fills the device."""
    hardware_bf16 = device == "cuda" or machine.describe().hardware["bf16"]
    large_gpu = device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 30e9
    batch = by_device(device, quick, small=16, cuda=2048 if large_gpu else 256, cpu=128)
    return Recipe(
        model="ResNet9",
        width=by_device(device, quick, small=8, cuda=64, cpu=32),
        data="synthetic",
        images=batch,
        batch_size=batch,
        optimizer="sgd",
        device=device,
        precision="bf16" if hardware_bf16 else "fp32",
        memory_format="channels_last",
    )


# Helpers


def by_device(device: Device, quick: bool, small: Any, cuda: Any, cpu: Any) -> Any:
    """The size for a quick run, for a GPU, or for a CPU."""
    if quick:
        return small
    return cuda if device == "cuda" else cpu


def can_compile(device: Device, quick: bool) -> bool:
    return not quick and (device == "cuda" or machine.describe().compiler is not None)


def finite_or_none(number: float) -> float | None:
    """The number, or None for NaN and infinity, which JSON does not have."""
    return number if math.isfinite(number) else None


def add_throughput(figures: Figures, images: int) -> Figures:
    """The figures of a step with its images/s, unless it failed."""
    if "failed" not in figures:
        figures["images_per_s"] = images / figures["median"]
    return figures


def allocated_bytes(function: Callable[[], Any], device: str) -> tuple[int, int]:
    """(bytes that the result of `function()` keeps allocated, peak during the call).

    Both count from the memory allocated before. From torch's CUDA allocator, or the CPU profiler.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return torch.cuda.memory_allocated() - before, peak
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print into the notebook
    with profile(profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    levels = np.cumsum([0, *(event.nbytes() for event in events)])
    del result  # only now: the profile must not contain its release
    return int(levels[-1]), int(levels.max())


def to_mib(sizes: dict[str, int]) -> dict[str, float]:
    return {name: size / 2**20 for name, size in sizes.items()}


# Measurements: each takes (device, quick) and returns JSON-safe figures


@benchmark_mode()
def checks(device: Device, quick: bool = False) -> Figures:
    """Train ResNet9 with each technique and compare with fp64 on the CPU.

    Relative errors of the first logits and gradients, and of the losses. Gradients have no limit:
    where the two largest values in a pooling window are close, rounding redirects the gradient.
    """
    base = Recipe(
        model="ResNet9",
        width=8 if quick else 32,
        data="synthetic",
        images=32,
        batch_size=32,
        optimizer="sgd",
        learning_rate=0.01,
    )
    ways: dict[str, dict[str, str]] = {
        "fp32": {},
        "channels_last": {"memory_format": "channels_last"},
        "bf16": {"precision": "bf16", "memory_format": "channels_last"},
    }
    if device == "cuda":
        ways |= {"tf32": {"precision": "tf32"}, "fp16": {"precision": "fp16"}}
    if can_compile(device, quick):
        ways["compiled"] = {"compiler": "inductor"}
    exact = train_steps(base, torch.float64)
    found = {way: check(base.replace(device=device, **ways[way]), exact) for way in ways}
    passed = [figures["passed"] for figures in found.values() if "failed" not in figures]
    return {
        "recipe": base.to_dict(),
        "fp64_losses": exact["losses"].tolist(),
        "ways": found,
        "passed": bool(passed) and all(passed),
    }


def check(recipe: Recipe, exact: dict[str, torch.Tensor]) -> Figures:
    """Compare `train_steps(recipe)` with exact results, unless the recipe cannot run here."""
    limits = LIMITS[recipe.precision]
    try:
        results = train_steps(recipe)
        errors = {name: relative_error(results[name], exact[name]) for name in results}
    except Exception as error:
        return describe_failure(error)
    return {
        "errors": {name: finite_or_none(error) for name, error in errors.items()},
        "limits": limits,
        "losses": [finite_or_none(loss) for loss in results["losses"].tolist()],
        "passed": all(errors[name] <= limit for name, limit in limits.items()),
    }


@benchmark_mode()
def clock(device: Device, quick: bool = False) -> Figures:
    """Time large matrix products until the calls return (`returned_s`) and finish (`median`)."""
    size = by_device(device, quick, small=256, cuda=4096, cpu=1024)
    products = by_device(device, quick, small=4, cuda=20, cpu=10)
    chain = {"chain": matmul_chain(size, products, device)}
    figures = benchmark_interleaved(chain, device, 5 if quick else 15)["chain"]
    flop = products * 2 * size**3
    return {
        **figures,
        "size": size,
        "products": products,
        "flops": flop / figures["median"],
        "flops_by_the_naive_clock": flop / figures["returned_s"],
    }


@benchmark_mode()
def copies(device: Device, quick: bool = False) -> Figures:
    """GB/s of copies from and to a GPU, pageable and pinned, and within the device's memory.

    Bytes count once between memory and GPU, and twice (read and written) within a memory.
    """
    mib = 8 if quick else 256
    within = "within its memory"
    target, pageable = torch.empty(mib * 2**18, device=device), torch.ones(mib * 2**18)
    ways = {within: partial(target.copy_, torch.ones_like(target))}
    if device == "cuda":
        pinned = pageable.pin_memory()
        ways |= {
            "pageable to GPU": partial(target.copy_, pageable),
            "GPU to pageable": partial(pageable.copy_, target),
            "pinned to GPU": partial(target.copy_, pinned),
            "GPU to pinned": partial(pinned.copy_, target),
            "pinned to GPU, non_blocking": partial(target.copy_, pinned, non_blocking=True),
            "GPU to pinned, non_blocking": partial(pinned.copy_, target, non_blocking=True),
        }
    found = benchmark_interleaved(ways, device, 5 if quick else 20)
    for way, figures in found.items():
        if "failed" not in figures:
            moved = 2 * target.nbytes if way == within else target.nbytes
            figures["gb_per_s"] = moved / figures["median"] / 1e9
    return {"mib": mib, "ways": found}


@benchmark_mode()
def overlap(device: Device, quick: bool = False) -> Figures:
    """Copy to the GPU during matrix products that take about as long, on one and on two streams."""
    if device == "cpu":
        return {"ways": None, "missing": f"Overlap {ONLY_GPU}"}
    target = torch.empty((8 if quick else 256) * 2**18, device=device)
    pageable = torch.ones(target.shape)
    pinned, main, side = pageable.pin_memory(), torch.cuda.current_stream(), torch.cuda.Stream()
    copy_only = partial(target.copy_, pinned, non_blocking=True)
    one_product = matmul_chain(4096, 1, device, torch.bfloat16)
    alone = benchmark_interleaved({"copy": copy_only, "product": one_product}, device, 10)
    products = max(1, round(alone["copy"]["median"] / alone["product"]["median"]))
    compute = matmul_chain(4096, products, device, torch.bfloat16)

    def both(source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(main)  # earlier work may still use the target
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        compute()
        main.wait_stream(stream)  # later work may read the target

    ways = {
        "copy": copy_only,
        "compute": compute,
        "one after the other": partial(both, pinned, main),
        "at the same time": partial(both, pinned, side),
        "at the same time, pageable": partial(both, pageable, side),
    }
    found = benchmark_interleaved(ways, device, 20)
    copy_s, compute_s = found["copy"]["median"], found["compute"]["median"]
    hidden_s = copy_s + compute_s - found["at the same time"]["median"]
    return {
        "mib": target.nbytes / 2**20,
        "products": products,
        "ways": found,
        "missing": None,
        "hidden_share": hidden_s / min(copy_s, compute_s),
    }


@benchmark_mode()
def batch_sizes(device: Device, quick: bool = False) -> Figures:
    """Training throughput of ResNet9 by batch size, with the images on the device."""
    gpu_sizes, cpu_sizes = (4, 16, 64, 256, 1024, 4096), (2, 8, 32, 128, 256)
    sizes = by_device(device, quick, small=(2, 8), cuda=gpu_sizes, cpu=cpu_sizes)
    base = fast_recipe(device, quick)
    recipes = {size: base.replace(images=size, batch_size=size) for size in sizes}
    steps = {str(size): make_trainer(recipe).step for size, recipe in recipes.items()}
    found = benchmark_interleaved(steps, device, 3 if quick else 15, seconds=40)
    return {
        "recipe": base.to_dict(),
        "sizes": {size: add_throughput(figures, int(size)) for size, figures in found.items()},
    }


@benchmark_mode()
def graphs(device: Device, quick: bool = False) -> Figures:
    """Time a small training step, its kernels launched one by one and as one CUDA graph."""
    recipe = Recipe(data="synthetic", images=16, batch_size=16, optimizer="sgd", device=device)
    steps = {"one by one": make_trainer(recipe).step}
    if device == "cuda":
        steps["one CUDA graph"] = cuda_graphed(make_trainer(recipe).step)
    for _ in range(WARMUP_CALLS):  # the graph takes as many steps before its capture
        steps["one by one"]()
    losses = {way: [float(step()) for _ in range(5)] for way, step in steps.items()}
    found = benchmark_interleaved(steps, device, 10 if quick else 30, calls=10)
    return {
        "recipe": recipe.to_dict(),
        "losses": losses,
        "ways": {"one CUDA graph": None, **found},
        "missing": None if device == "cuda" else f"A CUDA graph {ONLY_GPU}",
    }


@benchmark_mode()
def memory(device: Device, quick: bool = False) -> Figures:
    """MiB of a training step of ResNet9 with Adam in fp32: counted, and from the allocator."""
    batch = by_device(device, quick, small=8, cuda=1024, cpu=64)
    recipe = Recipe(
        model="ResNet9",
        width=8 if quick else 32,
        data="synthetic",
        images=batch,
        batch_size=batch,
        device=device,
    )
    trainer = make_trainer(recipe)
    trainer.step()  # creates the optimizer's state
    weights = list(trainer.network.parameters())
    buffers_bytes = sum(buffer.nbytes for buffer in trainer.network.buffers())
    weights_bytes = sum(weight.nbytes for weight in weights)
    counted = {
        "parameters": weights_bytes + buffers_bytes,
        "gradients": weights_bytes,
        "optimizer state": sum(
            tensor.nbytes for state in trainer.optimizer.state.values() for tensor in state.values()
        ),
        "images": trainer.images.nbytes,
        "activations": saved_tensor_bytes(trainer.loss, [*weights, trainer.images]),
    }
    before = counted["parameters"] + counted["optimizer state"] + counted["images"]
    kept, _ = allocated_bytes(trainer.loss, device)
    _, peak = allocated_bytes(trainer.step, device)
    measured = {"kept by the forward pass": kept, "most at once": before + peak}
    return {"batch": batch, "counted": to_mib(counted), "measured": to_mib(measured)}


@benchmark_mode()
def training(device: Device, quick: bool = False) -> Figures:
    """Throughput of ResNet9 from plain fp32 to the fastest step, and its share of the bf16 peak."""
    fast = fast_recipe(device, quick)
    fused = fast.replace(fused_optimizer=True)
    plain = fast.replace(precision="fp32", memory_format="contiguous")
    steps = {
        "fp32": make_trainer(plain).step,
        f"channels_last, {fast.precision}": make_trainer(fast).step,
        "+ fused optimizer": make_trainer(fused).step,
    }
    if can_compile(device, quick):
        steps["+ compiled"] = make_trainer(fused.replace(compiler="inductor")).step
        if device == "cuda":
            steps["+ CUDA graphs"] = make_trainer(fused.replace(compiler="cudagraphs")).step
    with FlopCounterMode(display=False) as counter:
        make_trainer(plain.replace(images=4, batch_size=4)).step()
    flop_per_image = counter.get_total_flops() / 4
    size = by_device(device, quick, small=128, cuda=8192, cpu=1024)
    peak, _, _ = peaks.peak_flops("bf16", device, torch.get_num_threads(), size)
    found = benchmark_interleaved(steps, device, 3 if quick else 20, seconds=60)
    for figures in found.values():
        if "failed" not in add_throughput(figures, fast.batch_size):
            figures["share_of_bf16_peak"] = figures["images_per_s"] * flop_per_image / peak
    return {
        "recipe": fast.to_dict(),
        "flop_per_image": flop_per_image,
        "bf16_peak": peak,
        "ways": found,
    }


@benchmark_mode()
def inference(device: Device, quick: bool = False) -> Figures:
    """Seconds of VGG19's forward pass on 1, 10 and 100 images of 224x224, with 1,000 classes.

    Errors are relative to plain fp32.
    """
    counts = (1, 2) if quick else (1, 10, 100)
    found = {}
    for count in counts:
        torch.compiler.reset()
        ways = inference_variants(device, quick, count, tune=count == counts[-1])
        times = benchmark_interleaved(ways, device, 3 if quick else 20)
        exact = ways["fp32"]()
        for way, figures in times.items():
            if "failed" not in figures:
                figures["error"] = finite_or_none(relative_error(ways[way](), exact))
        found[str(count)] = times
    width, size = (8, 32) if quick else (64, 224)
    return {"model": "VGG19", "width": width, "image_size": size, "images": found}


def inference_variants(
    device: Device, quick: bool, number: int, tune: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that return VGG19's logits for `number` images.

    `tune`: on a GPU, let the compiler try kernels out, which takes a minute or two.
    """
    width, size = (8, 32) if quick else (64, 224)
    plain = build(Recipe(model="VGG19", width=width), (3, size, 1000)).to(device).eval()
    images = datasets.synthetic(number, size, 1000).train.tensors[0].to(device)
    channels_last = techniques.channels_last(copy.deepcopy(plain))
    bf16 = techniques.channels_last(copy.deepcopy(plain)).bfloat16()
    pixels = images.to(memory_format=torch.channels_last)
    bf16_pixels = pixels.bfloat16()
    ways = {
        "fp32": inference_fn(plain, images),
        "channels_last": inference_fn(channels_last, pixels),
        "bf16 autocast": inference_fn(channels_last, pixels, autocast=device),
        "bf16 weights": inference_fn(bf16, bf16_pixels),
    }
    if device == "cuda":
        fused = inference_fn(fuse_conv_relu(bf16), bf16_pixels)
        ways["bf16 weights, CUDA graph"] = cuda_graphed(inference_fn(bf16, bf16_pixels))
        ways["conv + ReLU in one, CUDA graph"] = cuda_graphed(fused)
    if can_compile(device, quick):
        compiled = torch.compile(channels_last, dynamic=False)
        ways["bf16 autocast, compiled"] = inference_fn(compiled, pixels, autocast=device)
        ways |= compiled_bf16(device, bf16, bf16_pixels, tune)
    return ways


def compiled_bf16(
    device: Device, model: nn.Module, images: torch.Tensor, tune: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """The fastest compiled version of a model with bf16 weights."""
    if device == "cuda":
        mode = "max-autotune-no-cudagraphs" if tune else "default"
        compiled = torch.compile(model, dynamic=False, mode=mode)
        return {"bf16 weights, compiled, CUDA graph": cuda_graphed(inference_fn(compiled, images))}
    compiled = torch.compile(model, dynamic=False, options={"freezing": True})
    return {"bf16 weights, compiled, frozen": inference_fn(compiled, images)}


def inference_fn(
    model: nn.Module, images: torch.Tensor, autocast: str | None = None
) -> Callable[[], torch.Tensor]:
    """A function that returns the model's logits; `autocast`: device type to run in bf16."""

    # Not inference_mode: a CUDA graph captured in it may break the next (pytorch issue 166792).
    @torch.no_grad()
    def logits() -> torch.Tensor:
        with torch.autocast(autocast or "cpu", torch.bfloat16, enabled=autocast is not None):
            return model(images)

    return logits


def fuse_conv_relu(model: nn.Module) -> nn.Module:
    """A copy in which cuDNN computes each convolution and its ReLU in one call. CUDA only."""
    model = copy.deepcopy(model)
    for stage in model:
        for index, (conv, relu) in enumerate(zip(stage[:-1], stage[1:], strict=True)):
            if isinstance(conv, nn.Conv2d) and isinstance(relu, nn.ReLU):
                conv.forward = partial(
                    torch.cudnn_convolution_relu,
                    weight=conv.weight,
                    bias=conv.bias,
                    stride=conv.stride,
                    padding=conv.padding,
                    dilation=conv.dilation,
                    groups=conv.groups,
                )
                stage[index + 1] = nn.Identity()
    return model


MEASUREMENTS = {
    "checks": checks,
    "clock": clock,
    "copies": copies,
    "overlap": overlap,
    "batch_sizes": batch_sizes,
    "graphs": graphs,
    "memory": memory,
    "training": training,
    "forward": inference,
}


def measure_all(device: Device, quick: bool = False) -> Iterator[tuple[str, Figures]]:
    """Yield (name, figures) of each measurement, "machine" first.

    `device`: "cpu" or "cuda"; `quick`: small sizes and no compilation. A measurement that raises
    yields {"failed": message}, and the others go on.
    """
    here = machine.describe()
    if device == "cuda" and not torch.cuda.is_available():
        reason = here.missing.get("NVIDIA GPU", "torch finds none.")
        raise CnnlabError(f"device='cuda' needs an NVIDIA GPU: {reason} Use device='cpu'.")
    yield (
        "machine",
        {
            **here.to_dict(),
            "device": device,
            "device_name": torch.cuda.get_device_name() if device == "cuda" else here.name,
            "threads": torch.get_num_threads(),
            "quick": quick,
            "commit": record.git_commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    )
    for name, measure in MEASUREMENTS.items():
        start = time.perf_counter()
        try:
            figures = measure(device, quick)
        except Exception as error:
            figures = describe_failure(error)
        yield name, {**figures, "took_s": time.perf_counter() - start}


def record_device(folder: Path, device: Device, quick: bool = False) -> Path:
    """Write all measurements to a JSON file in `folder`, after each one, and return its path."""
    from tqdm.auto import tqdm

    path = folder / record.file_name("device", machine.describe().to_dict())
    record.check_writable(path)
    found: dict[str, Figures] = {}
    with tqdm(total=len(MEASUREMENTS) + 1, desc=f"measuring {device}", leave=False) as bar:
        for name, figures in measure_all(device, quick):
            found[name] = figures
            record.write_json(path, found)
            if "failed" in figures:
                bar.write(f"{name}: failed: {figures['failed']}", file=sys.stderr)
            bar.update()
    return path


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 for what cannot be done."""
    parser = argparse.ArgumentParser(description="Measure one device for the lessons.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where device-NAME.json goes")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--quick", action="store_true", help="small sizes, no compilation")
    options = parser.parse_args(arguments)
    try:
        path = record_device(options.folder, options.device, options.quick)
    except CnnlabError as error:
        print(f"device.py: {error}", file=sys.stderr)
        return 2
    print(f"measured {options.device}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
