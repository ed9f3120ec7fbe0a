"""Each technique by itself: it does what it says, and leaves the numbers alone where it says so."""

import copy
import os
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

from cnnlab import machine
from cnnlab.model import VGG19, ResNet9, SmallCNN
from cnnlab.recipe import Recipe
from cnnlab.training import techniques
from cnnlab.training.clock import Clock, peak_memory_mib

CPU = torch.device("cpu")


def test_channels_last_keeps_shapes_and_numbers():
    torch.manual_seed(0)
    model, images = ResNet9(width=4).eval(), torch.rand(2, 3, 32, 32)
    expected = model(images)
    faster = techniques.channels_last(model)
    assert faster.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(faster(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, channels_last", [({}, False), ({"memory_format": "channels_last"}, True)]
)
def test_prepare_applies_the_layout_of_the_recipe(change, channels_last):
    model = techniques.prepare(SmallCNN(width=8, channels=3), Recipe(**change), CPU)
    assert model.stage2[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_prepare_compiles_only_when_asked():
    assert type(techniques.prepare(SmallCNN(), Recipe(), CPU)) is SmallCNN
    assert isinstance(
        techniques.prepare(SmallCNN(), Recipe(compiler="inductor"), CPU),
        torch._dynamo.OptimizedModule,
    )  # compiles at its first call


def test_pooling_is_left_out_of_what_is_compiled():
    torch.manual_seed(0)
    plain, images = ResNet9(width=4), torch.rand(2, 3, 32, 32)
    cut = techniques.prepare(
        copy.deepcopy(plain), Recipe(compiler="inductor-except-pool"), CPU
    )._orig_mod
    assert torch._dynamo.explain(plain)(images).graph_break_count == 0
    torch._dynamo.reset()
    found = torch._dynamo.explain(cut)(images)
    assert found.graph_break_count == 0 and found.graph_count == 1  # all the rest is one graph ...
    pools = [str(node.target) for node in found.graphs[0].graph.nodes if "pool" in str(node.target)]
    assert (
        pools == ["cnnlab.max_pool.default"] * 4
    )  # ... into whose poolings the compiler cannot look
    torch._dynamo.reset()
    graphs = torch.compile(cut, backend="eager")
    assert torch.equal(graphs(images), copy.deepcopy(plain)(images))


@pytest.mark.parametrize("build", [SmallCNN, ResNet9])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(pooling="before-relu"),
        Recipe(memory_format="channels_last"),
        Recipe(compiler="inductor-except-pool"),
    ],
)
def test_what_only_moves_work_about_leaves_logits_and_gradients_the_same(build, recipe):
    torch.manual_seed(0)
    plain, images = build(width=4), torch.rand(8, 3, 32, 32)
    other = techniques.prepare(copy.deepcopy(plain), recipe, CPU)
    other = getattr(other, "_orig_mod", other)  # as it is before it is compiled
    found = []
    for model in (plain, other):
        logits = model(images)
        logits.logsumexp(1).sum().backward()
        found.append([logits, *(parameter.grad for parameter in model.parameters())])
    for ours, expected in zip(found[1], found[0]):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "build, poolings, stay", [(SmallCNN, 2, 0), (ResNet9, 4, 1), (VGG19, 5, 0)]
)  # ResNet9's last follows a sum, not a ReLU
def test_every_pooling_that_follows_a_relu_moves_before_it(build, poolings, stay):
    leaves = lambda model: [type(layer) for layer in model.modules() if not list(layer.children())]
    follows = lambda model: sum(
        pair == (nn.ReLU, nn.MaxPool2d) for pair in zip(leaves(model), leaves(model)[1:])
    )
    before, after = build(width=2), techniques.pool_before_relu(build(width=2))
    assert (follows(before), follows(after)) == (poolings, stay)
    assert sorted(map(str, leaves(after))) == sorted(map(str, leaves(before)))


def test_channels_last_gradients_arrive_channels_last():
    model, arrived = (
        techniques.prepare(SmallCNN(width=4), Recipe(memory_format="channels_last"), CPU),
        [],
    )
    model.stage2.register_full_backward_hook(lambda layer, inner, outer: arrived.append(outer[0]))
    model(torch.rand(8, 3, 32, 32)).sum().backward()
    assert arrived[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_computes_at_the_recipes_precision(precision, dtype):
    with techniques.autocast(Recipe(precision=precision)):
        assert nn.Linear(4, 4)(torch.rand(2, 4)).dtype == dtype


@pytest.mark.parametrize("precision, scales", [("fp32", False), ("bf16", False), ("fp16", True)])
def test_only_fp16_scales_its_gradients(precision, scales):
    assert techniques.grad_scaler(Recipe(precision=precision)).is_enabled() == scales


def test_threads_are_those_of_the_recipe_or_all_cores_or_what_the_rank_was_given(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "cores", lambda: 3)
    try:
        for recipe, world, expected in (
            (Recipe(threads=2), 1, 2),
            (Recipe(threads=2), 4, 2),
            (Recipe(), 1, 3),
            (Recipe(), 2, 5),
        ):
            torch.set_num_threads(5)  # as rank.main has shared them out
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


def test_where_a_system_cannot_pin_ranks_stay_unpinned(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert techniques.pin_to_cores(0, 2) is None


def drawn():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_seed_repeats_all_draws_and_ranks_differ():
    draws = []
    for seed, rank in ((1, 0), (1, 0), (1, 1)):
        techniques.set_seed(seed, rank)
        draws.append(drawn())
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2]))


def test_the_largest_seed_can_be_set():
    techniques.set_seed(Recipe(seed=2**31 - 1).seed, rank=1000)


def test_tf32_is_switched_on():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    try:
        techniques.set_tf32(True)
        assert all(flag.allow_tf32 for flag in flags)
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value


def test_the_clock_stands_still_while_paused():
    clock = Clock(CPU)
    clock.resume()
    clock.pause()
    first = clock.seconds
    time.sleep(0.5)
    clock.resume()
    clock.pause()
    assert first <= clock.seconds < 0.25


def test_the_clock_runs_while_training():
    clock = Clock(CPU)
    clock.resume()
    time.sleep(0.1)
    assert clock.elapsed() >= 0.1
    clock.pause()
    assert clock.seconds >= 0.1


def test_the_clock_adds_up():
    clock = Clock(CPU)
    for _ in range(3):
        clock.resume()
        time.sleep(0.1)
        clock.pause()
    assert clock.seconds >= 0.3


def test_waiting_counts_the_loader_but_not_the_work():
    def loader():
        for number in range(3):
            time.sleep(0.1)
            yield number

    clock, seen = Clock(CPU), []
    for number in clock.iterate(loader()):
        seen.append(number)
        time.sleep(0.5)
    assert seen == [0, 1, 2]
    assert 0.3 <= clock.waiting < 1.0


def test_communication_is_exposed_from_the_last_exchange_on_only():
    """Two exchanges in one backward: the first beside it, the second after all is computed."""
    clock = Clock(CPU)
    for _ in clock.iterate([1]):
        time.sleep(0.02)
        clock.mark("forward")
        first = time.perf_counter()
        time.sleep(0.1)  # backward, and the first exchange
        clock.record_communication(first)
        clock.timed_communication(time.sleep, 0.05)
        clock.mark("backward")
        clock.timed_communication(time.sleep, 0.03)
        clock.mark("update")
    assert 0.08 <= clock.exposed < 0.15
    spans = clock.timeline()
    length = {
        phase: sum(end - begin for name, begin, end in spans if name == phase)
        for phase, *_ in spans
    }
    assert (
        length["exposed"] == pytest.approx(clock.exposed, abs=1e-4)
        and length["communication"] >= 0.18
    )
    assert (
        length["forward"] >= 0.02 and 0.1 <= length["backward"] < 0.15 and length["update"] < 0.05
    )
    assert abs(max(end for *_, end in spans) - time.time()) < 5  # on the clock on the wall


def test_peak_memory_is_in_mib_and_never_falls():
    before = peak_memory_mib(CPU)
    ballast = torch.ones(400 * 2**20 // 4)
    after = peak_memory_mib(CPU)
    del ballast
    assert before > 50  # torch alone takes more
    assert before <= after < before + 600
    assert peak_memory_mib(CPU) >= after
