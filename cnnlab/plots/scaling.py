"""Pictures of runs: pure `draw(ax, data)` functions, the same for live, recorded and tested plots.

The curves can be drawn again on the same axes with more data: a line that is there already only gets new points.
"""

import numpy as np

from cnnlab.measure.scaling import amdahl
from cnnlab.plots.style import (
    COLORS,
    PREDICTED,
    REJECTED,
    _plain,
)


def scaling_curve(ax, workers, measured, serial=None, prediction=None, law=amdahl):
    """Speedup against workers: measured points beside the ideal line, and the law's curve for a serial share.

    `measured`: a `Speedup` for each entry of `workers`. `prediction`: {workers: speedup}, made before. `law`: `amdahl` where
    the work stays the same (strong scaling), `gustafson` where it grows with the workers (weak scaling).
    """
    n = np.linspace(1, max([2, *workers]), 50)
    ax.plot(n, n, "--", color=REJECTED, label="ideal")
    if serial is not None:
        ax.plot(
            n,
            law(n, serial),
            color=COLORS[1],
            label=f"{law.__name__.title()}, {100 * serial:.0f}% serial",
        )
    values = [speedup.value for speedup in measured]
    known = [np.isfinite(s.high) for s in measured]  # one run alone has no interval
    spread = [
        [(s.value - s.low) * k for s, k in zip(measured, known)],
        [min(s.high - s.value, s.value) if k else 0 for s, k in zip(measured, known)],
    ]
    ax.errorbar(
        workers,
        values,
        yerr=spread,
        fmt="o",
        color=COLORS[0],
        capsize=3,
        label="measured" + " (95% confidence)" * any(known),
    )
    if prediction:
        ax.plot(
            list(prediction),
            list(prediction.values()),
            "x",
            color=PREDICTED,
            markersize=9,
            label="your prediction",
        )
    ax.set_xticks(sorted({1, *workers}))
    ax.set_xlabel("workers")
    ax.set_ylabel(f"speedup over {measured[0].baseline}" if measured else "speedup")
    ax.set_ylim(0, 1.1 * max([2, *workers, *values, *(prediction or {}).values()]))
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    _plain(ax)
