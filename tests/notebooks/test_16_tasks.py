"""The solutions of lesson 16 against the package."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from cnnlab import Measurement, Recipe, record, speedup
from cnnlab.measure import ladder

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TASKS = runpy.run_path(str(NOTEBOOKS / "solutions" / "16_whole_ladder.py"))["TASKS"]


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.2])
def test_the_rule_is_that_of_the_package(spread):
    generator = np.random.default_rng(0)
    for _ in range(50):
        below = generator.normal(100, 1, size=5)
        candidate = 104 * generator.lognormal(0, spread, size=5)
        runs = [
            Measurement(name=name, recipe=Recipe(), images_per_s=tuple(rates))
            for name, rates in (("below", below), ("candidate", candidate))
        ]
        assert TASKS["16.1"].reference(candidate / below) == (speedup(*runs).low > 1)


@pytest.mark.parametrize("recorded", record.recorded_ladders().values())
def test_the_speedup_at_the_top_and_the_verdicts_are_those_of_a_recorded_ladder(recorded):
    rungs = recorded["rungs"]
    best = next(rung for rung in rungs if rung["name"] == recorded["best"])
    assert TASKS["16.4"].reference(rungs) == pytest.approx(best["speedup"], rel=0.01)
    kept = [name for name, found in TASKS["16.3"].reference(rungs).items() if found == "kept"]
    assert kept == [rung["name"] for rung in rungs[1:] if rung["kept"]]


def test_the_climb_keeps_what_the_package_keeps(monkeypatch):
    """On a made-up machine, on which bf16 pays only after channels_last."""
    gains = {"threads": 1.8, "memory_format": 1.2, "precision": 0.7, "compiler": 0.9}
    base = Recipe(threads=1)
    techniques = {
        "bf16": {"precision": "bf16"},
        "threads": {"threads": 2},
        "channels_last": {"memory_format": "channels_last"},
        "torch.compile": {"compiler": "inductor"},
        "again: bf16": {"precision": "bf16"},
    }

    def rate(settings):
        found = 100.0
        for field, gain in gains.items():
            if settings[field] != getattr(base, field):
                both = field == "precision" and settings["memory_format"] == "channels_last"
                found *= 2.0 if both else gain
        return found

    def measure_interleaved(recipes, repeats, **_):
        yield {
            name: Measurement(
                name=name,
                recipe=recipe,
                images_per_s=tuple(rate(recipe.to_dict()) + n / 1e6 for n in range(repeats)),
            )
            for name, recipe in recipes.items()
        }

    monkeypatch.setattr(ladder, "measure_interleaved", measure_interleaved)
    *_, top = (rung for rung in ladder.climb(base, techniques, 3) if rung.kept)

    def measure(below, candidate):
        return [rate(candidate) / rate(below)] * 3

    pays = TASKS["16.1"].reference
    settings = TASKS["16.2"].reference(base.to_dict(), techniques, measure, pays)
    assert settings == top.recipe.to_dict()
    assert settings["precision"] == "bf16" and settings["compiler"] == "eager"
