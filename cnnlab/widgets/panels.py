"""The panels of the lessons: training, scaling over ranks, and the ladder."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets

from cnnlab import machine
from cnnlab.events import Event
from cnnlab.launch import launcher
from cnnlab.measure.compare import Measurement, slowest_rank, speedup
from cnnlab.measure.ladder import Rung, climb, ladder_result, techniques
from cnnlab.measure.scaling import amdahl, fit_serial_fraction, gustafson
from cnnlab.plots import accuracy, ladder_bars, loss, rank_timeline, scaling_curve, step_breakdown
from cnnlab.recipe import Recipe
from cnnlab.widgets.board import Panel, slider
from cnnlab.widgets.picture import Picture
from cnnlab.widgets.status import oversubscription_note, plural, simulated_note, status_line

EARLIER_RUNS = 4  # that stay on the plot for comparison
BASELINE = "one rank without DDP"

Vary = Mapping[str, Sequence[Any]]  # fields of the recipe, and the values of their sliders


def _sliders(base, vary):
    return {name: slider(name, values, getattr(base, name)) for name, values in vary.items()}


def _shorten_labels(runs):
    """The runs, labeled only by the values that differ between them."""
    words = [label.split(", ") for label in runs]
    common = set.intersection(*map(set, words)) if len(runs) > 1 else set()
    labels = [", ".join(word for word in label if word not in common) for label in words]
    return dict(zip(labels, runs.values(), strict=True))


class TrainingPanel(Panel):
    """A panel that trains `base` with some fields changed by sliders, and draws the runs live.

    `draw` has a plot function for each axes. `.recipe` is what Run would train now, `.runs` the
    events of the latest runs by label.
    """

    def __init__(self, base: Recipe, vary: Vary, draw: Sequence[Callable] = (loss, accuracy)):
        self.base = base
        self.plots = draw
        self.runs: dict[str, list[Event]] = {}
        self.events: list[Event] = []
        picture = Picture(len(draw))
        if step_breakdown in draw:  # its rows need room for their labels
            picture = Picture(len(draw), (9.4, 3.1))
            picture.figure.subplots_adjust(wspace=0.42)
        controls = _sliders(base, vary)
        super().__init__(controls, self._work, self._take, self._draw, picture, explains=True)

    @property
    def recipe(self) -> Recipe:
        return self.base.replace(**self.values)

    def _work(self, values, stop):
        recipe = self.base.replace(**values)
        label = ", ".join(f"{name}={value}" for name, value in values.items()) or "unchanged"
        earlier = [run for run in self.runs.items() if run[0] != label]
        self.events = []
        self.runs = dict([*earlier[-EARLIER_RUNS:], (label, self.events)])
        before = [item for item in self.compared.items() if item[0] != label]
        self.compared = dict([*before[-1:], (label, recipe)])
        yield from launcher.run(recipe, stop)

    def _take(self, event):
        self.events.append(event)
        return status_line(event, self.events)

    def _draw(self, axes):
        runs = _shorten_labels(self.runs)
        for draw, ax in zip(self.plots, axes, strict=True):
            draw(ax, runs)


class ScalingPanel(Panel):
    """A slider for the number of ranks, and a switch between strong and weak scaling.

    Strong scaling splits one batch over the ranks; weak scaling gives each rank its own batch. Run
    trains `base` with DDP on that many ranks and then, interleaved with it, the baseline: one rank
    without DDP. Their ratio is a point of the curve; another Run of the same setting is a repeat.
    `prediction()` returns {ranks: speedup} or None. `.points` is {setting of the other controls:
    {ranks: (baseline, measured)}}.
    """

    def __init__(
        self,
        base: Recipe,
        ranks: Sequence[int] = (1, 2, 4),
        vary: Vary | None = None,
        prediction: Callable[[], Mapping[int, float] | None] = lambda: None,
    ) -> None:
        self.base = base
        self.prediction = prediction
        self.points: dict[tuple, dict[int, tuple[Measurement, Measurement]]] = {}
        self.setting: tuple = (("scaling", "strong"),)
        self.shown = base  # the recipe whose figures are shown
        self.events: list[Event] = []
        self.label = ""
        scaling = widgets.ToggleButtons(options=["strong", "weak"], layout={"width": "260px"})
        scaling.style.button_width = "100px"
        replicas = slider("replicas", ranks, ranks[min(1, len(ranks) - 1)])
        controls = {"replicas": replicas, "scaling": scaling, **_sliders(base, vary or {})}
        picture = Picture(2, (9.4, 3.4))
        picture.figure.subplots_adjust(wspace=0.23, top=0.91, bottom=0.15)
        super().__init__(controls, self._work, self._take, self._draw, picture, explains=True)

    def _work(self, values, stop):
        """Run the ranks, then the baseline; only if both finish they become a repeat."""
        ranks = values.pop("replicas")
        self.setting = tuple(values.items())
        if values.pop("scaling") == "weak":
            values["batch_size"] = ranks * self.base.batch_size
        strategy = self.base.strategy or "ddp"
        recipe = self.base.replace(replicas=ranks, strategy=strategy, **values)
        baseline = self.base.replace(replicas=1, strategy=None)
        self.shown = recipe
        label = f"{plural(ranks, 'rank')} with DDP"
        self.compared = {BASELINE: baseline, label: recipe}
        ours = yield from self._run(label, recipe, stop)
        if ours is None:
            return
        events = self.events
        reference = yield from self._run(BASELINE, baseline, stop)
        if reference is None:
            return
        points = self.points.setdefault(self.setting, {})
        new = (Measurement(name=BASELINE, recipe=baseline), Measurement(name=label, recipe=recipe))
        before = points.get(ranks, new)
        points[ranks] = (before[0].add(reference), before[1].add(ours))
        self.events = events  # of the ranks: their timeline stays in the picture
        self.label = label
        yield 1.0, self._result(ours, reference)

    def _run(self, label, recipe, stop):
        """Yield the events of a run. Returns the figures of its slowest rank; None if stopped."""
        self.label = label
        self.events = []
        for event in launcher.run(recipe, stop):
            self.events.append(event)
            yield event
        return slowest_rank(self.events, recipe.ranks)

    def _take(self, event):
        if isinstance(event, tuple):  # the result of both runs
            return event
        progress = status_line(event, self.events)
        if progress is None:
            return None
        fraction, line = progress
        done = 0.5 if self.label == BASELINE else 0.0
        return done + fraction / 2, f"{self.label}: {line}"

    def _result(self, ours, baseline):
        gain = ours.images_per_s / baseline.images_per_s
        line = (
            f"{self.label}: {ours.images_per_s:,.0f} images/s, a speedup of <b>{gain:.2f}</b> "
            f"over {BASELINE} ({baseline.images_per_s:,.0f})"
        )
        if ours.communication_s is not None:
            line += f"; {ours.communication_s / ours.step_s:.0%} of a step is exposed communication"
        line += oversubscription_note(self.shown.ranks, self.shown.threads)
        return line + simulated_note(self.shown)

    def _draw(self, axes):
        timeline, ax = axes
        rank_timeline(timeline, {self.label: self.events})
        weak = dict(self.setting)["scaling"] == "weak"
        law = gustafson if weak else amdahl
        points = sorted(self.points.get(self.setting, {}).items())
        speedups = {ranks: speedup(*pair) for ranks, pair in points}
        # The laws do not know oversubscription: fit only ranks that have a core for each thread.
        most = machine.cores() // (self.shown.threads or 1)
        fitted = {ranks: found.value for ranks, found in speedups.items() if ranks <= most}
        serial = None
        if max(fitted, default=1) > 1:
            serial = fit_serial_fraction(list(fitted), list(fitted.values()), law)
        choices = self.controls["replicas"].options
        measured = list(speedups.values())
        guess = self.prediction()
        scaling_curve(ax, list(speedups), measured, serial, guess, law, until=max(choices))
        title = "weak scaling: one batch per rank" if weak else "strong scaling: one batch, split"
        ax.set_title(title + simulated_note(self.shown), fontsize=10)
        ax.set(xlabel="ranks", xticks=choices, xlim=(0.5, max(choices) + 0.5))
        ax.set_ylabel(f"speedup over {BASELINE}")


class LadderPanel(Panel):
    """A panel that climbs the ladder: choose the rungs, press Run, and the bars grow.

    `.rungs` is {name: Rung} so far, `.outcome` the whole ladder as in JSON once it is finished.
    `prediction()` returns the learner's best speedup or None; `recorded` is the ladder of another
    machine.
    """

    def __init__(
        self,
        base: Recipe,
        repeats: int = 3,
        prediction: Callable[[], float | None] = lambda: None,
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        self.base = base
        self.prediction = prediction
        self.recorded = recorded
        self.rungs: dict[str, Rung] = {}
        self.outcome: dict[str, Any] | None = None
        self.possible, self.impossible = techniques(machine.describe())
        options: Any = {"value": True, "indent": False, "layout": {"width": "190px"}}
        controls = {name: widgets.Checkbox(description=name, **options) for name in self.possible}
        options = {"description": "repeats", "continuous_update": False}
        controls["repeats"] = widgets.IntSlider(repeats, 2, 10, **options)
        picture = Picture(1, (8.8, 4.2))
        picture.figure.subplots_adjust(left=0.25, bottom=0.13, top=0.97)
        missing = html.escape("; ".join(f"no {name}" for name in self.impossible))
        hint = f"Choose rungs, then press Run. {missing}"
        super().__init__(controls, self._work, self._take, self._draw, picture, False, hint)

    def _work(self, values, stop):
        self.rungs = {}
        self.outcome = None
        chosen = {name: change for name, change in self.possible.items() if values[name]}
        for rung in climb(self.base, chosen, values["repeats"], stop):
            self.rungs[rung.name] = rung
            done = sum(rung.kept is not None for rung in self.rungs.values())
            yield done / (1 + len(chosen)), rung
        if not stop.is_set():
            self.outcome = ladder_result(self.rungs.values(), self.impossible)

    def _take(self, event):
        fraction, rung = event
        state = f"run {len(rung.measurement.images_per_s) + 1}" if rung.kept is None else "done"
        return fraction, f"{rung.name}: {state}"

    def _draw(self, axes):
        rungs = list(self.rungs.values())
        measured = [r.to_dict() for r in rungs if r.measurement.images_per_s and not r.failed]
        running = next((rung.name for rung in rungs if rung.kept is None), None)
        ladder_bars(axes[0], measured, self.prediction(), self.recorded, running)
