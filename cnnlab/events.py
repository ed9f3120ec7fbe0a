"""What a run yields while it runs. Plots, panels, records and comparisons read only events."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, get_args

from cnnlab.recipe import CnnlabError, Recipe


def to_dict(event: "Event") -> dict[str, Any]:
    """An event as JSON-safe values, with its type under "event"."""
    return {"event": type(event).__name__, **asdict(event)}


def from_dict(values: dict[str, Any]) -> "Event":
    """The inverse of `to_dict`. Raises `CnnlabError` if `values` is not an event.

    Fields that older records lack take their defaults.
    """
    values = dict(values)
    kind = EVENT_TYPES.get(values.pop("event", None))
    known = fields(kind) if kind else ()
    values = {f.name: f.default for f in known if f.default is not MISSING} | values
    if kind is None or {f.name for f in known} != set(values):
        raise CnnlabError("this line is not an event of this version of cnnlab.")
    if kind is Started:
        values["recipe"] = Recipe.from_dict(values["recipe"])
    return kind(**values)


@dataclass(frozen=True, kw_only=True)
class Started:
    """The rank is ready to take its first step."""

    rank: int
    world: int  # number of ranks in the run
    recipe: Recipe
    pid: int
    parameters: int  # trainable parameters of the model
    train_images: int
    test_images: int
    steps: int  # that the whole run takes
    first_step: int  # steps that were done before the checkpoint that this run resumes
    threads: int  # CPU threads of this rank
    cores: list[int] | None  # that this rank is pinned to; None if the system does not say


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What happened since this rank's previous `Progress`. All times are in seconds."""

    rank: int
    epoch: int  # from 1
    step: int  # steps done, from 1; under async, those of an average rank
    images: int  # training images so far, all ranks together
    seconds: float  # training clock since the start, without the time of the consumer
    losses: list[float]  # of each step, mean over this rank's images
    accuracy: float  # fraction of this rank's training images classified correctly
    images_per_s: float  # throughput, all ranks together
    warming_up: bool  # whether the speed figures leave these steps out
    spans: list  # [phase, begin, end] of the latest steps, in Unix time


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Accuracy and mean loss over the held-out images, each counted once."""

    rank: int
    epoch: int
    step: int
    seconds: float  # training clock, without evaluation
    accuracy: float
    loss: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The figures of the whole run. Rates and times per step leave the warm-up steps out."""

    rank: int
    steps: int  # of this rank
    images: int  # all ranks together, with warm-up
    seconds: float  # training time, with warm-up
    warmup_s: float  # time of the warm-up steps: compilation, caches, first allocations
    images_per_s: float  # throughput, all ranks together
    step_s: float  # mean time per step, the sum of the next three
    waiting_s: float  # per step, waiting for the loader
    communication_s: float | None  # per step, waiting for other ranks and data; None: not timed
    compute_s: float  # per step, the rest: transfer, forward, backward, update
    peak_memory_mib: float  # device memory on a GPU, else resident memory of the process
    accuracy: float | None  # held out; None if the recipe does not evaluate
    # Async: mean updates by others between a rank's read and update; (N - 1) / 2 in lockstep.
    staleness: float | None
    skipped_steps: int = 0  # that did not update the parameters, because fp16 gradients overflowed


@dataclass(frozen=True, kw_only=True)
class Checkpointed:
    """The state after `step` is on disk."""

    rank: int
    step: int
    path: str
    took_s: float  # not part of the training clock


@dataclass(frozen=True, kw_only=True)
class Restarted:
    """A rank failed, and all ranks start again, from the latest checkpoint if there is one."""

    rank: int  # the rank that failed
    error: str
    attempt: int  # from 1


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A rank ended with an error."""

    rank: int
    error: str
    traceback: str = field(repr=False)  # the full text


Event = Started | Progress | Evaluated | Finished | Checkpointed | Restarted | Failed
EVENT_TYPES = {kind.__name__: kind for kind in get_args(Event)}
