"""`Recipe`: everything that decides how one training run goes, as plain, frozen, JSON-safe values."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, fields

CHOICES = {
    "model": ("SmallCNN", "ResNet9", "VGG16", "VGG19"),
    "data": ("digits", "fashion-mnist", "cifar10", "synthetic", "photos"),
    "augment": ("none", "shift", "crop"),
    "optimizer": ("sgd", "adam"),
    "schedule": ("constant", "cosine"),
    "device": ("cpu", "cuda"),
    "loader": ("sample", "batch"),
    "precision": ("fp32", "tf32", "bf16", "fp16"),
    "memory_format": ("contiguous", "channels_last"),
    "pooling": ("after-relu", "before-relu"),
    "compiler": ("eager", "inductor", "inductor-except-pool"),
    "strategy": (None, "ddp", "ring", "local-sgd", "async"),
    "compression": ("none", "fp16", "bf16", "powersgd"),
}


DDP_ONLY_DEFAULTS = {
    "compression": "none",
    "bucket_mb": None,
    "accumulate": 1,
}  # fields that mean nothing elsewhere, and their defaults


class CnnlabError(ValueError):
    """What was asked for cannot be done; the message names the value, what is allowed, and the mend."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training configuration. The defaults train `SmallCNN` on the embedded digits, the plainest way.

    Raises `CnnlabError` for a value or a combination that can run on no machine; what only *this* machine
    lacks (a GPU, a compiler) is reported by `machine.missing_for(recipe)`.
    """

    model: str = "SmallCNN"
    width: int | None = None  # channels of the first convolution; None: the model's own
    data: str = "digits"
    images: int = 2048  # how many, for synthetic data and photos only
    image_size: int = 32  # pixels a side, for synthetic data and photos only
    classes: int = 10  # for synthetic data only
    batch_size: int = 64  # images a step, all ranks together
    epochs: int = 1
    steps: int | None = None  # stop after so many steps, however many epochs they take
    warmup_steps: int = 2  # timed apart: compilation, caches, first allocations
    augment: str = "none"  # shift: each batch moved by up to 2 pixels; crop: a random part of each photo, perhaps mirrored
    optimizer: str = "adam"  # sgd has momentum 0.9
    learning_rate: float = 0.003
    schedule: str = "constant"  # cosine: down to 0 at the last step
    seed: int = 0
    evaluate: bool = True  # held-out accuracy after each epoch and at the end
    device: str = "cpu"
    threads: int | None = None  # a rank; None: the cores shared out among the ranks
    loader: str = "sample"  # fetch sample by sample and collate, or index a whole batch at once
    loader_workers: int = 0
    precision: str = "fp32"
    memory_format: str = "contiguous"
    pooling: str = "after-relu"  # max-pooling before ReLU gives the same numbers from less work
    compiler: str = (
        "eager"  # inductor: torch.compile; except-pool: with max-pooling left to PyTorch's own code
    )
    replicas: int = 1  # ranks, each with a whole copy of the model and its share of every batch
    strategy: str | None = (
        None  # how replicas stay equal; None: ddp, and nothing where there is one replica
    )
    compression: str = "none"  # ddp: what gradients are squeezed into on their way
    bucket_mb: float | None = (
        None  # ddp: gradients travel in buckets of so many MiB; None: torch's own, 1 and then 25
    )
    accumulate: int = 1  # ddp: parts that a batch is computed in, one exchange of gradients for all
    sync_every: int = 8  # local-sgd: steps between two averagings of the parameters
    staleness: int | None = (
        None  # async: steps that a rank may be ahead of the slowest, counted anew each epoch; None: any number
    )
    latency_ms: float = 0.0  # simulated network: what each message takes at least ...
    bandwidth_mbit: float | None = (
        None  # ... and how much a link carries, in Mbit/s; None: as fast as it is
    )
    straggler_ms: float = 0.0  # the last rank sleeps so long in each step, on purpose
    checkpoint_every: int = 100  # steps, for runs that keep checkpoints

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        for name in (
            "images",
            "image_size",
            "classes",
            "batch_size",
            "epochs",
            "replicas",
            "accumulate",
            "sync_every",
            "checkpoint_every",
        ):
            _check_integer(name, getattr(self, name), 1)
        for name in ("warmup_steps", "loader_workers", "seed"):
            _check_integer(name, getattr(self, name), 0)
        for name, least in {"width": 1, "steps": 1, "threads": 1, "staleness": 0}.items():
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), least)
        for name in ("latency_ms", "straggler_ms"):
            _check_number(name, getattr(self, name), "of 0 or more", lambda value: value >= 0)
        for name in ("learning_rate", "bucket_mb", "bandwidth_mbit"):
            if getattr(self, name) is not None or name == "learning_rate":
                _check_number(name, getattr(self, name), "above 0", lambda value: value > 0)
        if self.seed >= 2**31:
            raise CnnlabError(
                f"seed={self.seed} is not allowed: it must be below 2147483648, for numpy takes no more than 32 bits."
            )
        if not isinstance(self.evaluate, bool):
            raise CnnlabError(
                f"evaluate={self.evaluate!r} is not allowed: it must be True or False."
            )
        self._check_combinations()

    def _check_combinations(self):
        if self.batch_size % self.replicas:
            raise CnnlabError(
                f"batch_size={self.batch_size} cannot be split evenly over replicas={self.replicas}: "
                f"take a multiple of {self.replicas}, such as {_nearest_multiple(self.batch_size, self.replicas)}."
            )
        if self.strategy not in (None, "ddp"):
            for name, default in DDP_ONLY_DEFAULTS.items():
                if getattr(self, name) != default:
                    raise CnnlabError(
                        f"{name}={getattr(self, name)!r} needs strategy='ddp': strategy={self.strategy!r} sends no gradients in buckets."
                    )
            if self.precision == "fp16":
                raise CnnlabError(
                    f"precision='fp16' needs strategy='ddp': a rank that skips a step, for its gradients overflow, would leave the "
                    f"others of strategy={self.strategy!r} waiting. Take precision='bf16'."
                )
        if (self.latency_ms or self.bandwidth_mbit) and self.device != "cpu":
            raise CnnlabError(
                "latency_ms and bandwidth_mbit need device='cpu': the simulated network cannot hold up what a GPU sends by itself."
            )
        if self.strategy == "async" and self.schedule != "constant":
            raise CnnlabError(
                "strategy='async' needs schedule='constant': its ranks share no count of steps. Take schedule='constant'."
            )
        if self.batch_size // self.replicas % self.accumulate:
            raise CnnlabError(
                f"accumulate={self.accumulate} cannot split the {self.batch_size // self.replicas} images of a rank evenly: take a "
                f"divisor of it."
            )
        if self.precision == "tf32" and self.device != "cuda":
            raise CnnlabError(
                "precision='tf32' needs device='cuda': it is a mode of NVIDIA's matrix units. "
                "On a CPU take precision='bf16'."
            )
        if self.steps is not None and self.steps <= self.warmup_steps:
            raise CnnlabError(
                f"steps={self.steps} leaves nothing to time after warmup_steps={self.warmup_steps}: "
                "raise steps or lower warmup_steps."
            )
        if self.augment == "crop" and self.data != "photos":
            raise CnnlabError(
                "augment='crop' needs data='photos': it is done while a file is decoded. Elsewhere take augment='shift'."
            )
        if self.data == "synthetic" and self.batch_size > self.images:
            raise CnnlabError(
                f"batch_size={self.batch_size} is larger than the data, images={self.images}: "
                "lower batch_size or raise images."
            )

    def replace(self, **changes):
        """The same recipe with some fields changed."""
        _check_field_names(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The inverse of `to_dict`; fields left out take their defaults, unknown ones are refused."""
        if not isinstance(values, dict):
            raise CnnlabError(
                f"a recipe is a JSON object of names and values, not {type(values).__name__}."
            )
        _check_field_names(values)
        return cls(**values)


def changes(a, b):
    """What differs from recipe `a` to recipe `b`: {field name: (value in a, value in b)}."""
    return {
        f.name: (getattr(a, f.name), getattr(b, f.name))
        for f in fields(Recipe)
        if getattr(a, f.name) != getattr(b, f.name)
    }


def format_changes(a, b):
    """`changes(a, b)` as a short label for a plot, such as 'threads=2, precision=bf16'."""
    return ", ".join(f"{name}={new}" for name, (_, new) in changes(a, b).items()) or "unchanged"


def _check_choice(name, value, allowed):
    if value not in allowed:
        close = difflib.get_close_matches(str(value), filter(None, allowed), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise CnnlabError(
            f"{name}={value!r} is not known: take one of {', '.join(map(str, allowed))}.{hint}"
        )


def _check_integer(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CnnlabError(
            f"{name}={value!r} is not allowed: it must be a whole number, {least} or more."
        )


def _check_number(name, value, allowed, fits):
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not fits(value)
    ):
        raise CnnlabError(f"{name}={value!r} is not allowed: it must be a finite number {allowed}.")


def _check_field_names(values):
    names = [f.name for f in fields(Recipe)]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = (
                f" Did you mean {close[0]!r}?" if close else f" The fields are {', '.join(names)}."
            )
            raise CnnlabError(f"a recipe has no field {name!r}.{hint}")


def _nearest_multiple(value, factor):
    return max(factor, round(value / factor) * factor)
