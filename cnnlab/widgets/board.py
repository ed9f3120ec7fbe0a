"""The base of all panels: controls, Run and Stop, a status line, and a live picture.

The cell that shows a panel returns at once. Callbacks only set events, so that controls stay
responsive. The work runs in other processes; one thread consumes its events, another one draws.
"""

import base64
import html
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import ipywidgets as widgets
from IPython.display import publish_display_data

from cnnlab.launch.failures import RankError
from cnnlab.launch.processes import prewarm
from cnnlab.measure import explain
from cnnlab.plots import profile_timeline
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.widgets.picture import Draw, Picture

# Seconds between two status lines, and between two frames: drawing takes time from the training.
REPORT_EVERY = 0.3
REDRAW_EVERY = 1.5
STAY_ACTIVE_EVERY = 30

NO_LIMIT = "no limit"  # how a slider shows None, which ipywidgets takes for "nothing selected"

Values = dict[str, Any]  # of the controls, by name
Work = Callable[[Values, threading.Event], Generator[Any, None, None]]
Take = Callable[[Any], "tuple[float, str] | None"]


def slider(name: str, values: Sequence[Any], value: Any) -> widgets.SelectionSlider:
    """A slider over `values` that reports a new value when it is released."""
    if value not in values:
        value = values[0]
    return widgets.SelectionSlider(
        options=[NO_LIMIT if option is None else option for option in values],
        value=NO_LIMIT if value is None else value,
        description=name,
        continuous_update=False,
        style={"description_width": "initial"},
        layout={"width": "320px"},
    )


def _button(label, icon, on_click, **options):
    layout = {"width": "90px", "flex": "0 0 auto"}  # A long status line does not squeeze it.
    button = widgets.Button(description=label, icon=icon, layout=layout, **options)
    button.on_click(on_click)
    button.add_class(f"cnnlab-{label.lower()}")
    return button


def _explanation_html(label, explanation):
    """The report, the timeline of its profile, and where the trace file is."""

    def draw(axes):
        profile_timeline(axes[0], explanation.profile)

    height = 1.2 + 0.45 * len(explanation.profile.lanes)
    picture = Picture(1, (9.5, height))
    picture.figure.subplots_adjust(left=0.13, bottom=0.5 / height, top=0.98)
    png = base64.b64encode(picture.png(draw, scale=2)).decode()
    note = f"Trace file: {explanation.profile.trace_file}. Open it at https://ui.perfetto.dev"
    return (
        f"<pre>{html.escape(f'{label}: {explanation}')}</pre>"
        f'<img alt="timeline of the last steps" style="width: 100%; max-width: 1400px" '
        f'src="data:image/png;base64,{png}"><pre>{html.escape(note)}</pre>'
    )


class Panel(widgets.VBox):
    """Controls, Run and Stop, a status line, and a picture that follows the work.

    `controls` is {name: widget}. `work(values, stop)` is a generator that works until it is done or
    the event `stop` is set. Everything it yields goes to `take(event)`, which returns (fraction
    done, status line), or None if there is nothing to report. `draw(axes)` draws the current state
    on empty axes. With `follow`, a control that changes after the first Run restarts the work.
    With `explains`, a button Why explains the speed of the recipes in `.compared`.

    If CNNLAB_UNATTENDED is set, as in tests and exports, displaying the panel runs it to its end.
    """

    def __init__(
        self,
        controls: Mapping[str, Any],
        work: Work,
        take: Take,
        draw: Draw,
        picture: Picture,
        follow: bool = True,
        hint: str = "Press Run.",
        explains: bool = False,
    ) -> None:
        self.controls = controls
        self.work = work
        self.take = take
        self.draw = draw
        self.picture = picture
        self.compared: dict[str, Recipe] = {}  # what Why explains, by label
        self.stop_event = threading.Event()  # of the newest run
        self.changed = threading.Event()  # since the last frame
        self.thread: threading.Thread | None = None  # of the newest run
        self.display_id: str | None = None
        self.last_report = 0.0  # when the status line was last written
        self._make_widgets(hint)
        if follow:
            for control in controls.values():
                control.observe(self._follow, "value")
        rows = widgets.Box(list(controls.values()), layout={"flex_flow": "row wrap"})
        why = [self.why_button] if explains else []
        top = widgets.HBox([self.run_button, self.stop_button, *why, self.bar, self.status])
        super().__init__([rows, top, self.image, self.reason])
        self.add_class("cnnlab-panel")

    def _make_widgets(self, hint):
        self.run_button = _button("Run", "play", self.run, button_style="primary")
        self.stop_button = _button("Stop", "stop", self.stop, disabled=True)
        self.why_button = _button("Why", "question", self.explain, disabled=True)
        self.bar = widgets.FloatProgress(min=0, max=1, layout={"flex": "0 0 160px"})
        self.status = widgets.HTML(hint).add_class("cnnlab-status")
        self.reason = widgets.HTML().add_class("cnnlab-reason")
        png = self.picture.png(self.draw)
        width = int(self.picture.figure.bbox.width)
        fitting = {"max_width": "100%", "object_fit": "contain"}
        self.image = widgets.Image(value=png, format="png", width=width, layout=fitting)
        self.image.add_class("cnnlab-picture")
        for name, control in self.controls.items():
            control.add_class("cnnlab-" + re.sub(r"\W+|_", "-", name))

    @property
    def values(self) -> Values:
        """{name: value} of the controls."""
        values = {name: control.value for name, control in self.controls.items()}
        return {name: None if value == NO_LIMIT else value for name, value in values.items()}

    def run(self, _: Any = None) -> None:
        """Start the work, or restart it with the current values. Returns at once."""
        self._begin(self.work, self.take)

    def explain(self, _: Any = None) -> None:
        """Explain what limits the speed of the recipes in `.compared`. Returns at once."""
        self._begin(self._explain, lambda line: (1.0, line))

    def stop(self, _: Any = None) -> None:
        """Stop the work. Returns at once; its processes end within a fraction of a second."""
        self.stop_event.set()

    def wait(self) -> None:
        """Block until the work is done, for scripts and tests."""
        if self.thread:
            self.thread.join()

    def _follow(self, _):
        if self.thread:
            self.run()

    def _begin(self, work, take):
        self.stop_event.set()
        self.stop_event = threading.Event()
        args = (work, take, self.values, self.stop_event, self.thread)
        self.thread = threading.Thread(target=self._supervise, args=args, daemon=True)
        self.thread.start()

    def _supervise(self, work, take, values, stop, previous):
        if previous:
            previous.join()
        line = "Stopped."
        if not stop.is_set():
            self.run_button.disabled = True
            self.why_button.disabled = True
            self.stop_button.disabled = False
            self.bar.bar_style = ""
            over = threading.Event()
            drawer = threading.Thread(target=self._keep_drawing, args=(over,), daemon=True)
            drawer.start()
            line = self._consume(work, take, values, stop)
            over.set()
            drawer.join()
        if self.stop_event is stop:  # no newer run has begun
            self._finish(line)

    def _consume(self, work, take, values, stop):
        """Do the work and report its progress. Returns the last status line."""
        line = ""
        try:
            self._report(0.0, "starting ...")
            for event in work(values, stop):
                progress = take(event)
                if progress is not None:
                    fraction, line = progress
                    self._report(fraction, line)
                    self.changed.set()
        except CnnlabError as error:
            self.bar.bar_style = "warning"
            return f"<b>This cannot run:</b> {html.escape(str(error))}"
        except RankError as error:
            return self._failure(f"Rank {error.rank} failed", error.error, error.traceback)
        except Exception:  # an exception that ends a thread is lost
            return self._failure("The panel failed", "", traceback.format_exc())
        if stop.is_set():
            return f"Stopped. {line}"
        self.bar.bar_style = "success"
        return line

    def _explain(self, values, stop):
        self.status.value = "profiling a few steps, up to a minute with torch.compile ..."
        report = ""
        for label, recipe in self.compared.items():
            explanation = explain.explain(recipe, stop=stop)
            if explanation is None:  # stopped
                return
            report += _explanation_html(label, explanation)
        self.reason.value = report
        yield "the explanation is below the picture"

    def _finish(self, line):
        self.status.value = line
        self.run_button.disabled = False
        self.stop_button.disabled = True
        self.why_button.disabled = not self.compared
        try:
            self.image.value = self.picture.png(self.draw, scale=2)  # for the saved notebook
            if self.display_id:
                self._publish(update=True)
        except Exception:
            self.status.value = self._failure("The panel cannot draw", "", traceback.format_exc())

    def _failure(self, title, error, details):
        self.bar.bar_style = "danger"
        return f"<b>{title}:</b> {html.escape(error)}<pre>{html.escape(details)}</pre>"

    def _report(self, fraction, line):
        """Show progress, but not so often that it overloads the browser."""
        now = time.monotonic()
        if fraction in (0.0, 1.0) or now - self.last_report > REPORT_EVERY:
            self.last_report = now
            self.status.value = line
            self.bar.value = fraction

    def _keep_drawing(self, over):
        while not over.is_set():
            if not self.changed.wait(REPORT_EVERY):
                self._stay_active()
                continue
            self.changed.clear()
            try:
                self.image.value = self.picture.png(self.draw)
            except Exception:  # the last picture raises it again, and _finish reports it
                return
            over.wait(REDRAW_EVERY)

    def _stay_active(self):
        """Repeat the status of silent work: Jupyter servers end kernels that send nothing."""
        if time.monotonic() - self.last_report > STAY_ACTIVE_EVERY:
            self.last_report = time.monotonic()
            self.status.send_state("value")

    def _publish(self, update):
        """Show the panel, and its picture as an image on pages that cannot run widgets."""
        png = base64.b64encode(self.image.value).decode()
        data = {**super()._repr_mimebundle_(), "image/png": png}
        metadata = {"image/png": {"width": self.image.width}}
        display_id = {"display_id": self.display_id}
        publish_display_data(data, metadata, transient=display_id, update=update)

    def _ipython_display_(self):
        if os.environ.get("CNNLAB_UNATTENDED"):
            self.run()
            self.wait()
        else:
            prewarm()
        self.display_id = self.display_id or f"cnnlab-{id(self)}"
        self._publish(update=False)
