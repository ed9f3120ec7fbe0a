"""Explanations: the parts of a real step, which of them bounds it, and the advice."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cnnlab import machine, widgets
from cnnlab.launch import launcher
from cnnlab.measure.explain import (
    PARTS,
    Explanation,
    count_flops_and_bytes,
    explain,
    suggest_next,
)
from cnnlab.model import SmallCNN
from cnnlab.recipe import CnnlabError, Recipe

SMALL = Recipe(batch_size=64, threads=1)


@pytest.fixture(scope="module")
def plain():
    return explain(SMALL, repeats=1)


def test_the_parts_add_up_to_a_step(plain):
    assert set(plain.parts) == set(PARTS) and min(plain.parts.values()) >= 0
    assert sum(plain.parts.values()) == pytest.approx(plain.step_s)
    assert plain.parts["communication"] == 0
    assert plain.images_per_s == pytest.approx(64 / plain.step_s, rel=0.05)


def test_flops_are_those_of_forward_and_backward(plain):
    with FlopCounterMode(display=False) as counter:
        SmallCNN(channels=1)(torch.randn(64, 1, 32, 32)).sum().backward()
    assert plain.flops == counter.get_total_flops() > 0


def test_bytes_are_those_of_one_step(plain):
    assert plain.moved == count_flops_and_bytes(SMALL.replace(steps=12))["moved"]


def test_a_slow_loader_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    recipe = Recipe(data="photos", images=64, batch_size=16, threads=1, image_size=16)
    found = explain(recipe, repeats=1)
    _, change = suggest_next(found.recipe, found.bound)
    assert found.bound == "loader" and change == {"loader_workers": 1}
    assert "Most of a step is waiting for the loader. Try next: more loader workers" in str(found)


def test_heavy_convolutions_are_found():
    recipe = Recipe(model="VGG16", width=32, batch_size=32, threads=1, warmup_steps=1)
    found = explain(recipe, repeats=1)
    assert found.bound == "arithmetic" and "GFLOP/s" in str(found)


def test_a_slow_network_is_found():
    found = explain(SMALL.replace(replicas=2, latency_ms=60.0), repeats=1)
    _, change = suggest_next(found.recipe, found.bound)
    assert found.bound == "communication" and change == {"batch_size": 128}


@pytest.mark.skipif("C++ compiler" in machine.describe().missing, reason="no C++ compiler here")
def test_compiled_steps_are_explained():
    found = explain(SMALL.replace(compiler="inductor"), repeats=1)
    assert found.parts["memory"] > 0 and found.parts["arithmetic"] > 0
    assert "before fusion" in str(found)


def explanation(bound, **changes):
    parts = dict.fromkeys(PARTS, 0.1) | {bound: 0.6}
    return Explanation(
        recipe=SMALL.replace(**changes),
        images_per_s=64.0,
        step_s=1.0,
        parts=parts,
        flops=10**9,
        moved=10**9,
        peak_flops=1e11,
        peak_copy=1e10,
        operations=100,
        profile=None,
    )


def test_on_a_gpu_copies_are_a_part_and_on_a_cpu_they_are_not_listed():
    assert "copies between CPU and GPU" in str(explanation("launch", device="cuda"))
    assert "copies" not in str(explanation("launch"))


@pytest.mark.parametrize("bound", PARTS)
def test_the_largest_part_bounds_the_step(bound):
    found = explanation(bound)
    assert found.bound == bound and f"Most of a step is {PARTS[bound]}." in str(found)


FASTER = {"threads": None, "precision": "bf16", "memory_format": "channels_last"}


@pytest.mark.parametrize(
    "changes, bound, expected",
    [
        ({}, "loader", {"loader": "batch"}),
        ({"loader": "batch"}, "loader", {}),
        ({"data": "photos", "loader_workers": 1}, "loader", {"loader_workers": 2}),
        (FASTER, "arithmetic", {}),
        ({"threads": None, "precision": "bf16"}, "arithmetic", {"memory_format": "channels_last"}),
        ({**FASTER, "precision": "fp16"}, "arithmetic", {}),
        ({**FASTER, "threads": 1}, "arithmetic", {"threads": 2}),
        ({**FASTER, "threads": 1, "loader_workers": 1}, "arithmetic", {}),
        (FASTER, "memory", {"pooling": "before-relu"}),
        ({**FASTER, "pooling": "before-relu"}, "memory", {"compiler": "inductor"}),
        (
            {**FASTER, "pooling": "before-relu", "compiler": "inductor"},
            "memory",
            {},
        ),
        ({"replicas": 2}, "communication", {"batch_size": 128}),
        ({"strategy": "pipeline", "stages": 2}, "communication", {"micro_batches": 2}),
    ],
    ids=str,
)
def test_the_advice_is_a_change_that_the_recipe_does_not_have_yet(
    changes, bound, expected, monkeypatch
):
    monkeypatch.setattr(machine, "describe", lambda: MACHINE)
    advice, change = suggest_next(SMALL.replace(**changes), bound)
    assert advice and change == expected
    SMALL.replace(**changes).replace(**change)  # is a valid recipe


@pytest.mark.parametrize(
    "bound, lacking, expected",
    [
        ("launch", [], {"compiler": "inductor"}),
        ("copies", [], {}),
        ("launch", ["C++ compiler"], {"batch_size": 128}),
        ("arithmetic", ["C++ compiler"], {"precision": "bf16"}),
        ("arithmetic", ["C++ compiler", "bf16"], {"memory_format": "channels_last"}),
    ],
)
def test_the_advice_is_one_that_this_machine_can_follow(bound, lacking, expected, monkeypatch):
    here = replace(
        MACHINE,
        hardware={"bf16": "bf16" not in lacking, "fp16": False},
        missing={**MACHINE.missing, **dict.fromkeys(lacking, "it is not here")},
    )
    monkeypatch.setattr(machine, "describe", lambda: here)
    assert suggest_next(SMALL.replace(threads=None), bound)[1] == expected


def test_a_gpu_is_suggested_where_there_is_one(monkeypatch):
    with_gpu = machine_with_gpu("cuda", machine.PRECISIONS)
    monkeypatch.setattr(machine, "describe", lambda: with_gpu)
    assert suggest_next(SMALL.replace(threads=None), "arithmetic")[1] == {"device": "cuda"}
    on_gpu = SMALL.replace(device="cuda")  # has bf16 whatever the CPU has
    assert suggest_next(on_gpu, "arithmetic")[1] == {"precision": "bf16"}


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_fp16_is_suggested_for_a_gpu_without_bf16(device, monkeypatch):
    older = machine_with_gpu(device, ("fp32", "fp16"))
    monkeypatch.setattr(machine, "describe", lambda: older)
    assert suggest_next(SMALL.replace(threads=None), "arithmetic")[1] == {"device": device}
    on_gpu = SMALL.replace(device=device)
    assert suggest_next(on_gpu, "arithmetic")[1] == {"precision": "fp16"}
    after = suggest_next(on_gpu.replace(precision="fp16"), "arithmetic")[1]
    assert after == {"memory_format": "channels_last"}


def test_several_ranks_are_not_sent_to_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(machine, "describe", lambda: machine_with_gpu("mps", ("fp32", "fp16")))
    several = SMALL.replace(threads=None, replicas=2)
    assert "device" not in suggest_next(several, "arithmetic")[1]


def machine_with_gpu(device, precisions):
    gpu = machine.Accelerator(
        device=device, name="A", memory_gib=8.0, capability="", precisions=precisions
    )
    hardware = {"bf16": False, "fp16": False}  # of the CPU
    return replace(MACHINE, accelerators=(gpu,), missing={}, hardware=hardware)


MACHINE = machine.Machine(
    name="a machine",
    system="",
    cores=2,
    memory_gib=8.0,
    units=(),
    gpus=(),
    compiler="g++",
    hardware={"bf16": True, "fp16": False},
    missing={"NVIDIA GPU": "none here"},
    versions={},
)


def test_stop_ends_an_explanation():
    stop, began = threading.Event(), time.monotonic()
    threading.Timer(1.0, stop.set).start()
    assert explain(SMALL.replace(model="VGG16", batch_size=128), stop=stop) is None
    assert time.monotonic() - began < 30  # a hang limit


def test_a_recipe_that_cannot_run_is_rejected():
    with pytest.raises(CnnlabError, match="batch_size=5000"):
        explain(SMALL.replace(batch_size=5000))


def test_without_a_profiler_that_sees_the_gpu_nothing_is_explained(monkeypatch):
    supported = {torch.profiler.ProfilerActivity.CPU}
    monkeypatch.setattr("torch.profiler.supported_activities", lambda: supported)
    with pytest.raises(CnnlabError, match="does not see this GPU's kernels"):
        explain(SMALL.replace(device="mps"))


def test_the_panel_shows_the_explanation():
    live = widgets.TrainingPanel(SMALL.replace(steps=8, evaluate=False), {"threads": [1, 2]})
    assert live.why_button.disabled
    live.run()
    live.wait()
    assert not live.why_button.disabled and live.reason.value == ""
    live.explain()
    live.wait()
    shown = live.reason.value
    assert "Most of a step is" in shown and "below" in live.status.value
    assert 'src="data:image/png;base64,' in shown and "https://ui.perfetto.dev" in shown
    live.controls["threads"].value = 2
    live.wait()
    live.explain()
    live.wait()
    assert "threads=1: SmallCNN on" in live.reason.value
    assert "threads=2: SmallCNN on" in live.reason.value
    assert launcher.RANK_NAME not in [thread.name for thread in threading.enumerate()]


def test_a_rank_of_a_divided_model_does_a_part_of_the_work():
    base = Recipe(batch_size=32, threads=1)
    whole = explain(base, repeats=1)
    half = explain(base.replace(strategy="tensor", tensor_ranks=2), repeats=1)
    assert half.flops == whole.flops // 2
    assert sum(half.parts.values()) == pytest.approx(half.step_s)
