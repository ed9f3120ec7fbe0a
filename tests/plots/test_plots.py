"""Plots of real events: what they show, at every moment of a run."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from helpers import points, render, texts

from cnnlab import plots
from cnnlab.events import Evaluated, Failed, Finished, Progress, Started
from cnnlab.measure.compare import Measurement, Speedup
from cnnlab.plots import style
from cnnlab.recipe import Recipe

CURVES = [plots.loss, plots.accuracy, plots.throughput]


def bars(ax):
    """{label: (left, right) of each bar}."""
    return {
        container.get_label(): [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in container]
        for container in ax.containers
    }


def measurement(name, *rates):
    return Measurement(name=name, recipe=Recipe(), images_per_s=rates)


def rung(name, speedup=1.0, kept=True, ci=None):
    ci = ci or [0.9 * speedup, 1.1 * speedup]
    return {
        "name": name,
        "speedup": speedup,
        "speedup_ci": ci,
        "over_below": speedup,
        "over_below_ci": ci,
        "below": "baseline",
        "kept": kept,
    }


# Curves


def test_the_loss_has_a_point_for_every_step(ax, short_run):
    plots.loss(ax, {"run": short_run})
    images, losses = points(ax.lines[0])
    assert images == [128 * step for step in range(1, 23)]
    assert losses == [
        loss for event in short_run if isinstance(event, Progress) for loss in event.losses
    ]


def test_the_loss_of_several_ranks_is_their_mean(short_run):
    both = []
    for event in short_run:
        if isinstance(event, Started):
            event = replace(event, world=2)
        other = replace(event, rank=1)
        if isinstance(event, Progress):
            other = replace(other, losses=[loss + 1 for loss in event.losses])
        both += [event, other]
    _, alone = plots.loss_curve(short_run)
    _, mean = plots.loss_curve(both)
    assert len(alone) == 22 and mean == pytest.approx(alone + 0.5)


@pytest.mark.parametrize("guess", [0.5, 3.0, 40.0])
def test_a_prediction_lies_within_the_axes(ax, guess):
    measured = [
        Speedup(value=1.0, low=1.0, high=1.0, baseline="1"),
        Speedup(value=1.8, low=1.7, high=1.9, baseline="1"),
    ]
    plots.scaling_curve(ax, [1, 2], measured, prediction={2: guess})
    assert ax.get_ylim()[0] < guess < ax.get_ylim()[1]
    ax.clear()
    both = {name: measurement(name, 100.0, 101.0, 102.0) for name in "ab"}
    plots.speedup_bars(ax, both, prediction=guess)
    assert ax.get_xlim()[0] < guess * 101 < ax.get_xlim()[1]


def test_speedup_bars_say_what_one_run_and_small_differences_prove(ax):
    plots.speedup_bars(ax, {"old": measurement("old", 100.0), "new": measurement("new", 30.0)})
    assert "(0.30x, one run)" in texts(ax)
    ax.clear()
    same = {name: measurement(name, *rates) for name, rates in (("a", (9, 10)), ("b", (10, 9)))}
    plots.speedup_bars(ax, same)
    assert "no significant difference" in texts(ax)


def test_the_running_mean_covers_the_last_ten_steps():
    means = style.running_mean(list(range(30)))
    assert means[[0, 1, 9, 29]].tolist() == pytest.approx([0, 0.5, 4.5, 24.5])
    assert len(style.running_mean([])) == 0


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_loss_that_is_not_finite_affects_the_running_mean_for_one_window_only(bad):
    means = style.running_mean([1.0] * 5 + [bad] + [1.0] * 20)
    assert not np.isfinite(means[5:15]).any()
    assert means[:5].tolist() == [1.0] * 5
    assert means[15:].tolist() == [1.0] * 11


@pytest.mark.parametrize("value", [0.0004, 0.9, 1.0, 2.6, 49.0, 7_200.0])
def test_limits_are_rounded_up_to_a_few_values(value):
    limit = style.round_up(value)
    assert value <= limit <= 1.6 * value
    assert style.round_up(limit) == pytest.approx(limit)
    assert f"{limit:.1e}"[:3] in ("1.0", "1.5", "2.0", "3.0", "5.0", "7.0")


def test_accuracy_shows_held_out_images_in_percent(ax, short_run):
    plots.accuracy(ax, {"run": short_run})
    held_out = [event for event in short_run if isinstance(event, Evaluated)]
    training, points_held_out = ax.lines
    percent = [100 * event.accuracy for event in held_out]
    assert points(points_held_out) == ([128 * 11, 128 * 22], percent)
    assert len(points(training)[0]) > 2


def test_throughput_leaves_the_warm_up_out(ax, short_run):
    plots.throughput(ax, {"run": short_run})
    assert points(ax.lines[0])[1] == [
        event.images_per_s
        for event in short_run
        if isinstance(event, Progress) and not event.warming_up
    ]


@pytest.mark.parametrize("draw", CURVES)
def test_a_run_can_be_drawn_after_every_event(ax, short_run, draw):
    for end in range(len(short_run) + 1):
        ax.clear()
        draw(ax, {"run": short_run[:end]})
        render(ax)


@pytest.mark.parametrize("draw", [*CURVES, plots.rank_timeline, plots.step_breakdown])
def test_an_earlier_frame_leaves_no_trace(ax, short_run, draw):
    runs = {"run": short_run, "other": short_run[:-1]}
    draw(ax, runs)
    once = render(ax)
    for end in (1, 3):
        ax.clear()
        draw(ax, {"run": short_run[:end]})
        assert not np.array_equal(render(ax), once)
    ax.clear()
    draw(ax, runs)
    assert np.array_equal(render(ax), once)


@pytest.mark.parametrize("draw", [plots.loss, plots.accuracy])
def test_the_axes_stay_the_same_while_a_run_grows(ax, short_run, draw):
    limits = set()
    for end in range(2, len(short_run) + 1):
        ax.clear()
        draw(ax, {"run": short_run[:end]})
        limits.add((ax.get_xlim(), ax.get_ylim()))
    assert len(limits) <= 2


@pytest.mark.parametrize("draw", CURVES)
def test_every_run_has_its_line_and_its_name(ax, short_run, draw):
    draw(ax, {"plain": short_run, "bf16": short_run})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["plain", "bf16"]
    shown = [line for line in ax.lines if line.get_label() in ("plain", "bf16")]
    assert len({line.get_color() for line in shown}) == 2


@pytest.mark.parametrize("draw", [*CURVES, plots.rank_timeline, plots.step_breakdown])
@pytest.mark.parametrize("runs", [{}, {"run": []}], ids=str)
def test_runs_without_events_can_be_drawn(ax, draw, runs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(ax, runs)
    render(ax)


@pytest.mark.parametrize("draw", CURVES)
def test_a_failed_run_can_be_drawn(ax, short_run, draw):
    failed = Failed(rank=0, error="no", traceback="")
    for events in ([failed], [*short_run[:4], failed]):
        ax.clear()
        draw(ax, {"run": events})
        render(ax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_can_be_drawn(ax, short_run, bad):
    events = [
        replace(event, losses=[bad] * len(event.losses)) if isinstance(event, Progress) else event
        for event in short_run
    ]
    plots.loss(ax, {"run": events})
    assert np.isfinite(ax.get_ylim()).all()
    render(ax)


def test_the_x_axis_ends_where_the_longest_run_will(ax, short_run):
    plots.loss(ax, {"run": short_run[:3]})
    assert ax.get_xlim() == (0, 22 * 128)


# Bars


def test_the_parts_of_a_step_add_up(ax, short_run):
    plots.step_breakdown(ax, {"run": short_run})
    end = short_run[-1]
    assert isinstance(end, Finished)
    compute, step = 1000 * end.compute_s, 1000 * end.step_s
    assert list(bars(ax)) == ["compute", "waiting for data"]
    assert bars(ax)["compute"] == [pytest.approx((0, compute))]
    assert bars(ax)["waiting for data"] == [pytest.approx((compute, step))]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["run"]
    render(ax)


def test_the_parts_of_a_step_follow_a_run_in_progress(ax, short_run):
    spans = [
        ["waiting", 10.0, 10.1],
        ["forward", 10.1, 10.2],
        ["exposed", 10.2, 10.5],
        ["update", 10.5, 10.6],
    ]
    live = [
        replace(event, spans=2 * spans) if isinstance(event, Progress) else event
        for event in short_run[:-2]
    ]
    plots.step_breakdown(ax, {"run": live, "only started": short_run[:1]})
    assert bars(ax)["compute"] == [pytest.approx((0, 200))]
    assert bars(ax)["waiting for data"] == [pytest.approx((200, 300))]
    assert bars(ax)["exposed communication"] == [pytest.approx((300, 600))]
    render(ax)


def test_speedups_are_ratios_of_medians_to_the_first(ax):
    plots.speedup_bars(
        ax,
        {"old": measurement("old", 90, 100, 110), "new": measurement("new", 180, 200, 220)},
        prediction=3,
    )
    assert [bar.get_width() for bar in ax.patches] == [100, 200]
    assert "(2.00x)" in texts(ax)
    assert "your prediction" in texts(ax)
    assert 300 in [x for line in ax.lines for x in line.get_xdata()]
    render(ax)


def test_the_ladder_shows_which_rungs_were_kept_rejected_and_are_running(ax):
    rungs = [
        rung("baseline"),
        rung("threads", 2.0),
        rung("bf16", 0.5, kept=False),
        rung("compile", 1.0, kept=None, ci=[0.0, float("inf")]),
    ]
    recorded = {
        "machine": {"name": "big box", "cores": 64, "gpus": []},
        "recipe": {"batch_size": 32},
        "rungs": [rung("threads", 9.0), rung("GPU", 50.0)],
    }
    plots.ladder_bars(ax, rungs, prediction=4, recorded=recorded, running="replicas")
    assert [bar.get_width() for bar in ax.patches] == [1, 2, 0.5, 1]
    assert len({bar.get_facecolor() for bar in ax.patches}) == 3
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "baseline",
        "threads",
        "bf16",
        "compile",
        "replicas",
        "GPU",
    ]
    assert "0.50x  slower: not kept" in texts(ax)
    assert "recorded: big box, 64 cores" in texts(ax)
    assert "your prediction: 4x" in texts(ax)
    assert ax.get_xlim()[1] > 50
    render(ax)


@pytest.mark.parametrize(
    "rungs, options",
    [
        ([], {}),
        ([], {"running": "baseline"}),
        ([rung("baseline")], {}),
        (
            [rung("baseline")],
            {
                "recorded": {
                    "machine": {"name": "x", "cores": 1, "gpus": []},
                    "recipe": {"batch_size": 32},
                    "rungs": [],
                }
            },
        ),
    ],
    ids=str,
)
def test_an_early_ladder_can_be_drawn(ax, rungs, options):
    plots.ladder_bars(ax, rungs, **options)
    render(ax)


# Laws


def test_the_roofline_is_the_lower_of_bandwidth_and_peak(ax):
    plots.roofline(ax, {"fp32": 1e12, "bf16": 4e12, "copy": 1e11}, {"conv": (3.0, 2e11)})
    x, y = ax.lines[0].get_data()
    assert y == pytest.approx(np.minimum(100 * x, 1000))  # GFLOP/s
    assert ([3.0], [200.0]) in [tuple(map(list, line.get_data())) for line in ax.lines[2:]]
    assert "conv" in texts(ax) and "4,000 GFLOP/s" in texts(ax)
    render(ax)


def test_the_scaling_curve_shows_points_and_law(ax):
    one = Speedup(value=1.0, low=1.0, high=1.0, baseline="1 worker")
    two = Speedup(value=1.6, low=1.5, high=1.7, baseline="1 worker")
    unknown = Speedup(value=2.0, low=0.0, high=float("inf"), baseline="1 worker")
    plots.scaling_curve(ax, [1, 2, 4], [one, two, unknown], serial=0.25, prediction={2: 2.0})
    assert "Amdahl, 25% serial" in texts(ax)
    assert ax.get_ylabel() == "speedup over 1 worker"
    amdahl = next(line for line in ax.lines if "Amdahl" in str(line.get_label()))
    assert amdahl.get_ydata()[-1] == pytest.approx(16 / 7)
    render(ax)


def spans(start):
    """A step of a rank: 10 ms waiting, 20 forward, 30 backward with communication, 5 update."""
    edges = [
        ("waiting", 0, 10),
        ("forward", 10, 30),
        ("backward", 30, 60),
        ("communication", 45, 58),
        ("exposed", 58, 60),
        ("update", 60, 65),
    ]
    return [[phase, start + begin / 1000, start + end / 1000] for phase, begin, end in edges]


def test_the_timeline_has_a_row_for_each_rank_and_a_bar_for_each_span(ax):
    events = [
        event
        for rank in (0, 1)
        for event in (started(rank, 2), progress(rank, 5, [1.0], spans=spans(1e9 + 0.001 * rank)))
    ]
    plots.rank_timeline(ax, {"now": events})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    assert len(ax.collections) == len(plots.PHASES)
    for phase, lines in zip(plots.PHASES, ax.collections, strict=True):
        segments = np.array(lines.get_segments())
        begin, end = next((b, e) for name, b, e in spans(0.0) if name == phase)
        assert len(segments) == 2
        widths = segments[:, 1, 0] - segments[:, 0, 0]
        np.testing.assert_allclose(widths, 1000 * (end - begin), atol=1e-3)
    render(ax)


def test_steps_that_are_trained_again_after_a_restart_count_once():
    batch = 10
    events = [
        started(0, 1, batch=batch),
        progress(0, 3, [3.0, 2.0, 1.0], batch=batch),
        started(0, 1, batch=batch, first=2),
        progress(0, 4, [0.5, 0.4], batch=batch),
    ]
    images, losses = plots.loss_curve(events)
    assert list(losses) == [3.0, 2.0, 0.5, 0.4] and list(images) == [10, 20, 30, 40]
    seconds, _ = plots.loss_curve(events, "seconds")
    assert (np.diff(seconds) > 0).all()


def started(rank, world, batch=10, first=0):
    return Started(
        rank=rank,
        world=world,
        recipe=Recipe(batch_size=batch, replicas=world),
        pid=1,
        parameters=1,
        train_images=100,
        test_images=10,
        steps=10,
        first_step=first,
        threads=1,
        cores=None,
    )


def progress(rank, step, losses, batch=10, spans=()):
    return Progress(
        rank=rank,
        epoch=1,
        step=step,
        images=step * batch,
        seconds=step / 10,
        losses=losses,
        accuracy=0.5,
        images_per_s=100.0,
        warming_up=False,
        spans=list(spans),
    )
