"""Predict data-parallel training on a cluster that is described on paper, or on this machine.

In the folder notebooks:

    python -m many_machines.predict SPEC.json [--json FILE] [--png FILE]
    python -m many_machines.predict --here

`predictor.py` describes a SPEC. `--here` predicts 2 and 4 ranks on this machine, then runs them.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from many_machines import calibrate
from many_machines.predictor import predict
from matplotlib.figure import Figure
from tyro.conf import FlagCreatePairsOff, Positional, arg

from cnnlab import record
from cnnlab.plots.style import COLORS, REJECTED, Axes, color_of, hide_frame
from cnnlab.recipe import CnnlabError

File = Annotated[Path | None, arg(metavar="FILE")]
SpecFile = Annotated[Path | None, arg(metavar="[SPEC.json]")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Predict the throughput of a cluster, or of this machine."""

    spec_file: Positional[SpecFile] = None  # a cluster on paper
    here: FlagCreatePairsOff[bool] = False  # predict more ranks on this machine, then run them
    json: File = None  # write the predictions as JSON
    png: File = None  # draw them


def main(words: Sequence[str] | None = None) -> int:
    """Predict, print, write and draw. Returns 0, or 2 if the request is invalid."""
    try:
        run(tyro.cli(Options, prog="python -m many_machines.predict", args=words))
        return 0
    except CnnlabError as error:
        print(f"cnnlab: {error}", file=sys.stderr)
        return 2


def run(options: Options) -> None:
    if options.here == bool(options.spec_file):
        raise CnnlabError("predict needs a SPEC.json or --here, and not both.")
    for path in filter(None, (options.json, options.png)):
        record.check_writable(path)
    if options.spec_file:
        result = predict(read_spec(options.spec_file))
        print("\n".join(prediction_lines(result)))
    else:
        result = calibrate.predict_here()
    if options.json:
        record.write_json(options.json, result)
    if options.png:
        draw(result, options.png)


def read_spec(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CnnlabError(f"the spec {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CnnlabError(f"the spec {path} is not valid JSON: {error}.") from None


def prediction_lines(result: dict[str, Any]) -> Iterator[str]:
    """A table of the predictions, in ms per step, and what they assume."""
    yield (
        f"{'devices':>9} {'images/s':>13} {'speedup':>10} {'efficiency':>10} {'step':>9} "
        f"{'compute':>9} {'exposed':>9} {'jitter':>9} ms, bound by"
    )
    for row in result["predictions"]:
        parts = ("step_s", "compute_s", "exposed_communication_s", "jitter_s")
        times = " ".join(f"{1000 * row[part]:9.1f}" for part in parts)
        speed = f"{row['images_per_s']:13,.0f} {row['speedup']:10,.1f} {row['efficiency']:10.1%}"
        yield f"{row['devices']:9,} {speed} {times}     {row['bound_by']}"
    yield ""
    for name, assumption in result["assumptions"].items():
        value = assumption["value"]
        if isinstance(value, list):
            value = f"{len(value)} layers"
        elif isinstance(value, float):
            value = f"{value:.3g}"
        yield f"{name:20} {value!s:12} {assumption['origin']}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the predictions, and what was measured here."""
    measured = {row["ranks"]: row["efficiency"] for row in result.get("measured", [])}
    figure = Figure(figsize=(9, 5), layout="constrained")
    points = {"measured here": measured} if measured else {}
    prediction_curve(figure.subplots(), result["predictions"], points)
    figure.savefig(path, dpi=150, format="png")


def prediction_curve(
    ax: Axes,
    predictions: Sequence[Mapping[str, Any]],
    published: Mapping[str, Mapping[int, float]] | None = None,
) -> None:
    """Draw where the time of a step goes, by the number of devices; the lowest area is efficiency.

    `predictions`: those of `predict()`. `published`: {label: {devices: measured efficiency}}.
    """
    rows = sorted(predictions, key=lambda row: row["devices"])
    devices = np.array([row["devices"] for row in rows])
    step_s = np.array([row["step_s"] for row in rows])
    efficiency = np.array([row["efficiency"] for row in rows])
    exposed_s = np.array([row["exposed_communication_s"] for row in rows])
    jitter_s = np.array([row["jitter_s"] for row in rows])
    lost = np.array([exposed_s, jitter_s]) / step_s
    parts = 100 * np.array([efficiency, *lost, 1 - efficiency - lost.sum(axis=0)])
    labels = ["useful work", "exposed communication", "waiting for the slowest", "stack efficiency"]
    colors = ["#CDE3F0", COLORS[1], COLORS[4], REJECTED]
    ax.stackplot(devices, parts, labels=labels, colors=colors)
    ax.plot(devices, parts[0], color=COLORS[0], marker="o" if len(rows) < 30 else "", clip_on=False)
    for number, (label, points) in enumerate((published or {}).items()):
        percent = [100 * value for value in points.values()]
        color = color_of(number + 2)
        ax.plot(list(points), percent, "D", label=label, color=color, mec="white", clip_on=False)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    if len(rows) < 8:
        ax.set_xticks(devices)
    ax.minorticks_off()
    ax.set_xlim(devices[0], max(2 * devices[0], devices[-1]))
    ax.set_ylim(0, 105)
    ax.set_xlabel("devices")
    ax.set_ylabel("efficiency (% of a step)")
    ax.legend(fontsize=9, loc="lower left", framealpha=0.9, edgecolor="none")
    hide_frame(ax)


if __name__ == "__main__":
    sys.exit(main())
