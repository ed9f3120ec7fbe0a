"""The ladder on synthetic machines and speeds, and once for real."""

import json
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnlab import machine
from cnnlab.console import rung_line
from cnnlab.events import Finished
from cnnlab.launch import launcher
from cnnlab.machine import Accelerator
from cnnlab.measure.compare import Measurement, speedup
from cnnlab.measure.ladder import (
    RETRY_PREFIX,
    baseline_recipe,
    climb,
    ladder_result,
    multiply,
    techniques,
)
from cnnlab.recipe import Recipe


def gpus(*names, device="cuda", precisions=machine.PRECISIONS):
    return tuple(
        Accelerator(device=device, name=name, memory_gib=8.0, capability="", precisions=precisions)
        for name in names
    )


LARGER = "larger batch on the GPU"
BASE = Recipe(model="ResNet9", batch_size=64, steps=3, warmup_steps=1)
LAPTOP = replace(
    machine.describe(),
    cores=4,
    accelerators=(),
    compiler="/usr/bin/g++",
    missing={"NVIDIA GPU": "none here", "second GPU": "needs two"},
)
WITH_GPU = replace(LAPTOP, accelerators=gpus("A"), missing={"second GPU": "needs two"})


def test_a_laptop_can_try_everything_but_the_gpu():
    rungs, why_not = techniques(LAPTOP)
    assert list(rungs) == [
        "threads",
        "channels_last",
        "whole-batch loader",
        "bf16",
        "pooling before ReLU",
        "fused optimizer",
        RETRY_PREFIX + "channels_last",
        "torch.compile",
        "replicas",
    ]
    assert rungs["threads"] == {"threads": 4}
    assert why_not == {"GPU": "none here"}


def test_one_core_has_neither_threads_nor_replicas():
    rungs, why_not = techniques(replace(LAPTOP, cores=1))
    assert not {"threads", "replicas"} & set(rungs)
    assert "one core" in why_not["threads"] and "one core" in why_not["replicas"]


def test_without_a_compiler_there_is_no_torch_compile():
    missing = {**LAPTOP.missing, "C++ compiler": "apt install g++"}
    rungs, why_not = techniques(replace(LAPTOP, compiler=None, missing=missing))
    assert "torch.compile" not in rungs and why_not["torch.compile"] == "apt install g++"


def test_a_gpu_adds_its_own_rungs():
    rungs, why_not = techniques(WITH_GPU)
    # Not what paid off on the CPU.
    plain = {"precision": "fp32", "memory_format": "contiguous", "fused_optimizer": False}
    assert rungs["GPU"] == {"device": "cuda", **plain}
    # Each rung names the device, so that it can be tried although the rung before was rejected.
    assert rungs["TF32 on the GPU"] == {"device": "cuda", "precision": "tf32"}
    assert why_not == {
        "replicas": "needs two",
        "torch.compile": "it is tried on the GPU",
    }
    assert rungs["CUDA graphs"] == {"device": "cuda", "compiler": "cudagraphs"}
    # The faster the arithmetic, the larger the batch that saturates it.
    names = list(rungs)
    assert names.index(RETRY_PREFIX + LARGER) > names.index("bf16 on the GPU") > names.index(LARGER)


def test_a_gpu_without_cuda_gets_no_rungs_that_need_it():
    apple = gpus("M", device="mps", precisions=("fp32", "fp16"))
    rungs, why_not = techniques(replace(WITH_GPU, accelerators=apple))
    for name in ("CUDA graphs", "cuDNN benchmark"):
        assert name not in rungs and why_not[name] == "it needs CUDA, which M does not have"
    for change in rungs.values():
        Recipe(**{name: value for name, value in change.items() if name != "batch_size"})


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_gpu_without_bf16_and_tf32_gets_the_fp16_rung(device):
    """As NVIDIA's before Ampere, and Apple's."""
    older = gpus("Old", device=device, precisions=("fp32", "fp16"))
    rungs, why_not = techniques(replace(WITH_GPU, accelerators=older))
    assert rungs["fp16 on the GPU"] == {"device": device, "precision": "fp16"}
    for name in ("bf16 on the GPU", "TF32 on the GPU"):
        assert name not in rungs and why_not[name].startswith("Old does not compute")


def test_a_slow_gpu_does_not_end_the_climb(speeds):
    speeds.factors.update({("device", "cuda"): 0.1, ("precision", "bf16"): 2.0})
    rungs, _ = techniques(WITH_GPU)
    found = outcomes(rungs)
    assert found["bf16"].kept and found["GPU"].kept is False
    assert {name for name, change in rungs.items() if "device" in change} <= set(found)


def test_the_gpu_starts_from_plain_fp32_whatever_paid_off_on_the_cpu(speeds):
    speeds.factors.update(
        {
            ("device", "cuda"): 20.0,
            ("precision", "bf16"): 2.0,
            ("memory_format", "channels_last"): 1.5,
        }
    )
    rungs, _ = techniques(WITH_GPU)
    found = outcomes(rungs)
    assert found["GPU"].kept and found["TF32 on the GPU"].kept is False
    assert found["channels_last on the GPU"].kept and found["bf16 on the GPU"].kept
    gpu = found["GPU"].recipe
    assert (gpu.precision, gpu.memory_format) == ("fp32", "contiguous")
    assert found["bf16"].recipe.precision == "bf16"


def test_two_gpus_can_have_replicas():
    rungs, why_not = techniques(replace(LAPTOP, accelerators=gpus("A", "B"), missing={}))
    assert rungs["replicas"] == {"replicas": 2, "threads": None}
    assert set(why_not) == {"torch.compile"}


@pytest.mark.parametrize("names", [(), ("A",), ("A", "B", "C")])
@pytest.mark.parametrize("cores", [1, 2, 6, 12])
def test_every_technique_is_tried_or_has_a_reason(cores, names):
    missing = {}
    if not names:
        missing["NVIDIA GPU"] = "none here"
    if len(names) < 2:
        missing["second GPU"] = "needs two"
    rungs, why_not = techniques(
        replace(LAPTOP, cores=cores, accelerators=gpus(*names), missing=missing)
    )
    listed = {*rungs, *why_not}
    assert {"threads", "torch.compile", "replicas", "GPU"} <= listed
    assert all(why_not.values()) and not set(rungs) & set(why_not)


def test_the_baseline_is_the_same_work_without_any_technique():
    recipe = BASE.replace(
        threads=2,
        precision="bf16",
        loader="batch",
        memory_format="channels_last",
        pooling="before-relu",
        compiler="inductor",
        replicas=2,
        loader_workers=1,
    )
    assert baseline_recipe(recipe) == BASE.replace(threads=1)
    assert baseline_recipe(BASE.replace(device="cuda", precision="tf32")) == BASE.replace(threads=1)


@pytest.fixture
def speeds(monkeypatch):
    """Replaces `launcher.run`: `.factors` multiply the speed, `.calls` are recorded."""
    factors, calls = {}, []

    def run(recipe, stop=None, env=None):
        if stop is not None and stop.is_set():
            return
        calls.append((recipe, dict(env)))
        if recipe.batch_size > run.largest_batch:
            raise launcher.RankError(0, "OutOfMemoryError: CUDA out of memory", "its traceback")
        rate = 100.0 * (1 + 0.001 * (len(calls) % 3))
        for (field, value), factor in factors.items():
            if getattr(recipe, field) == value:
                rate *= factor
        for rank in range(recipe.replicas):
            yield Finished(
                rank=rank,
                steps=3,
                images=192,
                seconds=1.0,
                warmup_s=3.0,
                images_per_s=rate,
                step_s=0.3,
                waiting_s=0.1,
                communication_s=0.0,
                compute_s=0.2,
                peak_memory_mib=300.0,
                accuracy=0.5 if recipe.evaluate else None,
                staleness=None,
            )

    monkeypatch.setattr("cnnlab.launch.launcher.run", run)
    run.factors, run.calls, run.largest_batch = factors, calls, 10_000
    return run


def outcomes(rungs, recipe=BASE, **options):
    """The final state of each rung."""
    found = {}
    for rung in climb(recipe, rungs, repeats=3, **options):
        found[rung.name] = rung
    return found


RUNGS = {
    "threads": {"threads": 4},
    "channels_last": {"memory_format": "channels_last"},
    "bf16": {"precision": "bf16"},
}


def test_rungs_that_pay_off_are_kept_and_others_are_not(speeds):
    speeds.factors.update(
        {("threads", 4): 2.0, ("memory_format", "channels_last"): 0.5, ("precision", "bf16"): 3.0}
    )
    found = outcomes(RUNGS)
    assert list(found) == ["baseline", "threads", "channels_last", "bf16"]
    assert [rung.kept for rung in found.values()] == [True, True, False, True]
    threads = baseline_recipe(BASE).replace(threads=4)
    assert found["channels_last"].recipe == threads.replace(memory_format="channels_last")
    bf16 = found["bf16"]
    assert bf16.recipe == threads.replace(precision="bf16")
    assert bf16.over_baseline.value == pytest.approx(6, rel=0.01)
    assert bf16.over_below.value == pytest.approx(3, rel=0.01)
    assert bf16.over_below.baseline == "threads"


def test_a_rung_that_makes_no_difference_is_not_kept(speeds):
    assert outcomes({"threads": {"threads": 4}})["threads"].kept is False


def test_a_rung_that_fails_is_left_out_and_the_climb_goes_on(speeds, monkeypatch):
    speeds.factors["precision", "bf16"] = 2.0

    def run(recipe, stop=None, env=None):
        if recipe.compiler == "inductor":
            raise launcher.RankError(0, "CppCompileError: broken compiler", "its traceback")
        return speeds(recipe, stop, env)

    monkeypatch.setattr(launcher, "run", run)
    found = outcomes({"torch.compile": {"compiler": "inductor"}, "bf16": {"precision": "bf16"}})
    outcome = ladder_result(found.values(), {})
    assert [rung["name"] for rung in outcome["rungs"]] == ["baseline", "bf16"]
    assert outcome["best"] == "bf16" and "broken compiler" in outcome["impossible"]["torch.compile"]


def test_a_failure_of_the_rung_below_is_not_blamed_on_the_candidate(speeds, monkeypatch):
    speeds.factors.update({("threads", 4): 2.0})

    def run(recipe, stop=None, env=None):
        below = recipe.threads == 4 and recipe.precision == "fp32"
        if below and len(speeds.calls) >= 9:  # it has run well before
            raise launcher.RankError(0, "the process was killed", "")
        return speeds(recipe, stop, env)

    monkeypatch.setattr(launcher, "run", run)
    with pytest.raises(launcher.RankError, match="killed"):
        outcomes({"threads": {"threads": 4}, "bf16": {"precision": "bf16"}})


def test_a_candidate_that_runs_first_and_fails_is_blamed(speeds, monkeypatch):
    def run(recipe, stop=None, env=None):
        if recipe.threads == 4 and len(speeds.calls) == 5:  # the first run of the second repeat
            raise launcher.RankError(0, "the process was killed", "")
        return speeds(recipe, stop, env)

    monkeypatch.setattr(launcher, "run", run)
    assert outcomes({"threads": {"threads": 4}})["threads"].failed == "the process was killed"


GPU = {"GPU": {"device": "cuda"}}
BATCH = {LARGER: {"device": "cuda", "batch_size": None}}


def test_runs_on_a_gpu_are_long_enough_and_both_train_on_as_many_images(speeds):
    speeds.factors.update({("device", "cuda"): 50.0, ("precision", "bf16"): 3.0})
    rungs = {**GPU, "bf16": {"device": "cuda", "precision": "bf16"}}
    found = outcomes(rungs, gpu_seconds=2.0)
    assert found["bf16"].kept
    for name, rate in (("GPU", 5000), ("bf16", 15000)):
        recipe = found[name].recipe
        assert (recipe.steps - recipe.warmup_steps) * recipe.batch_size >= 2.0 * rate
        assert recipe.warmup_steps >= 3  # compilation, and the capture of CUDA graphs
    fp32 = [recipe.steps for recipe, _ in speeds.calls[-6:] if recipe.precision == "fp32"]
    assert fp32 == [found["bf16"].recipe.steps] * 3
    on_cpu = {recipe.steps for recipe, _ in speeds.calls if recipe.device == "cpu"}
    assert on_cpu == {BASE.steps}
    best = ladder_result(found.values(), {})["best_recipe"]
    assert best == {"device": "cuda", "precision": "bf16"}


@pytest.mark.parametrize(
    "gains, largest, expected",
    [
        ({128: 1.5, 256: 2.0, 512: 2.1}, 10_000, 256),  # the last doubling gains 5%
        ({128: 1.5, 256: 2.0, 512: 3.0}, 256, 256),  # a larger one does not fit
        ({128: 1.0}, 10_000, 64),
        ({128: 9.0}, 64, 64),
    ],
)
def test_the_batch_is_doubled_until_the_gpu_is_saturated_or_full(speeds, gains, largest, expected):
    speeds.factors["device", "cuda"] = 50.0
    speeds.factors |= {("batch_size", batch): gain for batch, gain in gains.items()}
    speeds.largest_batch = largest
    found = outcomes({**GPU, **BATCH})
    if expected == BASE.batch_size:
        assert LARGER not in found
        return
    rung = found[LARGER]
    assert rung.kept and rung.recipe.batch_size == expected
    # The learning depends on the batch: both are evaluated, after as many images.
    assert rung.measurement.accuracy == rung.accuracy_below == 0.5
    assert "accuracy 50.0%, below 50.0%" in rung_line(rung)
    last = [recipe for recipe, _ in speeds.calls[-6:]]
    assert sorted(recipe.evaluate for recipe in last) == [False] * 4 + [True] * 2
    images = {(recipe.steps - recipe.warmup_steps) * recipe.batch_size for recipe in last}
    assert max(images) - min(images) < expected


def test_a_gpu_that_always_fails_does_not_end_the_climb(speeds, monkeypatch):
    def run(recipe, stop=None, env=None):
        if recipe.device == "cuda":
            raise launcher.RankError(0, "CUDA error: no kernel image", "its traceback")
        return speeds(recipe, stop, env)

    monkeypatch.setattr(launcher, "run", run)
    rungs, _ = techniques(WITH_GPU)
    found = outcomes(rungs)
    assert found["GPU"].failed and found[LARGER].failed and found["CUDA graphs"].failed


def test_only_rungs_that_were_not_kept_are_tried_again(speeds):
    rungs = {**RUNGS, RETRY_PREFIX + "channels_last": {"memory_format": "channels_last"}}
    speeds.factors.update({("memory_format", "channels_last"): 0.5})
    assert RETRY_PREFIX + "channels_last" in outcomes(rungs)
    speeds.factors.update({("memory_format", "channels_last"): 2.0})
    assert RETRY_PREFIX + "channels_last" not in outcomes(rungs)


def test_the_rung_below_and_the_candidate_run_interleaved(speeds):
    speeds.factors.update({("threads", 4): 2.0})
    rungs = {"threads": {"threads": 4}, "bf16": {"precision": "bf16"}}
    list(climb(BASE, rungs, repeats=3))
    order = [(recipe.threads, recipe.precision) for recipe, _ in speeds.calls]
    baseline, threads, bf16 = (1, "fp32"), (4, "fp32"), (4, "bf16")
    pairs = [baseline, threads, threads, baseline, baseline, threads]
    pairs += [threads, bf16, bf16, threads, threads, bf16]
    assert order == [baseline] * 3 + pairs


def test_every_run_does_the_same_work(speeds):
    outcomes(RUNGS)
    assert speeds.calls
    for recipe, _ in speeds.calls:
        assert (recipe.model, recipe.batch_size) == ("ResNet9", 64)
        assert (recipe.steps, recipe.seed) == (3, 0)


def test_each_recipe_is_evaluated_once(speeds):
    speeds.factors.update({("threads", 4): 2.0})
    found = outcomes(RUNGS)
    evaluated = [recipe for recipe, _ in speeds.calls if recipe.evaluate]
    assert sorted(map(str, evaluated)) == sorted(str(rung.recipe) for rung in found.values())
    assert all(rung.measurement.accuracy == 0.5 and rung.recipe.evaluate for rung in found.values())


def test_95_percent_of_the_intervals_over_two_rungs_contain_the_truth():
    """300 climbs of two rungs, 5 pairs each with 5% noise, within 5 standard deviations."""
    random = np.random.default_rng(0)

    def noisy(rate):
        images_per_s = tuple(rate * np.exp(0.05 * random.standard_normal(5)))
        return Measurement(name="a", recipe=BASE, images_per_s=images_per_s)

    hits = 0
    for _ in range(300):
        found = multiply(speedup(noisy(1), noisy(2)), speedup(noisy(2), noisy(3)))
        hits += found.low <= 3 <= found.high
    assert hits / 300 > 0.95 - 5 * (0.95 * 0.05 / 300) ** 0.5


@pytest.mark.parametrize(
    "cores, batch, replicas",
    [(4, 64, 4), (6, 64, 4), (12, 64, 8), (3, 64, 2), (6, 60, 6), (5, 7, 1)],
)
def test_replicas_divide_the_batch_evenly(speeds, cores, batch, replicas):
    rungs = {"replicas": {"replicas": cores, "threads": None}}
    found = outcomes(rungs, BASE.replace(batch_size=batch))
    assert found["replicas"].recipe.replicas == replicas


def test_compilation_starts_from_an_empty_cache_that_is_removed(speeds):
    outcomes(RUNGS)
    folders = {env["TORCHINDUCTOR_CACHE_DIR"] for _, env in speeds.calls}
    assert len(folders) == 1 and not Path(folders.pop()).exists()


def test_a_rung_is_shown_before_its_first_run_and_after_each(speeds):
    counts = [
        len(rung.measurement.images_per_s)
        for rung in climb(BASE, {"threads": {"threads": 4}}, repeats=3)
        if rung.name == "threads"
    ]
    assert counts[0] == 0 and sorted(set(counts)) == [0, 1, 2, 3] and counts == sorted(counts)


def test_the_baseline_is_measured_without_rungs(speeds):
    [baseline] = outcomes({}).values()
    assert len(baseline.measurement.images_per_s) == 3 and baseline.kept


@pytest.mark.parametrize("after", [1, 3, 8])
def test_a_stopped_climb_keeps_the_decided_rungs(speeds, after):
    stop, found = threading.Event(), {}
    speeds.factors.update({("threads", 4): 2.0})
    for rung in climb(BASE, RUNGS, repeats=3, stop=stop):
        found[rung.name] = rung
        if len(speeds.calls) >= after:
            stop.set()
    assert after <= len(speeds.calls) <= after + 1  # not every run yields a rung
    undecided = [rung.name for rung in found.values() if rung.kept is None]
    assert undecided == [list(found)[-1]]


def test_abandoning_the_climb_removes_the_cache(speeds, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    steps = climb(BASE, RUNGS)
    next(steps)
    assert len(list(tmp_path.glob("cnnlab-compiled-*"))) == 1
    steps.close()
    assert list(tmp_path.iterdir()) == []


def test_the_json_has_what_readers_expect(speeds):
    speeds.factors.update({("threads", 4): 2.0})
    outcome = json.loads(json.dumps(ladder_result(outcomes(RUNGS).values(), {"GPU": "none here"})))
    assert {"rungs", "best", "best_recipe", "impossible", "recipe"} <= set(outcome)
    assert {"machine", "versions", "commit", "date"} <= set(outcome)
    names = [rung["name"] for rung in outcome["rungs"]]
    assert names == ["baseline", "threads", "channels_last", "bf16"]
    for rung in outcome["rungs"]:
        assert {"name", "recipe", "images_per_s", "speedup", "speedup_ci", "kept"} <= set(rung)
        assert {"compile_s", "peak_memory_mib", "accuracy"} <= set(rung)
        figures = rung["images_per_s"]
        assert set(figures) == {"median", "q1", "q3", "n"}
        assert figures["q1"] <= figures["median"] <= figures["q3"] and figures["n"] >= 3
        assert rung["speedup_ci"][0] <= rung["speedup"] <= rung["speedup_ci"][1]
        assert rung["accuracy"] == 0.5 and Recipe.from_dict(rung["recipe"])
    assert outcome["best"] == "threads" and outcome["best_recipe"] == {"threads": 4}
    assert outcome["machine"]["name"] and outcome["versions"]["torch"]


def test_a_stopped_climb_has_a_result(speeds):
    speeds.factors.update({("threads", 4): 2.0})
    found = {}
    for rung in climb(BASE, RUNGS, repeats=3):
        found[rung.name] = rung
        if rung.name == "channels_last" and len(rung.measurement.images_per_s) == 1:
            break
    outcome = ladder_result(found.values(), {})
    assert [rung["name"] for rung in outcome["rungs"]] == ["baseline", "threads"]
    assert outcome["best"] == "threads"


def test_a_real_climb_measures_every_rung():
    recipe = Recipe(
        data="synthetic", images=64, image_size=8, batch_size=16, steps=3, warmup_steps=1
    )
    rungs = {
        "whole-batch loader": {"loader": "batch"},
        "channels_last": {"memory_format": "channels_last"},
    }
    found = outcomes(rungs, recipe)
    assert list(found) == ["baseline", "whole-batch loader", "channels_last"]
    for rung in found.values():
        assert rung.kept is not None and min(rung.measurement.images_per_s) > 0
    assert ladder_result(found.values(), {})["rungs"][1]["images_per_s"]["n"] == 3
