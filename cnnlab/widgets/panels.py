"""Panels: controls that make a recipe, and what comes of it live. Press Run, watch real training, move a slider, press Stop."""

import ipywidgets as widgets

from cnnlab import machine
from cnnlab.events import Finished, Progress, Started
from cnnlab.launch import launcher
from cnnlab.measure.compare import Measurement, slowest_rank, speedup
from cnnlab.measure.ladder import climb as climb_ladder
from cnnlab.measure.ladder import ladder_result, techniques
from cnnlab.measure.scaling import amdahl, fit_serial_fraction, gustafson
from cnnlab.plots import runs, scaling, speed, timeline
from cnnlab.recipe import format_changes
from cnnlab.widgets.board import Panel, Picture, escape_html, slider

EARLIER_RUNS = 4  # how many stay on the plot for comparison


class TrainingPanel(Panel):
    """A panel that trains `base` with some fields changed by controls, and draws loss and accuracy live.

    `vary`: {field of the recipe: its values}, a slider each. `.recipe` is what Run would train now; `.runs`, the
    events of the runs so far, by label.
    """

    def __init__(self, base, vary, draw=(runs.loss, runs.accuracy), **options):
        self.base, self.runs, self.events = base, {}, []
        sliders = {name: slider(name, values, getattr(base, name)) for name, values in vary.items()}
        self.fresh, self.one_each = False, draw
        named = timeline.step_breakdown in draw  # its rows need room for their names
        picture = Picture(len(draw), (9.4, 3.1) if named else (8.0, 3.1))
        picture.figure.subplots_adjust(wspace=0.42 if named else 0.2)
        super().__init__(
            sliders, self._work, self._take, self._draw, picture, explains=True, **options
        )

    @property
    def recipe(self):
        return self.base.replace(**self.values)

    def _work(self, values, stop):
        recipe = self.base.replace(**values)
        label = ", ".join(f"{name}={value}" for name, value in values.items()) or format_changes(
            self.base, recipe
        )
        runs = {name: events for name, events in self.runs.items() if name != label}
        self.events, self.compared = (
            [],
            [*(other for other in self.compared if other != recipe), recipe][-2:],
        )  # beside the one before
        self.runs = {**dict(list(runs.items())[-EARLIER_RUNS:]), label: self.events}
        self.fresh = True
        yield from launcher.run(recipe, stop)

    def _draw(self, axes):
        if self.fresh:  # another set of runs: begin on empty axes
            self.fresh = False
            for ax in axes:
                ax.clear()
        for draw, ax in zip(self.one_each, axes):
            draw(ax, self._shown())

    def _shown(self):
        """The runs, named by what differs among them."""
        words = {label: label.split(", ") for label in self.runs}
        common = set.intersection(*map(set, words.values())) if len(words) > 1 else set()
        return {
            ", ".join(word for word in words[label] if word not in common): events
            for label, events in self.runs.items()
        }

    def _take(self, event):
        self.events.append(event)
        started = next((e for e in self.events if isinstance(e, Started)), None)
        return status_line(event, started)


class ScalingPanel(Panel):
    """A slider of ranks, and a switch: strong scaling (the batch is shared out) or weak (each rank has a batch of its own).

    Run trains `base` with so many ranks, and then, for the machine may have changed meanwhile, the baseline: one rank
    without DDP. Their ratio is a point of the curve; each further Run of the same adds a repeat to it. One rank alone is measured *with* DDP:
    what the technique itself costs. `vary`: further fields, a slider each. `prediction()`: {ranks: speedup}, or None.
    `.points`: {(switch, values of `vary`): {ranks: (baseline's `Measurement`, its own)}}.
    """

    def __init__(self, base, ranks=(1, 2, 4), vary=None, prediction=lambda: None):
        self.base, self.prediction, self.points, self.events, self.label = (
            base,
            prediction,
            {},
            [],
            "",
        )
        self.fresh, self.setting, self.shown = True, None, base
        controls = {
            "replicas": slider("replicas", ranks, ranks[min(1, len(ranks) - 1)]),
            "scaling": widgets.ToggleButtons(options=["strong", "weak"], layout={"width": "260px"}),
        }
        controls |= {
            name: slider(name, values, getattr(base, name)) for name, values in (vary or {}).items()
        }
        controls["scaling"].style.button_width = "100px"
        picture = Picture(2, (9.4, 3.4))
        picture.figure.subplots_adjust(wspace=0.17, top=0.91, bottom=0.15)
        super().__init__(controls, self._work, self._take, self._draw, picture, explains=True)

    def _work(self, values, stop):
        """The run with so many ranks, then the baseline; both or neither become a repeat."""
        ranks, weak = values.pop("replicas"), values["scaling"] == "weak"
        self.setting, self.fresh, self.shown = (
            tuple(values.items()),
            True,
            self.base.replace(**{name: values[name] for name in values if name != "scaling"}),
        )
        del values["scaling"]
        alone = self.base.replace(replicas=1, strategy=None)
        recipe = self.base.replace(
            replicas=ranks,
            strategy=self.base.strategy or "ddp",
            batch_size=self.base.batch_size * (ranks if weak else 1),
            **values,
        )
        self.compared, rates = [alone, recipe], []
        ours = f"{ranks} rank{'s' * (ranks > 1)} with DDP"
        for self.label, each in ((ours, recipe), ("one rank without DDP", alone)):
            self.events, finished = [], []
            for event in launcher.run(each, stop):
                finished += [event] if isinstance(event, Finished) else []
                yield event
            if len(finished) < each.replicas:
                return
            rates.append(slowest_rank(finished))
            if each is recipe:
                seen = self.events
        points = self.points.setdefault(self.setting, {})
        before = points.get(ranks) or (
            Measurement(name="one rank without DDP", recipe=alone),
            Measurement(name=ours, recipe=recipe),
        )
        points[ranks] = before[0].add(rates[1]), before[1].add(rates[0])
        self.events, self.label, self.fresh = seen, ours, True
        yield rates

    def _take(self, event):
        if isinstance(event, list):  # both have run
            ours, baseline = event
            gain, world = (
                ours.images_per_s / baseline.images_per_s,
                len(self.events and {e.rank for e in self.events}),
            )
            share = (
                ""
                if ours.communication_s is None
                else f"; {100 * ours.communication_s / ours.step_s:.0f}% of a step waiting for other ranks"
            )
            return 1.0, (
                f"{self.label}: {ours.images_per_s:,.0f} images/s, <b>{gain:.2f} times</b> one rank without DDP ({baseline.images_per_s:,.0f})"
                + share
                + oversubscription_note(world, self.base.threads)
                + simulated_note(self.shown)
            )
        self.events.append(event)
        said = status_line(event, next((e for e in self.events if isinstance(e, Started)), None))
        half = 0.0 if "with DDP" in self.label else 0.5
        return said and (half + said[0] / 2, f"{self.label}: {said[1]}")

    def _draw(self, axes):
        if self.fresh:
            self.fresh = False
            for ax in axes:
                ax.clear()
            self._draw_curve(axes[1])
        timeline.rank_timeline(axes[0], {self.label: self.events})

    def _draw_curve(self, ax):
        kind = dict(self.setting or ()).get("scaling", "strong")
        points, law = self.points.get(self.setting, {}), gustafson if kind == "weak" else amdahl
        workers = sorted(points)
        measured = [speedup(*points[n]) for n in workers]
        fair = [
            (n, gain.value)
            for n, gain in zip(workers, measured)
            if n * (self.base.threads or 1) <= machine.cores()
        ]  # the law knows no crowds
        serial = fit_serial_fraction(*zip(*fair), law) if any(n > 1 for n, _ in fair) else None
        scaling.scaling_curve(ax, workers, measured, serial, self.prediction(), law)
        ax.set(xlabel="ranks", ylabel="times one rank without DDP")
        ax.set_title(
            f"{kind} scaling: "
            + ("a batch for each rank" if kind == "weak" else "one batch, shared out")
            + simulated_note(self.shown),
            fontsize=10,
        )
        if not workers:
            ax.set_xticks(self.controls["replicas"].options)
            ax.set_xlim(0.5, max(self.controls["replicas"].options) + 0.5)


class LadderPanel(Panel):
    """A panel that climbs the ladder: choose the rungs, press Run, and the bars grow.

    `.rungs` are those measured so far, as JSON has them, and `.outcome` the whole, once it is finished; `prediction()`
    gives the learner's guess of the best speedup, or None; `recorded` is another machine's ladder.
    """

    def __init__(self, base, repeats=3, seconds=4.0, prediction=lambda: None, recorded=None):
        self.base, self.seconds, self.rungs, self.running, self.outcome = (
            base,
            seconds,
            [],
            None,
            None,
        )
        self.possible, self.impossible = techniques(machine.describe())
        boxes = {
            name: widgets.Checkbox(
                value=True, description=name, indent=False, layout={"width": "190px"}
            )
            for name in self.possible
        }
        steps = widgets.IntSlider(
            value=repeats, min=2, max=10, description="repeats", continuous_update=False
        )
        draw = lambda axes: (
            axes[0].clear(),
            speed.ladder_bars(axes[0], self.rungs, prediction(), recorded, self.running),
        )
        picture = Picture(1, (8.8, 4.2))
        picture.figure.subplots_adjust(left=0.25, bottom=0.13, top=0.97)
        super().__init__(
            {**boxes, "repeats": steps},
            self._work,
            self._take,
            draw,
            picture,
            follow=False,
            hint="Choose rungs, then press Run. "
            + escape_html("; ".join(f"no {name}" for name in self.impossible)),
        )

    def _work(self, values, stop):
        self.rungs, self.outcome, climbed = [], None, {}
        chosen = {name: change for name, change in self.possible.items() if values[name]}
        self.total, self.done = len(chosen), 0
        for rung in climb_ladder(self.base, chosen, values["repeats"], self.seconds, stop):
            climbed[rung.name] = rung
            yield rung
        if not stop.is_set():
            self.outcome = ladder_result(climbed.values(), self.impossible)

    def _take(self, rung):
        self.running = rung.name if rung.kept is None else None
        if rung.measurement.images_per_s and not rung.failed:
            others = [other for other in self.rungs if other["name"] != rung.name]
            at = next(
                (i for i, other in enumerate(self.rungs) if other["name"] == rung.name), len(others)
            )
            self.rungs = [*others[:at], rung.to_dict(), *others[at:]]
        self.done += rung.kept is not None and rung.name != "baseline"
        doing = "done" if rung.kept is not None else f"run {len(rung.measurement.images_per_s) + 1}"
        return self.done / max(1, self.total), f"{rung.name}: {doing}"


def status_line(event, started):
    """(share done, a line of text) of an event of a run, or None where there is nothing to say."""
    if isinstance(event, Progress):
        text = f"step {event.step} of {started.steps}, epoch {event.epoch}: loss {event.losses[-1]:.3f}, {event.images_per_s:,.0f} images/s"
        return event.step / started.steps, text + oversubscription_note(
            started.world, started.threads
        ) + simulated_note(started.recipe)
    if isinstance(event, Finished):
        held_out = (
            "" if event.accuracy is None else f", held-out accuracy {100 * event.accuracy:.1f}%"
        )
        return (
            1.0,
            f"{event.images:,} images in {event.seconds:.1f} s: {event.images_per_s:,.0f} images/s{held_out}",
        )
    return None


def simulated_note(recipe):
    """What must stand beside every figure that a network made slow on purpose has a part in."""
    return ", SIMULATED network" if recipe.latency_ms or recipe.bandwidth_mbit else ""


def oversubscription_note(ranks, threads):
    """What to say of ranks that do not have a core for each of their threads."""
    cores = machine.cores()
    return (
        f" &ndash; {ranks} ranks of {threads} thread{'s' * (threads > 1)} share {cores} core{'s' * (cores > 1)}"
        if ranks > 1 and ranks * (threads or 1) > cores
        else ""
    )
