"""Speedups of figures made up so that the truth is known, and how the figures are taken."""

import threading

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
    assert found.significant and str(found).startswith("1.50x old")


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_holds_the_truth_as_often_as_it_says(paired):
    """300 experiments of 5 pairs with 10% noise: 95% of the intervals hold 1.3 (5 standard deviations of slack)."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        a, b = 100 * np.exp(0.1 * random.standard_normal((2, 5))) * [[1], [1.3]]
        found = speedup(measurement("a", a), measurement("b", b), paired=paired)
        assert found.low < found.value < found.high
        held += found.low <= 1.3 <= found.high
    assert abs(held / 300 - 0.95) < 5 * (0.95 * 0.05 / 300) ** 0.5


def test_pairs_cancel_what_both_shared():
    a, b = measurement("a", (100, 200, 400)), measurement("b", (151, 299, 602))
    assert speedup(a, b).significant
    assert not speedup(a, b, paired=False).significant


def test_noise_is_called_no_significant_difference():
    found = speedup(measurement("old", (100, 110, 90)), measurement("new", (105, 95, 102)))
    assert not found.significant
    assert str(found).startswith("no significant difference from old")


def test_a_slowdown_is_significant_too():
    found = speedup(measurement("old", (100, 101, 99)), measurement("new", (50, 51, 49)))
    assert found.significant and found.high < 1


@pytest.mark.parametrize("paired", [True, False])
def test_one_run_proves_nothing(paired):
    found = speedup(measurement("a", (100,)), measurement("b", (300,)), paired=paired)
    assert (found.value, found.low, found.high) == pytest.approx((3, 0, float("inf")))
    assert not found.significant


def test_pairs_need_as_many_of_each():
    a, b = measurement("a", (100, 100)), measurement("b", (100, 101, 102))
    with pytest.raises(CnnlabError, match="a has 2 repeats and b 3.*paired=False"):
        speedup(a, b)
    assert speedup(a, b, paired=False).value > 1


def test_quartiles_are_first_median_third():
    assert measurement(rates=(1, 2, 3, 4, 5)).quartiles == (2, 3, 4)
    assert measurement(rates=(7,)).quartiles == (7, 7, 7)


def test_a_measurement_gathers_the_figures_of_its_repeats():
    found = (
        measurement(rates=())
        .add(finished(100, memory=300, accuracy=0.5))
        .add(finished(120, memory=250))
    )
    assert found.images_per_s == (100, 120)
    assert found.peak_memory_mib == 300 and found.accuracy == 0.5


def test_compile_time_is_the_first_warm_up_above_its_steps():
    compiled = Measurement(name="c", recipe=Recipe(compiler="inductor", warmup_steps=2))
    assert compiled.add(finished(warmup_s=10.0)).add(
        finished(warmup_s=1.0)
    ).compile_s == pytest.approx(10 - 2 * 0.25)
    assert measurement(rates=()).add(finished(warmup_s=10.0)).compile_s == 0


def test_the_slowest_rank_counts():
    assert slowest_rank([finished(120, 0), finished(100, 1)]).rank == 1


# How runs are taken


@pytest.fixture
def runs(monkeypatch):
    """Stands in for `launch.run`: remembers what it was asked to run."""
    asked = []

    def run(recipe, stop=None, env=None):
        asked.append(recipe)
        yield finished(
            100.0 * (recipe.threads or 1) + len(asked), accuracy=0.5 if recipe.evaluate else None
        )

    monkeypatch.setattr("cnnlab.launch.launcher.run", run)
    return asked


def test_runs_are_interleaved(runs):
    recipes = {"slow": Recipe(threads=1), "fast": FAST}
    steps = list(measure_interleaved(recipes, repeats=3))
    assert [recipe.threads for recipe in runs] == [1, 2, 1, 2, 1, 2]
    assert [tuple(len(m.images_per_s) for m in step.values()) for step in steps] == [
        (1, 0),
        (1, 1),
        (2, 1),
        (2, 2),
        (3, 2),
        (3, 3),
    ]
    assert steps[-1]["fast"].images_per_s == (202, 204, 206)


def test_only_the_first_repeat_evaluates(runs):
    assert [
        m.accuracy
        for m in list(measure_interleaved({"a": Recipe(), "b": FAST}, repeats=2))[-1].values()
    ] == [0.5, 0.5]
    assert [recipe.evaluate for recipe in runs] == [True, True, False, False]


def test_earlier_steps_keep_their_figures(runs):
    first, *_ = list(measure_interleaved({"a": Recipe(), "b": FAST}, repeats=2))
    assert len(first["a"].images_per_s) == 1


def test_a_stopped_measurement_keeps_what_it_has(monkeypatch):
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
def test_an_unfair_comparison_is_refused_with_the_field_and_its_values(runs, change):
    ((name, value),) = change.items()
    with pytest.raises(CnnlabError, match="not be fair.*allow_confounders") as refused:
        next(measure_interleaved({"a": Recipe(), "b": FAST.replace(**change)}))
    assert f"{name}: {getattr(Recipe(), name)}, {value}" in str(refused.value)
    assert not runs
    assert list(
        measure_interleaved(
            {"a": Recipe(), "b": FAST.replace(**change)}, repeats=1, allow_confounders=True
        )
    )


def test_a_technique_is_no_unfairness_and_one_can_name_ones_own():
    assert (
        confounders(
            [
                Recipe(),
                FAST.replace(precision="bf16", loader="batch", memory_format="channels_last"),
            ]
        )
        == {}
    )
    assert confounders([Recipe(), Recipe(batch_size=32), Recipe(batch_size=32, seed=1)]) == {
        "batch_size": [64, 32],
        "seed": [0, 1],
    }
    assert confounders([Recipe(), Recipe(batch_size=32)], technique=("batch_size",)) == {}
    assert confounders([Recipe(), FAST], technique=("batch_size",)) == {"threads": [None, 2]}


def test_a_run_that_was_stopped_between_the_ends_of_its_ranks_does_not_count(monkeypatch):
    monkeypatch.setattr(
        "cnnlab.launch.launcher.run", lambda recipe, stop=None, env=None: iter([finished(120, 0)])
    )
    assert list(measure_interleaved({"a": Recipe(replicas=2)}, repeats=2)) == []


def test_measured_gives_the_last_word(runs):
    assert {
        name: len(m.images_per_s)
        for name, m in compare({"a": Recipe(), "b": FAST}, repeats=2).items()
    } == {"a": 2, "b": 2}


@pytest.mark.parametrize("repeats", [0, -1, 1.5, "3"])
def test_repeats_must_be_a_count(runs, repeats):
    with pytest.raises(CnnlabError, match="repeats="):
        next(measure_interleaved({"a": Recipe(), "b": FAST}, repeats=repeats))


def test_real_runs_can_be_measured():
    recipe = Recipe(
        data="synthetic", images=64, image_size=8, batch_size=16, steps=3, warmup_steps=1, threads=1
    )
    found = compare({"sample": recipe, "batch": recipe.replace(loader="batch")}, repeats=2)
    for m in found.values():
        assert len(m.images_per_s) == 2 and min(m.images_per_s) > 0
        assert 0 <= m.accuracy <= 1 and m.compile_s == 0 and m.peak_memory_mib > 50


def test_the_table_names_its_baseline_and_the_speedups():
    text = speedup_table(
        {"old": measurement("old", (100, 200, 50)), "new": measurement("new", (150, 300, 75))}
    )
    _, old, new = text.splitlines()
    assert "100 (75 to 150)" in old and "the baseline" in old
    assert "150 (112 to 225)" in new and "1.50x old" in new
    assert (
        "the baseline"
        in speedup_table({"a": measurement("a"), "b": measurement("b")}, baseline="b").splitlines()[
            2
        ]
    )


def test_a_speedup_says_its_interval():
    assert (
        str(Speedup(value=2, low=1.5, high=2.6, baseline="x"))
        == "2.00x x (95% confidence 1.50 to 2.60)"
    )
