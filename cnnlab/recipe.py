"""`Recipe`: every setting of one training run, as plain, frozen, JSON-safe values."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

Model = Literal["SmallCNN", "ResNet9", "VGG16", "VGG19"]
Data = Literal["digits", "fashion-mnist", "cifar10", "synthetic", "photos"]
Augment = Literal["none", "shift", "crop"]
Optimizer = Literal["sgd", "adam"]
Schedule = Literal["constant", "cosine"]
Device = Literal["cpu", "cuda", "mps", "xpu"]
Loader = Literal["sample", "batch", "device"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
MemoryFormat = Literal["contiguous", "channels_last"]
Pooling = Literal["after-relu", "before-relu"]
Compiler = Literal["eager", "inductor", "cudagraphs"]
Strategy = Literal[None, "ddp", "ring", "local-sgd", "async", "zero1", "fsdp", "tensor", "pipeline"]
PipelineSchedule = Literal["gpipe", "1f1b", "interleaved"]
Compression = Literal["none", "fp16", "bf16", "powersgd"]
SHARDED = ("zero1", "fsdp", "tensor", "pipeline")  # no rank holds all of the training state


class CnnlabError(ValueError):
    """An error that the user can fix. The message names the value, what is allowed, and a fix."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training configuration. The defaults train `SmallCNN` on scikit-learn's digits.

    Raises `CnnlabError` for values and combinations that cannot run on any machine. What this
    machine lacks, such as a GPU or a compiler, is reported by `machine.missing_for(recipe)`.
    """

    # The command line shows these comments as help.
    model: Model = "SmallCNN"  # network to train
    width: int | None = None  # channels of the first convolution; None: the model's default
    data: Data = "digits"  # data set to train on
    images: int = 2048  # number of images (synthetic and photos only)
    image_size: int = 32  # height and width in pixels (synthetic and photos only)
    classes: int = 10  # number of classes (synthetic only)
    batch_size: int = 64  # images per step, all ranks together
    epochs: int = 1  # passes over the training images
    steps: int | None = None  # training steps, overrides epochs; None: as many as the epochs have
    warmup_steps: int = 2  # first steps, timed separately: compilation, caches, allocations
    augment: Augment = "none"  # shift: moves batches up to 2 pixels; crop: random crops of photos
    optimizer: Optimizer = "adam"  # sgd has momentum 0.9
    learning_rate: float = 0.003  # learning rate of the first step
    schedule: Schedule = "constant"  # learning rate over time; cosine: decays to 0 at the last step
    seed: int = 0  # seed of the initial weights, the order of the images, and the augmentation
    evaluate: bool = True  # measure held-out accuracy after each epoch and at the end

    device: Device = "cpu"  # of the model; cuda: NVIDIA or AMD, mps: Apple, xpu: Intel
    threads: int | None = None  # CPU threads per rank; None: the cores divided among the ranks
    loader: Loader = "sample"  # sample: single images; batch: whole batches; device: in GPU memory
    loader_workers: int = 0  # loader processes per rank; 0: load in the training process
    precision: Precision = "fp32"  # number format of convolutions and matrix products
    memory_format: MemoryFormat = "contiguous"  # memory layout of weights and activations
    pooling: Pooling = "after-relu"  # before-relu: the same values from less work
    compiler: Compiler = "eager"  # inductor: torch.compile; cudagraphs: with CUDA graphs
    cudnn_benchmark: bool = False  # time cuDNN's algorithms and use the fastest (cuda only)
    fused_optimizer: bool = False  # update all parameters in one kernel

    replicas: int = 1  # copies of the model, each trained on its share of every batch
    strategy: Strategy = None  # how ranks share the work; None: ddp for several replicas
    stages: int = 1  # ranks of each replica, with consecutive layers (pipeline only)
    micro_batches: int = 1  # parts of a batch that follow one another in a pipeline
    pipeline_schedule: PipelineSchedule = "gpipe"  # order of forward and backward in a pipeline
    tensor_ranks: int = 1  # ranks of each replica, with a part of every layer (tensor only)
    recompute: bool = False  # free activations, and compute them again in the backward pass
    memory_limit_mib: int | None = None  # memory a rank may use for training; None: all there is
    compression: Compression = "none"  # gradient compression in the all-reduce (ddp, zero1)
    bucket_mb: float | None = None  # gradient bucket size in MiB (ddp, zero1); None: torch's own
    accumulate: int = 1  # micro-batches per step, with one all-reduce for all (ddp, zero1)
    sync_every: int = 8  # steps between two averagings of the parameters (local-sgd only)
    staleness: int | None = None  # steps a rank may be ahead of the slowest (async); None: any
    latency_ms: float = 0.0  # simulated network: minimum time per message in ms
    bandwidth_mbit: float | None = None  # simulated network: link speed in Mbit/s; None: no limit
    straggler_ms: float = 0.0  # ms that the last rank sleeps in each step
    checkpoint_every: int = 100  # steps between two checkpoints, if checkpoints are kept

    def __post_init__(self) -> None:
        for name in FIELD_TYPES:
            _check_field(name, getattr(self, name))
        if self.seed >= 2**31:
            raise CnnlabError(f"seed={self.seed} is too large for NumPy. Use one below {2**31}.")
        _check_batch(self)
        _check_strategy(self)
        _check_model_parallel(self)
        _check_device_and_data(self)

    @property
    def model_ranks(self) -> int:
        """Number of ranks that hold one replica together."""
        return self.stages * self.tensor_ranks

    @property
    def ranks(self) -> int:
        """Number of ranks of the run."""
        return self.replicas * self.model_ranks

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with some fields changed."""
        _check_names(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-safe values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`. Missing fields take their defaults; unknown ones raise."""
        if not isinstance(values, dict):
            raise CnnlabError(f"a recipe is a JSON object, not {type(values).__name__}.")
        _check_names(values)
        return cls(**values)


FIELD_TYPES = get_type_hints(Recipe)

# All other numbers must be above 0.
ZERO_ALLOWED = {"warmup_steps", "loader_workers", "seed", "staleness", "latency_ms", "straggler_ms"}


def changes(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    """The fields that differ: {field name: (value in `a`, value in `b`)}."""
    old, new = a.to_dict(), b.to_dict()
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name not in FIELD_TYPES:
            hint = suggest(name, FIELD_TYPES) or f" Choose one of {', '.join(FIELD_TYPES)}."
            raise CnnlabError(f"a recipe has no field {name!r}.{hint}")


def suggest(name: str, allowed: Iterable[str | None]) -> str:
    """A sentence with the most similar of the allowed names, or nothing."""
    close = difflib.get_close_matches(name, [choice for choice in allowed if choice], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _check_field(name: str, value: Any) -> None:
    kind = FIELD_TYPES[name]
    options = get_args(kind)  # the choices of a Literal; (int, NoneType) of int | None
    if get_origin(kind) is Literal:
        if value not in options:
            fix = f"Choose one of {', '.join(map(str, options))}.{suggest(str(value), options)}"
            raise CnnlabError(f"{name}={value!r} is not allowed. {fix}")
    elif kind is bool:
        if not isinstance(value, bool):
            raise CnnlabError(f"{name}={value!r} is not allowed. Use True or False.")
    elif value is not None or NoneType not in options:
        _check_number(name, value, integer=kind in (int, int | None))


def _check_number(name: str, value: Any, integer: bool) -> None:
    zero_allowed = name in ZERO_ALLOWED
    is_number = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
    if is_number and (0 < value < math.inf or (value == 0 and zero_allowed)):
        return
    if integer:
        allowed = f"an integer of at least {0 if zero_allowed else 1}"
    else:
        allowed = f"a finite number {'of at least' if zero_allowed else 'above'} 0"
    raise CnnlabError(f"{name}={value!r} is not allowed. Use {allowed}.")


def _check_batch(recipe: Recipe) -> None:
    batch, replicas = recipe.batch_size, recipe.replicas
    share, remainder = divmod(batch, replicas)
    if remainder:
        nearest = max(replicas, round(batch / replicas) * replicas)
        raise CnnlabError(
            f"batch_size={batch} is not divisible by replicas={replicas}. "
            f"Use a multiple of {replicas}, such as {nearest}."
        )
    if share % recipe.accumulate:
        raise CnnlabError(
            f"accumulate={recipe.accumulate} does not divide the {share} images per rank. "
            f"Use a divisor of {share}."
        )
    if recipe.data == "synthetic" and batch > recipe.images:
        raise CnnlabError(
            f"batch_size={batch} is larger than the data set, images={recipe.images}. "
            "Lower batch_size or raise images."
        )


# Fields that decide what a model learns, except for how long. The others decide how fast.
LEARNING_FIELDS = {"model", "width", "data", "images", "image_size", "classes", "batch_size"}
LEARNING_FIELDS |= {"augment", "optimizer", "learning_rate", "schedule", "seed"}
MODEL_PARALLEL_FIELDS = ("stages", "micro_batches", "pipeline_schedule", "tensor_ranks")
REPLICATED = ("ddp", "ring", "local-sgd", "async")  # strategies whose ranks have the whole model

# Field: the strategies that support other values than its default. Without an entry: all.
SUPPORTED_BY = {
    "compression": ("ddp", "zero1"),
    "bucket_mb": ("ddp", "zero1"),
    "accumulate": ("ddp", "zero1"),
    "latency_ms": REPLICATED,
    "bandwidth_mbit": REPLICATED,
    "straggler_ms": (*REPLICATED, "zero1", "fsdp", "tensor"),
    "compiler": (*REPLICATED, "zero1"),
    "schedule": ("ddp", "ring", "local-sgd", *SHARDED),  # async: its ranks share no step count
    "memory_format": (*REPLICATED, "zero1", "tensor", "pipeline"),
    "stages": ("pipeline",),
    "micro_batches": ("pipeline",),
    "pipeline_schedule": ("pipeline",),
    "tensor_ranks": ("tensor",),
}


def _check_strategy(recipe: Recipe) -> None:
    strategy = recipe.strategy
    for name, strategies in SUPPORTED_BY.items():
        value, default = getattr(recipe, name), getattr(Recipe, name)
        if value != default and (strategy or "ddp") not in strategies:
            raise CnnlabError(
                f"{name}={value!r} is not supported with strategy={strategy!r}. Use "
                f"{name}={default!r}, or a strategy that supports it: {', '.join(strategies)}."
            )
    if recipe.precision == "fp16" and strategy not in (None, "ddp"):
        raise CnnlabError(
            "precision='fp16' needs strategy='ddp', because a rank that skips an overflowing step "
            f"would block the others of strategy={strategy!r}. Use precision='bf16'."
        )


def _check_model_parallel(recipe: Recipe) -> None:
    strategy = recipe.strategy
    field = {"pipeline": "stages", "tensor": "tensor_ranks"}.get(str(strategy), "replicas")
    if strategy in SHARDED and getattr(recipe, field) == 1:
        raise CnnlabError(
            f"strategy={strategy!r} needs several ranks to share a model. Use {field}=2."
        )
    share = recipe.batch_size // recipe.replicas
    if share % recipe.micro_batches:
        raise CnnlabError(
            f"micro_batches={recipe.micro_batches} does not divide the {share} images per replica. "
            f"Use a divisor of {share}."
        )
    schedule, stages, count = recipe.pipeline_schedule, recipe.stages, recipe.micro_batches
    if (schedule == "1f1b" and count < stages) or (schedule == "interleaved" and count % stages):
        raise CnnlabError(
            f"micro_batches={count} does not work with stages={stages}: 1f1b needs at least as "
            f"many as stages, interleaved a multiple. Use micro_batches={stages} or 'gpipe'."
        )
    if recipe.recompute and recipe.compiler != "eager":
        raise CnnlabError(
            f"recompute=True does not work with compiler={recipe.compiler!r}, which rejects the "
            "code that keeps batch norm correct. Use compiler='eager' or recompute=False."
        )


# (field, value that only CUDA supports, what to use instead)
ONLY_CUDA: Any = (("precision", "tf32", "bf16"), ("compiler", "cudagraphs", "inductor"))
ONLY_CUDA += (("cudnn_benchmark", True, False),)


def _check_device_and_data(recipe: Recipe) -> None:
    if recipe.device != "cpu" and (recipe.latency_ms or recipe.bandwidth_mbit):
        raise CnnlabError(
            "latency_ms and bandwidth_mbit need device='cpu': GPU transfers cannot be delayed."
        )
    single = recipe.ranks == 1 and recipe.strategy is None and recipe.memory_limit_mib is None
    if recipe.device == "mps" and not single:
        raise CnnlabError(
            "device='mps' trains in one process without a memory limit, because its ranks cannot "
            "communicate. Use replicas=1, strategy=None, memory_limit_mib=None, or device='cpu'."
        )
    for name, value, instead in ONLY_CUDA:
        if getattr(recipe, name) == value and recipe.device != "cuda":
            raise CnnlabError(f"{name}={value!r} needs device='cuda'. Use {name}={instead!r}.")
    if recipe.compiler == "cudagraphs" and recipe.accumulate > 1:
        raise CnnlabError(
            "compiler='cudagraphs' needs accumulate=1, because a graph overwrites the gradients of "
            "the last micro-batch. Use compiler='inductor'."
        )
    if recipe.loader == "device" and (recipe.data == "photos" or recipe.loader_workers):
        raise CnnlabError(
            "loader='device' needs a data set in memory and loader_workers=0. Use loader='batch'."
        )
    if recipe.steps is not None and recipe.steps <= recipe.warmup_steps:
        raise CnnlabError(
            f"steps={recipe.steps} leaves no step to time after warmup_steps="
            f"{recipe.warmup_steps}. Raise steps or lower warmup_steps."
        )
    if recipe.augment == "crop" and recipe.data != "photos":
        raise CnnlabError("augment='crop' needs data='photos'. Use augment='shift' instead.")
