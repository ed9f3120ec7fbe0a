"""What a `Recipe` allows, refuses, and says."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from cnnlab.recipe import CHOICES, CnnlabError, Recipe, changes, format_changes


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


def test_fields_left_out_take_their_defaults():
    assert Recipe.from_dict({"batch_size": 32}) == Recipe(batch_size=32)


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, allowed in CHOICES.items() for value in allowed]
)
def test_every_choice_is_accepted(name, value):
    needed = {"tf32": {"device": "cuda"}, "crop": {"data": "photos"}}.get(value, {})
    assert getattr(Recipe(**{name: value, **needed}), name) == value


def test_but_changes_only_what_is_named():
    base = Recipe()
    other = base.replace(precision="bf16", threads=2)
    assert base == Recipe()
    assert changes(base, other) == {"precision": ("fp32", "bf16"), "threads": (None, 2)}
    assert changes(other, base) == {"precision": ("bf16", "fp32"), "threads": (2, None)}
    assert changes(base, base) == {}


def test_the_legend_says_what_differs():
    assert format_changes(Recipe(), Recipe(threads=2)) == "threads=2"
    assert format_changes(Recipe(), Recipe()) == "unchanged"
    assert set(format_changes(Recipe(), Recipe(threads=2, precision="bf16")).split(", ")) == {
        "threads=2",
        "precision=bf16",
    }


WHOLE = {
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
}  # name: the least that is allowed
NUMBERS = {
    "learning_rate": "above 0",
    "bucket_mb": "above 0",
    "bandwidth_mbit": "above 0",
    "latency_ms": "0 or more",
    "straggler_ms": "0 or more",
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", ["below", True, 2.5, "3", math.nan, [1]], ids=repr)
def test_a_bad_count_is_refused_with_its_name_value_and_least(name, value):
    value = WHOLE[name] - 1 if value == "below" else value
    with pytest.raises(CnnlabError) as refused:
        Recipe(**{name: value})
    assert f"{name}={value!r}" in str(refused.value)
    assert f"whole number, {WHOLE[name]} or more" in str(refused.value)


def test_no_whole_number_field_goes_unchecked():
    numbers = {
        f.name
        for f in fields(Recipe)
        if f.name not in CHOICES and f.name not in NUMBERS and f.name != "evaluate"
    }
    assert numbers == set(WHOLE)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [0, -0.1, math.nan, math.inf, -math.inf, True, "0.1", None], ids=repr
)
def test_a_bad_number_is_refused_with_its_name_value_and_bound(name, value):
    if (
        value == 0
        and "0 or more" in NUMBERS[name]
        or value is None
        and name in ("bucket_mb", "bandwidth_mbit")
    ):
        assert getattr(Recipe(**{name: value}), name) == value
        return
    with pytest.raises(CnnlabError, match=f"finite number.*{NUMBERS[name]}") as refused:
        Recipe(**{name: value})
    assert f"{name}={value!r}" in str(refused.value)


@pytest.mark.parametrize("value", [1, 0, "yes", None], ids=repr)
def test_evaluate_must_be_true_or_false(value):
    with pytest.raises(CnnlabError, match="evaluate=.*True or False"):
        Recipe(evaluate=value)


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_refused_with_all_that_are_allowed(name):
    with pytest.raises(CnnlabError) as refused:
        Recipe(**{name: "nonsense"})
    assert f"{name}='nonsense'" in str(refused.value)
    assert all(str(allowed) in str(refused.value) for allowed in CHOICES[name])


@pytest.mark.parametrize("value", [None, 3, True, ["SmallCNN"]], ids=repr)
def test_a_choice_that_is_no_word_is_refused(value):
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
def test_an_unknown_field_is_refused_with_a_suggestion(make):
    with pytest.raises(CnnlabError, match="no field 'batchsize'.*Did you mean 'batch_size'"):
        make({"batchsize": 3})
    with pytest.raises(CnnlabError, match="no field 'zzz'.*learning_rate"):
        make({"zzz": 3})


@pytest.mark.parametrize("values", [[1, 2], "SmallCNN", None, 3], ids=repr)
def test_what_is_no_json_object_is_no_recipe(values):
    with pytest.raises(CnnlabError, match="JSON object"):
        Recipe.from_dict(values)


def test_replicas_that_do_not_divide_the_batch_are_refused_with_a_batch_that_works():
    with pytest.raises(CnnlabError, match="batch_size=64.*replicas=3.*such as 63"):
        Recipe(replicas=3)
    with pytest.raises(CnnlabError, match="batch_size=2.*such as 4"):
        Recipe(batch_size=2, replicas=4)


@pytest.mark.parametrize("strategy", ["ring", "local-sgd", "async"])
@pytest.mark.parametrize(
    "change", [{"compression": "fp16"}, {"bucket_mb": 1.0}, {"accumulate": 2}], ids=str
)
def test_what_only_ddp_does_is_refused_elsewhere(strategy, change):
    [name] = change
    with pytest.raises(CnnlabError, match=f"{name}=.*needs strategy='ddp'.*strategy='{strategy}'"):
        Recipe(strategy=strategy, replicas=2, **change)
    Recipe(strategy="ddp", replicas=2, **change), Recipe(replicas=2, **change)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"strategy": "async", "schedule": "cosine"}, "schedule='constant'"),
        ({"strategy": "ring", "precision": "fp16"}, "precision='bf16'"),
        ({"accumulate": 3}, "accumulate=3 cannot split the 64 images"),
        ({"replicas": 2, "accumulate": 64}, "accumulate=64 cannot split the 32 images"),
        ({"device": "cuda", "latency_ms": 1.0}, "device='cpu'"),
        ({"device": "cuda", "bandwidth_mbit": 1.0}, "device='cpu'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_with_what_to_take(change, said):
    with pytest.raises(CnnlabError, match=said):
        Recipe(**change)


def test_tf32_on_a_cpu_is_refused_with_what_to_take():
    with pytest.raises(CnnlabError, match="tf32.*device='cuda'.*bf16"):
        Recipe(precision="tf32")


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_that_leave_nothing_to_time_are_refused(steps):
    with pytest.raises(CnnlabError, match=f"steps={steps}.*warmup_steps=2"):
        Recipe(steps=steps, warmup_steps=2)
    assert Recipe(steps=steps, warmup_steps=0).steps == steps


def test_a_batch_larger_than_the_synthetic_data_is_refused():
    with pytest.raises(CnnlabError, match="batch_size=64.*images=63"):
        Recipe(data="synthetic", images=63)
    assert Recipe(data="synthetic", images=64).images == 64


def test_a_seed_that_numpy_cannot_take_is_refused():
    with pytest.raises(CnnlabError, match="seed=4294967296"):
        Recipe(seed=2**32)
