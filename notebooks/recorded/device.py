"""Instruments for measuring a device: functions timed in turn, CUDA graphs, a training step to hold on to, the memory that it takes. What one device does, measured piece by piece: are its results right, its clock, copies, batch sizes, graphs, memory, its fastest steps."""

import copy
import math
import time
from datetime import datetime, timezone
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cnnlab import machine, record
from cnnlab.data import datasets
from cnnlab.measure import peaks
from cnnlab.measure.benchmark import (
    WARMUP_CALLS,
    benchmark_interleaved,
    benchmark_mode,
    cuda_graphed,
    describe_failure,
    relative_error,
)
from cnnlab.measure.memory import allocated_bytes, saved_tensor_bytes
from cnnlab.model import build
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import techniques
from cnnlab.training.loop import make_optimizer


def matmul_chain(size, products, device, dtype=torch.float32):
    """A function that multiplies two (size, size) matrices so many times."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(a)

    def work():
        for _ in range(products):
            torch.mm(a, b, out=result)

    return work


def make_trainer(recipe, dtype=torch.float32, fused=False):
    """The recipe's network in training, on the same synthetic images again and again, which are on the device.

    `step()` does forward, backward and update, and returns the loss without waiting for it. `fused`: SGD as one kernel.
    """
    device, kind = (
        torch.device(recipe.device),
        partial(torch.optim.SGD, lr=recipe.learning_rate, momentum=0.9, fused=True),
    )
    images, labels = datasets.synthetic(
        recipe.batch_size, recipe.image_size, recipe.classes, recipe.seed
    ).train.tensors
    layout = (
        torch.channels_last if recipe.memory_format == "channels_last" else torch.contiguous_format
    )
    images, labels = images.to(device, dtype, memory_format=layout), labels.to(device)
    network = build(recipe, (3, recipe.image_size, recipe.classes)).to(dtype)
    model = techniques.prepare(network, recipe, device)
    optimizer = (
        kind(model.parameters()) if fused else make_optimizer(recipe, model, steps=1)[0]
    )
    scaler = torch.amp.GradScaler(
        recipe.device, init_scale=1024.0, enabled=recipe.precision == "fp16"
    )  # torch's 65536 may skip the first steps

    def loss():
        with techniques.autocast(recipe):
            return F.cross_entropy(model(images), labels)

    def step():
        lost = loss()
        scaler.scale(lost).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        return lost.detach()

    return SimpleNamespace(
        network=network, model=model, optimizer=optimizer, images=images, loss=loss, step=step
    )


def train_steps(recipe, dtype=torch.float32, steps=6):
    """{"logits", "gradients", "losses"}: of the first forward and backward pass, and of a few steps."""
    work = make_trainer(recipe, dtype)
    with techniques.autocast(recipe):
        logits = work.model(work.images).detach()
    gradients = torch.autograd.grad(
        1024 * work.loss(), list(work.network.parameters())
    )  # 1024: small ones are 0 in fp16 otherwise
    return {
        "logits": logits,
        "gradients": torch.cat([gradient.flatten() for gradient in gradients]),
        "losses": torch.stack([work.step() for _ in range(steps)]),
    }


def finite_or_none(number):
    """The number; None where it is none, for JSON has no word for it."""
    return number if math.isfinite(number) else None


LIMITS = {
    "fp32": (1e-4, 1e-3),
    "tf32": (1e-2, 1e-2),
    "fp16": (1e-2, 1e-2),
    "bf16": (5e-2, 1e-2),
}  # relative errors: logits, losses


ONLY_GPU = "needs device='cuda': a CPU does what it is told at once, so that nothing can be launched ahead or hidden behind other work."


MEASUREMENTS = (
    "checks",
    "clock",
    "copies",
    "overlap",
    "batch_sizes",
    "graphs",
    "memory",
    "training",
    "forward",
)


def measure_all(device, quick=False):
    """Measure all of it: yields (name, figures), "machine" first. `device`: "cpu" or "cuda"; `quick`: small sizes, nothing compiled.

    An error in one becomes {"failed": what it says}, and the others go on. All figures are JSON-safe.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise CnnlabError(
            f"device='cuda' needs an NVIDIA GPU: {machine.describe().missing.get('NVIDIA GPU', 'torch sees none.')}"
        )
    name = torch.cuda.get_device_name() if device == "cuda" else machine.describe().name
    yield (
        "machine",
        {
            **machine.describe().to_dict(),
            "device": device,
            "device_name": name,
            "threads": torch.get_num_threads(),
            "quick": quick,
            "commit": record.git_commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    )
    for name in MEASUREMENTS:
        began = time.perf_counter()
        try:
            figures = globals()[name](device, quick)
        except Exception as error:
            figures = describe_failure(error)
        yield name, {**figures, "took_s": time.perf_counter() - began}


@benchmark_mode()
def checks(device, quick=False):
    """Training ResNet9 in every way against the same in fp64 on the CPU: relative errors of the first logits and gradients, and of the losses.

    Gradients have no limit: where the two largest of a max-pooling are close, rounding swaps them, and a gradient goes elsewhere.
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
    ways = {
        "fp32": {},
        "channels_last": {"memory_format": "channels_last"},
        "bf16": {"precision": "bf16", "memory_format": "channels_last"},
    }
    if device == "cuda":
        ways |= {"tf32": {"precision": "tf32"}, "fp16": {"precision": "fp16"}}
    if can_compile(device, quick):
        ways |= {"compiled": {"compiler": "inductor"}}
    exact, found = train_steps(base, torch.float64), {}
    for way, change in ways.items():
        most = dict(zip(("logits", "losses"), LIMITS[change.get("precision", "fp32")]))
        try:
            got = train_steps(base.replace(device=device, **change))
            errors = {name: relative_error(got[name], exact[name]) for name in got}
            found[way] = {
                "errors": {name: finite_or_none(error) for name, error in errors.items()},
                "limits": most,
                "losses": [finite_or_none(loss) for loss in got["losses"].tolist()],
                "passed": all(errors[name] <= most[name] for name in most),
            }
        except Exception as error:
            found[way] = describe_failure(error)  # no wrong result: none
    ran = [way["passed"] for way in found.values() if "failed" not in way]
    return {
        "recipe": base.to_dict(),
        "fp64_losses": exact["losses"].tolist(),
        "ways": found,
        "passed": bool(ran) and all(ran),
    }


@benchmark_mode()
def clock(device, quick=False):
    """A chain of large matrix products: seconds until the calls came back ("returned_s"), and until the device had done them ("median")."""
    size, products = (256, 4) if quick else (4096, 20) if device == "cuda" else (1024, 10)
    figures = benchmark_interleaved(
        {"chain": matmul_chain(size, products, device)}, device, 5 if quick else 15
    )["chain"]
    flop = products * 2 * size**3
    return {
        **figures,
        "size": size,
        "products": products,
        "flops": flop / figures["median"],
        "flops_by_the_naive_clock": flop / figures["returned_s"],
    }


@benchmark_mode()
def copies(device, quick=False):
    """GB/s of copies: between memory and GPU, from ordinary (pageable) and pinned memory, bytes counted once; within memory, read and written."""
    mib = 8 if quick else 256
    target, ordinary = torch.empty(mib * 2**18, device=device), torch.ones(mib * 2**18)
    pairs = {"within its memory": (target, torch.ones_like(target), False)}
    if device == "cuda":
        pinned = ordinary.pin_memory()
        pairs |= {
            "pageable to GPU": (target, ordinary, False),
            "GPU to pageable": (ordinary, target, False),
            "pinned to GPU": (target, pinned, False),
            "GPU to pinned": (pinned, target, False),
            "pinned to GPU, non_blocking": (target, pinned, True),
            "GPU to pinned, non_blocking": (pinned, target, True),
        }
    found = benchmark_interleaved(
        {
            name: partial(to.copy_, source, non_blocking=later)
            for name, (to, source, later) in pairs.items()
        },
        device,
        5 if quick else 20,
    )
    for name, figures in found.items():
        if "failed" not in figures:
            figures["gb_per_s"] = (
                (2 if name == "within its memory" else 1) * mib * 2**20 / figures["median"] / 1e9
            )
    return {"mib": mib, "ways": found}


@benchmark_mode()
def overlap(device, quick=False):
    """A copy to the GPU beside matrix products that take about as long: one after the other, and at the same time, on two streams."""
    if device == "cpu":
        return {"ways": None, "missing": f"Overlap {ONLY_GPU}"}
    target = torch.empty((8 if quick else 256) * 2**18, device=device)
    ordinary = torch.ones(target.shape)
    pinned, main, side = ordinary.pin_memory(), torch.cuda.current_stream(), torch.cuda.Stream()
    copy_over = partial(target.copy_, pinned, non_blocking=True)
    alone = benchmark_interleaved(
        {"copy": copy_over, "product": matmul_chain(4096, 1, device, torch.bfloat16)}, device, 10
    )
    products = max(1, round(alone["copy"]["median"] / alone["product"]["median"]))
    compute = matmul_chain(4096, products, device, torch.bfloat16)

    def both(source, stream):
        stream.wait_stream(main)  # the target may still be in use there
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        compute()
        main.wait_stream(stream)  # what comes next may read the target

    found = benchmark_interleaved(
        {
            "copy": copy_over,
            "compute": compute,
            "one after the other": lambda: both(pinned, main),
            "at the same time": lambda: both(pinned, side),
            "at the same time, pageable": lambda: both(ordinary, side),
        },
        device,
        20,
    )
    moved, computed, both_s = (
        found[way]["median"] for way in ("copy", "compute", "at the same time")
    )
    return {
        "mib": target.nbytes / 2**20,
        "products": products,
        "ways": found,
        "missing": None,
        "hidden_share": (moved + computed - both_s) / min(moved, computed),
    }


@benchmark_mode()
def batch_sizes(device, quick=False):
    """Training images/s of ResNet9 by batch size: eager, channels_last, bf16 where the device has it; the images are on the device."""
    sizes = (
        (2, 8)
        if quick
        else (4, 16, 64, 256, 1024, 4096)
        if device == "cuda"
        else (2, 8, 32, 128, 256)
    )
    base = fast_recipe(device, quick)
    steps = {size: make_trainer(base.replace(images=size, batch_size=size)).step for size in sizes}
    found = benchmark_interleaved(steps, device, 3 if quick else 15, seconds=40)
    return {
        "recipe": base.to_dict(),
        "sizes": {str(size): add_throughput(figures, size) for size, figures in found.items()},
    }


@benchmark_mode()
def graphs(device, quick=False):
    """A small training step (SmallCNN, 16 images): its kernels launched one by one and, on a GPU, as one CUDA graph; and the losses of both."""
    recipe = Recipe(data="synthetic", images=16, batch_size=16, optimizer="sgd", device=device)
    steps = {
        "one by one": make_trainer(recipe).step,
        **({"one CUDA graph": cuda_graphed(make_trainer(recipe).step)} if device == "cuda" else {}),
    }
    for _ in range(WARMUP_CALLS):
        steps["one by one"]()  # as many as come before the graph is recorded
    losses = {way: [float(step()) for _ in range(5)] for way, step in steps.items()}
    found = benchmark_interleaved(steps, device, 10 if quick else 30, calls=10)
    missing = None if device == "cuda" else f"A CUDA graph {ONLY_GPU}"
    return {
        "recipe": recipe.to_dict(),
        "losses": losses,
        "ways": {"one CUDA graph": None, **found},
        "missing": missing,
    }


@benchmark_mode()
def memory(device, quick=False):
    """MiB of one training step of ResNet9 with Adam in fp32: counted part by part, and what the allocator says."""
    batch = 8 if quick else 1024 if device == "cuda" else 64
    work = make_trainer(
        Recipe(
            model="ResNet9",
            width=8 if quick else 32,
            data="synthetic",
            images=batch,
            batch_size=batch,
            device=device,
        )
    )
    work.step()  # the optimizer's state begins to exist
    weights, state = (
        list(work.network.parameters()),
        [tensor for values in work.optimizer.state.values() for tensor in values.values()],
    )
    size = lambda tensors: sum(tensor.nbytes for tensor in tensors)
    counted = {
        "parameters": size([*weights, *work.network.buffers()]),
        "gradients": size(weights),
        "optimizer state": size(state),
        "images": work.images.nbytes,
        "activations": saved_tensor_bytes(work.loss, [*weights, work.images]),
    }
    standing = counted["parameters"] + counted["optimizer state"] + counted["images"]
    measured = {
        "kept by the forward pass": allocated_bytes(work.loss, device)[0],
        "most at once": standing + allocated_bytes(work.step, device)[1],
    }
    in_mib = lambda sizes: {name: bytes / 2**20 for name, bytes in sizes.items()}
    return {"batch": batch, "counted": in_mib(counted), "measured": in_mib(measured)}


@benchmark_mode()
def training(device, quick=False):
    """Training ResNet9 from plain fp32 to the fastest step here, images on the device: images/s, and the share of the measured bf16 matrix peak."""
    fast = fast_recipe(device, quick)
    plain = fast.replace(precision="fp32", memory_format="contiguous")
    steps = {
        "fp32": make_trainer(plain).step,
        f"channels_last, {fast.precision}": make_trainer(fast).step,
        "+ fused optimizer": make_trainer(fast, fused=True).step,
    }
    if can_compile(device, quick):
        compiler = "inductor" if device == "cuda" else "inductor-except-pool"
        steps["+ compiled"] = make_trainer(fast.replace(compiler=compiler), fused=True).step
    with FlopCounterMode(display=False) as counter:
        make_trainer(plain.replace(images=4, batch_size=4)).step()
    flop, size = counter.get_total_flops() / 4, 128 if quick else 8192 if device == "cuda" else 1024
    peak = peaks.peak_flops("bf16", device, torch.get_num_threads(), size)[0]
    found = benchmark_interleaved(steps, device, 3 if quick else 20, seconds=60)
    for figures in found.values():
        if "failed" not in add_throughput(figures, fast.batch_size):
            figures["share_of_bf16_peak"] = figures["images_per_s"] * flop / peak
    return {"recipe": fast.to_dict(), "flop_per_image": flop, "bf16_peak": peak, "ways": found}


@benchmark_mode()
def inference(device, quick=False, numbers=None):
    """Seconds of a VGG19 forward pass over 1, 10 and 100 images of 224x224 (1,000 classes), way by way; errors are relative to plain fp32."""
    numbers, found = numbers or ((1, 2) if quick else (1, 10, 100)), {}
    for number in numbers:
        torch.compiler.reset()
        ways = inference_variants(device, quick, number, tune=number == numbers[-1])
        times, exact = benchmark_interleaved(ways, device, 3 if quick else 20), ways["fp32"]()
        for way, figures in times.items():
            if "failed" not in figures:
                figures["error"] = finite_or_none(relative_error(ways[way](), exact))
        found[str(number)] = times
    return {
        "model": "VGG19",
        "width": 8 if quick else 64,
        "image_size": 32 if quick else 224,
        "images": found,
    }


def inference_variants(device, quick, number, tune):
    """{way: function that returns the logits of `number` images}; `tune`: on a GPU let the compiler try kernels out, for a minute or two."""
    size, width = (32, 8) if quick else (224, 64)
    plain = build(Recipe(model="VGG19", width=width), (3, size, 1000)).to(device).eval()
    images = datasets.synthetic(number, size, 1000).train.tensors[0].to(device)
    inner, narrow = (
        techniques.channels_last(copy.deepcopy(plain)).to(dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    pixels = images.to(memory_format=torch.channels_last)
    half = pixels.bfloat16()
    ways = {
        "fp32": inference_fn(plain, images),
        "channels_last": inference_fn(inner, pixels),
        "bf16 autocast": inference_fn(inner, pixels, autocast=device),
        "bf16 weights": inference_fn(narrow, half),
    }
    if device == "cuda":
        ways |= {
            "bf16 weights, CUDA graph": cuda_graphed(inference_fn(narrow, half)),
            "conv + ReLU in one, CUDA graph": cuda_graphed(
                inference_fn(fuse_conv_relu(narrow), half)
            ),
        }
    if can_compile(device, quick):
        ways["bf16 autocast, compiled"] = inference_fn(
            torch.compile(inner, dynamic=False), pixels, autocast=device
        )
        how = (
            {"mode": "max-autotune-no-cudagraphs" if tune else "default"}
            if device == "cuda"
            else {"options": {"freezing": True}}
        )
        best = inference_fn(torch.compile(narrow, dynamic=False, **how), half)
        ways |= (
            {"bf16 weights, compiled, CUDA graph": cuda_graphed(best)}
            if device == "cuda"
            else {"bf16 weights, compiled, frozen": best}
        )
    return ways


def inference_fn(model, images, autocast=None):
    """A function that returns the model's logits of these images; `autocast`: the device type on which to take bf16."""

    @torch.no_grad()  # not inference_mode: a CUDA graph recorded in it may break the next one (pytorch issue 166792)
    def logits():
        with torch.autocast(autocast or "cpu", torch.bfloat16, enabled=autocast is not None):
            return model(images)

    return logits


def fuse_conv_relu(model):
    """The model with each convolution and the ReLU behind it as one call of cuDNN: what lies between never goes to memory. CUDA only."""
    model = copy.deepcopy(model)
    for stage in model:
        for at, (conv, relu) in enumerate(zip(stage[:-1], stage[1:])):
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
                stage[at + 1] = nn.Identity()
    return model


def add_throughput(figures, images):
    """The figures of a step, with its images/s where it did not fail."""
    if "failed" not in figures:
        figures["images_per_s"] = images / figures["median"]
    return figures


def fast_recipe(device, quick):
    """ResNet9 as it trains fast without compiling, at a batch that fills the device."""
    precision = "bf16" if device == "cuda" or machine.describe().hardware["bf16"] else "fp32"
    large = device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 30e9
    width, batch = (
        (8, 16) if quick else (64, 2048 if large else 256) if device == "cuda" else (32, 128)
    )
    return Recipe(
        model="ResNet9",
        width=width,
        data="synthetic",
        images=batch,
        batch_size=batch,
        optimizer="sgd",
        device=device,
        precision=precision,
        memory_format="channels_last",
    )


def can_compile(device, quick):
    return not quick and (device == "cuda" or machine.describe().compiler is not None)
