"""Panels without a browser: how they handle runs, stops, sliders and failures."""

import io
import threading
import time
from dataclasses import replace

import psutil
import pytest
from helpers import wait_until
from PIL import Image

from cnnlab import machine, widgets
from cnnlab.events import Finished
from cnnlab.launch import launcher
from cnnlab.measure import ladder
from cnnlab.measure.compare import Measurement, Speedup
from cnnlab.recipe import Recipe

SHORT = Recipe(steps=12, batch_size=64, evaluate=False)
LONG = SHORT.replace(steps=100_000, evaluate=True)
SIZES = {"batch_size": [32, 64, 128]}


@pytest.fixture
def live(request):
    made = widgets.TrainingPanel(getattr(request, "param", SHORT), SIZES)
    yield made
    made.stop()
    made.wait()


def test_a_run_ends_with_its_throughput_and_a_picture(live):
    live.run()
    live.wait()
    assert isinstance(live.events[-1], Finished) and "images/s" in live.status.value
    assert not live.run_button.disabled and live.stop_button.disabled and live.bar.value == 1
    assert Image.open(io.BytesIO(live.image.value)).size == (1600, 620)


def test_run_returns_at_once(live):
    began = time.monotonic()
    live.run()
    assert time.monotonic() - began < 1 and live.thread.is_alive()


@pytest.mark.parametrize("live", [LONG], indirect=True)
def test_stop_ends_the_processes(live):
    live.run()
    wait_until(lambda: "step" in live.status.value, "no step was reported", 10)
    live.stop()
    live.wait()
    assert live.status.value.startswith("Stopped.") and not live.run_button.disabled
    wait_until(lambda: not ranks(), "a rank is still alive", 10)


@pytest.mark.parametrize("live", [LONG], indirect=True)
def test_a_moved_slider_restarts_training_and_keeps_the_earlier_run(live):
    live.controls["batch_size"].value = 32
    assert live.thread is None  # before the first Run, a slider only chooses
    live.run()
    wait_until(lambda: "step" in live.status.value, "no step was reported", 10)
    live.controls["batch_size"].value = 128
    wait_until(
        lambda: live.events and live.events[0].recipe.batch_size == 128, "no new run started", 10
    )
    assert list(live.runs) == ["batch_size=32", "batch_size=128"] and live.recipe.batch_size == 128
    assert len(ranks()) <= 1  # the previous run has ended


@pytest.mark.parametrize("live", [LONG], indirect=True)
def test_many_quick_clicks_leave_no_run_and_no_thread(live):
    before = threading.active_count()
    for value in (32, 64, 128, 64, 32, 128):
        live.run()
        live.controls["batch_size"].value = value
        live.stop()
    live.run()
    live.stop()  # before it could begin
    live.wait()
    assert not live.run_button.disabled and live.stop_button.disabled
    wait_until(lambda: not ranks() and threading.active_count() <= before, "threads are left", 10)


def test_the_panel_shows_an_error_of_its_plots(live):
    def broken(axes):
        raise KeyError("no such curve")

    live.draw = broken
    live.run()
    live.wait()
    assert "cannot draw" in live.status.value and "no such curve" in live.status.value
    assert not live.run_button.disabled and live.stop_button.disabled


def test_the_panel_shows_why_a_recipe_cannot_run(live):
    live.base = live.base.replace(data="synthetic", images=32, batch_size=16)  # the slider has 64
    live.run()
    live.wait()
    assert "larger than the data" in live.status.value and not live.run_button.disabled


def test_why_stays_disabled_if_nothing_ran():
    base = SHORT.replace(replicas=2, batch_size=64)
    live = widgets.TrainingPanel(base, {"batch_size": [63]})  # odd: two ranks cannot share it
    live.run()
    live.wait()
    assert "cannot run" in live.status.value
    assert live.why_button.disabled and not live.run_button.disabled


def test_the_panel_names_a_failed_rank(live, monkeypatch):
    def run(recipe, stop):
        raise launcher.RankError(1, "ValueError: no", "Traceback: <here>")
        yield

    monkeypatch.setattr(launcher, "run", run)
    live.run()
    live.wait()
    assert "Rank 1 failed" in live.status.value and "&lt;here&gt;" in live.status.value


def test_an_unattended_panel_runs_by_itself(live, monkeypatch):
    monkeypatch.setenv("CNNLAB_UNATTENDED", "1")
    live._ipython_display_()
    assert isinstance(live.events[-1], Finished)


def test_a_picture_shows_what_was_drawn_last():
    picture = widgets.Picture(1)
    before = picture.png(lambda axes: axes[0].plot([1, 2]))
    after = picture.png(lambda axes: axes[0].plot([2, 1]))
    assert pixels(after) != pixels(before)
    assert pixels(picture.png(lambda axes: axes[0].plot([1, 2]))) == pixels(before)
    assert Image.open(io.BytesIO(before)).size == (800, 310)


def test_no_text_of_a_ladder_is_cut_off():
    here = replace(machine.describe(), cores=2, compiler="g++", missing={"NVIDIA GPU": "none"})
    panel = widgets.LadderPanel(Recipe(batch_size=256))
    names = {
        name for gpus in (("A", "B"), ()) for name in ladder.techniques(replace(here, gpus=gpus))[0]
    }
    gain = Speedup(value=1.0, low=0.9, high=3.0, baseline="baseline")
    for name in names:
        found = Measurement(name=name, recipe=panel.base, images_per_s=(1.0,))
        panel.rungs[name] = ladder.Rung(
            name=name, measurement=found, over_baseline=gain, over_below=gain, kept=False
        )
    panel.picture.png(panel.draw)
    figure, [ax] = panel.picture.figure, panel.picture.axes
    for text in (*ax.get_yticklabels(), *ax.get_xticklabels(), *ax.texts, ax.xaxis.label):
        box = text.get_window_extent()
        inside = box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
        assert inside, f"{text.get_text()!r} is cut off"


def test_the_ladder_panel_climbs_what_is_chosen():
    climb = widgets.LadderPanel(
        Recipe(batch_size=256, steps=3, warmup_steps=1, evaluate=False), repeats=2
    )
    for name, box in climb.controls.items():
        if name not in ("channels_last", "repeats"):
            box.value = False
    climb.run()
    climb.wait()
    assert [rung["name"] for rung in climb.outcome["rungs"]] == ["baseline", "channels_last"]


def test_a_prediction_is_fixed_once_it_is_made():
    guess = widgets.Prediction("how many?")
    assert guess.value is None
    guess.box.value = 3.5
    guess.commit()
    assert guess.value == 3.5 and guess.box.disabled


def pixels(png):
    return Image.open(io.BytesIO(png)).tobytes()


def ranks():
    servers = [
        process
        for process in psutil.Process().children()
        if process.status() != psutil.STATUS_ZOMBIE
        and "multiprocessing.forkserver" in " ".join(process.cmdline())
    ]
    return [child for server in servers for child in server.children()]


def test_the_scaling_panel_adds_a_point_for_each_number_of_ranks():
    guess = {2: 1.5}
    board = widgets.ScalingPanel(SHORT.replace(threads=1), ranks=(1, 2), prediction=lambda: guess)
    for count in (2, 1, 2):
        board.controls["replicas"].value = count
        if not board.thread:  # after the first Run, moving the slider runs again
            board.run()
        board.wait()
        assert "a speedup of" in board.status.value, board.status.value
    measured = next(iter(board.points.values()))
    assert sorted(measured) == [1, 2]
    for baseline, own in measured.values():
        assert (
            baseline.recipe.replicas == 1
            and baseline.recipe.strategy is None
            and own.recipe.strategy == "ddp"
        )
        assert len(baseline.images_per_s) == len(own.images_per_s)
    assert [len(own.images_per_s) for _, own in (measured[1], measured[2])] == [1, 2]


def test_weak_scaling_gives_each_rank_its_own_batch_and_has_its_own_curve():
    board = widgets.ScalingPanel(SHORT.replace(threads=1), ranks=(1, 2))
    board.controls["scaling"].value = "weak"
    board.controls["replicas"].value = 2
    board.run()
    board.wait()
    ((setting, measured),) = board.points.items()
    assert dict(setting)["scaling"] == "weak"
    baseline, own = measured[2]
    assert own.recipe.batch_size == 2 * baseline.recipe.batch_size


def test_a_stopped_scaling_run_leaves_no_point():
    board = widgets.ScalingPanel(LONG.replace(evaluate=False), ranks=(2,))
    board.run()
    wait_until(lambda: "step" in board.status.value, "no step was reported", 10)
    board.stop()
    board.wait()
    assert board.status.value.startswith("Stopped.") and not any(board.points.values())
    wait_until(lambda: not ranks(), "a rank is still alive", 10)


def test_the_status_line_warns_of_oversubscription():
    cores = machine.cores()
    board = widgets.TrainingPanel(
        SHORT.replace(replicas=2 * cores, batch_size=16 * cores, threads=1), {"seed": [0]}
    )
    lines = []
    board.status.observe(lambda change: lines.append(change["new"]), "value")
    board.run()
    board.wait()
    assert any(f"{2 * cores} ranks of 1 thread share {cores} core" in line for line in lines)
