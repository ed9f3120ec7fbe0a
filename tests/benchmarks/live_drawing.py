"""What the live picture costs: images/s of training with the panel drawing, and with its drawing thread idle, in turn.

python tests/benchmarks/live_drawing.py [ROUNDS]
"""

import sys
import threading
import time

from cnnlab import widgets
from cnnlab.events import Finished
from cnnlab.measure.compare import Measurement, speedup
from cnnlab.recipe import Recipe


def rate(recipe, drawing):
    live = widgets.TrainingPanel(recipe, vary={"batch_size": [recipe.batch_size]})
    frames, png = [], live.picture.png
    live.picture.png = lambda draw: frames.append(time.perf_counter()) or png(draw)
    if not drawing:
        live._keep_drawing = lambda over: over.wait()
    live.run()
    live.wait()
    fastest = min((b - a for a, b in zip(frames, frames[1:-1])), default=float("inf"))
    return (
        next(event for event in live.events if isinstance(event, Finished)).images_per_s,
        len(frames),
        fastest,
    )


def main(rounds):
    recipe = Recipe(batch_size=256, epochs=60, evaluate=False)
    rates = {"not drawn": [], "drawn": []}
    for _ in range(rounds):
        for name in rates:
            value, frames, fastest = rate(recipe, name == "drawn")
            rates[name].append(value)
    silent, drawn = (
        Measurement(name=name, recipe=recipe, images_per_s=tuple(values))
        for name, values in rates.items()
    )
    print(
        f"not drawn {silent.quartiles[1]:,.0f}, drawn {drawn.quartiles[1]:,.0f} images/s: {speedup(silent, drawn)}"
    )
    print(
        f"{frames} frames in the last run, the two nearest {1000 * fastest:.0f} ms apart; threads left: {threading.active_count() - 1}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
