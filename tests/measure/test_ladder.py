"""The ladder on machines and speeds that are made up, and once for real."""

import json
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from cnnlab import machine
from cnnlab.events import Finished
from cnnlab.launch import launcher
from cnnlab.measure import ladder
from cnnlab.measure.ladder import RETRY_PREFIX, baseline_recipe, climb, ladder_result, techniques
from cnnlab.recipe import Recipe

BASE = Recipe(model="ResNet9", batch_size=64, steps=3, warmup_steps=1)
LAPTOP = replace(
    machine.describe(),
    cores=4,
    gpus=(),
    compiler="/usr/bin/g++",
    missing={"NVIDIA GPU": "none here", "second GPU": "needs two"},
)
WITH_GPU = replace(LAPTOP, gpus=("A",), missing={"second GPU": "needs two"})


def test_a_laptop_can_try_all_but_the_gpu():
    rungs, why_not = techniques(LAPTOP)
    assert list(rungs) == [
        "threads",
        "channels_last",
        "whole-batch loader",
        "bf16",
        "pooling before ReLU",
        RETRY_PREFIX + "channels_last",
        "torch.compile",
        "compiled except pooling",
        "replicas",
    ]
    assert rungs["threads"] == {"threads": 4}
    assert why_not == {"GPU": "none here"}


def test_one_core_has_neither_threads_nor_replicas():
    rungs, why_not = techniques(replace(LAPTOP, cores=1))
    assert not {"threads", "replicas"} & set(rungs)
    assert "one core" in why_not["threads"] and "one core" in why_not["replicas"]


def test_without_a_compiler_there_is_no_torch_compile():
    rungs, why_not = techniques(
        replace(
            LAPTOP, compiler=None, missing={**LAPTOP.missing, "C++ compiler": "apt install g++"}
        )
    )
    assert "torch.compile" not in rungs and why_not["torch.compile"] == "apt install g++"


def test_a_gpu_adds_its_own_rungs():
    rungs, why_not = techniques(WITH_GPU)
    assert rungs["GPU"] == {
        "device": "cuda",
        "precision": "fp32",
        "memory_format": "contiguous",
    }  # its own way up, not the CPU's
    assert rungs["TF32 on the GPU"] == {
        "device": "cuda",
        "precision": "tf32",
    }  # possible where the rung before it lost, too
    assert why_not == {
        "replicas": "needs two",
        **dict.fromkeys(("torch.compile", "compiled except pooling"), "it is tried on the GPU"),
    }
    assert list(rungs).index(RETRY_PREFIX + "whole-batch loader") > list(rungs).index(
        "bf16 on the GPU"
    )  # the faster the step, the more the loader counts


def test_a_gpu_that_loses_does_not_end_the_climb(speeds):
    speeds.factors.update({("device", "cuda"): 0.1, ("precision", "bf16"): 2.0})
    rungs, _ = techniques(WITH_GPU)
    found = outcomes(rungs)
    assert (
        found["bf16"].kept
        and found["GPU"].kept is False
        and {name for name, change in rungs.items() if "device" in change} <= set(found)
    )


def test_the_gpu_is_climbed_from_plain_fp32_whatever_paid_on_the_cpu(speeds):
    speeds.factors.update(
        {
            ("device", "cuda"): 20.0,
            ("precision", "bf16"): 2.0,
            ("memory_format", "channels_last"): 1.5,
        }
    )
    rungs, _ = techniques(WITH_GPU)
    found = outcomes(rungs)
    assert {
        name: found[name].kept
        for name in ("GPU", "TF32 on the GPU", "channels_last on the GPU", "bf16 on the GPU")
    } == {
        "GPU": True,
        "TF32 on the GPU": False,
        "channels_last on the GPU": True,
        "bf16 on the GPU": True,
    }
    assert (
        found["GPU"].recipe.precision,
        found["GPU"].recipe.memory_format,
        found["bf16"].recipe.precision,
    ) == ("fp32", "contiguous", "bf16")


def test_two_gpus_can_have_replicas():
    rungs, why_not = techniques(replace(LAPTOP, gpus=("A", "B"), missing={}))
    assert rungs["replicas"] == {"replicas": 2, "threads": None} and set(why_not) == {
        "torch.compile",
        "compiled except pooling",
    }


@pytest.mark.parametrize("gpus", [(), ("A",), ("A", "B", "C")])
@pytest.mark.parametrize("cores", [1, 2, 6, 12])
def test_every_technique_is_tried_or_has_a_reason(cores, gpus):
    missing = {
        **({} if gpus else {"NVIDIA GPU": "none here"}),
        **({} if len(gpus) > 1 else {"second GPU": "needs two"}),
    }
    rungs, why_not = techniques(replace(LAPTOP, cores=cores, gpus=gpus, missing=missing))
    assert {"threads", "torch.compile", "compiled except pooling", "replicas", "GPU"} <= set(
        rungs
    ) | set(why_not)
    assert all(why_not.values()) and not set(rungs) & set(why_not)


def test_the_ground_is_the_same_work_the_plainest_way():
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
    """Stands in for `launcher.run`: each technique multiplies the speed by its factor. Remembers the recipes asked for."""
    factors, asked = {}, []

    def run(recipe, stop=None, env=None):
        if stop is not None and stop.is_set():
            return
        asked.append((recipe, dict(env)))
        rate = 100.0 * (1 + 0.001 * (len(asked) % 3))
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
    run.factors, run.asked = factors, asked
    return run


def outcomes(rungs, recipe=BASE, **options):
    """The last word on each rung."""
    found = {}
    for rung in climb(recipe, rungs, repeats=3, seconds=0, **options):
        found[rung.name] = rung
    return found


RUNGS = {
    "threads": {"threads": 4},
    "channels_last": {"memory_format": "channels_last"},
    "bf16": {"precision": "bf16"},
}


def test_what_wins_is_carried_upward_and_what_loses_is_not(speeds):
    speeds.factors.update(
        {("threads", 4): 2.0, ("memory_format", "channels_last"): 0.5, ("precision", "bf16"): 3.0}
    )
    found = outcomes(RUNGS)
    assert {name: rung.kept for name, rung in found.items()} == {
        "baseline": True,
        "threads": True,
        "channels_last": False,
        "bf16": True,
    }
    assert found["channels_last"].recipe == baseline_recipe(BASE).replace(
        threads=4, memory_format="channels_last"
    )
    assert found["bf16"].recipe == baseline_recipe(BASE).replace(threads=4, precision="bf16")
    assert found["bf16"].over_baseline.value == pytest.approx(6, rel=0.01)
    assert (
        found["bf16"].over_below.value == pytest.approx(3, rel=0.01)
        and found["bf16"].over_below.baseline == "threads"
    )


def test_what_makes_no_difference_is_left_out(speeds):
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
        if (
            recipe.threads == 4 and recipe.precision == "fp32" and len(speeds.asked) >= 6
        ):  # it had run well, and then memory ran out
            raise launcher.RankError(0, "the process was killed", "")
        return speeds(recipe, stop, env)

    monkeypatch.setattr(launcher, "run", run)
    with pytest.raises(launcher.RankError, match="killed"):
        outcomes({"threads": {"threads": 4}, "bf16": {"precision": "bf16"}})


def test_where_only_second_chances_were_chosen_there_is_still_the_baseline(speeds):
    [baseline] = outcomes(
        {RETRY_PREFIX + "channels_last": {"memory_format": "channels_last"}}
    ).values()
    assert len(baseline.measurement.images_per_s) == 3 and baseline.kept


def test_a_second_chance_goes_only_to_what_lost(speeds):
    rungs = {**RUNGS, RETRY_PREFIX + "channels_last": {"memory_format": "channels_last"}}
    speeds.factors.update({("memory_format", "channels_last"): 0.5})
    assert RETRY_PREFIX + "channels_last" in outcomes(rungs)
    speeds.factors.update({("memory_format", "channels_last"): 2.0})
    assert RETRY_PREFIX + "channels_last" not in outcomes(rungs)


def test_the_rung_below_and_the_candidate_run_in_turn(speeds):
    speeds.factors.update({("threads", 4): 2.0})
    list(
        climb(
            BASE,
            {"threads": {"threads": 4}, "bf16": {"precision": "bf16"}},
            repeats=3,
            seconds=1e-9,
        )
    )
    order = [(recipe.threads, recipe.precision) for recipe, _ in speeds.asked]
    assert order == [(1, "fp32"), (4, "fp32")] * 3 + [(1, "fp32")] + [(4, "fp32"), (4, "bf16")] * 3


def test_without_time_to_spare_nothing_runs_more_often_than_asked(speeds):
    speeds.factors.update({("threads", 4): 2.0})
    outcomes({"threads": {"threads": 4}, "bf16": {"precision": "bf16"}})
    assert len(speeds.asked) == 2 * 3 + 2 * 3


def test_every_run_does_the_same_work(speeds):
    outcomes(RUNGS)
    assert {
        (recipe.model, recipe.batch_size, recipe.steps, recipe.seed) for recipe, _ in speeds.asked
    } == {("ResNet9", 64, 3, 0)}


def test_each_recipe_is_evaluated_once(speeds):
    speeds.factors.update({("threads", 4): 2.0})
    found = outcomes(RUNGS)
    evaluated = [recipe for recipe, _ in speeds.asked if recipe.evaluate]
    assert sorted(map(str, evaluated)) == sorted(str(rung.recipe) for rung in found.values())
    assert all(rung.measurement.accuracy == 0.5 and rung.recipe.evaluate for rung in found.values())


def test_the_baseline_keeps_its_runs_while_what_is_above_it_loses(speeds):
    baseline = outcomes(RUNGS)["baseline"].measurement
    assert len(baseline.images_per_s) == 3 * len(RUNGS) and baseline.accuracy == 0.5


@pytest.mark.parametrize(
    "cores, batch, replicas",
    [(4, 64, 4), (6, 64, 4), (12, 64, 8), (3, 64, 2), (6, 60, 6), (5, 7, 1)],
)
def test_replicas_are_as_many_as_split_the_batch(speeds, cores, batch, replicas):
    found = outcomes(
        {"replicas": {"replicas": cores, "threads": None}}, BASE.replace(batch_size=batch)
    )
    assert found["replicas"].recipe.replicas == replicas if "replicas" in found else replicas == 1


def test_compilation_starts_from_an_empty_cache_that_is_removed(speeds):
    outcomes(RUNGS)
    folders = {env["TORCHINDUCTOR_CACHE_DIR"] for _, env in speeds.asked}
    assert len(folders) == 1 and not Path(folders.pop()).exists()


def test_a_rung_is_shown_before_its_first_run_and_after_each(speeds):
    counts = [
        len(rung.measurement.images_per_s)
        for rung in climb(BASE, {"threads": {"threads": 4}}, repeats=3, seconds=0)
        if rung.name == "threads"
    ]
    assert counts[0] == 0 and sorted(set(counts)) == [0, 1, 2, 3] and counts == sorted(counts)


def test_without_rungs_there_is_still_the_baseline(speeds):
    [baseline] = outcomes({}).values()
    assert len(baseline.measurement.images_per_s) == 3 and baseline.kept


@pytest.mark.parametrize("after", [1, 3, 8])
def test_a_stop_in_the_middle_keeps_what_was_decided(speeds, after):
    stop, found = threading.Event(), {}
    speeds.factors.update({("threads", 4): 2.0})
    for rung in climb(BASE, RUNGS, repeats=3, seconds=0, stop=stop):
        found[rung.name] = rung
        if len(speeds.asked) >= after:
            stop.set()
    assert after <= len(speeds.asked) <= after + 1  # not every run has news for the consumer
    undecided = [rung.name for rung in found.values() if rung.kept is None]
    assert undecided == [list(found)[-1]]


def test_abandoning_the_climb_removes_the_cache(speeds):
    before = set(Path(tempfile.gettempdir()).glob("cnnlab-compiled-*"))
    steps = climb(BASE, RUNGS)
    next(steps)
    ours = set(Path(tempfile.gettempdir()).glob("cnnlab-compiled-*")) - before
    steps.close()
    assert ours and not any(folder.exists() for folder in ours) or not ours


def test_the_json_has_what_readers_expect(speeds):
    speeds.factors.update({("threads", 4): 2.0})
    outcome = json.loads(json.dumps(ladder_result(outcomes(RUNGS).values(), {"GPU": "none here"})))
    assert {
        "rungs",
        "best",
        "best_recipe",
        "machine",
        "versions",
        "impossible",
        "recipe",
        "commit",
        "date",
    } <= set(outcome)
    assert [rung["name"] for rung in outcome["rungs"]] == [
        "baseline",
        "threads",
        "channels_last",
        "bf16",
    ]
    for rung in outcome["rungs"]:
        assert {
            "name",
            "recipe",
            "images_per_s",
            "speedup",
            "speedup_ci",
            "kept",
            "compile_s",
            "peak_memory_mib",
            "accuracy",
        } <= set(rung)
        assert set(rung["images_per_s"]) == {"median", "q1", "q3", "n"}
        assert (
            rung["images_per_s"]["q1"]
            <= rung["images_per_s"]["median"]
            <= rung["images_per_s"]["q3"]
        )
        assert rung["images_per_s"]["n"] >= 3
        assert rung["speedup_ci"][0] <= rung["speedup"] <= rung["speedup_ci"][1]
        assert rung["accuracy"] == 0.5 and Recipe.from_dict(rung["recipe"])
    assert outcome["best"] == "threads" and outcome["best_recipe"] == {"threads": 4}
    assert outcome["machine"]["name"] and outcome["versions"]["torch"]


def test_a_stopped_climb_can_be_summed_up(speeds):
    speeds.factors.update({("threads", 4): 2.0})
    found = {}
    for rung in climb(BASE, RUNGS, repeats=3, seconds=0):
        found[rung.name] = rung
        if rung.name == "channels_last" and len(rung.measurement.images_per_s) == 1:
            break
    outcome = ladder_result(found.values(), {})
    assert [rung["name"] for rung in outcome["rungs"]] == ["baseline", "threads"] and outcome[
        "best"
    ] == "threads"


def test_a_real_climb_measures_every_rung():
    recipe = Recipe(
        data="synthetic", images=64, image_size=8, batch_size=16, steps=3, warmup_steps=1
    )
    found = outcomes(
        {
            "whole-batch loader": {"loader": "batch"},
            "channels_last": {"memory_format": "channels_last"},
        },
        recipe,
    )
    assert list(found) == ["baseline", "whole-batch loader", "channels_last"]
    assert all(
        rung.kept is not None and min(rung.measurement.images_per_s) > 0 for rung in found.values()
    )
    assert ladder.ladder_result(found.values(), {})["rungs"][1]["images_per_s"]["n"] == 3
