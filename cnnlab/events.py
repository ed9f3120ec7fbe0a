"""What a run says while it runs. Every consumer (plots, panels, records, comparisons) reads only these."""

from dataclasses import asdict, dataclass, field, fields

from cnnlab.recipe import CnnlabError, Recipe


@dataclass(frozen=True, kw_only=True)
class Started:
    """The rank is set up and about to take its first step."""

    rank: int
    world: int  # how many ranks the run has
    recipe: Recipe
    pid: int
    parameters: int  # trainable numbers in the model
    train_images: int
    test_images: int
    steps: int  # how many the run will take
    first_step: int  # steps done before, in the run whose checkpoint this one goes on from
    threads: int  # of this rank
    cores: list[int] | None  # that this rank is pinned to; None where the system cannot tell


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What happened since this rank's last Progress. Times are seconds; `seconds` runs on from the start."""

    rank: int
    epoch: int  # from 1
    step: int  # steps done, from 1; under async, those of an average rank
    images: int  # training images seen so far, by all ranks together
    seconds: float  # clock time since the start; consumers' time is not counted
    losses: list[float]  # of each step since the last Progress, mean over this rank's images
    accuracy: float  # share of this rank's training images classified rightly meanwhile
    images_per_s: float  # all ranks together, meanwhile
    warming_up: bool  # these steps are not part of the speed figures
    spans: list  # the last steps: [phase, begin, end], seconds since 1970; empty on a GPU


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Accuracy and mean loss over every held-out image, each counted once."""

    rank: int
    epoch: int
    step: int
    seconds: float  # training clock, evaluation not counted
    accuracy: float
    loss: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The run's own figures. All but `warmup_s` leave the warm-up steps out."""

    rank: int
    steps: int  # of this rank
    images: int  # all ranks together, warm-up included
    seconds: float  # of training, warm-up included
    warmup_s: float  # the warm-up steps: compilation, caches, first allocations
    images_per_s: float  # all ranks together
    step_s: float  # mean seconds a step
    waiting_s: float  # of `step_s`, waiting for the loader
    communication_s: (
        float | None
    )  # of `step_s`, waiting for other ranks and for what they send; None on a GPU
    compute_s: float  # of `step_s`, the rest: moving, forward, backward, update
    peak_memory_mib: float  # device memory on a GPU, else resident memory, libraries included
    accuracy: float | None  # held out; None when the recipe does not evaluate
    staleness: (
        float | None
    )  # async: others' updates between reading the parameters and changing them, mean; in lockstep (N - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Checkpointed:
    """All that is needed to go on from `step` is on disk."""

    rank: int
    step: int
    path: str
    took_s: float  # not part of the training clock


@dataclass(frozen=True, kw_only=True)
class Restarted:
    """After a failure all ranks are started anew, from the last checkpoint where there is one."""

    rank: int  # the one that had failed
    error: str
    attempt: int  # from 1


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A rank ended with an error; `traceback` is its full text."""

    rank: int
    error: str
    traceback: str = field(repr=False)


EVENT_TYPES = {
    kind.__name__: kind
    for kind in (Started, Progress, Evaluated, Finished, Checkpointed, Restarted, Failed)
}


def to_dict(event):
    """An event as JSON-safe values, its kind under 'event'."""
    return {"event": type(event).__name__, **asdict(event)}


def from_dict(values):
    """The inverse of `to_dict`. Raises `CnnlabError` for what is no event."""
    values = dict(values)
    kind = EVENT_TYPES.get(values.pop("event", None))
    if kind is None or {f.name for f in fields(kind)} != set(values):
        raise CnnlabError("this line is no event that this version of cnnlab knows.")
    if kind is Started:
        values["recipe"] = Recipe.from_dict(values["recipe"])
    return kind(**values)
