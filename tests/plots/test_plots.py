"""Pictures of real events: what is on them, that they can be drawn early, and drawn again."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cnnlab import plots
from cnnlab.events import Evaluated, Failed, Finished, Progress, Started
from cnnlab.measure.compare import Measurement, Speedup
from cnnlab.plots import style
from cnnlab.recipe import Recipe

CURVES = [plots.loss, plots.accuracy, plots.throughput]


@pytest.fixture
def ax():
    figure = Figure(figsize=(6, 3))
    FigureCanvasAgg(figure)
    return figure.subplots()


def render(ax):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba()).copy()


def points(ax):
    return {line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


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


def texts(ax):
    return " ".join(
        text.get_text()
        for text in [
            *ax.texts,
            *ax.get_xticklabels(),
            *ax.get_yticklabels(),
            ax.title,
            *(ax.get_legend().get_texts() if ax.get_legend() else []),
        ]
    )


# Curves


def test_the_loss_has_a_point_for_every_step(ax, short_run):
    plots.loss(ax, {"run": short_run})
    images, losses = points(ax)["0 raw"]
    assert images == [128 * step for step in range(1, 23)]
    assert losses == [
        loss for event in short_run if isinstance(event, Progress) for loss in event.losses
    ]


def test_the_loss_of_ranks_is_their_mean(short_run):
    other = [
        replace(event, rank=1, losses=[loss + 1 for loss in event.losses])
        if isinstance(event, Progress)
        else replace(event, rank=1)
        for event in short_run
    ]
    alone, both = (
        plots.loss_curve(short_run)[1],
        plots.loss_curve([event for pair in zip(short_run, other) for event in pair])[1],
    )
    assert both == pytest.approx([loss + 0.5 for loss in alone])


@pytest.mark.parametrize("guess", [0.5, 3.0, 40.0])
def test_a_prediction_is_in_the_picture(ax, guess):
    plots.scaling_curve(
        ax,
        [1, 2],
        [
            Speedup(value=1.0, low=1.0, high=1.0, baseline="1"),
            Speedup(value=1.8, low=1.7, high=1.9, baseline="1"),
        ],
        prediction={2: guess},
    )
    assert ax.get_ylim()[0] < guess < ax.get_ylim()[1]
    ax.clear()
    plots.speedup_bars(
        ax,
        {
            name: Measurement(name=name, recipe=Recipe(), images_per_s=(100.0, 101.0, 102.0))
            for name in "ab"
        },
        prediction=guess,
    )
    assert ax.get_xlim()[0] < guess * 101 < ax.get_xlim()[1]


def test_the_mean_runs_over_the_last_ten_steps():
    values = list(range(30))
    assert style._running_mean(values)[[0, 1, 9, 29]].tolist() == pytest.approx([0, 0.5, 4.5, 24.5])
    assert len(style._running_mean([])) == 0


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_one_loss_that_is_no_number_spoils_the_running_mean_for_a_window_only(bad):
    means = style._running_mean([1.0] * 5 + [bad] + [1.0] * 20)
    assert (
        not np.isfinite(means[5:15]).any()
        and means[:5].tolist() == [1.0] * 5
        and means[15:].tolist() == [1.0] * 11
    )


def test_accuracy_shows_held_out_images_in_percent(ax, short_run):
    plots.accuracy(ax, {"run": short_run})
    held_out = [event for event in short_run if isinstance(event, Evaluated)]
    assert points(ax)["0 test"] == (
        [128 * 11, 128 * 22],
        [100 * event.accuracy for event in held_out],
    )


def test_throughput_leaves_the_warm_up_out(ax, short_run):
    plots.throughput(ax, {"run": short_run})
    assert points(ax)["0"][1] == [
        event.images_per_s
        for event in short_run
        if isinstance(event, Progress) and not event.warming_up
    ]


@pytest.mark.parametrize("draw", CURVES)
def test_a_curve_can_be_drawn_from_any_beginning_of_a_run(ax, short_run, draw):
    render_at = range(len(short_run) + 1)
    for end in render_at:
        draw(ax, {"run": short_run[:end]})
        render(ax)


@pytest.mark.parametrize("draw", CURVES)
def test_drawing_again_reuses_the_lines_and_equals_drawing_once(short_run, draw):
    pictures = []
    for ends in ([3, 6, len(short_run)], [len(short_run)]):
        figure = Figure(figsize=(6, 3))
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        first = None
        for end in ends:
            draw(ax, {"run": short_run[:end], "other": short_run[: end - 1]})
            first = first or list(ax.lines)
            assert list(ax.lines) == first
        pictures.append((points(ax), render(ax)))
    assert pictures[0][0] == pictures[1][0]
    assert np.array_equal(pictures[0][1], pictures[1][1])


@pytest.mark.parametrize("draw", CURVES)
def test_every_run_has_its_line_and_its_name(ax, short_run, draw):
    draw(ax, {"plain": short_run, "bf16": short_run})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["plain", "bf16"]
    shown = [line for line in ax.lines if line.get_label() in ("plain", "bf16")]
    assert len({line.get_color() for line in shown}) == 2


@pytest.mark.parametrize("draw", [*CURVES, plots.step_breakdown])
def test_nothing_yet_can_be_drawn(ax, draw):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(ax, {})
        draw(ax, {"run": []})
    render(ax)


@pytest.mark.parametrize("draw", CURVES)
def test_a_failed_run_can_be_drawn(ax, short_run, draw):
    draw(ax, {"run": [Failed(rank=0, error="no", traceback="")]})
    draw(ax, {"run": [*short_run[:4], Failed(rank=0, error="no", traceback="")]})
    render(ax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_no_number_can_be_drawn(ax, short_run, bad):
    events = [
        replace(event, losses=[bad] * len(event.losses)) if isinstance(event, Progress) else event
        for event in short_run
    ]
    plots.loss(ax, {"run": events})
    assert np.isfinite(ax.get_ylim()).all()
    render(ax)


def test_x_ends_where_the_longest_run_will(ax, short_run):
    plots.loss(ax, {"run": short_run[:3]})
    assert ax.get_xlim() == (0, 22 * 128)


# Bars


def test_where_time_goes_adds_up_to_a_step(ax, short_run):
    plots.step_breakdown(ax, {"run": short_run})
    end, bars = short_run[-1], points(ax)
    assert isinstance(end, Finished)
    assert bars["compute"][0][:2] == pytest.approx([0, 1000 * end.compute_s])
    assert bars["waiting for data"][0][:2] == pytest.approx(
        [1000 * end.compute_s, 1000 * end.step_s]
    )
    assert "waiting for other ranks" not in bars
    assert [label.get_text() for label in ax.get_yticklabels()] == ["run"]
    render(ax)


def test_where_time_goes_follows_a_run_under_way_and_shows_waiting_for_ranks(ax, short_run):
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
    plots.step_breakdown(ax, {"run": live, "only begun": short_run[:1]})
    bars = points(ax)
    assert bars["compute"][0][:2] == pytest.approx([0, 200]) and bars["waiting for data"][0][
        :2
    ] == pytest.approx([200, 300])
    assert bars["waiting for other ranks"][0][:2] == pytest.approx([300, 600])
    before = render(ax)
    plots.step_breakdown(ax, {"run": short_run})  # the same axes, with the run's end
    assert (
        points(ax)["compute"][0][1] == pytest.approx(1000 * short_run[-1].compute_s)
        and len(ax.lines) == 3
    )
    assert (render(ax) != before).any()


def test_speedups_show_medians_over_the_first(ax):
    plots.speedup_bars(
        ax,
        {"old": measurement("old", 90, 100, 110), "new": measurement("new", 180, 200, 220)},
        prediction=3,
        caveat={"seed": [0, 1]},
    )
    assert [bar.get_width() for bar in ax.patches] == [100, 200]
    assert (
        "(2.00x)" in texts(ax)
        and "not the same work: seed [0, 1]" in texts(ax)
        and "your prediction" in texts(ax)
    )
    assert 300 in [x for line in ax.lines for x in line.get_xdata()]
    render(ax)


def test_the_ladder_shows_what_was_kept_what_lost_and_what_runs(ax):
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
    assert (
        "left out" in texts(ax)
        and "recorded: big box, 64 cores" in texts(ax)
        and "your prediction: 4x" in texts(ax)
    )
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


def test_the_roofline_is_the_lower_of_memory_and_arithmetic(ax):
    plots.roofline(
        ax, {"fp32": 1e12, "bf16": 4e12, "copy": 1e11}, {"conv": (3.0, 2e11)}, precision="bf16"
    )
    x, y = ax.lines[0].get_data()
    assert y == pytest.approx(np.minimum(100 * x, 1000))  # GFLOP/s
    assert ([3.0], [200.0]) in [tuple(map(list, line.get_data())) for line in ax.lines[2:]]
    assert "conv" in texts(ax) and "4,000 GFLOP/s" in texts(ax)
    render(ax)


def test_scaling_shows_the_points_beside_the_law(ax):
    one = Speedup(value=1.0, low=1.0, high=1.0, baseline="1 worker")
    two = Speedup(value=1.6, low=1.5, high=1.7, baseline="1 worker")
    unknown = Speedup(value=2.0, low=0.0, high=float("inf"), baseline="1 worker")
    plots.scaling_curve(ax, [1, 2, 4], [one, two, unknown], serial=0.25, prediction={2: 2.0})
    assert "Amdahl, 25% serial" in texts(ax)
    assert ax.get_ylabel() == "speedup over 1 worker"
    amdahl = next(line for line in ax.lines if "Amdahl" in str(line.get_label()))
    assert amdahl.get_ydata()[-1] == pytest.approx(16 / 7)
    render(ax)


def test_the_run_drawn_here_is_real(short_run):
    assert isinstance(short_run[0], Started) and isinstance(short_run[-1], Finished)


def spans(start):
    """A step of a rank that begins then: 10 ms of waiting, 20 forward, 30 backward with communication beside its end, 5 update."""
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
        for event in (begun(rank, 2), told(rank, 5, [1.0], spans=spans(1e9 + 0.001 * rank)))
    ]
    plots.rank_timeline(ax, {"now": events})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    for line in ax.lines:
        x = np.array(line.get_xdata(), float).reshape(-1, 3)
        begin, end = next((b, e) for phase, b, e in spans(0.0) if phase == line.get_gid())
        np.testing.assert_allclose(x[:, 1] - x[:, 0], 1000 * (end - begin), atol=1e-3)
        assert len(x) == 2
    plots.rank_timeline(ax, {"now": events})  # again, on the same axes: only points move
    assert len(ax.lines) == len(plots.PHASES)


def test_steps_that_are_trained_again_after_a_restart_count_once():
    batch = 10
    events = [
        begun(0, 1, batch=batch),
        told(0, 3, [3.0, 2.0, 1.0], batch=batch),
        begun(0, 1, batch=batch, first=2),
        told(0, 4, [0.5, 0.4], batch=batch),
    ]
    images, losses = plots.loss_curve(events)
    assert list(losses) == [3.0, 2.0, 0.5, 0.4] and list(images) == [10, 20, 30, 40]
    seconds, _ = plots.loss_curve(events, "seconds")
    assert all(later > earlier for earlier, later in zip(seconds, seconds[1:]))


def begun(rank, world, batch=10, first=0):
    from cnnlab.recipe import Recipe

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


def told(rank, step, losses, batch=10, spans=()):
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
