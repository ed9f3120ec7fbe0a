"""The live board: controls, Run and Stop, a line that says what happens, and a picture that grows.

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

from cnnlab.launch import launcher
from cnnlab.measure import explain
from cnnlab.recipe import CnnlabError

REDRAW_EVERY = 0.3  # seconds, at least ...


REDRAW_AT_LEAST_EVERY = 1.5


REDRAW_SHARE = (
    0.01  # ... and longer where drawing would take more than this share of a core from the training
)


NO_LIMIT = "no limit"  # what a slider shows where the recipe has None


class Picture:
    """A matplotlib figure as PNG bytes. While nothing but the points of lines changes, only the lines are drawn."""

    def __init__(self, axes=2, size=(8.0, 3.1), dpi=100):
        self.figure = Figure(figsize=size, dpi=dpi)
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.subplots(1, axes, squeeze=False)[0]
        self.figure.subplots_adjust(left=0.07, right=0.97, bottom=0.16, top=0.9, wspace=0.2)
        self.drawn, self.background = None, None

    def png(self, draw):
        """Call draw(axes), then render."""
        draw(self.axes)
        frame = [
            (ax.get_xlim(), ax.get_ylim(), len(ax.lines), [*ax.patches, *ax.texts, ax.get_legend()])
            for ax in self.axes
        ]
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
        return self._encoded()

    def final(self):
        """The same picture once more, at twice the resolution: for the saved notebook."""
        buffer = io.BytesIO()
        for line in (line for ax in self.axes for line in ax.lines):
            line.set_animated(False)
        self.figure.savefig(buffer, format="png", dpi=2 * self.figure.dpi)
        self.drawn = None
        return buffer.getvalue()

    def _encoded(self):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB").save(
            buffer, "png", compress_level=1
        )
        return buffer.getvalue()


class Panel(widgets.VBox):
    """Controls, Run and Stop, a line that says what happens, and a picture.

    `controls`: {name: widget}. `work(values, stop)` is a generator that does the work until it ends or the event
    `stop` is set; each thing that it yields goes to `take(thing)`, which returns (share done, a line of text), or
    None when there is nothing to say. `draw(axes)` draws what has been taken in. With `follow`, moving a control
    while a run is on, or after one, starts anew with the new value. With `explains`, a button Why explains the recipes in `.compared`.

    Where CNNLAB_UNATTENDED is set (tests, exports: nobody is there to press Run) showing the panel runs it to its end.
    """

    def __init__(
        self, controls, work, take, draw, picture, follow=True, hint="Press Run.", explains=False
    ):
        self.controls, self.work, self.take, self.draw, self.picture, self.compared = (
            controls,
            work,
            take,
            draw,
            picture,
            [],
        )
        self.lock, self.stop_event, self.thread, self.handle = (
            threading.Lock(),
            threading.Event(),
            None,
            None,
        )
        self.changed, self.started, self.said = threading.Event(), False, 0.0
        self.run_button = widgets.Button(
            description="Run", icon="play", button_style="primary", layout={"width": "90px"}
        )
        self.stop_button = widgets.Button(
            description="Stop", icon="stop", disabled=True, layout={"width": "90px"}
        )
        self.why_button = widgets.Button(
            description="Why", icon="question", disabled=True, layout={"width": "90px"}
        )
        self.reason = widgets.HTML()
        self.bar = widgets.FloatProgress(min=0, max=1, layout={"width": "160px"})
        self.status = widgets.HTML(hint)
        self.image = widgets.Image(
            format="png", layout={"max_width": "100%", "object_fit": "contain"}
        )
        self.image.width = int(picture.figure.get_figwidth() * picture.figure.dpi)
        self.image.value = picture.png(draw)
        self.run_button.on_click(self.run)
        self.stop_button.on_click(self.stop)
        self.why_button.on_click(self.explain)
        if follow:
            for control in controls.values():
                control.observe(lambda _: self.started and self.run(), "value")
        for widget, name in (
            (self.run_button, "run"),
            (self.stop_button, "stop"),
            (self.why_button, "why"),
            (self.reason, "reason"),
            (self.status, "status"),
            (self.image, "picture"),
        ):
            widget.add_class(f"cnnlab-{name}")
        for name, control in controls.items():
            control.add_class("cnnlab-" + re.sub(r"\W+|_", "-", name))
        top = widgets.HBox(
            [
                self.run_button,
                self.stop_button,
                *([self.why_button] if explains else []),
                self.bar,
                self.status,
            ]
        )
        rows = widgets.Box(list(controls.values()), layout={"flex_flow": "row wrap"})
        super().__init__([rows, top, self.image, self.reason])
        self.add_class("cnnlab-panel")

    @property
    def values(self):
        """{name: value} of the controls."""
        return {
            name: None if control.value == NO_LIMIT else control.value
            for name, control in self.controls.items()
        }

    def run(self, _=None):
        """Start, or start anew. Returns at once."""
        self._begin(self.work, self.take)

    def explain(self, _=None):
        """Say why the last run is as fast as it is: which resource bounds it. Returns at once."""
        self._begin(self._explaining, lambda said: (1.0, said))

    def _explaining(self, values, stop):
        self.status.value = (
            "profiling a few steps: some seconds; with torch.compile up to a minute ..."
        )
        said = explain.explain(*self.compared, stop=stop)
        if not stop.is_set():
            self.reason.value = f"<pre>{escape_html(said)}</pre>"
            yield "the reason is below the picture"

    def _begin(self, work, take):
        with self.lock:
            self.stop_event.set()
            self.stop_event, self.started = threading.Event(), True
            self.thread = threading.Thread(
                target=self._supervise,
                args=(work, take, self.values, self.stop_event, self.thread),
                daemon=True,
            )
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
        except CnnlabError as error:
            last, self.bar.bar_style = f"<b>This cannot run:</b> {escape_html(error)}", "warning"
        except launcher.RankError as error:
            last, self.bar.bar_style = (
                f"<b>Rank {error.rank} failed:</b> {escape_html(error.error)}<pre>{escape_html(error.traceback)}</pre>",
                "danger",
            )
        except Exception:  # nobody would ever see what a thread raises
            last, self.bar.bar_style = (
                f"<b>The panel failed:</b><pre>{escape_html(traceback.format_exc())}</pre>",
                "danger",
            )
        over.set()
        drawer.join()
        try:
            self._rest(last, stop)
        except Exception:  # of the picture
            self.status.value, self.bar.bar_style = (
                f"<b>The panel cannot draw:</b><pre>{escape_html(traceback.format_exc())}</pre>",
                "danger",
            )

    def _rest(self, line, stop):
        """Ready for the next Run; nothing to do when a newer run has begun already."""
        if self.stop_event is stop:
            self.status.value = line
            self.run_button.disabled, self.stop_button.disabled, self.why_button.disabled = (
                False,
                True,
                not self.compared,
            )
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
            except Exception:  # the last picture, at the end, says so
                return
            over.wait(
                min(
                    max(REDRAW_EVERY, (time.thread_time() - began) / REDRAW_SHARE),
                    REDRAW_AT_LEAST_EVERY,
                )
            )

    def _keep(self):
        """Leave the last picture in the notebook as a plain image, for pages that cannot run widgets."""
        self.picture.png(self.draw)
        self.image.value = self.picture.final()
        if self.handle:
            publish_display_data(
                self._bundle(), self._metadata(), transient={"display_id": self.handle}, update=True
            )

    def _bundle(self):
        return {
            **super()._repr_mimebundle_(),
            "image/png": base64.b64encode(self.image.value).decode(),
        }

    def _metadata(self):
        return {"image/png": {"width": self.image.width}}

    def _ipython_display_(self):
        if os.environ.get("CNNLAB_UNATTENDED"):
            self.run()
            self.wait()
        else:
            launcher.prewarm()
        self.handle = self.handle or f"cnnlab-{id(self)}"
        publish_display_data(
            self._bundle(), self._metadata(), transient={"display_id": self.handle}
        )


def slider(name, values, value):
    """A slider over these values, whose moves count when it is let go."""
    value = value if value in values else values[0]
    options = [
        NO_LIMIT if each is None else each for each in values
    ]  # None would mean to the widget that nothing is chosen
    return widgets.SelectionSlider(
        options=options,
        value=NO_LIMIT if value is None else value,
        description=name,
        continuous_update=False,
        style={"description_width": "initial"},
        layout={"width": "320px"},
    )


def escape_html(text):
    """The text as HTML shows it."""
    import html

    return html.escape(str(text))
