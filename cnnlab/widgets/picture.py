"""The live picture of a panel."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

Draw = Callable[[Sequence[Any]], Any]  # takes the axes


class Picture:
    """A matplotlib figure with a row of axes, rendered to PNG bytes."""

    def __init__(self, axes: int = 2, size: tuple[float, float] = (8.0, 3.1)) -> None:
        self.figure = Figure(figsize=size, dpi=100)
        self.axes = self.figure.subplots(1, axes, squeeze=False)[0]
        self.figure.subplots_adjust(left=0.07, right=0.97, bottom=0.16, top=0.9, wspace=0.2)

    def png(self, draw: Draw, scale: int = 1) -> bytes:
        """Clear the axes, call `draw(axes)`, and render at `scale` times the resolution."""
        for ax in self.axes:
            ax.clear()
        draw(self.axes)
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=scale * self.figure.dpi)
        return buffer.getvalue()
