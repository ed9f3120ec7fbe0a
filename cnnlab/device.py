"""What one device does, measured piece by piece: are its results right, its clock, copies, batch sizes, graphs, memory, its fastest steps."""

import copy
import time
from datetime import datetime, timezone
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import data, machine, record, speed
from .instruments import WARM, allocated, chain, failure, finite, graphed, in_turn, kept_for_backward, relative, settled, trained, trainer
from .model import build
from .recipe import Recipe, Refused

LIMITS = {"fp32": (1e-4, 1e-3), "tf32": (1e-2, 1e-2), "fp16": (1e-2, 1e-2), "bf16": (5e-2, 1e-2)}    # relative errors: logits, losses
ONLY_GPU = "needs device='cuda': a CPU does what it is told at once, so that nothing can be launched ahead or hidden behind other work."
NAMES = ("checks", "clock", "copies", "overlap", "batch_sizes", "graphs", "memory", "training", "forward")


def everything(device, quick=False):
    """Measure all of it: yields (name, figures), "machine" first. `device`: "cpu" or "cuda"; `quick`: small sizes, nothing compiled.

    An error in one becomes {"failed": what it says}, and the others go on. All figures are JSON-safe.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused(f"device='cuda' needs an NVIDIA GPU: {machine.describe().missing.get('NVIDIA GPU', 'torch sees none.')}")
    name = torch.cuda.get_device_name() if device == "cuda" else machine.describe().name
    yield "machine", {**machine.describe().to_dict(), "device": device, "device_name": name, "threads": torch.get_num_threads(), "quick": quick,
                      "commit": record.commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    for name in NAMES:
        began = time.perf_counter()
        try:
            figures = globals()[name](device, quick)
        except Exception as error:
            figures = failure(error)
        yield name, {**figures, "took_s": time.perf_counter() - began}


@settled()
def checks(device, quick=False):
    """Training ResNet9 in every way against the same in fp64 on the CPU: relative errors of the first logits and gradients, and of the losses.

    Gradients have no limit: where the two largest of a max-pooling are close, rounding swaps them, and a gradient goes elsewhere.
    """
    base = Recipe(model="ResNet9", width=8 if quick else 32, data="synthetic", images=32, batch_size=32, optimizer="sgd", learning_rate=0.01)
    ways = {"fp32": {}, "channels_last": {"memory_format": "channels_last"}, "bf16": {"precision": "bf16", "memory_format": "channels_last"}}
    if device == "cuda":
        ways |= {"tf32": {"precision": "tf32"}, "fp16": {"precision": "fp16"}}
    if may_compile(device, quick):
        ways |= {"compiled": {"compiler": "inductor"}}
    exact, found = trained(base, torch.float64), {}
    for way, change in ways.items():
        most = dict(zip(("logits", "losses"), LIMITS[change.get("precision", "fp32")]))
        try:
            got = trained(base.but(device=device, **change))
            errors = {name: relative(got[name], exact[name]) for name in got}
            found[way] = {"errors": {name: finite(error) for name, error in errors.items()}, "limits": most,
                          "losses": [finite(loss) for loss in got["losses"].tolist()], "passed": all(errors[name] <= most[name] for name in most)}
        except Exception as error:
            found[way] = failure(error)          # no wrong result: none
    ran = [way["passed"] for way in found.values() if "failed" not in way]
    return {"recipe": base.to_dict(), "fp64_losses": exact["losses"].tolist(), "ways": found, "passed": bool(ran) and all(ran)}


@settled()
def clock(device, quick=False):
    """A chain of large matrix products: seconds until the calls came back ("returned_s"), and until the device had done them ("median")."""
    size, products = (256, 4) if quick else (4096, 20) if device == "cuda" else (1024, 10)
    figures = in_turn({"chain": chain(size, products, device)}, device, 5 if quick else 15)["chain"]
    flop = products * 2 * size**3
    return {**figures, "size": size, "products": products, "flops": flop / figures["median"], "flops_by_the_naive_clock": flop / figures["returned_s"]}


@settled()
def copies(device, quick=False):
    """GB/s of copies: between memory and GPU, from ordinary (pageable) and pinned memory, bytes counted once; within memory, read and written."""
    mib = 8 if quick else 256
    target, ordinary = torch.empty(mib * 2**18, device=device), torch.ones(mib * 2**18)
    pairs = {"within its memory": (target, torch.ones_like(target), False)}
    if device == "cuda":
        pinned = ordinary.pin_memory()
        pairs |= {"pageable to GPU": (target, ordinary, False), "GPU to pageable": (ordinary, target, False),
                  "pinned to GPU": (target, pinned, False), "GPU to pinned": (pinned, target, False),
                  "pinned to GPU, non_blocking": (target, pinned, True), "GPU to pinned, non_blocking": (pinned, target, True)}
    found = in_turn({name: partial(to.copy_, source, non_blocking=later) for name, (to, source, later) in pairs.items()}, device, 5 if quick else 20)
    for name, figures in found.items():
        if "failed" not in figures:
            figures["gb_per_s"] = (2 if name == "within its memory" else 1) * mib * 2**20 / figures["median"] / 1e9
    return {"mib": mib, "ways": found}


@settled()
def overlap(device, quick=False):
    """A copy to the GPU beside matrix products that take about as long: one after the other, and at the same time, on two streams."""
    if device == "cpu":
        return {"ways": None, "missing": f"Overlap {ONLY_GPU}"}
    target = torch.empty((8 if quick else 256) * 2**18, device=device)
    ordinary = torch.ones(target.shape)
    pinned, main, side = ordinary.pin_memory(), torch.cuda.current_stream(), torch.cuda.Stream()
    copy_over = partial(target.copy_, pinned, non_blocking=True)
    alone = in_turn({"copy": copy_over, "product": chain(4096, 1, device, torch.bfloat16)}, device, 10)
    products = max(1, round(alone["copy"]["median"] / alone["product"]["median"]))
    compute = chain(4096, products, device, torch.bfloat16)

    def both(source, stream):
        stream.wait_stream(main)                 # the target may still be in use there
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        compute()
        main.wait_stream(stream)                 # what comes next may read the target
    found = in_turn({"copy": copy_over, "compute": compute, "one after the other": lambda: both(pinned, main),
                     "at the same time": lambda: both(pinned, side), "at the same time, pageable": lambda: both(ordinary, side)}, device, 20)
    moved, computed, both_s = (found[way]["median"] for way in ("copy", "compute", "at the same time"))
    return {"mib": target.nbytes / 2**20, "products": products, "ways": found, "missing": None,
            "hidden_share": (moved + computed - both_s) / min(moved, computed)}


@settled()
def batch_sizes(device, quick=False):
    """Training images/s of ResNet9 by batch size: eager, channels_last, bf16 where the device has it; the images are on the device."""
    sizes = (2, 8) if quick else (4, 16, 64, 256, 1024, 4096) if device == "cuda" else (2, 8, 32, 128, 256)
    base = fast_recipe(device, quick)
    steps = {size: trainer(base.but(images=size, batch_size=size)).step for size in sizes}
    found = in_turn(steps, device, 3 if quick else 15, seconds=40)
    return {"recipe": base.to_dict(), "sizes": {str(size): rated(figures, size) for size, figures in found.items()}}


@settled()
def graphs(device, quick=False):
    """A small training step (SmallCNN, 16 images): its kernels launched one by one and, on a GPU, as one CUDA graph; and the losses of both."""
    recipe = Recipe(data="synthetic", images=16, batch_size=16, optimizer="sgd", device=device)
    steps = {"one by one": trainer(recipe).step, **({"one CUDA graph": graphed(trainer(recipe).step)} if device == "cuda" else {})}
    for _ in range(WARM):
        steps["one by one"]()                    # as many as come before the graph is recorded
    losses = {way: [float(step()) for _ in range(5)] for way, step in steps.items()}
    found = in_turn(steps, device, 10 if quick else 30, calls=10)
    missing = None if device == "cuda" else f"A CUDA graph {ONLY_GPU}"
    return {"recipe": recipe.to_dict(), "losses": losses, "ways": {"one CUDA graph": None, **found}, "missing": missing}


@settled()
def memory(device, quick=False):
    """MiB of one training step of ResNet9 with Adam in fp32: counted part by part, and what the allocator says."""
    batch = 8 if quick else 1024 if device == "cuda" else 64
    work = trainer(Recipe(model="ResNet9", width=8 if quick else 32, data="synthetic", images=batch, batch_size=batch, device=device))
    work.step()                                  # the optimizer's state begins to exist
    weights, state = list(work.network.parameters()), [tensor for values in work.optimizer.state.values() for tensor in values.values()]
    size = lambda tensors: sum(tensor.nbytes for tensor in tensors)
    counted = {"parameters": size([*weights, *work.network.buffers()]), "gradients": size(weights), "optimizer state": size(state),
               "images": work.images.nbytes, "activations": kept_for_backward(work.loss, [*weights, work.images])}
    standing = counted["parameters"] + counted["optimizer state"] + counted["images"]
    measured = {"kept by the forward pass": allocated(work.loss, device)[0], "most at once": standing + allocated(work.step, device)[1]}
    in_mib = lambda sizes: {name: bytes / 2**20 for name, bytes in sizes.items()}
    return {"batch": batch, "counted": in_mib(counted), "measured": in_mib(measured)}


@settled()
def training(device, quick=False):
    """Training ResNet9 from plain fp32 to the fastest step here, images on the device: images/s, and the share of the measured bf16 matrix peak."""
    fast = fast_recipe(device, quick)
    plain = fast.but(precision="fp32", memory_format="contiguous")
    steps = {"fp32": trainer(plain).step, f"channels_last, {fast.precision}": trainer(fast).step, "+ fused optimizer": trainer(fast, fused=True).step}
    if may_compile(device, quick):
        compiler = "inductor" if device == "cuda" else "inductor-except-pool"
        steps["+ compiled"] = trainer(fast.but(compiler=compiler), fused=True).step
    with FlopCounterMode(display=False) as counter:
        trainer(plain.but(images=4, batch_size=4)).step()
    flop, size = counter.get_total_flops() / 4, 128 if quick else 8192 if device == "cuda" else 1024
    peak = machine.peak_flops("bf16", device, torch.get_num_threads(), size)[0]
    found = in_turn(steps, device, 3 if quick else 20, seconds=60)
    for figures in found.values():
        if "failed" not in rated(figures, fast.batch_size):
            figures["share_of_bf16_peak"] = figures["images_per_s"] * flop / peak
    return {"recipe": fast.to_dict(), "flop_per_image": flop, "bf16_peak": peak, "ways": found}


@settled()
def forward(device, quick=False, numbers=None):
    """Seconds of a VGG19 forward pass over 1, 10 and 100 images of 224x224 (1,000 classes), way by way; errors are relative to plain fp32."""
    numbers, found = numbers or ((1, 2) if quick else (1, 10, 100)), {}
    for number in numbers:
        torch.compiler.reset()
        ways = forwards(device, quick, number, tune=number == numbers[-1])
        times, exact = in_turn(ways, device, 3 if quick else 20), ways["fp32"]()
        for way, figures in times.items():
            if "failed" not in figures:
                figures["error"] = finite(relative(ways[way](), exact))
        found[str(number)] = times
    return {"model": "VGG19", "width": 8 if quick else 64, "image_size": 32 if quick else 224, "images": found}


def forwards(device, quick, number, tune):
    """{way: function that returns the logits of `number` images}; `tune`: on a GPU let the compiler try kernels out, for a minute or two."""
    size, width = (32, 8) if quick else (224, 64)
    plain = build(Recipe(model="VGG19", width=width), (3, size, 1000)).to(device).eval()
    images = data.synthetic(number, size, 1000).train.tensors[0].to(device)
    inner, narrow = (speed.channels_last(copy.deepcopy(plain)).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    pixels = images.to(memory_format=torch.channels_last)
    half = pixels.bfloat16()
    ways = {"fp32": used(plain, images), "channels_last": used(inner, pixels), "bf16 autocast": used(inner, pixels, autocast=device),
            "bf16 weights": used(narrow, half)}
    if device == "cuda":
        ways |= {"bf16 weights, CUDA graph": graphed(used(narrow, half)), "conv + ReLU in one, CUDA graph": graphed(used(joined(narrow), half))}
    if may_compile(device, quick):
        ways["bf16 autocast, compiled"] = used(torch.compile(inner, dynamic=False), pixels, autocast=device)
        how = {"mode": "max-autotune-no-cudagraphs" if tune else "default"} if device == "cuda" else {"options": {"freezing": True}}
        best = used(torch.compile(narrow, dynamic=False, **how), half)
        ways |= {"bf16 weights, compiled, CUDA graph": graphed(best)} if device == "cuda" else {"bf16 weights, compiled, frozen": best}
    return ways


def used(model, images, autocast=None):
    """A function that returns the model's logits of these images; `autocast`: the device type on which to take bf16."""
    @torch.no_grad()                             # not inference_mode: a CUDA graph recorded in it may break the next one (pytorch issue 166792)
    def logits():
        with torch.autocast(autocast or "cpu", torch.bfloat16, enabled=autocast is not None):
            return model(images)
    return logits


def joined(model):
    """The model with each convolution and the ReLU behind it as one call of cuDNN: what lies between never goes to memory. CUDA only."""
    model = copy.deepcopy(model)
    for stage in model:
        for at, (conv, relu) in enumerate(zip(stage[:-1], stage[1:])):
            if isinstance(conv, nn.Conv2d) and isinstance(relu, nn.ReLU):
                conv.forward = partial(torch.cudnn_convolution_relu, weight=conv.weight, bias=conv.bias, stride=conv.stride,
                                       padding=conv.padding, dilation=conv.dilation, groups=conv.groups)
                stage[at + 1] = nn.Identity()
    return model


def rated(figures, images):
    """The figures of a step, with its images/s where it did not fail."""
    if "failed" not in figures:
        figures["images_per_s"] = images / figures["median"]
    return figures


def fast_recipe(device, quick):
    """ResNet9 as it trains fast without compiling, at a batch that fills the device."""
    precision = "bf16" if device == "cuda" or machine.describe().hardware["bf16"] else "fp32"
    large = device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 30e9
    width, batch = (8, 16) if quick else (64, 2048 if large else 256) if device == "cuda" else (32, 128)
    return Recipe(model="ResNet9", width=width, data="synthetic", images=batch, batch_size=batch, optimizer="sgd", device=device, precision=precision,
                  memory_format="channels_last")


def may_compile(device, quick):
    return not quick and (device == "cuda" or machine.describe().compiler is not None)
