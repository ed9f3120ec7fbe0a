"""What this machine can do: its cores, matrix units and GPUs, what it lacks and why, and its measured limits."""

from cnnlab.machine import PRECISIONS, cores


def peak_flops(precision="fp32", device="cpu", threads=None, size=2048):
    """Measured FLOP/s of the fastest large operation: (median, first quartile, third quartile).

    That is a (size, size) matrix product, which takes 2 size^3 floating point operations, or, on a CPU, a 3x3
    convolution of 128 channels of about as many: the two come from different libraries, and either may be ahead.
    """
    import torch
    from torch.nn.functional import conv2d

    dtype = {
        "fp32": torch.float32,
        "tf32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }[precision]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    candidates = [(2 * size**3, "a @ b", {"a": a, "b": b})]
    if device == "cpu":
        images = max(1, size**3 // (32 * 32 * 128 * 128 * 9))
        x, w = (
            torch.randn(shape).to(dtype, memory_format=torch.channels_last)
            for shape in ((images, 128, 32, 32), (128, 128, 3, 3))
        )
        candidates.append(
            (
                2 * images * 32 * 32 * 128 * 128 * 9,
                "conv2d(x, w, padding=1)",
                {"conv2d": conv2d, "x": x, "w": w},
            )
        )
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.no_grad():
            return max(
                tuple(flops / seconds for seconds in _timed(statement, values, threads))
                for flops, statement, values in candidates
            )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copy_bandwidth(device="cpu", threads=None, mib=256):
    """Measured bytes/s of a copy, read and write both counted: (median, first quartile, third quartile)."""
    import torch

    source = torch.ones(mib * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * 4
    return tuple(
        moved / seconds
        for seconds in _timed("target.copy_(source)", {"target": target, "source": source}, threads)
    )


def peaks(device="cpu"):
    """The machine's measured roofline: {precision: FLOP/s} for all it computes, and 'copy': bytes/s; medians."""
    names = PRECISIONS if device == "cuda" else ("fp32", "bf16", "fp16")
    size = 8192 if device == "cuda" else 1024
    return {
        **{name: peak_flops(name, device, size=size)[0] for name in names},
        "copy": copy_bandwidth(device)[0],
    }


def _timed(statement, values, threads):
    """Seconds of one run of a statement, as (median, slow quartile, fast quartile); the timer fences the GPU."""
    import numpy as np
    from torch.utils.benchmark import Timer

    timer = Timer(statement, globals=values, num_threads=threads or cores())
    times = timer.blocked_autorange(min_run_time=0.2).times
    return tuple(float(seconds) for seconds in np.percentile(times, (50, 75, 25)))
