"""The panel of lesson 05: speedup over ranks, next to Amdahl's and Gustafson's laws."""

import numpy as np
from timing import speedup_of

from cnnlab import amdahl, gustafson, machine, plots
from cnnlab.widgets import Panel, Picture, slider

LAWS = {"strong": amdahl, "weak": gustafson}


class ScalingPanel(Panel):
    """Choose strong or weak scaling and the number of ranks, press Run, and a point appears.

    `seconds_of(ranks, copies)` runs the program with an image that is `copies` times as large, and
    returns its seconds. `serial`: the serial share for the lines of the laws. `predicted`: the
    learner's {ranks: speedup} for strong scaling.
    """

    def __init__(self, seconds_of, counts, serial, repeats, predicted):
        self.seconds_of = seconds_of
        self.counts = counts
        self.serial = serial
        self.repeats = repeats
        self.predicted = predicted
        self.pairs = {scaling: {} for scaling in LAWS}  # {ranks: [(of one rank, of all), ...]}
        controls = {
            "scaling": slider("scaling", list(LAWS), "strong"),
            "ranks": slider("ranks", counts, counts[0]),
        }
        work, picture = self._work, Picture(2, (9.4, 3.8))
        super().__init__(controls, work, lambda progress: progress, self.draw_laws, picture)

    def measure_pair(self, scaling, ranks):
        """Run the same work in one rank and in `ranks` ranks. The order changes each time."""
        pairs = self.pairs[scaling].setdefault(ranks, [])
        copies = ranks if scaling == "weak" else 1
        order = (1, ranks) if len(pairs) % 2 == 0 else (ranks, 1)
        seconds = {count: self.seconds_of(count, copies) for count in order}
        pairs.append((seconds[1], seconds[ranks]))

    def measure_missing(self):
        """Measure the points that have too few pairs."""
        self.wait()
        for scaling in LAWS:
            for ranks in self.counts:
                while len(self.pairs[scaling].get(ranks, [])) < self.repeats:
                    self.measure_pair(scaling, ranks)

    def speedups(self, scaling):
        """{ranks: Speedup over one rank}, from all pairs so far."""
        found = {}
        for ranks, pairs in sorted(self.pairs[scaling].items()):
            if pairs:
                found[ranks] = speedup_of("one rank", *zip(*pairs, strict=True))
        return found

    def draw_laws(self, axes):
        """Draw strong scaling into the first axes and weak scaling into the second ones."""
        for ax, (scaling, law) in zip(axes, LAWS.items(), strict=True):
            found, last = self.speedups(scaling), self.counts[-1]
            guess = self.predicted if scaling == "strong" else None
            gains = list(found.values())
            plots.scaling_curve(ax, list(found), gains, self.serial, guess, law, last)
            ax.set_title(f"{scaling} scaling, {machine.cores()} cores", fontsize=10)
            ax.set_xlabel("ranks")

    def _work(self, values, stop):
        scaling, ranks = values["scaling"], values["ranks"]
        for number in range(1, self.repeats + 1):
            if stop.is_set():
                return
            self.measure_pair(scaling, ranks)
            pairs = self.pairs[scaling][ranks]
            middle = np.median([one / many for one, many in pairs])
            line = f"{scaling} scaling, {ranks} ranks: <b>{middle:.2f}x</b>, median of {len(pairs)}"
            yield number / self.repeats, f"{line} pairs"
