"""The loop of pipeline-parallel training."""

from collections.abc import Iterator

from cnnlab.events import Event
from cnnlab.recipe import Recipe


def train_pipeline(
    recipe: Recipe, rank: int, world: int, checkpoints: str | None = None
) -> Iterator[Event]:
    """Train with strategy='pipeline' and yield the same events as `loop.train`."""
    raise NotImplementedError
