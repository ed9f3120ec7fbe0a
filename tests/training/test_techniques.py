"""Each technique does what it says, and changes no numbers where it promises not to."""

import copy
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from cnnlab import machine
from cnnlab.model import VGG19, ResNet9, SmallCNN
from cnnlab.recipe import Recipe
from cnnlab.training import techniques

CPU = torch.device("cpu")


def test_channels_last_keeps_shapes_and_numbers():
    torch.manual_seed(0)
    model, images = ResNet9(width=4).eval(), torch.rand(2, 3, 32, 32)
    expected = model(images)
    converted = techniques.channels_last(model)
    assert converted.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(converted(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, channels_last", [({}, False), ({"memory_format": "channels_last"}, True)]
)
def test_prepare_applies_the_memory_format_of_the_recipe(change, channels_last):
    model = techniques.prepare(SmallCNN(width=8, channels=3), Recipe(**change), CPU)
    assert model.stage2[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_prepare_compiles_only_on_request():
    assert type(techniques.prepare(SmallCNN(), Recipe(), CPU)) is SmallCNN
    compiled = techniques.prepare(SmallCNN(), Recipe(compiler="inductor"), CPU)
    assert isinstance(compiled, torch._dynamo.OptimizedModule)  # compiles at its first call


@pytest.mark.parametrize(
    "compiler, mode", [("inductor", "default"), ("cudagraphs", "reduce-overhead")]
)
def test_cuda_graphs_are_a_mode_of_the_compiler(monkeypatch, compiler, mode):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode))
    techniques.prepare(SmallCNN(), Recipe(device="cuda", compiler=compiler), CPU)
    assert modes == [mode]


@pytest.mark.parametrize("tried", [True, False])
def test_cudnn_tries_its_algorithms_on_request(monkeypatch, tried):
    """With a model that stays on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tried)
    monkeypatch.setattr(SmallCNN, "to", lambda model, device: model)
    monkeypatch.setattr(techniques, "set_tf32", lambda enabled: None)
    recipe = Recipe(device="cuda", cudnn_benchmark=tried)
    techniques.prepare(SmallCNN(), recipe, torch.device("cuda"))
    assert torch.backends.cudnn.benchmark == tried


@pytest.mark.parametrize("build", [SmallCNN, ResNet9])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(pooling="before-relu"),
        Recipe(memory_format="channels_last"),
    ],
)
def test_techniques_that_only_move_work_keep_logits_and_gradients(build, recipe):
    torch.manual_seed(0)
    plain, images = build(width=4), torch.rand(8, 3, 32, 32)
    other = techniques.prepare(copy.deepcopy(plain), recipe, CPU)
    found = []
    for model in (plain, other):
        logits = model(images)
        logits.logsumexp(1).sum().backward()
        found.append([logits, *(parameter.grad for parameter in model.parameters())])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def layer_types(model):
    return [type(layer) for layer in model.modules() if not list(layer.children())]


def count_pools_after_relu(model):
    types = layer_types(model)
    return list(zip(types, types[1:], strict=False)).count((nn.ReLU, nn.MaxPool2d))


@pytest.mark.parametrize(
    "build, pools, left",
    [(SmallCNN, 2, 0), (ResNet9, 4, 1), (VGG19, 5, 0)],  # ResNet9's last follows a sum, not a ReLU
)
def test_every_pooling_that_follows_a_relu_moves_before_it(build, pools, left):
    before, after = build(width=2), techniques.pool_before_relu(build(width=2))
    assert (count_pools_after_relu(before), count_pools_after_relu(after)) == (pools, left)
    assert sorted(map(str, layer_types(after))) == sorted(map(str, layer_types(before)))


def test_gradients_of_channels_last_models_are_channels_last():
    model = techniques.prepare(SmallCNN(width=4), Recipe(memory_format="channels_last"), CPU)
    gradients = []
    model.stage2.register_full_backward_hook(lambda _, inputs, outputs: gradients.append(*outputs))
    model(torch.rand(8, 3, 32, 32)).sum().backward()
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_computes_in_the_precision_of_the_recipe(precision, dtype):
    with techniques.autocast(Recipe(precision=precision)):
        assert nn.Linear(4, 4)(torch.rand(2, 4)).dtype == dtype


@pytest.mark.parametrize("precision, scales", [("fp32", False), ("bf16", False), ("fp16", True)])
def test_only_fp16_scales_its_gradients(precision, scales):
    assert techniques.grad_scaler(Recipe(precision=precision)).is_enabled() == scales


@pytest.mark.parametrize(
    "recipe, world, expected",
    [
        (Recipe(threads=2), 1, 2),
        (Recipe(threads=2), 4, 2),
        (Recipe(), 1, 3),  # all cores
        (Recipe(), 2, 5),  # what the launcher has set
    ],
)
def test_threads_follow_the_recipe_or_the_cores_or_the_launcher(
    monkeypatch, recipe, world, expected
):
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "cores", lambda: 3)
    try:
        torch.set_num_threads(5)
        techniques.set_threads(recipe, world)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "cores, ranks, expected",
    [
        (2, 1, [[0, 1]]),
        (2, 2, [[0], [1]]),
        (2, 4, [[0], [1], [0], [1]]),
        (5, 2, [[0, 1], [2, 3]]),
        (4, 3, [[0], [1], [2]]),
        (1, 2, [[0], [0]]),
    ],
)
def test_ranks_are_pinned_to_their_share_of_the_cores(monkeypatch, cores, ranks, expected):
    pinned = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda pid, mine: pinned.append(mine), raising=False
    )
    assert [techniques.pin_to_cores(rank, ranks) for rank in range(ranks)] == pinned == expected


def test_ranks_are_not_pinned_where_the_system_cannot(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert techniques.pin_to_cores(0, 2) is None


def test_a_seed_repeats_all_random_numbers_and_ranks_differ():
    draws = []
    for seed, rank in ((1, 0), (1, 0), (1, 1)):
        techniques.set_seed(seed, rank)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


def test_the_largest_seed_can_be_set():
    techniques.set_seed(Recipe(seed=2**31 - 1).seed, rank=1000)


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_is_switched_for_convolutions_and_matrix_products(enabled):
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag in flags:
            flag.fp32_precision = "ieee" if enabled else "tf32"
        techniques.set_tf32(enabled)
        expected = "tf32" if enabled else "ieee"
        assert [flag.fp32_precision for flag in flags] == [expected, expected]
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


AFTER_TODAYS_API = """
import torch

torch.backends.cuda.matmul.fp32_precision = "tf32"  # from here on, reading allow_tf32 raises
torch.backends.cudnn.conv.fp32_precision = "tf32"

from cnnlab import Recipe, machine
from cnnlab.measure.peaks import peak_flops
from cnnlab.training.loop import train

assert machine.describe().hardware["fp32"]
assert peak_flops(size=32, threads=1)[0] > 0
*_, finished = train(Recipe(steps=3, threads=1, evaluate=False))
assert finished.steps == 3
assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # the user's setting is kept
"""


def test_the_package_works_after_todays_api_has_allowed_tf32():
    command = [sys.executable, "-c", AFTER_TODAYS_API]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
