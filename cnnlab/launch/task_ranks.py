"""Real ranks for the tasks of the lessons that are solved by several ranks together."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

from cnnlab.launch.launcher import ranks


@cache
def _start_ranks() -> None:
    """The first start of ranks takes seconds, which must not count for the timeout."""
    ranks(os.getpid, 2)


def call_in_ranks(call: Callable[[], Any], world: int, timeout: float) -> dict[str, Any]:
    """{"rank 0": what call() returns in rank 0, ...} of `world` ranks.

    Raises `RankError` if a rank fails, or has not finished after `timeout` seconds.
    """
    _start_ranks()
    values = ranks(call, world, timeout=timeout)
    return {f"rank {rank}": value for rank, value in enumerate(values)}
