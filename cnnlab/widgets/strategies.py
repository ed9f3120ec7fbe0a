"""The panel that compares data and model parallelism on the same ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from cnnlab.measure.compare import Measurement, measure_interleaved
from cnnlab.measure.memory import measure_ranks
from cnnlab.plots import memory_bars, speedup_bars, traffic_bars
from cnnlab.recipe import Recipe
from cnnlab.widgets.board import Panel, slider
from cnnlab.widgets.picture import Picture

ONE_RANK = "one rank"


def strategies(base: Recipe, ranks: int) -> dict[str, Recipe]:
    """{name: recipe} of the ways to train `base` on that many ranks, with the same batches."""
    micro_batches = 4 if base.batch_size % 4 == 0 else 1
    return {
        "DDP": base.replace(replicas=ranks, strategy="ddp"),
        "ZeRO-1": base.replace(replicas=ranks, strategy="zero1"),
        "FSDP": base.replace(replicas=ranks, strategy="fsdp"),
        "tensor": base.replace(tensor_ranks=ranks, strategy="tensor"),
        "pipeline": base.replace(stages=ranks, strategy="pipeline", micro_batches=micro_batches),
    }


class StrategyPanel(Panel):
    """A panel that trains `base` with each chosen strategy: images/s, memory, and bytes sent.

    The runs are interleaved with those of the baseline, one rank. `.measurements` is {name:
    `Measurement`}, `.memory` {name: bytes of each part, in the rank that needs the most}, and
    `.sent` {name: bytes that a rank sends in a step}.
    """

    def __init__(self, base: Recipe, ranks: Sequence[int] = (2, 4), repeats: int = 3) -> None:
        self.base = base
        self.repeats = repeats
        self.measurements: dict[str, Measurement] = {}
        self.memory: dict[str, dict[str, int]] = {}
        self.sent: dict[str, float] = {}
        options: Any = {"value": True, "indent": False, "layout": {"width": "110px"}}
        names = strategies(base, ranks[0])
        boxes = {name: widgets.Checkbox(description=name, **options) for name in names}
        controls = {"ranks": slider("ranks", ranks, ranks[0]), **boxes}
        picture = Picture(3, (12, 3.4))
        for ax, left, width in zip(
            picture.axes, (0.075, 0.52, 0.8), (0.36, 0.19, 0.19), strict=True
        ):
            ax.set_position((left, 0.16, width, 0.76))
        super().__init__(controls, self._work, self._take, self._draw, picture, follow=False)

    def _work(self, values, stop):
        chosen = strategies(self.base, values["ranks"])
        recipes = {ONE_RANK: self.base}
        recipes |= {name: recipe for name, recipe in chosen.items() if values[name]}
        self.measurements = {}
        self.memory = {}
        self.sent = {}
        total = len(recipes) * (self.repeats + 1)
        for done, (name, recipe) in enumerate(recipes.items()):
            yield done / total, f"{name}: memory and messages"
            ranks = measure_ranks(recipe, stop)
            if stop.is_set():
                return
            sizes, sent = zip(*ranks, strict=True)
            self.memory[name] = max(sizes, key=lambda parts: sum(parts.values()))
            self.sent[name] = max(sent)
        runs = measure_interleaved(recipes, self.repeats, stop=stop)
        for done, self.measurements in enumerate(runs, start=len(recipes) + 1):
            yield done / total, f"run {done - len(recipes)} of {total - len(recipes)}"

    def _take(self, event):
        return event

    def _draw(self, axes):
        measured = {name: found for name, found in self.measurements.items() if found.images_per_s}
        plots: list[tuple[Callable, Any]] = [
            (speedup_bars, measured),
            (memory_bars, self.memory),
            (traffic_bars, self.sent),
        ]
        for ax, (draw, data) in zip(axes, plots, strict=True):
            if data:
                draw(ax, data)
            else:
                ax.set_axis_off()
        axes[0].set_xlim(right=1.15 * axes[0].get_xlim()[1])  # long labels in narrow axes
