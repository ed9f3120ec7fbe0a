"""What the live picture costs: throughput of training with and without drawing, interleaved.

python tests/benchmarks/live_drawing.py [ROUNDS]
"""

import sys
import threading
import time
from itertools import pairwise

from cnnlab import widgets
from cnnlab.events import Finished
from cnnlab.measure.compare import Measurement, speedup
from cnnlab.recipe import Recipe


def train(recipe: Recipe, drawing: bool) -> tuple[Finished, list[tuple[float, float]]]:
    """Train in a panel. Returns its figures, and (start, CPU seconds) of each frame."""
    panel = widgets.TrainingPanel(recipe, vary={"batch_size": [recipe.batch_size]})
    frames = []
    png = panel.picture.png

    def timed_png(*args, **options):
        start, cpu = time.perf_counter(), time.thread_time()
        image = png(*args, **options)
        frames.append((start, time.thread_time() - cpu))
        return image

    panel.picture.png = timed_png
    if not drawing:
        panel._keep_drawing = lambda over: over.wait()
    panel.run()
    panel.wait()
    return next(event for event in panel.events if isinstance(event, Finished)), frames


def main(rounds: int) -> None:
    recipe = Recipe(batch_size=256, epochs=60, evaluate=False)
    rates = {"not drawn": [], "drawn": []}
    for _ in range(rounds):
        for name, values in rates.items():
            finished, frames = train(recipe, drawing=name == "drawn")
            values.append(finished.images_per_s)
    silent, drawn = (
        Measurement(name=name, recipe=recipe, images_per_s=tuple(values))
        for name, values in rates.items()
    )
    medians = [f"{m.name} {m.quartiles[1]:,.0f}" for m in (silent, drawn)]
    print(f"{', '.join(medians)} images/s: {speedup(silent, drawn)}")
    gaps = [later - start for (start, _), (later, _) in pairwise(frames[:-1])]
    cpu = sorted(seconds for _, seconds in frames)[len(frames) // 2]
    print(
        f"{len(frames)} frames in the last run, {1000 * cpu:.0f} ms of CPU time each (median), "
        f"at least {1000 * min(gaps):.0f} ms apart; threads left: {threading.active_count() - 1}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
