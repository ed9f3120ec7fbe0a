"""Pipeline schedules, simulated: in which order ranks compute, when, and how long they are idle."""

from collections import deque
from collections.abc import Sequence

Span = tuple[int, str, int, float, float]  # (stage, phase, micro-batch, begin, end)


def stages_per_rank(schedule: str) -> int:
    """Stages that each rank holds. Stage s is on rank s % ranks."""
    return 2 if schedule == "interleaved" else 1


def action_order(schedule: str, ranks: int, micro_batches: int, rank: int) -> list[tuple]:
    """The actions (stage, "forward" or "backward", micro-batch) of a rank, in their order.

    All schedules run some forward passes first, then alternate, then run the backward passes that
    are left. Sources: Huang et al., "GPipe" (2019); Narayanan et al., "Efficient Large-Scale
    Language Model Training on GPU Clusters" (2021), for 1f1b and interleaved.
    """
    held = stages_per_rank(schedule)
    forward, backward = [], []
    for step in range(held * micro_batches):
        # Interleaved: as many micro-batches as ranks pass a stage, then the rank's next stage.
        turn = step // ranks % held
        micro_batch = step // (ranks * held) * ranks + step % ranks
        forward.append((turn * ranks + rank, "forward", micro_batch))
        backward.append(((held - 1 - turn) * ranks + rank, "backward", micro_batch))
    if schedule == "gpipe":
        first = micro_batches
    elif schedule == "1f1b":
        first = min(ranks - 1 - rank, micro_batches)
    else:
        first = min(ranks + 2 * (ranks - 1 - rank), held * micro_batches)
    alternating = zip(forward[first:], backward, strict=False)
    steady = [action for pair in alternating for action in pair]
    return [*forward[:first], *steady, *backward[len(forward) - first :]]


def simulate_schedule(
    schedule: str,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    micro_batches: int,
) -> list[Span]:
    """When each stage computes each micro-batch, if messages take no time.

    `forward_s`, `backward_s`: seconds per micro-batch of each stage; with the interleaved schedule,
    there are two stages per rank. `schedule`, `micro_batches`: as in a `Recipe`.
    """
    stages = len(forward_s)
    ranks = stages // stages_per_rank(schedule)
    queues = [deque(action_order(schedule, ranks, micro_batches, rank)) for rank in range(ranks)]
    seconds = {"forward": forward_s, "backward": backward_s}
    ends: dict[tuple | None, float] = {None: 0.0}  # of each action that has been scheduled
    free_at = [0.0] * ranks
    spans = []
    while any(queues):
        for rank, queue in enumerate(queues):
            if queue and _needed(queue[0], stages) in ends:
                stage, phase, micro_batch = action = queue.popleft()
                begin = max(free_at[rank], ends[_needed(action, stages)])
                free_at[rank] = ends[action] = begin + seconds[phase][stage]
                spans.append((stage, phase, micro_batch, begin, free_at[rank]))
    return spans


def _needed(action, stages):
    """The action whose result this one needs; None: only the images."""
    stage, phase, micro_batch = action
    if phase == "forward":
        return (stage - 1, phase, micro_batch) if stage > 0 else None
    if stage == stages - 1:
        return stage, "forward", micro_batch
    return stage + 1, phase, micro_batch


def bubble_fraction(spans: Sequence[Span], ranks: int) -> float:
    """The share of the ranks' time from the first begin to the last end in which they are idle."""
    if not spans:
        return 0.0
    busy = sum(end - begin for *_, begin, end in spans)
    total = max(span[-1] for span in spans) - min(span[-2] for span in spans)
    return 1 - busy / (ranks * total)


def equal_stages_bubble(schedule: str, ranks: int, micro_batches: int) -> float:
    """`bubble_fraction` by the formula for equal stages: (S - 1) / (V M + S - 1).

    S ranks, V stages per rank, M micro-batches (Narayanan et al., 2021, sections 2.2.1 and 2.2.2).
    """
    return (ranks - 1) / (stages_per_rank(schedule) * micro_batches + ranks - 1)
