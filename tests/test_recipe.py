"""Which values a `Recipe` accepts, and the messages for those that it rejects."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from cnnlab.recipe import CnnlabError, Recipe, changes

CHOICES = {
    "model": ["SmallCNN", "ResNet9", "VGG16", "VGG19"],
    "data": ["digits", "fashion-mnist", "cifar10", "synthetic", "photos"],
    "augment": ["none", "shift", "crop"],
    "optimizer": ["sgd", "adam"],
    "schedule": ["constant", "cosine"],
    "device": ["cpu", "cuda", "mps", "xpu"],
    "loader": ["sample", "batch", "device"],
    "precision": ["fp32", "tf32", "bf16", "fp16"],
    "memory_format": ["contiguous", "channels_last"],
    "pooling": ["after-relu", "before-relu"],
    "compiler": ["eager", "inductor", "cudagraphs"],
    "strategy": [None, "ddp", "ring", "local-sgd", "async", "zero1", "fsdp", "tensor", "pipeline"],
    "pipeline_schedule": ["gpipe", "1f1b", "interleaved"],
    "compression": ["none", "fp16", "bf16", "powersgd"],
}

# Choice: what else it needs.
NEEDED = {
    "tf32": {"device": "cuda"},
    "cudagraphs": {"device": "cuda"},
    "crop": {"data": "photos"},
    "zero1": {"replicas": 2},
    "fsdp": {"replicas": 2},
    "tensor": {"tensor_ranks": 2},
    "pipeline": {"stages": 2},
    "1f1b": {"strategy": "pipeline", "stages": 2, "micro_batches": 2},
    "interleaved": {"strategy": "pipeline", "stages": 2, "micro_batches": 2},
}


def test_the_defaults_are_valid_and_frozen():
    recipe = Recipe()
    with pytest.raises(FrozenInstanceError):
        recipe.batch_size = 1


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(
            model="ResNet9",
            width=8,
            data="synthetic",
            images=100,
            batch_size=20,
            steps=5,
            evaluate=False,
            threads=2,
            precision="bf16",
            replicas=4,
            learning_rate=1,
        ),
    ],
)
def test_a_recipe_survives_json(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_missing_fields_take_their_defaults():
    assert Recipe.from_dict({"batch_size": 32}) == Recipe(batch_size=32)


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, allowed in CHOICES.items() for value in allowed]
)
def test_every_choice_is_accepted(name, value):
    assert getattr(Recipe(**{name: value, **NEEDED.get(value, {})}), name) == value


def test_replace_changes_only_the_named_fields():
    base = Recipe()
    other = base.replace(precision="bf16", threads=2)
    assert base == Recipe()
    assert changes(base, other) == {"precision": ("fp32", "bf16"), "threads": (None, 2)}
    assert changes(other, base) == {"precision": ("bf16", "fp32"), "threads": (2, None)}
    assert changes(base, base) == {}


MINIMUM = {
    "images": 1,
    "image_size": 1,
    "classes": 1,
    "batch_size": 1,
    "epochs": 1,
    "replicas": 1,
    "warmup_steps": 0,
    "loader_workers": 0,
    "seed": 0,
    "width": 1,
    "steps": 1,
    "threads": 1,
    "accumulate": 1,
    "sync_every": 1,
    "checkpoint_every": 1,
    "staleness": 0,
    "stages": 1,
    "micro_batches": 1,
    "tensor_ranks": 1,
    "memory_limit_mib": 1,
}
NUMBERS = {
    "learning_rate": "above 0",
    "bucket_mb": "above 0",
    "bandwidth_mbit": "above 0",
    "latency_ms": "at least 0",
    "straggler_ms": "at least 0",
}


@pytest.mark.parametrize("name", MINIMUM)
@pytest.mark.parametrize("value", ["below", True, 2.5, "3", math.nan, [1]], ids=repr)
def test_an_invalid_integer_is_rejected_with_its_name_value_and_minimum(name, value):
    value = MINIMUM[name] - 1 if value == "below" else value
    with pytest.raises(CnnlabError) as raised:
        Recipe(**{name: value})
    assert f"{name}={value!r}" in str(raised.value)
    assert f"Use an integer of at least {MINIMUM[name]}." in str(raised.value)


def test_every_integer_field_is_checked():
    numbers = {
        f.name
        for f in fields(Recipe)
        if f.name not in CHOICES and f.name not in NUMBERS and f.type is not bool
    }
    assert numbers == set(MINIMUM)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [0, -0.1, math.nan, math.inf, -math.inf, True, "0.1", None], ids=repr
)
def test_an_invalid_number_is_rejected_with_its_name_value_and_bound(name, value):
    zero_allowed = NUMBERS[name] == "at least 0"
    none_allowed = name in ("bucket_mb", "bandwidth_mbit")
    if (value == 0 and zero_allowed) or (value is None and none_allowed):
        assert getattr(Recipe(**{name: value}), name) == value
        return
    with pytest.raises(CnnlabError, match=f"finite number.*{NUMBERS[name]}") as raised:
        Recipe(**{name: value})
    assert f"{name}={value!r}" in str(raised.value)


@pytest.mark.parametrize("name", ["evaluate", "recompute"])
@pytest.mark.parametrize("value", [1, 0, "yes", None], ids=repr)
def test_a_flag_must_be_true_or_false(name, value):
    with pytest.raises(CnnlabError, match=f"{name}=.*True or False"):
        Recipe(**{name: value})


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_rejected_with_all_allowed_values(name):
    with pytest.raises(CnnlabError) as raised:
        Recipe(**{name: "nonsense"})
    assert f"{name}='nonsense'" in str(raised.value)
    allowed = ", ".join(str(choice) for choice in CHOICES[name])
    assert f"Choose one of {allowed}." in str(raised.value)


@pytest.mark.parametrize("value", [None, 3, True, ["SmallCNN"]], ids=repr)
def test_a_choice_that_is_not_a_string_is_rejected(value):
    with pytest.raises(CnnlabError, match="model="):
        Recipe(model=value)


@pytest.mark.parametrize(
    "name, typo, meant",
    [("model", "Resnet9", "ResNet9"), ("precision", "bf61", "bf16"), ("data", "cifar", "cifar10")],
)
def test_a_typo_in_a_choice_gets_a_suggestion(name, typo, meant):
    with pytest.raises(CnnlabError, match=f"Did you mean '{meant}'"):
        Recipe(**{name: typo})


@pytest.mark.parametrize("make", [lambda values: Recipe().replace(**values), Recipe.from_dict])
def test_an_unknown_field_is_rejected_with_a_suggestion(make):
    with pytest.raises(CnnlabError, match="no field 'batchsize'.*Did you mean 'batch_size'"):
        make({"batchsize": 3})
    with pytest.raises(CnnlabError, match="no field 'zzz'.*learning_rate"):
        make({"zzz": 3})


@pytest.mark.parametrize("values", [[1, 2], "SmallCNN", None, 3], ids=repr)
def test_only_a_json_object_is_a_recipe(values):
    with pytest.raises(CnnlabError, match="JSON object"):
        Recipe.from_dict(values)


def test_replicas_must_divide_the_batch_and_the_message_names_a_batch_that_works():
    with pytest.raises(CnnlabError, match="batch_size=64 .*replicas=3.*multiple of 3, such as 63"):
        Recipe(replicas=3)
    with pytest.raises(CnnlabError, match="batch_size=2.*such as 4"):
        Recipe(batch_size=2, replicas=4)


PIPELINE = {"strategy": "pipeline", "stages": 4, "batch_size": 48}
SEVERAL_RANKS = {
    "ddp": {"replicas": 2},
    "ring": {"replicas": 2},
    "local-sgd": {"replicas": 2},
    "async": {"replicas": 2},
    "zero1": {"replicas": 2},
    "fsdp": {"replicas": 2},
    "tensor": {"tensor_ranks": 2},
    "pipeline": {"stages": 2, "micro_batches": 2},
}


@pytest.mark.parametrize(
    "change, supported",
    [
        ({"compression": "fp16"}, "ddp zero1"),
        ({"bucket_mb": 1.0}, "ddp zero1"),
        ({"accumulate": 2}, "ddp zero1"),
        ({"latency_ms": 1.0}, "ddp ring local-sgd async"),
        ({"bandwidth_mbit": 1.0}, "ddp ring local-sgd async"),
        ({"straggler_ms": 1.0}, "ddp ring local-sgd async zero1 fsdp tensor"),
        ({"compiler": "inductor"}, "ddp ring local-sgd async zero1"),
        ({"memory_format": "channels_last"}, "ddp ring local-sgd async zero1 tensor pipeline"),
        ({"micro_batches": 2}, "pipeline"),
        ({"pipeline_schedule": "1f1b"}, "pipeline"),
        ({"precision": "fp16"}, "ddp"),
        ({"recompute": True, "precision": "bf16"}, " ".join(SEVERAL_RANKS)),
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", SEVERAL_RANKS)
def test_settings_that_a_strategy_does_not_support_are_rejected_with_a_fix(
    strategy, change, supported
):
    values = {"strategy": strategy, **SEVERAL_RANKS[strategy], **change}
    if strategy in supported.split():
        Recipe(**values)
        return
    [(name, value)] = change.items()
    with pytest.raises(CnnlabError, match=f"{name}={value!r}.*Use") as raised:
        Recipe(**values)
    assert f"strategy={strategy!r}" in str(raised.value)
    assert supported.split()[0] in str(raised.value)


def test_ranks_are_the_replicas_times_the_ranks_of_each():
    found = [Recipe(replicas=2), Recipe(strategy="fsdp", replicas=4)]
    found += [Recipe(strategy="pipeline", stages=3), Recipe(strategy="tensor", tensor_ranks=2)]
    found += [Recipe(strategy="tensor", tensor_ranks=2, replicas=4)]
    assert [(recipe.model_ranks, recipe.ranks) for recipe in found] == [
        (1, 2),
        (1, 4),
        (3, 3),
        (2, 2),
        (2, 8),
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"strategy": "async", "schedule": "cosine"}, "schedule='constant'"),
        ({"strategy": "ring", "precision": "fp16"}, "precision='bf16'"),
        ({"accumulate": 3}, "accumulate=3 does not divide the 64 images"),
        ({"replicas": 2, "accumulate": 64}, "accumulate=64 does not divide the 32 images"),
        ({"strategy": "zero1"}, "strategy='zero1' needs several ranks.*Use replicas=2"),
        ({"strategy": "fsdp"}, "Use replicas=2"),
        ({"strategy": "tensor", "replicas": 2}, "Use tensor_ranks=2"),
        ({"strategy": "pipeline", "replicas": 2}, "Use stages=2"),
        ({"stages": 2}, "stages=2 is not supported with strategy=None.*Use stages=1, .*: pipeline"),
        (
            {"tensor_ranks": 2, "strategy": "ddp"},
            "Use tensor_ranks=1, or a strategy that supports it: tensor",
        ),
        (
            {"strategy": "pipeline", "stages": 2, "replicas": 2, "micro_batches": 3},
            "micro_batches=3 does not divide the 32 images per replica. Use a divisor of 32",
        ),
        (
            {**PIPELINE, "pipeline_schedule": "1f1b", "micro_batches": 2},
            "1f1b needs at least as many as stages.*micro_batches=4 or 'gpipe'",
        ),
        (
            {**PIPELINE, "pipeline_schedule": "interleaved", "micro_batches": 6},
            "micro_batches=6.*stages=4.*interleaved a multiple.*micro_batches=4 or 'gpipe'",
        ),
        ({"cudnn_benchmark": True}, "device='cuda'. Use cudnn_benchmark=False"),
        ({"compiler": "cudagraphs"}, "device='cuda'. Use compiler='inductor'"),
        ({"device": "xpu", "compiler": "cudagraphs"}, "device='cuda'. Use compiler='inductor'"),
        (
            {"device": "cuda", "compiler": "cudagraphs", "accumulate": 2},
            "accumulate=1.*Use compiler='inductor'",
        ),
        ({"loader": "device", "loader_workers": 1}, "loader_workers=0. Use loader='batch'"),
        ({"loader": "device", "data": "photos"}, "in memory.*Use loader='batch'"),
        ({"recompute": True, "compiler": "inductor"}, "recompute=True.*compiler='eager'"),
        ({"device": "cuda", "latency_ms": 1.0}, "device='cpu'"),
        ({"device": "cuda", "bandwidth_mbit": 1.0}, "device='cpu'"),
        ({"device": "mps", "replicas": 2}, "device='mps'.*replicas=1.*device='cpu'"),
        ({"device": "mps", "strategy": "ddp"}, "device='mps'.*strategy=None"),
        ({"device": "mps", "memory_limit_mib": 100}, "device='mps'.*memory_limit_mib=None"),
        ({"device": "mps", "precision": "tf32"}, "tf32.*device='cuda'"),
        ({"device": "xpu", "precision": "tf32"}, "tf32.*device='cuda'"),
    ],
    ids=str,
)
def test_invalid_combinations_are_rejected_with_a_fix(change, message):
    with pytest.raises(CnnlabError, match=message):
        Recipe(**change)


def test_tf32_on_a_cpu_is_rejected_with_a_fix():
    with pytest.raises(CnnlabError, match="tf32.*device='cuda'.*bf16"):
        Recipe(precision="tf32")


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_must_exceed_the_warm_up(steps):
    with pytest.raises(CnnlabError, match=f"steps={steps}.*warmup_steps=2"):
        Recipe(steps=steps, warmup_steps=2)
    assert Recipe(steps=steps, warmup_steps=0).steps == steps


def test_a_batch_larger_than_the_synthetic_data_is_rejected():
    with pytest.raises(CnnlabError, match="batch_size=64.*images=63"):
        Recipe(data="synthetic", images=63)
    assert Recipe(data="synthetic", images=64).images == 64


def test_a_seed_too_large_for_numpy_is_rejected():
    with pytest.raises(CnnlabError, match="seed=4294967296.*below.*2147483648"):
        Recipe(seed=2**32)
