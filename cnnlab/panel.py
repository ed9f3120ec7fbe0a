"""Controls that make a recipe, and the live board: press Run, watch real training, move a slider, press Stop.

The cell that shows a panel returns at once. Training runs in other processes; one thread takes in what they say,
another draws, at most three times a second. Buttons and sliders only set events, so that they answer at once.
"""

import base64
import io
import os
import re
import threading
import time
import traceback

import ipywidgets as widgets
import numpy as np
from IPython.display import publish_display_data
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import explain, launch, machine, plot
from .compare import Measurement, slowest, speedup
from .events import Finished, Progress, Started
from .ladder import climb as climb_ladder
from .ladder import result, techniques
from .recipe import Refused, legend
from .scaling import amdahl, fit_serial, gustafson

REDRAW_EVERY = 0.3       # seconds, at least ...
REDRAW_AT_LEAST_EVERY = 1.5
REDRAW_SHARE = 0.01      # ... and longer where drawing would take more than this share of a core from the training
NO_LIMIT = "no limit"    # what a slider shows where the recipe has None
EARLIER_RUNS = 4         # how many stay on the plot for comparison


class Picture:
    """A matplotlib figure as PNG bytes. While nothing but the points of lines changes, only the lines are drawn."""

    def __init__(self, axes=2, size=(8.0, 3.1), dpi=100):
        self.figure = Figure(figsize=size, dpi=dpi)
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.subplots(1, axes, squeeze=False)[0]
        self.figure.subplots_adjust(left=0.07, right=0.98, bottom=0.16, top=0.9, wspace=0.2)
        self.drawn, self.background = None, None

    def png(self, draw):
        """Call draw(axes), then render."""
        draw(self.axes)
        frame = [(ax.get_xlim(), ax.get_ylim(), len(ax.lines), [*ax.patches, *ax.texts, ax.get_legend()]) for ax in self.axes]
        lines = [line for ax in self.axes for line in ax.lines]
        if frame != self.drawn:
            for line in lines:
                line.set_animated(True)
            self.canvas.draw()
            self.background, self.drawn = self.canvas.copy_from_bbox(self.figure.bbox), frame
        else:
            self.canvas.restore_region(self.background)
        for line in lines:
            line.axes.draw_artist(line)
        return self._encoded(compress_level=1)

    def final(self, scale=2):
        """The same picture once more, at twice the resolution: for the saved notebook."""
        buffer = io.BytesIO()
        for line in (line for ax in self.axes for line in ax.lines):
            line.set_animated(False)
        self.figure.savefig(buffer, format="png", dpi=scale * self.figure.dpi)
        self.drawn = None
        return buffer.getvalue()

    def _encoded(self, compress_level):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB").save(buffer, "png", compress_level=compress_level)
        return buffer.getvalue()


class Panel(widgets.VBox):
    """Controls, Run and Stop, a line that says what happens, and a picture.

    `controls`: {name: widget}. `work(values, stop)` is a generator that does the work until it ends or the event
    `stop` is set; each thing that it yields goes to `take(thing)`, which returns (share done, a line of text), or
    None when there is nothing to say. `draw(axes)` draws what has been taken in. With `follow`, moving a control
    while a run is on, or after one, starts anew with the new value. `why(stop)`, where given, is what the button Why shows: a text.

    Where CNNLAB_UNATTENDED is set (tests, exports: nobody is there to press Run) showing the panel runs it to its end.
    """

    def __init__(self, controls, work, take, draw, picture, follow=True, hint="Press Run.", why=None):
        self.controls, self.work, self.take, self.draw, self.picture, self.why = controls, work, take, draw, picture, why
        self.lock, self.stop_event, self.thread, self.handle = threading.Lock(), threading.Event(), None, None
        self.changed, self.started, self.said = threading.Event(), False, 0.0
        self.run_button = widgets.Button(description="Run", icon="play", button_style="primary", layout={"width": "90px"})
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True, layout={"width": "90px"})
        self.why_button = widgets.Button(description="Why", icon="question", disabled=True, layout={"width": "90px"})
        self.reason = widgets.HTML()
        self.bar = widgets.FloatProgress(min=0, max=1, layout={"width": "160px"})
        self.status = widgets.HTML(hint)
        self.image = widgets.Image(format="png", layout={"max_width": "100%", "object_fit": "contain"})
        self.image.width = int(picture.figure.get_figwidth() * picture.figure.dpi)
        self.image.value = picture.png(draw)
        self.run_button.on_click(self.run)
        self.stop_button.on_click(self.stop)
        self.why_button.on_click(self.explain)
        if follow:
            for control in controls.values():
                control.observe(lambda _: self.started and self.run(), "value")
        for widget, name in ((self.run_button, "run"), (self.stop_button, "stop"), (self.why_button, "why"), (self.reason, "reason"),
                             (self.status, "status"), (self.image, "picture")):
            widget.add_class(f"cnnlab-{name}")
        for name, control in controls.items():
            control.add_class("cnnlab-" + re.sub(r"\W+|_", "-", name))
        top = widgets.HBox([self.run_button, self.stop_button, *([self.why_button] if why else []), self.bar, self.status])
        rows = widgets.Box(list(controls.values()), layout={"flex_flow": "row wrap"})
        super().__init__([rows, top, self.image, self.reason])
        self.add_class("cnnlab-panel")

    @property
    def values(self):
        """{name: value} of the controls."""
        return {name: None if control.value == NO_LIMIT else control.value for name, control in self.controls.items()}

    def run(self, _=None):
        """Start, or start anew. Returns at once."""
        self._begin(self.work, self.take)

    def explain(self, _=None):
        """Say why the last run is as fast as it is: which resource bounds it. Returns at once."""
        self._begin(self._explaining, lambda said: (1.0, said))

    def _explaining(self, values, stop):
        self.status.value = "profiling a few steps: some seconds; with torch.compile up to a minute ..."
        said = self.why(stop)
        if not stop.is_set():
            self.reason.value = f"<pre>{_escaped(said)}</pre>"
            yield "the reason is below the picture"

    def _begin(self, work, take):
        with self.lock:
            self.stop_event.set()
            self.stop_event, self.started = threading.Event(), True
            self.thread = threading.Thread(target=self._supervise, args=(work, take, self.values, self.stop_event, self.thread), daemon=True)
            self.thread.start()

    def stop(self, _=None):
        """Stop what is running. Returns at once; the processes are gone within a fraction of a second."""
        self.stop_event.set()

    def wait(self):
        """Block until the run is over: for scripts and tests."""
        if self.thread:
            self.thread.join()

    def _supervise(self, work, take, values, stop, before):
        if before:
            before.join()
        if stop.is_set():
            return self._rest("Stopped.", stop)
        self.run_button.disabled = self.why_button.disabled = True
        self.stop_button.disabled, self.bar.bar_style = False, ""
        over = threading.Event()
        drawer = threading.Thread(target=self._keep_drawing, args=(over,), daemon=True)
        drawer.start()
        last = ""
        try:
            self._say(0.0, "starting ...")
            for thing in work(values, stop):
                share, line = take(thing) or (None, last)
                last = line
                if share is not None:
                    self._say(share, line)
                    self.changed.set()
            self.bar.bar_style = "" if stop.is_set() else "success"
            last = "Stopped. " + last if stop.is_set() else last
        except Refused as error:
            last, self.bar.bar_style = f"<b>This cannot run:</b> {_escaped(error)}", "warning"
        except launch.RankError as error:
            last, self.bar.bar_style = f"<b>Rank {error.rank} failed:</b> {_escaped(error.error)}<pre>{_escaped(error.traceback)}</pre>", "danger"
        except Exception:      # nobody would ever see what a thread raises
            last, self.bar.bar_style = f"<b>The panel failed:</b><pre>{_escaped(traceback.format_exc())}</pre>", "danger"
        over.set()
        drawer.join()
        try:
            self._rest(last, stop)
        except Exception:      # of the picture
            self.status.value, self.bar.bar_style = f"<b>The panel cannot draw:</b><pre>{_escaped(traceback.format_exc())}</pre>", "danger"

    def _rest(self, line, stop):
        """Ready for the next Run; nothing to do when a newer run has begun already."""
        if self.stop_event is stop:
            self.status.value = line
            self.run_button.disabled = self.why_button.disabled = False
            self.stop_button.disabled = True
            self._keep()

    def _say(self, share, line):
        """Progress, at most as often as the picture: a browser cannot take more."""
        now = time.monotonic()
        if share in (0.0, 1.0) or now - self.said > REDRAW_EVERY:
            self.said, self.status.value, self.bar.value = now, line, share

    def _keep_drawing(self, over):
        while not over.is_set():
            if not self.changed.wait(REDRAW_EVERY):
                continue
            self.changed.clear()
            began = time.thread_time()
            try:
                self.image.value = self.picture.png(self.draw)
            except Exception:          # the last picture, at the end, says so
                return
            over.wait(min(max(REDRAW_EVERY, (time.thread_time() - began) / REDRAW_SHARE), REDRAW_AT_LEAST_EVERY))

    def _keep(self):
        """Leave the last picture in the notebook as a plain image, for pages that cannot run widgets."""
        self.picture.png(self.draw)
        self.image.value = self.picture.final()
        if self.handle:
            publish_display_data(self._bundle(), self._metadata(), transient={"display_id": self.handle}, update=True)

    def _bundle(self):
        return {**super()._repr_mimebundle_(), "image/png": base64.b64encode(self.image.value).decode()}

    def _metadata(self):
        return {"image/png": {"width": self.image.width}}

    def _ipython_display_(self):
        if os.environ.get("CNNLAB_UNATTENDED"):
            self.run()
            self.wait()
        else:
            launch.prewarm()
        self.handle = self.handle or f"cnnlab-{id(self)}"
        publish_display_data(self._bundle(), self._metadata(), transient={"display_id": self.handle})


class Training(Panel):
    """A panel that trains `base` with some fields changed by controls, and draws loss and accuracy live.

    `vary`: {field of the recipe: its values}, a slider each. `.recipe` is what Run would train now; `.runs`, the
    events of the runs so far, by label.
    """

    def __init__(self, base, vary, draw=(plot.loss, plot.accuracy), **options):
        self.base, self.runs, self.events = base, {}, []
        sliders = {name: slider(name, values, getattr(base, name)) for name, values in vary.items()}
        self.fresh, self.one_each, self.told = False, draw, []
        named = plot.where_time_goes in draw           # its rows need room for their names
        picture = Picture(len(draw), (9.4, 3.1) if named else (8.0, 3.1))
        picture.figure.subplots_adjust(wspace=0.42 if named else 0.2)
        super().__init__(sliders, self._work, self._take, self._draw, picture, why=self._why, **options)

    @property
    def recipe(self):
        return self.base.but(**self.values)

    def _work(self, values, stop):
        recipe = self.base.but(**values)
        label = ", ".join(f"{name}={value}" for name, value in values.items()) or legend(self.base, recipe)
        runs = {name: events for name, events in self.runs.items() if name != label}
        self.events, self.told = [], [*(other for other in self.told if other != recipe), recipe][-2:]
        self.runs = {**dict(list(runs.items())[-EARLIER_RUNS:]), label: self.events}
        self.fresh = True
        yield from launch.run(recipe, stop)

    def _why(self, stop):
        """The last recipe, beside the one before where there is one."""
        return explain.explain(*self.told, stop=stop)

    def _draw(self, axes):
        if self.fresh:                         # another set of runs: begin on empty axes
            self.fresh = False
            for ax in axes:
                ax.clear()
        for draw, ax in zip(self.one_each, axes):
            draw(ax, self._shown())

    def _shown(self):
        """The runs, named by what differs among them."""
        words = {label: label.split(", ") for label in self.runs}
        common = set.intersection(*map(set, words.values())) if len(words) > 1 else set()
        return {", ".join(word for word in words[label] if word not in common): events for label, events in self.runs.items()}

    def _take(self, event):
        self.events.append(event)
        started = next((e for e in self.events if isinstance(e, Started)), None)
        return told(event, started)


class Scaling(Panel):
    """A slider of ranks, and a switch: strong scaling (the batch is shared out) or weak (each rank has a batch of its own).

    Run trains `base` with so many ranks, and then, for the machine may have changed meanwhile, the baseline: one rank
    without DDP. Their ratio is a point of the curve; each further Run of the same adds a repeat to it. One rank alone is measured *with* DDP:
    what the technique itself costs. `vary`: further fields, a slider each. `prediction()`: {ranks: speedup}, or None.
    `.points`: {(switch, values of `vary`): {ranks: (baseline's `Measurement`, its own)}}.
    """

    def __init__(self, base, ranks=(1, 2, 4), vary=None, prediction=lambda: None):
        self.base, self.prediction, self.points, self.events, self.label = base, prediction, {}, [], ""
        self.fresh, self.setting, self.shown = True, None, base
        controls = {"replicas": slider("replicas", ranks, ranks[min(1, len(ranks) - 1)]), "scaling": widgets.ToggleButtons(options=["strong", "weak"], layout={"width": "260px"})}
        controls |= {name: slider(name, values, getattr(base, name)) for name, values in (vary or {}).items()}
        controls["scaling"].style.button_width = "100px"
        picture = Picture(2, (9.4, 3.4))
        picture.figure.subplots_adjust(wspace=0.17, top=0.91, bottom=0.15)
        self.compared = [base]
        super().__init__(controls, self._work, self._take, self._draw, picture, why=lambda stop: explain.explain(*self.compared, stop=stop))

    def _work(self, values, stop):
        """The run with so many ranks, then the baseline; both or neither become a repeat."""
        ranks, weak = values.pop("replicas"), values["scaling"] == "weak"
        self.setting, self.fresh, self.shown = tuple(values.items()), True, self.base.but(**{name: values[name] for name in values if name != "scaling"})
        del values["scaling"]
        alone = self.base.but(replicas=1, strategy=None)
        recipe = self.base.but(replicas=ranks, strategy=self.base.strategy or "ddp", batch_size=self.base.batch_size * (ranks if weak else 1), **values)
        self.compared, rates = [alone, recipe], []
        ours = f"{ranks} rank{'s' * (ranks > 1)} with DDP"
        for self.label, each in ((ours, recipe), ("one rank without DDP", alone)):
            self.events, finished = [], []
            for event in launch.run(each, stop):
                finished += [event] if isinstance(event, Finished) else []
                yield event
            if len(finished) < each.replicas:
                return
            rates.append(slowest(finished))
            if each is recipe:
                seen = self.events
        points = self.points.setdefault(self.setting, {})
        before = points.get(ranks) or (Measurement(name="one rank without DDP", recipe=alone), Measurement(name=ours, recipe=recipe))
        points[ranks] = before[0].add(rates[1]), before[1].add(rates[0])
        self.events, self.label, self.fresh = seen, ours, True
        yield rates

    def _take(self, event):
        if isinstance(event, list):             # both have run
            ours, baseline = event
            gain, world = ours.images_per_s / baseline.images_per_s, len(self.events and {e.rank for e in self.events})
            share = 100 * (ours.communication_s or 0) / ours.step_s
            return 1.0, (f"{self.label}: {ours.images_per_s:,.0f} images/s, <b>{gain:.2f} times</b> one rank without DDP ({baseline.images_per_s:,.0f}); "
                         f"{share:.0f}% of a step waiting for other ranks" + crowd(world, self.base.threads) + simulated(self.shown))
        self.events.append(event)
        said = told(event, next((e for e in self.events if isinstance(e, Started)), None))
        half = 0.0 if "with DDP" in self.label else 0.5
        return said and (half + said[0] / 2, f"{self.label}: {said[1]}")

    def _draw(self, axes):
        if self.fresh:
            self.fresh = False
            for ax in axes:
                ax.clear()
            self._draw_curve(axes[1])
        plot.timeline(axes[0], {self.label: self.events})

    def _draw_curve(self, ax):
        kind = dict(self.setting or ()).get("scaling", "strong")
        points, law = self.points.get(self.setting, {}), gustafson if kind == "weak" else amdahl
        workers = sorted(points)
        measured = [speedup(*points[n]) for n in workers]
        fair = [(n, gain.value) for n, gain in zip(workers, measured) if n * (self.base.threads or 1) <= machine.cores()]     # the law knows no crowds
        serial = fit_serial(*zip(*fair), law) if any(n > 1 for n, _ in fair) else None
        plot.scaling(ax, workers, measured, serial, self.prediction(), law)
        ax.set(xlabel="ranks", ylabel="times one rank without DDP")
        ax.set_title(f"{kind} scaling: " + ("a batch for each rank" if kind == "weak" else "one batch, shared out") + simulated(self.shown), fontsize=10)
        if not workers:
            ax.set_xticks(self.controls["replicas"].options)
            ax.set_xlim(0.5, max(self.controls["replicas"].options) + 0.5)


class Ladder(Panel):
    """A panel that climbs the ladder: choose the rungs, press Run, and the bars grow.

    `.rungs` are those measured so far, as JSON has them, and `.outcome` the whole, once it is finished; `prediction()`
    gives the learner's guess of the best speedup, or None; `recorded` is another machine's ladder.
    """

    def __init__(self, base, repeats=3, seconds=4.0, prediction=lambda: None, recorded=None):
        self.base, self.seconds, self.rungs, self.running, self.outcome = base, seconds, [], None, None
        self.possible, self.impossible = techniques(machine.describe())
        boxes = {name: widgets.Checkbox(value=True, description=name, indent=False, layout={"width": "190px"}) for name in self.possible}
        steps = widgets.IntSlider(value=repeats, min=2, max=10, description="repeats", continuous_update=False)
        draw = lambda axes: (axes[0].clear(), plot.ladder(axes[0], self.rungs, prediction(), recorded, self.running))
        picture = Picture(1, (8.0, 4.2))
        picture.figure.subplots_adjust(left=0.2, bottom=0.13, top=0.97)
        super().__init__({**boxes, "repeats": steps}, self._work, self._take, draw, picture, follow=False,
                         hint="Choose rungs, then press Run. " + _escaped("; ".join(f"no {name}" for name in self.impossible)))

    def _work(self, values, stop):
        self.rungs, self.outcome, climbed = [], None, {}
        chosen = {name: change for name, change in self.possible.items() if values[name]}
        self.total, self.done = len(chosen), 0
        for rung in climb_ladder(self.base, chosen, values["repeats"], self.seconds, stop):
            climbed[rung.name] = rung
            yield rung
        if not stop.is_set():
            self.outcome = result(climbed.values(), self.impossible)

    def _take(self, rung):
        self.running = rung.name if rung.kept is None else None
        if rung.measurement.images_per_s and not rung.failed:
            others = [other for other in self.rungs if other["name"] != rung.name]
            at = next((i for i, other in enumerate(self.rungs) if other["name"] == rung.name), len(others))
            self.rungs = [*others[:at], rung.to_dict(), *others[at:]]
        self.done += rung.kept is not None and rung.name != "baseline"
        doing = "done" if rung.kept is not None else f"run {len(rung.measurement.images_per_s) + 1}"
        return self.done / max(1, self.total), f"{rung.name}: {doing}"


class Prediction(widgets.VBox):
    """A question to answer with a number before measuring. `.value` is None until the learner commits to it."""

    def __init__(self, question, unit="x", least=0.0, most=1e6):
        self.value = None
        self.box = widgets.BoundedFloatText(value=least, min=least, max=most, step=0.1, layout={"width": "110px"})
        self.button = widgets.Button(description="This is my guess", button_style="info")
        self.said = widgets.HTML()
        self.unit = unit
        self.button.on_click(self.commit)
        answer = widgets.HBox([self.box, widgets.Label(unit), self.button, self.said])
        super().__init__([widgets.HTML(f"<b>Predict:</b> {question}"), answer])
        self.add_class("cnnlab-prediction")

    def commit(self, _=None):
        """Fix the guess: a prediction that can be changed afterwards is none."""
        self.value = self.box.value
        self.box.disabled = self.button.disabled = True
        self.said.value = f"Your prediction: <b>{self.value:,.10g} {self.unit}</b>"


def slider(name, values, value):
    """A slider over these values, whose moves count when it is let go."""
    value = value if value in values else values[0]
    options = [NO_LIMIT if each is None else each for each in values]           # None would mean to the widget that nothing is chosen
    return widgets.SelectionSlider(options=options, value=NO_LIMIT if value is None else value, description=name, continuous_update=False,
                                   style={"description_width": "initial"}, layout={"width": "320px"})


def told(event, started):
    """(share done, a line of text) of an event of a run, or None where there is nothing to say."""
    if isinstance(event, Progress):
        text = f"step {event.step} of {started.steps}, epoch {event.epoch}: loss {event.losses[-1]:.3f}, {event.images_per_s:,.0f} images/s"
        return event.step / started.steps, text + crowd(started.world, started.threads) + simulated(started.recipe)
    if isinstance(event, Finished):
        held_out = "" if event.accuracy is None else f", held-out accuracy {100 * event.accuracy:.1f}%"
        return 1.0, f"{event.images:,} images in {event.seconds:.1f} s: {event.images_per_s:,.0f} images/s{held_out}"
    return None


def simulated(recipe):
    """What must stand beside every figure that a network made slow on purpose has a part in."""
    return ", SIMULATED network" if recipe.latency_ms or recipe.bandwidth_mbit else ""


def crowd(ranks, threads):
    """What to say of ranks that do not have a core for each of their threads."""
    cores = machine.cores()
    return f" &ndash; {ranks} ranks of {threads} thread{'s' * (threads > 1)} share {cores} core{'s' * (cores > 1)}" if ranks > 1 and ranks * (threads or 1) > cores else ""


def _escaped(text):
    import html
    return html.escape(str(text))
