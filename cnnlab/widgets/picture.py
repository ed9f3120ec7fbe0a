"""The live picture of a panel."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

Draw = Callable[[Sequence[Any]], Any]  # takes the axes


def _frame(ax: Any) -> list[Any]:
    """Everything that is drawn around the data of the axes, in a form that can be compared."""
    parts = [ax.get_title(), ax.get_title(loc="left"), ax.get_xscale(), ax.get_yscale()]
    for axis in (ax.xaxis, ax.yaxis):
        ticks = axis.get_majorticklocs()
        labels = axis.get_major_formatter().format_ticks(ticks)
        parts += [*axis.get_view_interval(), *ticks, *labels, axis.get_label_text()]
    if ax.get_legend():
        parts += [text.get_text() for text in ax.get_legend().get_texts()]
    return parts


class Picture:
    """A matplotlib figure with a row of axes, rendered to PNG bytes.

    Drawing a whole frame is expensive, and most of it is ticks and text. They stay in a background
    image that is drawn again only if they change.
    """

    def __init__(self, axes: int = 2, size: tuple[float, float] = (8.0, 3.1)) -> None:
        self.figure = Figure(figsize=size, dpi=100)
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.subplots(1, axes, squeeze=False)[0]
        self.figure.subplots_adjust(left=0.07, right=0.97, bottom=0.16, top=0.9, wspace=0.2)
        self.frame: list[Any] | None = None
        self.background: Any = None

    def png(self, draw: Draw) -> bytes:
        """Clear the axes, call `draw(axes)` and render."""
        for ax in self.axes:
            ax.clear()
        draw(self.axes)
        frame = [_frame(ax) for ax in self.axes]
        data = []
        for ax in self.axes:
            data += [*ax.lines, *ax.collections, *ax.patches, *ax.texts]
        if frame != self.frame:
            for artist in data:
                artist.set_animated(True)  # leaves it out of the background
            self.canvas.draw()
            self.background = self.canvas.copy_from_bbox(self.figure.bbox)
            self.frame = frame
        self.canvas.restore_region(self.background)
        for artist in sorted(data, key=lambda artist: artist.zorder):
            artist.axes.draw_artist(artist)
        buffer = io.BytesIO()
        image = Image.fromarray(np.asarray(self.canvas.buffer_rgba()))
        image.convert("RGB").save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def final(self) -> bytes:
        """The last picture again at twice the resolution, for the saved notebook."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=2 * self.figure.dpi)
        self.frame = None
        return buffer.getvalue()
