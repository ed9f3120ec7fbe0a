"""The panel of strategies measures each chosen one on the same ranks."""

import io

import pytest
from helpers import ranks_alive, wait_until
from PIL import Image

from cnnlab import widgets
from cnnlab.measure.compare import confounders
from cnnlab.recipe import Recipe
from cnnlab.widgets.strategies import ONE_RANK, strategies

BASE = Recipe(steps=4, batch_size=32, evaluate=False, threads=1)


@pytest.fixture
def panel():
    made = widgets.StrategyPanel(BASE, ranks=(2, 4), repeats=2)
    yield made
    made.stop()
    made.wait()


def test_the_strategies_do_the_same_work_on_the_same_number_of_ranks():
    recipes = strategies(BASE, 4)
    assert {recipe.ranks for recipe in recipes.values()} == {4}
    assert confounders([BASE, *recipes.values()]) == {}


def test_speed_memory_and_messages_of_the_chosen_strategies(panel, nothing_is_left):
    for name in ("DDP", "tensor", "pipeline"):
        panel.controls[name].value = False
    panel.run()
    panel.wait()
    names = [ONE_RANK, "ZeRO-1", "FSDP"]
    assert list(panel.measurements) == list(panel.memory) == list(panel.sent) == names
    assert all(len(found.images_per_s) == 2 for found in panel.measurements.values())
    parameters = {name: sizes["parameters"] for name, sizes in panel.memory.items()}
    moments = {name: sizes["optimizer state"] for name, sizes in panel.memory.items()}
    assert parameters["ZeRO-1"] == parameters[ONE_RANK]
    assert parameters["FSDP"] == pytest.approx(parameters[ONE_RANK] / 2, rel=0.05)
    assert moments["ZeRO-1"] == pytest.approx(moments[ONE_RANK] / 2, rel=0.05)
    assert 0 == panel.sent[ONE_RANK] < panel.sent["ZeRO-1"]
    assert panel.sent["ZeRO-1"] == pytest.approx(panel.sent["FSDP"], rel=0.1)
    assert panel.bar.value == 1
    assert Image.open(io.BytesIO(panel.image.value)).size == (2400, 680)


def test_stop_ends_the_processes(panel, nothing_is_left):
    panel.run()
    wait_until(ranks_alive, "no rank has started", 60)
    panel.stop()
    panel.wait()
    assert panel.status.value.startswith("Stopped.")
