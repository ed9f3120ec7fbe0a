"""The ladder: techniques tried on top of each other, each kept only if it pays off."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cnnlab import machine, record
from cnnlab.launch.failures import RankError
from cnnlab.machine import Machine
from cnnlab.measure.compare import TIMED_STEPS, Measurement, Speedup, measure_interleaved, speedup
from cnnlab.measure.gpu_runs import measure_once, same_work, saturating_batch
from cnnlab.measure.techniques import ONE_CORE, TECHNIQUES, Changes
from cnnlab.recipe import ONLY_CUDA, Recipe, changes
from cnnlab.values import full_or_quick

RETRY_PREFIX = "again: "  # of a rung that is tried again higher up, unless it was kept

CPU_RUNGS = (
    "threads",
    "channels_last",
    "whole-batch loader",
    "bf16",
    "pooling before ReLU",
    "fused optimizer",
    RETRY_PREFIX + "channels_last",
    "torch.compile",
)
LARGER_BATCH: Changes = {"batch_size": None}  # found by measuring: see `saturating_batch`
GPU_RUNGS: dict[str, Changes] = {  # from plain fp32: what paid off on the CPU is tried again
    "GPU": {"precision": "fp32", "memory_format": "contiguous", "fused_optimizer": False},
    "data on the GPU": {"loader": "device"},
    "larger batch on the GPU": LARGER_BATCH,
    "TF32 on the GPU": {"precision": "tf32"},
    "channels_last on the GPU": {"memory_format": "channels_last"},
    "bf16 on the GPU": {"precision": "bf16"},
    "fp16 on the GPU": {"precision": "fp16"},
    RETRY_PREFIX + "larger batch on the GPU": LARGER_BATCH,
    "cuDNN benchmark": {"cudnn_benchmark": True},
    "fused optimizer on the GPU": {"fused_optimizer": True},
    "torch.compile on the GPU": {"compiler": "inductor"},
    "CUDA graphs": {"compiler": "cudagraphs"},
}


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One technique on the ladder. `kept` is None while it is measured; `failed` is its error."""

    name: str
    measurement: Measurement
    over_baseline: Speedup | None = None  # None before its first run
    over_below: Speedup | None = None
    kept: bool | None = None
    failed: str | None = None
    accuracy_below: float | None = None  # of the rung below after as many images, if batches differ

    @property
    def recipe(self) -> Recipe:
        return self.measurement.recipe

    def to_dict(self) -> dict[str, Any]:
        """The rung as JSON-safe values, once it has run."""
        base, below, found = self.over_baseline, self.over_below, self.measurement
        assert base is not None and below is not None
        q1, median, q3 = found.quartiles
        return {
            "name": self.name,
            "recipe": self.recipe.to_dict(),
            "images_per_s": {"median": median, "q1": q1, "q3": q3, "n": len(found.images_per_s)},
            "speedup": base.value,
            "speedup_ci": [base.low, base.high],
            "over_below": below.value,
            "over_below_ci": [below.low, below.high],
            "below": below.baseline,
            "kept": self.kept,
            "compile_s": found.compile_s,
            "peak_memory_mib": found.peak_memory_mib,
            "accuracy": found.accuracy,
            "accuracy_below": self.accuracy_below,
        }


def techniques(here: Machine) -> tuple[dict[str, Changes], dict[str, str]]:
    """What a machine can try, in order: ({rung: changes to a recipe}, {rung: why not})."""
    rungs: dict[str, Changes] = {}
    why_not: dict[str, str] = {}
    for name in CPU_RUNGS:
        technique = TECHNIQUES[name.removeprefix(RETRY_PREFIX)]
        reason = technique.why_not(here)
        if here.accelerators and technique.needs == "C++ compiler":
            reason = "it is tried on the GPU"
        if reason:
            why_not[name] = reason
        else:
            rungs[name] = technique.changes_for(baseline_recipe(Recipe()), here)
    if not here.accelerators:
        why_not["GPU"] = here.missing["NVIDIA GPU"]
    for name, change in GPU_RUNGS.items() if here.accelerators else ():
        gpu, precision = here.accelerators[0], change.get("precision", "fp32")
        if precision not in gpu.precisions:
            why_not[name] = f"{gpu.name} does not compute {precision} in hardware"
        elif gpu.device != "cuda" and any(
            change.get(field) == value for field, value, _ in ONLY_CUDA
        ):
            why_not[name] = f"it needs CUDA, which {gpu.name} does not have"
        else:
            rungs[name] = {"device": gpu.device, **change}
    replicas = len(here.accelerators) or here.cores
    if replicas > 1:
        rungs["replicas"] = {"replicas": replicas, "threads": None}
    else:
        why_not["replicas"] = here.missing["second GPU"] if here.accelerators else ONE_CORE
    return rungs, why_not


def baseline_recipe(recipe: Recipe) -> Recipe:
    """The naive baseline: the same work on one CPU thread, in fp32, eager, sample by sample."""
    return recipe.replace(
        device="cpu",
        threads=1,
        loader="sample",
        loader_workers=0,
        precision="fp32",
        memory_format="contiguous",
        pooling="after-relu",
        compiler="eager",
        cudnn_benchmark=False,
        fused_optimizer=False,
        replicas=1,
    )


def climb(
    recipe: Recipe,
    rungs: Mapping[str, Changes],
    repeats: int = 5,
    stop: threading.Event | None = None,
    gpu_seconds: float | None = None,
) -> Iterator[Rung]:
    """Try each of `rungs` ({name: changes}) on top of those kept; yield each `Rung` as it grows.

    The baseline runs `repeats` times. Then the rung below and each candidate run interleaved,
    `repeats` times each. A rung is kept if it beats the one below significantly. On a CPU, a run
    takes the steps of `recipe`. On a GPU, that would be over in milliseconds: a first run of each
    candidate gives its speed, and then both take as many images as the faster one trains on in
    `gpu_seconds` (2 by default, 0.2 in quick mode).
    """
    seconds = gpu_seconds or full_or_quick(2.0, 0.2)
    # The cache is empty, so that compile times are those of a first compilation.
    with TemporaryDirectory(prefix="cnnlab-compiled-", ignore_cleanup_errors=True) as cache:
        options = {"stop": stop, "env": {"TORCHINDUCTOR_CACHE_DIR": cache}}
        yield from _climb(recipe, rungs, repeats, seconds, options)


def _climb(recipe, rungs, repeats, seconds, options):
    empty = Measurement(name="baseline", recipe=baseline_recipe(recipe))
    one = Speedup(value=1.0, low=1.0, high=1.0, baseline="baseline")
    below = Rung(name="baseline", measurement=empty, over_baseline=one, over_below=one)
    yield below
    for found in measure_interleaved({"baseline": below.recipe}, repeats, **options):
        below = replace(below, measurement=found["baseline"])
        yield below
    below = replace(below, kept=True)
    yield below
    for name, change in rungs.items():
        candidate = _apply_change(below.recipe, change, seconds, options)
        if candidate == below.recipe:
            continue
        rung = Rung(name=name, measurement=Measurement(name=name, recipe=candidate))
        attempt = _try_rung(rung, below, repeats, seconds, options)
        for rung in attempt:
            yield rung
        if options["stop"] is not None and options["stop"].is_set():
            return
        gain = rung.over_below
        rung = replace(rung, kept=not rung.failed and gain is not None and gain.low > 1)
        yield rung
        if rung.kept:
            below = rung


def ladder_result(rungs: Iterable[Rung], impossible: Mapping[str, str]) -> dict[str, Any]:
    """A climb as JSON-safe values: its rungs, what could not be tried, and the best recipe."""
    rungs = list(rungs)
    failed = {rung.name: f"it failed here: {rung.failed}" for rung in rungs if rung.failed}
    decided = [rung for rung in rungs if rung.kept is not None and not rung.failed]
    best = [rung for rung in decided if rung.kept][-1]
    baseline, here = decided[0].recipe, machine.describe()
    changed = changes(baseline, best.recipe)
    return {
        "rungs": [rung.to_dict() for rung in decided],
        "best": best.name,
        "impossible": {**impossible, **failed},
        "best_recipe": {name: changed[name][1] for name in changed if name not in TIMED_STEPS},
        "recipe": baseline.to_dict(),
        "machine": here.to_dict(),
        "versions": here.versions,
        "commit": record.git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _apply_change(recipe: Recipe, change: Changes, seconds: float, options: dict) -> Recipe:
    """The recipe with a rung's changes, and the most replicas that divide the batch evenly."""
    if "batch_size" in change:
        recipe = recipe.replace(device=change["device"])
        return recipe.replace(batch_size=saturating_batch(recipe, seconds, options))
    most = change.get("replicas", recipe.replicas)
    replicas = max(n for n in range(1, most + 1) if recipe.batch_size % n == 0)
    return recipe.replace(**{**change, "replicas": replicas})


def _try_rung(rung, below, repeats, seconds, options):
    """Run the rung below and this one interleaved; yield the rung first and after each of its runs.

    If a rank of this rung fails, the last `Rung` says so; if one of the rung below fails, which has
    run before, that is raised as `RankError`.
    """
    yield rung
    recipes = [below.recipe.replace(evaluate=False), rung.recipe]
    on_gpu = rung.recipe.device != "cpu"
    first = None
    try:
        if on_gpu:
            first = measure_once(rung.recipe, options)
            if first is None:
                return
            recipes = same_work(below.measurement, first, seconds)
        pair = dict(zip((below.name, rung.name), recipes, strict=True))
        for found in measure_interleaved(pair, repeats, allow_confounders=on_gpu, **options):
            theirs, ours = found[below.name], found[rung.name]
            if first is not None:
                ours = replace(ours, compile_s=first.compile_s)  # now in the cache
            if len(theirs.images_per_s) == len(ours.images_per_s):
                rung = _compare_with_below(rung, below, theirs, ours)
                yield rung
    except RankError as error:
        if error.recipe_name == below.name:
            raise
        yield replace(rung, failed=error.error)


def _compare_with_below(rung, below, theirs, ours):
    """The rung with the speedups that follow from both measurements."""
    gain = speedup(theirs, ours)
    return replace(
        rung,
        measurement=ours,
        over_below=gain,
        over_baseline=multiply(below.over_baseline, gain),
        accuracy_below=theirs.accuracy,
    )


def multiply(lower: Speedup, upper: Speedup) -> Speedup:
    """The speedup of two rungs together. The margins, as logarithms, add in quadrature."""
    value = lower.value * upper.value
    margins = np.log([lower.high / lower.value, upper.high / upper.value])
    spread = float(np.exp(np.hypot(*margins)))
    return Speedup(value=value, low=value / spread, high=value * spread, baseline=lower.baseline)
