"""The ladder: techniques tried one on top of the other, each kept only if it pays, up to this machine's best recipe."""

import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from cnnlab import machine, record
from cnnlab.launch.launcher import RankError
from cnnlab.measure.compare import Measurement, Speedup, measure_interleaved, speedup
from cnnlab.recipe import changes

RETRY_PREFIX = "again: "  # in the name of a rung that lost once and gets a second chance, on a different footing


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One technique on the ladder. `kept` is None while it is being measured; `failed` is the error that ended it."""

    name: str
    measurement: Measurement
    over_baseline: Speedup | None = None
    over_below: Speedup | None = None
    kept: bool | None = None
    failed: str | None = None

    @property
    def recipe(self):
        return self.measurement.recipe

    def to_dict(self):
        """The rung as the JSON of `python -m cnnlab ladder` has it."""
        q1, median, q3 = self.measurement.quartiles
        base, below = self.over_baseline, self.over_below
        return {
            "name": self.name,
            "recipe": self.recipe.to_dict(),
            "images_per_s": {
                "median": median,
                "q1": q1,
                "q3": q3,
                "n": len(self.measurement.images_per_s),
            },
            "speedup": base.value,
            "speedup_ci": [base.low, base.high],
            "over_below": below.value,
            "over_below_ci": [below.low, below.high],
            "below": below.baseline,
            "kept": self.kept,
            "compile_s": self.measurement.compile_s,
            "peak_memory_mib": self.measurement.peak_memory_mib,
            "accuracy": self.measurement.accuracy,
        }


def techniques(machine):
    """What can be tried on this machine, from the ground up: ({name: changes to a recipe}, {name: why not})."""
    plain, on_gpu = (
        {"precision": "fp32", "memory_format": "contiguous"},
        {"device": "cuda"},
    )  # what paid on the CPU is tried on the GPU by itself
    gpu = machine.gpus and {
        "GPU": {**on_gpu, **plain},
        "TF32 on the GPU": {**on_gpu, "precision": "tf32"},
        "channels_last on the GPU": {**on_gpu, "memory_format": "channels_last"},
        "bf16 on the GPU": {**on_gpu, "precision": "bf16"},
        RETRY_PREFIX + "whole-batch loader": {"loader": "batch"},
        "torch.compile on the GPU": {**on_gpu, "compiler": "inductor"},
    }
    replicas = len(machine.gpus) if len(machine.gpus) > 1 else machine.cores
    rungs = {
        "threads": machine.cores > 1 and {"threads": machine.cores},
        "channels_last": {"memory_format": "channels_last"},
        "whole-batch loader": {"loader": "batch"},
        "bf16": {"precision": "bf16"},
        "pooling before ReLU": {"pooling": "before-relu"},
        RETRY_PREFIX + "channels_last": {"memory_format": "channels_last"},
        "torch.compile": machine.compiler and not gpu and {"compiler": "inductor"},
        "compiled except pooling": machine.compiler
        and not gpu
        and {"compiler": "inductor-except-pool"},
        **(gpu or {"GPU": None}),
        "replicas": (machine.cores > 1 and not machine.gpus or len(machine.gpus) > 1)
        and {"replicas": replicas, "threads": None},
    }
    no_compiler = "it is tried on the GPU" if gpu else machine.missing.get("C++ compiler")
    why_not = {
        "threads": "this process may use one core only",
        "torch.compile": no_compiler,
        "compiled except pooling": no_compiler,
        "GPU": machine.missing.get("NVIDIA GPU"),
        "replicas": machine.missing.get("second GPU")
        if machine.gpus
        else "this process may use one core only",
    }
    return (
        {name: change for name, change in rungs.items() if change},
        {name: why_not[name] for name, change in rungs.items() if not change},
    )


def baseline_recipe(recipe):
    """The naive baseline of a recipe: the same work with one thread, fp32, eager, one process, sample by sample, on the CPU."""
    return recipe.replace(
        device="cpu",
        threads=1,
        loader="sample",
        loader_workers=0,
        precision="fp32",
        memory_format="contiguous",
        pooling="after-relu",
        compiler="eager",
        replicas=1,
    )


def climb(recipe, rungs, repeats=5, seconds=4.0, stop=None):
    """Try each of `rungs` ({name: changes}) on top of what was kept, and yield each `Rung` anew after every run of it.

    The rung below and the candidate run in turn, `repeats` times each, or up to three times as often where that fits
    into `seconds`; the baseline runs once more beside each rung, so that its figure covers the whole climb. With
    seconds=0 there are no such further runs. A rung is kept when it beats the one below significantly.
    """
    cache = tempfile.mkdtemp(
        prefix="cnnlab-compiled-"
    )  # empty: compile times are those of a first time
    options = dict(stop=stop, env={"TORCHINDUCTOR_CACHE_DIR": cache})
    baseline = below = _with_speedups(
        Rung(
            name="baseline",
            measurement=Measurement(name="baseline", recipe=baseline_recipe(recipe)),
            kept=True,
        )
    )
    lost, often = set(), repeats
    try:
        yield baseline
        for name, change in rungs.items():
            candidate = _apply_change(below.recipe, change)
            if (
                candidate == below.recipe
                or name.startswith(RETRY_PREFIX)
                and name.removeprefix(RETRY_PREFIX) not in lost
            ):
                continue
            rung, began = (
                Rung(name=name, measurement=Measurement(name=name, recipe=candidate)),
                time.monotonic(),
            )
            for rung, baseline in _try_rung(rung, below, baseline, often, seconds > 0, options):
                yield baseline
                yield rung
            if stop is not None and stop.is_set():
                return
            rung = replace(rung, kept=not rung.failed and rung.over_below.low > 1)
            yield rung
            took = (time.monotonic() - began) / (
                2 * often
            )  # a run, as a guide for the next rung's repeats
            often = max(repeats, min(3 * repeats, int(seconds / (2 * took))))
            lost = lost if rung.kept else lost | {name}
            below = rung if rung.kept else baseline if below.name == "baseline" else below
        if not baseline.measurement.images_per_s:  # no rung was tried
            for found in measure_interleaved({"baseline": baseline.recipe}, repeats, **options):
                yield replace(baseline, measurement=found["baseline"])
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _try_rung(rung, below, baseline, often, beside, options):
    """Run the baseline once more if it is to run `beside`, then the rung below and this one in turn; yield (rung, baseline) at the start and after each run.

    When this rung's rank fails, the rung says so at the end; when those fail that have run before, `RankError` is raised.
    """
    yield rung, baseline
    before = baseline.measurement
    again = below.recipe.replace(
        evaluate=below.recipe.evaluate and below.measurement.accuracy is None
    )  # once is enough
    if beside and below.name != "baseline":
        for found in measure_interleaved(
            {"baseline": baseline.recipe.replace(evaluate=False)}, 1, **options
        ):
            baseline = replace(baseline, measurement=_add_repeats(before, found["baseline"]))
    pair = None
    try:
        for pair in measure_interleaved(
            {below.name: again, rung.name: rung.recipe}, often, **options
        ):
            baseline = (
                replace(baseline, measurement=_add_repeats(before, pair["baseline"]))
                if below.name == "baseline"
                else baseline
            )
            rung = _with_speedups(
                replace(rung, measurement=pair[rung.name]), baseline.measurement, pair[below.name]
            )
            yield rung, baseline
    except RankError as error:
        if pair is None or len(pair[below.name].images_per_s) == len(
            pair[rung.name].images_per_s
        ):  # it was the turn of the rung below
            raise
        yield replace(rung, failed=error.error), baseline


def ladder_result(rungs, impossible):
    """A finished climb as JSON-safe values: the rungs, what could not be tried, the best recipe, and what ran where."""
    impossible = impossible | {
        rung.name: f"it failed here: {rung.failed}" for rung in rungs if rung.failed
    }
    rungs = [rung for rung in rungs if rung.kept is not None and not rung.failed]
    best = [rung for rung in rungs if rung.kept][-1]
    here = machine.describe()
    return {
        "rungs": [rung.to_dict() for rung in rungs],
        "best": best.name,
        "impossible": impossible,
        "best_recipe": {
            name: new for name, (_, new) in changes(rungs[0].recipe, best.recipe).items()
        },
        "recipe": rungs[0].recipe.to_dict(),
        "machine": here.to_dict(),
        "versions": here.versions,
        "commit": record.git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _apply_change(recipe, change):
    """The recipe with a rung's change; of its replicas, as many as split the batch evenly."""
    most = change.get("replicas", recipe.replicas)
    return recipe.replace(
        **{**change, "replicas": max(n for n in range(1, most + 1) if recipe.batch_size % n == 0)}
    )


def _with_speedups(rung, baseline=None, below=None):
    """The rung with its speedups over the baseline and over the rung below; for the baseline itself, 1."""
    if rung.name == "baseline":
        one = Speedup(value=1.0, low=1.0, high=1.0, baseline="baseline")
        return replace(rung, over_baseline=one, over_below=one)
    if not rung.measurement.images_per_s:
        return rung
    pairs = len(rung.measurement.images_per_s)
    below = replace(below, images_per_s=below.images_per_s[:pairs])
    return replace(
        rung,
        over_baseline=speedup(baseline, rung.measurement, paired=False),
        over_below=speedup(below, rung.measurement),
    )


def _add_repeats(measurement, other):
    """A measurement with the repeats of another of the same recipe added."""
    return replace(
        measurement if measurement.images_per_s else other,
        images_per_s=measurement.images_per_s + other.images_per_s,
    )
