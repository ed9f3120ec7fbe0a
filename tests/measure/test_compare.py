"""Speedups of synthetic figures with a known truth, and how recipes are measured."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from cnnlab.events import Finished
from cnnlab.measure.compare import (
    Measurement,
    Speedup,
    compare,
    confounders,
    measure_interleaved,
    slowest_rank,
    speedup,
    speedup_table,
)
from cnnlab.recipe import CnnlabError, Recipe

FAST = Recipe(threads=2)


def measurement(name="a", rates=(100.0, 110.0, 90.0), **more):
    return Measurement(name=name, recipe=Recipe(), images_per_s=tuple(rates), **more)


def finished(rate=100.0, rank=0, warmup_s=1.0, accuracy=None, memory=300.0):
    return Finished(
        rank=rank,
        steps=4,
        images=256,
        seconds=2.0,
        warmup_s=warmup_s,
        images_per_s=rate,
        step_s=0.25,
        waiting_s=0.05,
        communication_s=0.0,
        compute_s=0.2,
        peak_memory_mib=memory,
        accuracy=accuracy,
        staleness=None,
    )


def test_equal_ratios_give_the_exact_speedup():
    found = speedup(measurement("old", (100, 200, 50)), measurement("new", (150, 300, 75)))
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found.significant and str(found).startswith("1.50x faster than old")


def test_95_percent_of_the_intervals_contain_the_truth():
    """300 experiments of 5 pairs with 10% noise, within 5 standard deviations."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        a, b = 100 * np.exp(0.1 * random.standard_normal((2, 5))) * [[1], [1.3]]
        found = speedup(measurement("a", a), measurement("b", b))
        assert found.low < found.value < found.high
        hits += found.low <= 1.3 <= found.high
    assert abs(hits / 300 - 0.95) < 5 * (0.95 * 0.05 / 300) ** 0.5


def test_pairing_cancels_noise_that_both_share():
    assert speedup(measurement("a", (100, 200, 400)), measurement("b", (151, 299, 602))).significant


def test_noise_is_reported_as_no_significant_difference():
    found = speedup(measurement("old", (100, 110, 90)), measurement("new", (105, 95, 102)))
    assert not found.significant
    assert str(found).startswith("no significant difference from old")


def test_a_slowdown_is_significant_and_reported_as_slower():
    found = speedup(measurement("old", (100, 101, 99)), measurement("new", (50, 51, 49)))
    assert found.significant and found.high < 1
    assert str(found).startswith("slower than old (0.50x, 95% CI ")


def test_the_interval_of_a_single_run_is_unbounded():
    found = speedup(measurement("a", (100,)), measurement("b", (300,)))
    assert (found.value, found.low, found.high) == pytest.approx((3, 0, float("inf")))
    assert not found.significant


def test_pairs_need_equally_many_repeats():
    a, b = measurement("a", (100, 100)), measurement("b", (100, 101, 102))
    with pytest.raises(CnnlabError, match="a has 2 repeats and b 3.*interleaved"):
        speedup(a, b)


def test_quartiles_are_the_first_the_median_and_the_third():
    assert measurement(rates=(1, 2, 3, 4, 5)).quartiles == (2, 3, 4)
    assert measurement(rates=(7,)).quartiles == (7, 7, 7)


def test_a_measurement_collects_the_figures_of_its_repeats():
    found = (
        measurement(rates=())
        .add(finished(100, memory=300, accuracy=0.5))
        .add(finished(120, memory=250))
    )
    assert found.images_per_s == (100, 120)
    assert found.peak_memory_mib == 300 and found.accuracy == 0.5


def test_compile_time_is_the_first_warmup_beyond_the_time_of_its_steps():
    compiled = Measurement(name="c", recipe=Recipe(compiler="inductor", warmup_steps=2))
    compiled = compiled.add(finished(warmup_s=10.0)).add(finished(warmup_s=1.0))
    assert compiled.compile_s == pytest.approx(10 - 2 * 0.25)
    assert measurement(rates=()).add(finished(warmup_s=10.0)).compile_s == 0


def test_the_slowest_rank_sets_the_pace():
    assert slowest_rank([finished(120, 0), finished(100, 1)]).rank == 1


@pytest.fixture
def runs(monkeypatch):
    """Replaces `launcher.run` and records the recipes that it is called with."""
    calls = []

    def run(recipe, stop=None, env=None):
        calls.append(recipe)
        rate = 100.0 * (recipe.threads or 1) + len(calls)
        yield finished(rate, accuracy=0.5 if recipe.evaluate else None)

    monkeypatch.setattr("cnnlab.launch.launcher.run", run)
    return calls


def test_runs_are_interleaved_and_no_recipe_is_always_the_first(runs):
    recipes = {"slow": Recipe(threads=1), "fast": FAST}
    steps = list(measure_interleaved(recipes, repeats=3))
    assert [recipe.threads for recipe in runs] == [1, 2, 2, 1, 1, 2]
    counts = [(len(step["slow"].images_per_s), len(step["fast"].images_per_s)) for step in steps]
    assert counts == [(1, 0), (1, 1), (1, 2), (2, 2), (3, 2), (3, 3)]
    assert steps[-1]["fast"].images_per_s == (202, 203, 206)


def test_only_the_first_repeat_evaluates(runs):
    *_, last = measure_interleaved({"a": Recipe(), "b": FAST}, repeats=2)
    assert [measurement.accuracy for measurement in last.values()] == [0.5, 0.5]
    assert [recipe.evaluate for recipe in runs] == [True, True, False, False]


def test_earlier_results_are_not_changed_later(runs):
    first, *_ = list(measure_interleaved({"a": Recipe(), "b": FAST}, repeats=2))
    assert len(first["a"].images_per_s) == 1


def test_a_stopped_measurement_ends_with_its_complete_runs(monkeypatch):
    stop = threading.Event()

    def run(recipe, stop=None, env=None):
        if not stop.is_set():
            yield finished()

    monkeypatch.setattr("cnnlab.launch.launcher.run", run)
    steps = []
    for step in measure_interleaved({"a": Recipe(), "b": FAST}, repeats=5, stop=stop):
        steps.append(step)
        if len(steps) == 3:
            stop.set()
    assert len(steps) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 32},
        {"model": "ResNet9"},
        {"steps": 9},
        {"learning_rate": 0.1},
        {"seed": 1},
        {"augment": "shift"},
    ],
    ids=str,
)
def test_a_confounded_comparison_is_rejected_with_the_field_and_its_values(runs, change):
    [(name, value)] = change.items()
    recipes = {"a": Recipe(), "b": FAST.replace(**change)}
    with pytest.raises(CnnlabError, match="is not fair.*allow_confounders=True") as rejected:
        next(measure_interleaved(recipes))
    assert f"{name}: {getattr(Recipe(), name)}, {value}" in str(rejected.value)
    assert not runs
    assert list(measure_interleaved(recipes, repeats=1, allow_confounders=True))


def test_fields_of_techniques_are_no_confounders():
    technique = FAST.replace(precision="bf16", loader="batch", memory_format="channels_last")
    technique = technique.replace(fused_optimizer=True)
    assert confounders([Recipe(), technique]) == {}
    assert confounders([Recipe(), Recipe(batch_size=32), Recipe(batch_size=32, seed=1)]) == {
        "batch_size": [64, 32],
        "seed": [0, 1],
    }
    pipeline = Recipe(strategy="pipeline", stages=2, micro_batches=4, recompute=True)
    assert confounders([Recipe(), pipeline]) == {}


def test_a_run_stopped_before_all_its_ranks_finished_does_not_count(monkeypatch):
    def run(recipe, stop=None, env=None):
        yield finished(120, rank=0)

    monkeypatch.setattr("cnnlab.launch.launcher.run", run)
    assert list(measure_interleaved({"a": Recipe(replicas=2)}, repeats=2)) == []


def test_compare_returns_the_final_measurements(runs):
    found = compare({"a": Recipe(), "b": FAST}, repeats=2)
    assert list(found) == ["a", "b"]
    assert [len(measurement.images_per_s) for measurement in found.values()] == [2, 2]


@pytest.mark.parametrize("repeats", [0, -1, 1.5, "3"])
def test_repeats_must_be_a_positive_integer(runs, repeats):
    with pytest.raises(CnnlabError, match="repeats="):
        next(measure_interleaved({"a": Recipe(), "b": FAST}, repeats=repeats))


def test_real_runs_can_be_measured():
    recipe = Recipe(
        data="synthetic", images=64, image_size=8, batch_size=16, steps=3, warmup_steps=1, threads=1
    )
    found = compare({"sample": recipe, "batch": recipe.replace(loader="batch")}, repeats=2)
    assert list(found) == ["sample", "batch"]
    for measurement in found.values():
        assert len(measurement.images_per_s) == 2 and min(measurement.images_per_s) > 0
        assert 0 <= measurement.accuracy <= 1 and measurement.compile_s == 0
        assert measurement.peak_memory_mib > 50


def test_the_table_names_its_baseline_and_the_speedups():
    text = speedup_table(
        {"old": measurement("old", (100, 200, 50)), "new": measurement("new", (150, 300, 75))}
    )
    _, old, new = text.splitlines()
    assert "100 (75 to 150)" in old and "the baseline" in old
    assert "150 (112 to 225)" in new and "1.50x faster than old" in new


@pytest.mark.parametrize(
    "change, named",
    [
        ({"threads": 2}, False),  # the technique that is compared
        ({"precision": "bf16"}, False),
        ({"precision": "bf16", "threads": 2}, True),
        ({"replicas": 4}, True),
    ],
    ids=str,
)
def test_the_table_names_threads_that_differ_together_with_something_else(
    monkeypatch, change, named
):
    monkeypatch.setattr("cnnlab.machine.cores", lambda: 4)
    one = replace(measurement("one"), recipe=Recipe(threads=1))
    other = replace(measurement("other"), recipe=Recipe(threads=1).replace(**change))
    last = speedup_table({"one": one, "other": other}).splitlines()[-1]
    total = 4 if "replicas" in change else 2
    assert (last == f"CPU threads of all ranks together: one 1, other {total}") == named
    shared = replace(other, recipe=Recipe(threads=None, replicas=4))
    all_cores = replace(one, recipe=Recipe(threads=None))
    assert "threads" not in speedup_table({"one": all_cores, "other": shared})


@pytest.mark.parametrize(
    "value, low, high, expected",
    [
        (2, 1.5, 2.6, "2.00x faster than x (95% CI 1.50 to 2.60)"),
        (0.5, 0.4, 0.6, "slower than x (0.50x, 95% CI 0.40 to 0.60)"),
        (1.1, 0.9, 1.3, "no significant difference from x (1.10x, 95% CI 0.90 to 1.30)"),
        (1.2, 0, float("inf"), "1.20x the throughput of x (one run: no interval)"),
    ],
)
def test_a_speedup_is_printed_with_its_interval(value, low, high, expected):
    assert str(Speedup(value=value, low=low, high=high, baseline="x")) == expected
