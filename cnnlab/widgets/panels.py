"""The panels of the lessons: training, scaling over ranks, and the ladder."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets

from cnnlab import machine
from cnnlab.events import Event, Finished, Progress, Started
from cnnlab.launch import launcher
from cnnlab.measure.compare import Measurement, slowest_rank, speedup
from cnnlab.measure.ladder import climb, ladder_result, techniques
from cnnlab.measure.scaling import amdahl, fit_serial_fraction, gustafson
from cnnlab.plots.runs import accuracy, loss
from cnnlab.plots.scaling import scaling_curve
from cnnlab.plots.speed import ladder_bars
from cnnlab.plots.timeline import rank_timeline, step_breakdown
from cnnlab.recipe import Recipe
from cnnlab.widgets.board import Panel, slider
from cnnlab.widgets.picture import Picture

EARLIER_RUNS = 4  # that stay on the plot for comparison
BASELINE = "one rank without DDP"


def status_line(event: Event, events: Sequence[Event]) -> tuple[float, str] | None:
    """(fraction done, status line) of an event, given the run's events; None if it has no news."""
    if isinstance(event, Progress):
        started = next(e for e in events if isinstance(e, Started))
        line = (
            f"step {event.step} of {started.steps}, epoch {event.epoch}: "
            f"loss {event.losses[-1]:.3f}, {event.images_per_s:,.0f} images/s"
        )
        line += oversubscription_note(started.world, started.threads)
        return event.step / started.steps, line + simulated_note(started.recipe)
    if isinstance(event, Finished):
        rate = f"{event.images_per_s:,.0f} images/s"
        line = f"{event.images:,} images in {event.seconds:.1f} s: {rate}"
        if event.accuracy is not None:
            line += f", held-out accuracy {100 * event.accuracy:.1f}%"
        return 1.0, line
    return None


def simulated_note(recipe: Recipe) -> str:
    """A warning for figures that a simulated network has slowed down; empty for others."""
    if recipe.latency_ms or recipe.bandwidth_mbit:
        return ", SIMULATED network"
    return ""


def oversubscription_note(ranks: int, threads: int | None) -> str:
    """A note for ranks that have fewer cores than threads; empty for others."""
    cores = machine.cores()
    threads = threads or 1
    if ranks == 1 or ranks * threads <= cores:
        return ""
    return f" &ndash; {ranks} ranks of {_plural(threads, 'thread')} share {_plural(cores, 'core')}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _shorten_labels(runs: Mapping[str, list[Event]]) -> dict[str, list[Event]]:
    """The runs, labeled only by the values that differ between them."""
    if len(runs) < 2:
        return dict(runs)
    words = {label: label.split(", ") for label in runs}
    common = set.intersection(*(set(parts) for parts in words.values()))
    return {
        ", ".join(word for word in words[label] if word not in common): events
        for label, events in runs.items()
    }


class TrainingPanel(Panel):
    """A panel that trains `base` with some fields changed by sliders, and draws the runs live.

    `vary` is {field of the recipe: its values}; each field gets a slider. `draw` has a plot
    function for each axes. `.recipe` is what Run would train now, `.runs` the events of the latest
    runs by label.
    """

    def __init__(
        self,
        base: Recipe,
        vary: Mapping[str, Sequence[Any]],
        draw: Sequence[Callable] = (loss, accuracy),
        **options: Any,
    ) -> None:
        self.base = base
        self.plots = draw
        self.runs: dict[str, list[Event]] = {}
        self.events: list[Event] = []
        sliders = {name: slider(name, values, getattr(base, name)) for name, values in vary.items()}
        picture = Picture(len(draw))
        if step_breakdown in draw:  # its rows need room for their labels
            picture = Picture(len(draw), (9.4, 3.1))
            picture.figure.subplots_adjust(wspace=0.42)
        super().__init__(
            sliders, self._work, self._take, self._draw, picture, explains=True, **options
        )

    @property
    def recipe(self) -> Recipe:
        return self.base.replace(**self.values)

    def _work(self, values, stop):
        recipe = self.base.replace(**values)
        label = ", ".join(f"{name}={value}" for name, value in values.items()) or "unchanged"
        earlier = {name: events for name, events in self.runs.items() if name != label}
        self.events = []
        self.runs = {**dict(list(earlier.items())[-EARLIER_RUNS:]), label: self.events}
        others = [other for other in self.compared if other != recipe]
        self.compared = [*others[-1:], recipe]  # Why compares with the run before
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
    trains `base` with DDP on that many ranks, and then the baseline again, because the machine may
    have changed meanwhile: one rank without DDP. The ratio is a point of the curve; running the
    same setting again adds a repeat. `vary` is {field of the recipe: its values}, a slider each.
    `prediction()` returns {ranks: speedup} or None. `.points` is {(scaling and values of `vary`):
    {ranks: (baseline, measurement)}}.
    """

    def __init__(
        self,
        base: Recipe,
        ranks: Sequence[int] = (1, 2, 4),
        vary: Mapping[str, Sequence[Any]] | None = None,
        prediction: Callable[[], Mapping[int, float] | None] = lambda: None,
    ) -> None:
        self.base = base
        self.prediction = prediction
        self.points: dict[tuple, dict[int, tuple[Measurement, Measurement]]] = {}
        self.setting: tuple = (("scaling", "strong"),)
        self.shown = base  # the recipe whose figures are shown
        self.events: list[Event] = []
        self.label = ""
        controls = {
            "replicas": slider("replicas", ranks, ranks[min(1, len(ranks) - 1)]),
            "scaling": widgets.ToggleButtons(options=["strong", "weak"], layout={"width": "260px"}),
        }
        controls["scaling"].style.button_width = "100px"
        for name, values in (vary or {}).items():
            controls[name] = slider(name, values, getattr(base, name))
        picture = Picture(2, (9.4, 3.4))
        picture.figure.subplots_adjust(wspace=0.23, top=0.91, bottom=0.15)
        super().__init__(controls, self._work, self._take, self._draw, picture, explains=True)

    def _work(self, values, stop):
        """Run the ranks, then the baseline; only if both finish they become a repeat."""
        ranks = values.pop("replicas")
        self.setting = tuple(values.items())
        weak = values.pop("scaling") == "weak"
        baseline = self.base.replace(replicas=1, strategy=None)
        recipe = self.base.replace(
            replicas=ranks,
            strategy=self.base.strategy or "ddp",
            batch_size=self.base.batch_size * (ranks if weak else 1),
            **values,
        )
        self.shown = self.base.replace(**values)
        self.compared = [baseline, recipe]
        label = f"{_plural(ranks, 'rank')} with DDP"
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
        yield ours, reference

    def _run(self, label, recipe, stop):
        """Yield the events of a run. Returns the figures of its slowest rank; None if stopped."""
        self.label = label
        self.events = []
        finished = []
        for event in launcher.run(recipe, stop):
            if isinstance(event, Finished):
                finished.append(event)
            yield event
        if len(finished) < recipe.replicas:
            return None
        return slowest_rank(finished)

    def _take(self, event):
        if isinstance(event, tuple):  # both runs have finished
            return 1.0, self._result(*event)
        self.events.append(event)
        progress = status_line(event, self.events)
        if progress is None:
            return None
        fraction, line = progress
        done = 0.5 if self.label == BASELINE else 0.0
        return done + fraction / 2, f"{self.label}: {line}"

    def _result(self, ours, baseline):
        gain = ours.images_per_s / baseline.images_per_s
        ranks = len({event.rank for event in self.events})
        line = (
            f"{self.label}: {ours.images_per_s:,.0f} images/s, a speedup of <b>{gain:.2f}</b> "
            f"over {BASELINE} ({baseline.images_per_s:,.0f})"
        )
        if ours.communication_s is not None:
            share = ours.communication_s / ours.step_s
            line += f"; {share:.0%} of a step is exposed communication"
        return line + oversubscription_note(ranks, self.base.threads) + simulated_note(self.shown)

    def _draw(self, axes):
        rank_timeline(axes[0], {self.label: self.events})
        self._draw_curve(axes[1])

    def _draw_curve(self, ax):
        weak = dict(self.setting)["scaling"] == "weak"
        law = gustafson if weak else amdahl
        points = dict(self.points.get(self.setting, {}))
        workers = sorted(points)
        measured = [speedup(*points[n]) for n in workers]
        # The laws do not know oversubscription: fit only ranks that have a core for each thread.
        cores = machine.cores() // (self.base.threads or 1)
        fitted = {n: s.value for n, s in zip(workers, measured, strict=True) if n <= cores}
        serial = None
        if max(fitted, default=1) > 1:
            serial = fit_serial_fraction(list(fitted), list(fitted.values()), law)
        scaling_curve(ax, workers, measured, serial, self.prediction(), law)
        ax.set_xlabel("ranks")
        ax.set_ylabel(f"speedup over {BASELINE}")
        title = "weak scaling: one batch per rank" if weak else "strong scaling: one batch, split"
        ax.set_title(title + simulated_note(self.shown), fontsize=10)
        ranks = self.controls["replicas"].options
        ax.set_xticks(ranks)
        ax.set_xlim(0.5, max(ranks) + 0.5)


class LadderPanel(Panel):
    """A panel that climbs the ladder: choose the rungs, press Run, and the bars grow.

    `.rungs` are those measured so far, as in JSON, and `.outcome` is the whole ladder once it is
    finished. `prediction()` returns the learner's best speedup or None; `recorded` is the ladder of
    another machine.
    """

    def __init__(
        self,
        base: Recipe,
        repeats: int = 3,
        seconds: float = 4.0,
        prediction: Callable[[], float | None] = lambda: None,
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        self.base = base
        self.seconds = seconds
        self.prediction = prediction
        self.recorded = recorded
        self.rungs: list[dict[str, Any]] = []
        self.running: str | None = None
        self.outcome: dict[str, Any] | None = None
        self.possible, self.impossible = techniques(machine.describe())
        controls: dict[str, Any] = {
            name: widgets.Checkbox(
                value=True, description=name, indent=False, layout={"width": "190px"}
            )
            for name in self.possible
        }
        controls["repeats"] = widgets.IntSlider(
            value=repeats, min=2, max=10, description="repeats", continuous_update=False
        )
        picture = Picture(1, (8.8, 4.2))
        picture.figure.subplots_adjust(left=0.25, bottom=0.13, top=0.97)
        hint = "Choose rungs, then press Run."
        if self.impossible:
            hint += f" Not possible here: {html.escape(', '.join(self.impossible))}."
        super().__init__(
            controls, self._work, self._take, self._draw, picture, follow=False, hint=hint
        )

    def _work(self, values, stop):
        self.rungs = []
        self.outcome = None
        chosen = {name: change for name, change in self.possible.items() if values[name]}
        self.total = len(chosen)
        self.done = 0
        climbed = {}
        for rung in climb(self.base, chosen, values["repeats"], self.seconds, stop):
            climbed[rung.name] = rung
            yield rung
        if not stop.is_set():
            self.outcome = ladder_result(climbed.values(), self.impossible)

    def _take(self, rung):
        measuring = rung.kept is None
        self.running = rung.name if measuring else None
        if rung.measurement.images_per_s and not rung.failed:
            rows = {row["name"]: row for row in self.rungs}
            self.rungs = list({**rows, rung.name: rung.to_dict()}.values())
        if measuring:
            state = f"run {len(rung.measurement.images_per_s) + 1}"
        else:
            state = "done"
            self.done += rung.name != "baseline"
        return self.done / max(1, self.total), f"{rung.name}: {state}"

    def _draw(self, axes):
        ladder_bars(axes[0], self.rungs, self.prediction(), self.recorded, self.running)
