"""Pictures of runs: pure `draw(ax, data)` functions, the same for live, recorded and tested plots.

The curves can be drawn again on the same axes with more data: a line that is there already only gets new points.
"""

import numpy as np

from .compare import speedup
from .events import Evaluated, Finished, Progress, Started
from .scaling import amdahl

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")    # Okabe and Ito: told apart by everyone
LOST, RECORDED, PREDICTED = "#BBBBBB", "#888888", "#000000"
BY = {"images": "training images seen", "seconds": "seconds of training"}
PHASES = {"waiting": "#E69F00", "forward": "#56B4E9", "backward": "#0072B2", "update": "#009E73", "communication": "#D55E00", "exposed": "#D55E00"}
CLEAR = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}       # behind text that may lie on a line


def loss(ax, runs, by="images"):
    """Training loss of each step, mean over the ranks. `runs`: {label: its events so far}; `by`: "images" seen, or "seconds"."""
    highest = 0.0
    for number, (label, events) in enumerate(runs.items()):
        x, losses = losses_of(events, by)
        colour = COLOURS[number % len(COLOURS)]
        _curve(ax, f"{number} raw", x, losses, color=colour, alpha=0.3, linewidth=0.8)
        _curve(ax, f"{number} mean", x, _running_mean(losses), color=colour, linewidth=1.8, label=label)
        highest = max([highest, *losses])
    _frame(ax, "training loss (cross-entropy)", BY[by], runs)
    ax.set_ylim(0, 2.5 if highest < 2.5 else min(2.0 ** np.ceil(np.log2(highest)), 64) if np.isfinite(highest) else 64)


def accuracy(ax, runs, by="images"):
    """Accuracy against images seen, or seconds: held-out images as points, training images, as they came, as a faint line."""
    for number, (label, events) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        shown = [event for event in events if event.rank == 0]
        progress = [event for event in shown if isinstance(event, Progress)]
        held_out = [event for event in shown if isinstance(event, Evaluated)]
        batch = _recipe(shown).batch_size if progress or held_out else 1
        x = lambda event: event.seconds if by == "seconds" else event.step * batch
        _curve(ax, f"{number} train", [x(e) for e in progress], [100 * e.accuracy for e in progress], color=colour, alpha=0.35, linewidth=1)
        _curve(ax, f"{number} test", [x(e) for e in held_out], [100 * e.accuracy for e in held_out], color=colour,
               marker="o", markersize=4, linewidth=1.5, label=label)
    _frame(ax, "accuracy (%): held out (points), training (faint)", BY[by], runs)
    ax.set_ylim(0, 102)


def throughput(ax, runs):
    """Images/s, all ranks together, against seconds of training; the warm-up left out."""
    highest = 1.0
    for number, (label, events) in enumerate(runs.items()):
        progress = [e for e in events if isinstance(e, Progress) and e.rank == 0 and not e.warming_up]
        rates = [e.images_per_s for e in progress]
        _curve(ax, f"{number}", [e.seconds for e in progress], rates, color=COLOURS[number % len(COLOURS)], linewidth=1.5, marker=".", label=label)
        highest = max([highest, *rates])
    _frame(ax, "images/s", "seconds of training", runs)
    ax.set_ylim(0, _round_up(1.1 * highest))


def timeline(ax, runs):
    """The last steps of the newest run, a row a rank: what it did when; in a lane below, when exchanges with other ranks were on.

    Communication in the bar itself is "exposed": the rank had nothing else left to do.
    """
    events = list(runs.values())[-1] if runs else []
    last = {}
    for event in events:
        if isinstance(event, Progress) and event.spans:
            last[event.rank] = event
    world = max((event.world for event in events if isinstance(event, Started)), default=1)
    until = min((max(end for _, _, end in event.spans) for event in last.values()), default=0.0)
    since = max((min(begin for _, begin, _ in event.spans) for event in last.values()), default=0.0)
    for phase, colour in PHASES.items():
        shared = phase == "communication"
        spans = [(rank + 0.34 * shared, begin, end) for rank, event in last.items() for name, begin, end in event.spans
                 if name == phase and end > since and begin < until]
        x = [1000 * (time - since) for _, begin, end in spans for time in (begin, end, np.nan)]
        y = [row for row, _, _ in spans for _ in range(3)]
        _curve(ax, phase, x, y, color=colour, linewidth=(30 if shared else 90) / max(world, 3), solid_capstyle="butt", label="" if phase == "exposed" else phase)
    _fit(ax, 1000 * max(until - since, 0.001), 1.1)
    ax.set_ylim(world - 0.3, -1.1)             # room above for the legend
    if len(ax.get_yticklabels()) != world or not ax.get_legend():
        ax.set_yticks(range(world), [f"rank {rank}" for rank in range(world)])
        ax.set_xlabel("milliseconds: the last steps")
        ax.spines[["top", "right"]].set_visible(False)
        _legend_of_bars(ax, 5)


def where_time_goes(ax, runs):
    """Milliseconds a step of each run, a bar each: computing, waiting for the loader, for other ranks. `runs`: {label: events}.

    Of a run under way, those of its last steps; on a GPU, nothing before it has finished.
    """
    steps = {label: parts for label, events in runs.items() if (parts := _step_of(events))}
    parts = {"compute": COLOURS[0], "waiting for data": PHASES["waiting"], "waiting for other ranks": PHASES["exposed"]}
    for number, (part, colour) in enumerate(parts.items()):
        if number == 2 and not any(step[2] for step in steps.values()):
            continue
        x = [at for step in steps.values() for at in (sum(step[:number]), sum(step[:number + 1]), np.nan)]
        y = [row for row, step in enumerate(steps.values()) for _ in range(3)]
        _curve(ax, part, x, y, color=colour, linewidth=min(22, 110 / max(len(steps), 1)), solid_capstyle="butt", label=part)
    _fit(ax, max((sum(step) for step in steps.values()), default=1.0), 1.15)
    if [label.get_text() for label in ax.get_yticklabels()] != list(steps) or not ax.get_legend():
        ax.set_yticks(range(len(steps)), list(steps))
        ax.set_ylim(max(len(steps), 1) - 0.4, -1.3)          # room above for the legend
        ax.set_xlabel("milliseconds a step")
        _legend_of_bars(ax, 3)
        _plain(ax)


def speedups(ax, measurements, prediction=None, caveat=None):
    """Images/s of each `Measurement` with its quartiles, and its `Speedup` over the first. `prediction`: of the last's.

    `caveat`: what else differs, as `compare.unfair` says; it is written on the plot.
    """
    names = list(measurements)
    quartiles = [measurements[name].quartiles for name in names]
    medians = [median for _, median, _ in quartiles]
    errors = [[median - q1 for q1, median, _ in quartiles], [q3 - median for _, median, q3 in quartiles]]
    ax.barh(names, medians, xerr=errors, color=[COLOURS[i % len(COLOURS)] for i in range(len(names))], capsize=3, height=0.6)
    gains = [speedup(measurements[names[0]], measurements[name]) for name in names]
    for row, (gain, (_, median, q3)) in enumerate(zip(gains, quartiles)):
        said = f"  ({gain.value:.2f}x" + ("" if gain.significant else ": no significant difference") + ")"
        ax.annotate(f"{median:,.0f}" + (said if row else ""), (q3, row), (8, 0), textcoords="offset points",
                    va="center", fontsize=9, bbox=CLEAR)
    if prediction:
        x, last = prediction * medians[0], len(names) - 1
        ax.plot([x, x], [last - 0.4, last + 0.4], color=PREDICTED, linestyle=":", linewidth=2)
        ax.annotate("your prediction", (x, last - 0.4), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, max([1.7 * max([*medians, *(q3 for _, _, q3 in quartiles)]), 1.1 * (prediction or 0) * medians[0]]))      # room for what is said
    ax.set_xlabel("images/s: median, quartiles")
    if caveat:
        ax.set_title("not the same work: " + ", ".join(f"{name} {values}" for name, values in caveat.items()), color=COLOURS[1], fontsize=9)
    _plain(ax)


def ladder(ax, rungs, prediction=None, recorded=None, running=None):
    """The ladder so far: a bar a rung, speedup over the naive baseline with its 95% confidence interval.

    `rungs`: rungs as JSON has them (`Rung.to_dict`), from the ground up; those that lost are grey. `prediction`:
    of the best rung's speedup. `recorded`: what `cnnlab ladder --json` wrote on another machine, drawn as
    diamonds beside the rungs of the same name. `running`: name of the rung being measured.
    """
    names = [rung["name"] for rung in rungs] + ([running] if running and running not in [rung["name"] for rung in rungs] else [])
    others = {rung["name"]: rung["speedup"] for rung in recorded["rungs"]} if recorded else {}
    names += [name for name in others if name not in names]
    widest = max([2.0, *(min(rung["speedup_ci"][1], 1.5 * rung["speedup"]) for rung in rungs), *others.values(), prediction or 0])
    for row, rung in enumerate(rungs):
        (low, high), value, kept = rung["speedup_ci"], rung["speedup"], rung["kept"]
        colour = LOST if kept is False else COLOURS[5] if kept is None else COLOURS[0]
        ax.barh(row, value, color=colour, height=0.6, hatch="//" if kept is False else None, edgecolor="white")
        if 0 < low < high < float("inf"):
            ax.errorbar(value, row, xerr=[[value - low], [high - value]], color="black", capsize=3, linewidth=1)
        lost = "  slower: left out" if rung["over_below_ci"][1] < 1 else "  no significant gain: left out"
        ax.annotate(f"{value:.2f}x" + {True: "", False: lost, None: "  ..."}[kept], (max(value, min(high, widest)), row), (6, 0),
                    textcoords="offset points", va="center", fontsize=9, bbox=CLEAR)
    if others:
        points = [(value, names.index(name)) for name, value in others.items()]
        where = f"recorded: {place(recorded['machine'])}, batch {recorded['recipe']['batch_size']}"
        ax.plot(*zip(*points), "D", color=RECORDED, markersize=5, markerfacecolor="none", label=where)
    if prediction:
        ax.axvline(prediction, color=PREDICTED, linestyle=":", linewidth=2, label=f"your prediction: {prediction:g}x")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(max(len(names), 4) - 0.4, -0.6)
    ax.set_xlim(0, 1.5 * widest)
    ax.set_xlabel("speedup over the naive baseline (bars: 95% confidence)")
    if others or prediction:
        ax.legend(frameon=False, loc="upper right", fontsize=9)
    _plain(ax)


def place(machine):
    """A machine, as JSON has it, in a few words: processor, cores, GPUs."""
    return ", ".join([machine["name"], f"{machine['cores']} cores", *machine["gpus"]])


def roofline(ax, peaks, points=None, precision="fp32"):
    """The roofline of Williams, Waterman and Patterson (2009): attainable FLOP/s against FLOP per byte moved.

    `peaks`: as `machine.peaks` measures them; `points`: {name: (FLOP per byte, FLOP/s)}.
    """
    intensity = np.logspace(-1, 4, 200)
    shown = [name for name in peaks if name != "copy"]
    for number, name in enumerate(shown):
        style = dict(color=COLOURS[number], linewidth=2 if name == precision else 1, alpha=1 if name == precision else 0.6)
        roof = np.minimum(peaks["copy"] * intensity, peaks[name]) / 1e9
        ax.loglog(intensity, roof, label=f"{name} peak {peaks[name] / 1e9:,.0f} GFLOP/s", **style)
    labels = []                              # (x, y) of each: one that would lie on another moves up
    for number, (name, (x, y)) in enumerate(sorted((points or {}).items(), key=lambda item: item[1][1])):
        ax.plot(x, y / 1e9, "o", color=COLOURS[(number + 1) % len(COLOURS)], markersize=7)
        height = max([y / 1e9, *(1.45 * below for left, below in labels if 0.3 < x / left < 3 and below < y / 1e9 * 1.45)])
        labels.append((x, height))
        ax.annotate(name, (x, height), (8, 0), textcoords="offset points", va="center", fontsize=9, bbox=CLEAR)
    ax.set_xlabel("arithmetic intensity (FLOP per byte moved)")
    ax.set_ylabel("GFLOP/s")
    ax.set_title(f"memory: {peaks['copy'] / 1e9:.0f} GB/s copied", fontsize=10)
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    _plain(ax)


def scaling(ax, workers, measured, serial=None, prediction=None, law=amdahl):
    """Speedup against workers: measured points beside the ideal line, and the law's curve for a serial share.

    `measured`: a `Speedup` for each entry of `workers`. `prediction`: {workers: speedup}, made before. `law`: `amdahl` where
    the work stays the same (strong scaling), `gustafson` where it grows with the workers (weak scaling).
    """
    n = np.linspace(1, max([2, *workers]), 50)
    ax.plot(n, n, "--", color=LOST, label="ideal")
    if serial is not None:
        ax.plot(n, law(n, serial), color=COLOURS[1], label=f"{law.__name__.title()}, {100 * serial:.0f}% serial")
    values = [speedup.value for speedup in measured]
    known = [np.isfinite(s.high) for s in measured]              # one run alone has no interval
    spread = [[(s.value - s.low) * k for s, k in zip(measured, known)], [min(s.high - s.value, s.value) if k else 0 for s, k in zip(measured, known)]]
    ax.errorbar(workers, values, yerr=spread, fmt="o", color=COLOURS[0], capsize=3, label="measured" + " (95% confidence)" * any(known))
    if prediction:
        ax.plot(list(prediction), list(prediction.values()), "x", color=PREDICTED, markersize=9, label="your prediction")
    ax.set_xticks(sorted({1, *workers}))
    ax.set_xlabel("workers")
    ax.set_ylabel(f"speedup over {measured[0].baseline}" if measured else "speedup")
    ax.set_ylim(0, 1.1 * max([2, *workers, *values, *(prediction or {}).values()]))
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    _plain(ax)


def losses_of(events, by="images"):
    """(images seen, or seconds of training; loss) of every step: mean over the ranks, as far as all have reported.

    Under async, whose ranks take steps of their own, those of rank 0. What was trained again after a restart counts once.
    """
    ranks, begun, world, alone = {}, {}, 0, False            # {rank: [(images, seconds, loss)]}, {rank: (images, seconds) at its start}
    for event in events:
        if isinstance(event, Started):
            world, alone = event.world, event.recipe.strategy == "async"
            images = event.first_step * event.recipe.batch_size
            kept = ranks[event.rank] = [point for point in ranks.get(event.rank, []) if point[0] <= images]
            begun[event.rank] = images, kept[-1][1] if kept else 0.0
        elif isinstance(event, Progress) and event.rank in ranks:
            points, steps = ranks[event.rank], len(event.losses)
            images, seconds = points[-1][:2] if points else begun[event.rank]
            new = np.linspace((images, seconds), (event.images, begun[event.rank][1] + event.seconds), steps + 1)[1:]
            points += [(*at, loss) for at, loss in zip(new, event.losses)]
    if alone:
        ranks, world = {0: ranks.get(0, [])}, 1
    done = min(map(len, ranks.values())) if ranks and len(ranks) >= world else 0
    if not done:
        return [], []
    points = np.mean([points[:done] for points in ranks.values()], axis=0)
    return points[:, 1 if by == "seconds" else 0], points[:, 2]


def _step_of(events):
    """Milliseconds (computing, waiting for data, for other ranks) of a step of rank 0; None where the run has not told yet."""
    end = next((event for event in events if isinstance(event, Finished) and event.rank == 0), None)
    if end:
        return [1000 * (seconds or 0.0) for seconds in (end.compute_s, end.waiting_s, end.communication_s)]
    spans = next((event.spans for event in reversed(events) if isinstance(event, Progress) and event.rank == 0), [])
    steps = sum(phase == "waiting" for phase, _, _ in spans)
    sums = [sum(end - begin for phase, begin, end in spans if phase in some) for some in (("forward", "backward", "update"), ("waiting",), ("exposed",))]
    return [1000 * seconds / steps for seconds in sums] if steps else None


def _recipe(events):
    return next(event.recipe for event in events if hasattr(event, "recipe"))


def _running_mean(values, window=10):
    """Mean over the last `window` values; over fewer at the start."""
    padded = np.concatenate([np.zeros(window - 1), values])
    counts = np.minimum(np.arange(1, len(values) + 1), window)
    return np.lib.stride_tricks.sliding_window_view(padded, window).sum(axis=1) / counts if len(values) else counts


def _curve(ax, gid, x, y, **style):
    """The line of that id, with new points; made when it is not there yet."""
    line = next((line for line in ax.lines if line.get_gid() == gid), None)
    if line is None:
        line, = ax.plot([], [], gid=gid, **style)
    line.set_data(x, y)
    if "label" in style:
        line.set_label(style["label"])


def _frame(ax, title, xlabel, runs):
    """Limits that seldom change, so that a live picture need not be drawn anew: x ends where the longest run will."""
    ends = [last for line in ax.lines if len(line.get_xdata()) for last in [line.get_xdata()[-1]]]
    totals = [event.steps * event.recipe.batch_size for events in runs.values() for event in events if hasattr(event, "recipe")]
    ax.set_xlim(0, max(totals, default=1) if "images" in xlabel else _round_up(max(ends, default=1)))
    if ax.get_xlabel() != xlabel:
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel(xlabel)
        _plain(ax)
    labels = list(runs)
    legend = ax.get_legend()
    if len(labels) > 1 and (legend is None or [text.get_text() for text in legend.get_texts()] != labels):
        ax.legend(frameon=False, fontsize=8, loc="best" if "loss" in title else "lower right")


def _fit(ax, width, room):
    """Limits for bars up to `width`, and as much room; they stay while they fit: a live picture is then drawn faster."""
    shown = ax.get_xlim()[1] if ax.get_legend() else 0
    if not width <= shown <= 3 * width:
        ax.set_xlim(0, _round_up(room * width))


def _legend_of_bars(ax, columns):
    """A legend above bars that are thick lines; thinner in it."""
    ax.legend(frameon=False, fontsize=8, ncols=columns, loc="upper left", columnspacing=0.8, handlelength=0.8, handletextpad=0.4, borderaxespad=0)
    for line in ax.get_legend().get_lines():
        line.set_linewidth(6)


def _round_up(value):
    """The next of 1, 1.5, 2, 3, 5, 7, 10 times a power of ten: limits that stay put while data grow."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-9)))
    return next(step * power for step in (1, 1.5, 2, 3, 5, 7, 10) if step * power >= value * (1 - 1e-9))


def _plain(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
