"""Runs that measure a GPU: long enough for its speed, with a batch that saturates it."""

from math import ceil

from cnnlab.launch.failures import RankError
from cnnlab.measure.compare import Measurement, measure_interleaved
from cnnlab.recipe import CnnlabError, Recipe

WARMUP_STEPS = 5  # they compile, capture CUDA graphs and time cuDNN's algorithms
SATURATED = 1.1  # a doubled batch that gains less than this does not count
MARGIN = 1.1  # because the next run may be faster than the first


def measure_once(recipe: Recipe, options: dict) -> Measurement | None:
    """One run of the recipe; None if it was stopped. `options`: of `measure_interleaved`."""
    for found in measure_interleaved({"": recipe}, 1, **options):
        return found[""]
    return None


def train_on(recipe: Recipe, images: float) -> Recipe:
    """The recipe with this many images after a warm-up that is long enough for a GPU."""
    warmup = max(recipe.warmup_steps, WARMUP_STEPS)
    return recipe.replace(warmup_steps=warmup, steps=warmup + ceil(images / recipe.batch_size))


def same_work(below: Measurement, candidate: Measurement, seconds: float) -> list[Recipe]:
    """The recipes of both with equally many images, so that the faster takes `seconds` on a GPU.

    If the rung below runs on the CPU, it keeps its steps, because this many images would take too
    long. If the batches differ, both are evaluated.
    """
    recipe, speed = candidate.recipe, candidate.images_per_s[0]
    if below.recipe.device == "cpu":
        return [below.recipe.replace(evaluate=False), train_on(recipe, MARGIN * seconds * speed)]
    images = MARGIN * seconds * max(speed, below.quartiles[1])
    compared = below.recipe.replace(evaluate=below.recipe.batch_size != recipe.batch_size)
    return [train_on(compared, images), train_on(recipe, images)]


def saturating_batch(recipe: Recipe, seconds: float, options: dict) -> int:
    """The batch that saturates the device: doubling it would gain less than 10%, or not fit."""
    batch, fastest, candidate = recipe.batch_size, 0.0, recipe
    while True:
        try:
            found = measure_once(candidate, options)
            if found is None or found.images_per_s[0] < SATURATED * fastest:
                return batch
            batch, fastest = candidate.batch_size, found.images_per_s[0]
            candidate = train_on(recipe.replace(batch_size=2 * batch), seconds * fastest)
        except (CnnlabError, RankError):  # no images or no memory are left
            return batch
