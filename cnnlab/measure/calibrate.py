"""Calibrates the predictor on this machine: compute from one rank, the links from all-reduces."""

from collections.abc import Callable, Sequence
from timeit import timeit
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from cnnlab import machine
from cnnlab.events import Started
from cnnlab.launch.launcher import ranks, run
from cnnlab.measure.compare import slowest_rank
from cnnlab.measure.predictor import GBIT, predict
from cnnlab.recipe import Recipe

# Each rank trains the batch of this recipe on one thread: more ranks take more images per step.
SIZE: dict[str, Any] = {"batch_size": 32, "steps": 14, "warmup_steps": 4}
RECIPE = Recipe(model="ResNet9", data="synthetic", threads=1, evaluate=False, **SIZE)
SWEEP_BYTES = tuple(2**power for power in range(14, 26, 2))  # 16 KiB to 16 MiB
REPEATS = 3  # of which the fastest counts, because other programs only slow a measurement down


def predict_here(
    counts: Sequence[int] = (2, 4), recipe: Recipe = RECIPE, say: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Predict the throughput of several numbers of ranks, then measure it. `say` gets each figure.

    Adds to what `predict()` returns the `machine`, the `recipe` of a rank, and `measured`: for each
    number of ranks `ranks`, `images_per_s`, `efficiency`, and the `error` of the predicted images/s
    (0.1: 10% too high).
    """
    if (load := psutil.cpu_percent(0.5)) > 20:
        say(f"other programs use {load:.0f}% of this machine: expect larger errors")
    alone, parameters = measure(recipe, 1)
    say(f"1 rank of {recipe.model}: {alone:,.1f} images/s measured")
    predictions, measured = [], []
    for count in counts:
        result = predict(spec_here(count, recipe, alone, parameters))
        predictions += result["predictions"]
        say(f"{count} ranks: {predictions[-1]['images_per_s']:,.1f} images/s predicted")
    for row in predictions:
        count = row["devices"]
        images_per_s, _ = measure(recipe, count)
        error = row["images_per_s"] / images_per_s - 1
        say(f"{count} ranks: {images_per_s:,.1f} images/s measured, error {error:+.1%}")
        figures = {"images_per_s": images_per_s, "efficiency": images_per_s / count / alone}
        measured.append({"ranks": count, **figures, "error": error})
    place = {"machine": machine.describe().to_dict(), "recipe": recipe.to_dict()}
    return {**result, "predictions": predictions, **place, "measured": measured}


def spec_here(count: int, recipe: Recipe, alone: float, parameters: int) -> dict[str, Any]:
    """The spec of `count` ranks here, one of which trains `alone` images/s by itself.

    Cores that compute at once slow each other down (caches, memory, clock), as a convolution shows,
    and ranks that outnumber the cores take turns. Both is in `stack_efficiency`. Communication
    takes the cores that backward needs, so that nothing overlaps.
    """
    busy = min(count, machine.cores())
    [idle_s], [busy_s] = fastest(time_convolution, 1), fastest(time_convolution, busy)
    latency_s, bytes_per_s = fit_link(fastest(time_all_reduces, count), count)
    link = {"bandwidth_gbps": bytes_per_s / GBIT, "latency_us": 1e6 * latency_s}
    return {
        "model": {"name": recipe.model, "parameters": parameters, "bytes_per_parameter": 4},
        "device": {"images_per_s": alone, "batch": recipe.batch_size},
        "node": {"devices": count, **link},
        "network": link,
        "overlap": False,
        "algorithm": "ring",  # gloo's
        "stack_efficiency": min(1.0, float(idle_s / busy_s)) * busy / count,
        "devices": [count],
    }


def fit_link(seconds: np.ndarray, count: int) -> tuple[float, float]:
    """(latency in s, bytes/s) of a ring of `count` ranks that all-reduces `SWEEP_BYTES`.

    Least squares of the relative errors of the alpha-beta model.
    """
    per_byte, fixed = np.polyfit(SWEEP_BYTES, seconds, 1, w=1 / seconds)
    messages = 2 * (count - 1)
    return max(0.0, float(fixed) / messages), messages / count / max(float(per_byte), 1e-15)


def measure(recipe: Recipe, count: int) -> tuple[float, int]:
    """(images/s of `count` ranks, each with the recipe's batch; parameters of the model)"""
    recipe = recipe.replace(replicas=count, batch_size=count * recipe.batch_size)
    runs = [list(run(recipe)) for _ in range(REPEATS)]
    slowest: list[Any] = [slowest_rank(events, count) for events in runs]
    [parameters] = {event.parameters for event in runs[0] if isinstance(event, Started)}
    return max(finished.images_per_s for finished in slowest), parameters


def fastest(function: Callable[[], list[float]], count: int) -> np.ndarray:
    """The seconds that `function` returns in `count` ranks: the slowest rank, fastest repeat."""
    return np.min([np.max(ranks(function, count), axis=0) for _ in range(REPEATS)], axis=0)


def time_all_reduces() -> list[float]:
    """In a rank: median seconds of an all-reduce of each of `SWEEP_BYTES`."""
    return [median_seconds(dist.all_reduce, torch.ones(bytes // 4)) for bytes in SWEEP_BYTES]


def time_convolution() -> list[float]:
    """In a rank: median seconds of forward and backward of a convolution."""
    torch.set_num_threads(1)  # as in `RECIPE`: a rank that is alone would use all cores
    layer = torch.nn.Conv2d(64, 64, 3, padding=1)
    images = torch.randn(32, 64, 16, 16, requires_grad=True)
    return [median_seconds(lambda: layer(images).relu().sum().backward(), calls=50)]


def median_seconds(function: Callable, *args: Any, calls: int = 12) -> float:
    seconds = []
    for _ in range(calls):
        dist.barrier()
        seconds.append(timeit(lambda: function(*args), number=1))
    return float(np.median(seconds[2:]))
