"""The schedule of a pipeline, drawn from the events of a run."""

import re

import numpy as np
import pytest
from helpers import render, texts
from matplotlib.colors import to_rgba

from cnnlab import plots
from cnnlab.events import Progress, Started
from cnnlab.parallel.pipeline_schedule import simulate_schedule
from cnnlab.recipe import Recipe

PIPELINE = Recipe(strategy="pipeline", stages=2, micro_batches=4)
INTERLEAVED = {"pipeline_schedule": "interleaved"}
SECONDS = {"forward": [0.010, 0.030], "backward": [0.020, 0.060]}  # per micro-batch, of each rank


def started(recipe, rank=0):
    return Started(
        rank=rank,
        world=recipe.ranks,
        recipe=recipe,
        pid=1,
        parameters=1,
        train_images=64,
        test_images=1,
        steps=2,
        first_step=0,
        threads=1,
        cores=None,
    )


def progress(rank, spans):
    return Progress(
        rank=rank,
        epoch=1,
        step=2,
        images=128,
        seconds=1.0,
        losses=[1.0, 1.0],
        accuracy=0.5,
        images_per_s=1.0,
        warming_up=False,
        spans=spans,
    )


def two_steps(rank):
    """The spans of two steps, in each of which the rank waits as long as it computes."""
    spans = []
    for begin in (0.0, 1.0):
        spans.append(["waiting", begin, begin])
        for phase in ("forward", "backward"):
            for _ in range(4):
                for name in ("exposed", phase):
                    end = begin + SECONDS[phase][rank]
                    spans.append([name, begin, end])
                    begin = end
        spans.append(["update", begin, begin + 0.001])
    return spans


def bars(ax):
    """(phase, row, begin, end) of each box."""
    phases = {to_rgba(plots.PHASES[phase]): phase for phase in SECONDS}
    found = []
    for row in ax.collections:
        phase = phases[tuple(row.get_facecolor()[0])]
        for path in row.get_paths():
            (left, bottom), (right, top) = path.vertices.min(0), path.vertices.max(0)
            found.append((phase, round((bottom + top) / 2), left, right))
    return found


def events_of(recipe):
    return [started(recipe), *(progress(rank, two_steps(rank)) for rank in range(2))]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_the_boxes_are_those_of_the_simulation_with_measured_times(ax, schedule):
    plots.schedule_diagram(ax, {"run": events_of(PIPELINE.replace(pipeline_schedule=schedule))})
    render(ax)
    halves = 2 if schedule == "interleaved" else 1
    times = [[value / halves for value in SECONDS[phase]] * halves for phase in SECONDS]
    expected = sorted(
        (phase, stage % 2, 1000 * begin, 1000 * end)
        for stage, phase, _, begin, end in simulate_schedule(schedule, *times, 4)
    )
    found = sorted(bars(ax))
    assert [box[:2] for box in found] == [box[:2] for box in expected]
    np.testing.assert_allclose([b[2:] for b in found], [b[2:] for b in expected], atol=1e-6)


def test_the_title_compares_formula_simulation_and_measurement(ax):
    plots.schedule_diagram(ax, {"other": [], "run": events_of(PIPELINE)})
    words = ax.get_title(loc="right")
    formula, simulated, measured = map(int, re.findall(r"(\d+)%", words))
    assert formula == 20
    assert simulated == 38  # 480 ms of 2 x 390 ms are busy
    assert measured == 50
    assert "milliseconds" in ax.get_xlabel()


def test_micro_batches_are_numbered_where_there_is_room(ax):
    plots.schedule_diagram(ax, {"run": events_of(PIPELINE)})
    numbers = [text.get_text() for text in ax.texts]
    assert sorted(numbers) == sorted("0123" * 3)  # the forward passes of rank 0 are too short
    ax.clear()
    plots.schedule_diagram(ax, {"run": [started(PIPELINE.replace(micro_batches=64))]})
    assert len(ax.texts) < 64


@pytest.mark.parametrize("change", [{}, {"stages": 4}, {"replicas": 2}, INTERLEAVED], ids=str)
def test_before_the_first_steps_and_on_a_gpu_stages_are_equal(ax, change):
    recipe = PIPELINE.replace(**change)
    events = [started(recipe), *(progress(rank, []) for rank in range(recipe.ranks))]
    plots.schedule_diagram(ax, {"run": events})
    render(ax)
    assert len(bars(ax)) == 2 * 4 * recipe.stages * (2 if change is INTERLEAVED else 1)
    assert "equal" in ax.get_xlabel()
    assert "measured" not in ax.get_title(loc="right")
    assert f"rank {recipe.stages - 1}" in texts(ax)
    assert f"rank {recipe.stages}" not in texts(ax)


@pytest.mark.parametrize("runs", [{}, {"run": []}, {"run": [started(Recipe())]}], ids=str)
def test_without_a_pipeline_there_is_nothing_to_draw(ax, runs):
    plots.schedule_diagram(ax, runs)
    render(ax)
    assert not ax.collections
