"""Memory of training strategies: what each rank holds, next to the formulas."""

from collections.abc import Mapping
from typing import Any

from cnnlab.plots.style import COLORS, PHASES, Axes, hide_frame, label_at, legend_above_bars

PART_COLORS = {
    "parameters": COLORS[0],
    "gradients": COLORS[2],
    "optimizer state": COLORS[4],
    "activations": COLORS[5],
}

Sizes = Mapping[str, Mapping[str, float]]  # {name of a strategy or rank: {part: bytes}}


def memory_bars(ax: Axes, measured: Sizes, formula: Sizes | None = None) -> None:
    """Draw the bytes of each part of the memory as a stacked bar, the formula's below, hatched."""
    formula = formula or {}
    names = list(dict.fromkeys([*measured, *formula]))
    totals = [sum(sizes.values()) for sizes in (*measured.values(), *formula.values())]
    widest = max([1.0, *totals])
    unit, name_of_unit = byte_unit(widest)
    height = 0.36 if formula else 0.6
    for number, bars in enumerate((measured, formula)):
        for name, sizes in bars.items():
            y = names.index(name) + (0.2 * (2 * number - 1) if formula else 0)
            look = _look(is_formula=number == 1)
            left = 0.0
            for part, color in PART_COLORS.items():
                width = sizes.get(part, 0) / unit
                ax.barh(y, width, left=left, height=height, color=color, **look)
                left += width
            label_at(ax, f"{left:.3g}", left, y, offset=4)
    for part, color in PART_COLORS.items():
        ax.barh(0, 0, color=color, label=part)
    if formula:
        ax.barh(0, 0, color="white", label="formula", **{**_look(True), "edgecolor": "gray"})
    ax.set_yticks(range(len(names)), names)
    lowest = max(len(names), 2) - 0.4
    ax.set(xlim=(0, 1.2 * widest / unit), ylim=(lowest, -0.8 - 0.1 * lowest))
    ax.set_xlabel(f"{name_of_unit} per rank")
    hide_frame(ax)
    legend_above_bars(ax, columns=3)


def traffic_bars(ax: Axes, sent: Mapping[str, float]) -> None:
    """Draw the bytes that a rank sends in a training step, by strategy."""
    widest = max([1.0, *sent.values()])
    unit, name_of_unit = byte_unit(widest)
    for row, size in enumerate(sent.values()):
        ax.barh(row, size / unit, height=0.6, color=PHASES["communication"])
        label_at(ax, f"{size / unit:.3g}", size / unit, row, offset=4)
    ax.set_yticks(range(len(sent)), list(sent))
    ax.set(xlim=(0, 1.2 * widest / unit), xlabel=f"{name_of_unit} sent per rank and step")
    ax.invert_yaxis()
    hide_frame(ax)


def byte_unit(size: float) -> tuple[int, str]:
    """The unit in which to write a number of bytes: (bytes in it, its name)."""
    power = next((power for power in (3, 2, 1) if size >= 1024**power), 0)
    return 1024**power, ("bytes", "KiB", "MiB", "GiB")[power]


def _look(is_formula: bool) -> dict[str, Any]:
    return {"hatch": "////", "alpha": 0.5, "edgecolor": "white"} if is_formula else {}
