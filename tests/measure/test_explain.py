"""Why a run is as fast as it is: the parts of a real step, what takes most of it, and the advice."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cnnlab import machine, widgets
from cnnlab.launch import launcher
from cnnlab.measure import profile
from cnnlab.measure.explain import PARTS, Explanation, explain, suggest_next
from cnnlab.model import SmallCNN
from cnnlab.recipe import CnnlabError, Recipe

SMALL = Recipe(batch_size=64, threads=1)


@pytest.fixture(scope="module")
def plain():
    return explain(SMALL, repeats=1)


def test_the_parts_add_up_to_a_step(plain):
    assert set(plain.parts) == set(PARTS) and min(plain.parts.values()) >= 0
    assert sum(plain.parts.values()) == pytest.approx(plain.step_s)
    assert plain.parts["communication"] == 0 and plain.images_per_s == pytest.approx(
        64 / plain.step_s, rel=0.05
    )


def test_flops_are_those_of_forward_and_backward(plain):
    with FlopCounterMode(display=False) as counter:
        SmallCNN(channels=1)(torch.randn(64, 1, 32, 32)).sum().backward()
    assert plain.flops == counter.get_total_flops() > 0


def test_bytes_are_those_of_all_operations_that_are_no_arithmetic(plain, monkeypatch):
    """ReLU on the first convolution's output alone reads and writes 64 x 16 x 32 x 32 floats."""
    assert plain.moved > 2 * 4 * 64 * 16 * 32 * 32
    twice = profile.count_flops_and_bytes(SMALL.replace(batch_size=128, steps=12))["moved"]
    assert 1.9 < twice / plain.moved < 2.0  # all but the parameters grows with the batch


def test_a_slow_loader_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path))
    found = explain(
        Recipe(data="photos", images=64, batch_size=16, threads=1, image_size=16), repeats=1
    )
    assert found.bound == "loader" and found.next[1] == {"loader_workers": 1}
    assert "Most of a step is waiting for the loader. Try next: more loader workers" in str(found)


def test_heavy_convolutions_are_found():
    found = explain(
        Recipe(model="VGG16", width=32, batch_size=32, threads=1, warmup_steps=1), repeats=1
    )
    assert found.bound == "arithmetic" and "GFLOP/s" in str(found)


def test_a_slow_network_is_found():
    found = explain(SMALL.replace(replicas=2, latency_ms=60.0), repeats=1)
    assert found.bound == "communication" and found.next[1] == {"batch_size": 128}


@pytest.mark.parametrize(
    "name, arithmetic",
    [
        ("aten::mkldnn_convolution", True),
        ("aten::convolution_backward", True),
        ("aten::addmm", True),
        ("aten::max_pool2d_with_indices", False),
        ("aten::cudnn_convolution", True),
        ("aten::cudnn_batch_norm", False),
        ("cudnn::bn_fw_tr_1C11_singleread", False),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", True),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNN", True),
        ("cutlass_80_wmma_tensorop_bf16_s161616gemm", True),
        ("triton_poi_fused_convolution_relu_3", False),
        ("triton_red_fused_native_batch_norm_backward_2", False),
        ("triton_tem_fused_mm_1", True),
    ],
)
def test_operations_and_kernels_are_told_apart_by_their_names(name, arithmetic):
    assert profile.is_arithmetic(name) is arithmetic


@pytest.mark.parametrize(
    "gpu, expected",
    [
        (True, ({"arithmetic": 1.5, "memory": 0.5}, 1)),
        (False, ({"arithmetic": 0.25, "memory": 0.0}, 0)),
    ],
)
def test_on_a_gpu_each_kernel_counts_once_and_on_a_cpu_each_call(gpu, expected):
    def event(name, where, own_cpu, own_device):
        return SimpleNamespace(
            name=name,
            device_type=getattr(torch.autograd.DeviceType, where),
            self_cpu_time_total=own_cpu,
            self_device_time_total=own_device,
            cpu_parent=None,
        )

    events = [
        event("aten::cudnn_convolution", "CPU", 500_000, 3_000_000),
        event("sm90_xmma_fprop_implicit_gemm", "CUDA", 0, 3_000_000),
        event("triton_poi_fused_relu_0", "CUDA", 0, 1_000_000),
        event("Optimizer.step#SGD.step", "CUDA", 0, 9_000_000),
    ]  # the last: a range over others
    assert profile.time_by_category(events, gpu, steps=2) == expected


@pytest.mark.skipif("C++ compiler" in machine.describe().missing, reason="no C++ compiler here")
def test_compiled_steps_are_explained():
    found = explain(SMALL.replace(compiler="inductor"), repeats=1)
    assert (
        found.parts["memory"] > 0
        and found.parts["arithmetic"] > 0
        and "before fusing" in str(found)
    )


@pytest.mark.parametrize("warmup", [0, 3])
def test_what_is_profiled_begins_after_the_warm_up(monkeypatch, warmup):
    """However often training says how it goes: here after every step."""
    monkeypatch.setattr("cnnlab.training.loop.REPORT_EVERY", 0.0)
    found = profile.profile_steps(
        SMALL.replace(steps=warmup + 4, warmup_steps=warmup, evaluate=False)
    )
    monkeypatch.setattr("cnnlab.training.loop.REPORT_EVERY", 1e9)
    assert (
        50
        < found["operations"]
        < 1.1
        * profile.profile_steps(
            SMALL.replace(steps=warmup + 4, warmup_steps=warmup, evaluate=False)
        )["operations"]
    )  # 5/4 with a step more


def test_two_recipes_are_compared_image_by_image():
    found = explain(SMALL, SMALL.replace(straggler_ms=0.0, batch_size=128), repeats=1)
    said = str(found)
    assert (
        "B (batch_size=128)" in said
        and "An image takes" in said
        and f"{found.b.images_per_s / found.a.images_per_s:.2f} times" in said
    )


def made(bound, **changes):
    parts = {name: 0.1 for name in PARTS} | {bound: 0.6}
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
    )


@pytest.mark.parametrize("bound", PARTS)
def test_the_largest_part_is_what_a_step_is_bound_by(bound):
    assert made(bound).bound == bound and f"Most of a step is {PARTS[bound]}." in str(made(bound))


@pytest.mark.parametrize(
    "changes, bound, expected",
    [
        ({}, "loader", {"loader": "batch"}),
        ({"loader": "batch"}, "loader", {}),
        ({"data": "photos", "loader_workers": 1}, "loader", {"loader_workers": 2}),
        (
            {"threads": None, "precision": "bf16", "memory_format": "channels_last"},
            "arithmetic",
            {},
        ),
        ({"threads": None, "precision": "bf16"}, "arithmetic", {"memory_format": "channels_last"}),
        (
            {"threads": 1, "precision": "bf16", "memory_format": "channels_last"},
            "arithmetic",
            {"threads": 2},
        ),
        (
            {
                "threads": 1,
                "loader_workers": 1,
                "precision": "bf16",
                "memory_format": "channels_last",
            },
            "arithmetic",
            {},
        ),
        (
            {"threads": None, "precision": "bf16", "memory_format": "channels_last"},
            "memory",
            {"pooling": "before-relu"},
        ),
        (
            {
                "threads": None,
                "precision": "bf16",
                "memory_format": "channels_last",
                "pooling": "before-relu",
            },
            "memory",
            {"compiler": "inductor"},
        ),
        ({"replicas": 2}, "communication", {"batch_size": 128}),
    ],
    ids=str,
)
def test_the_advice_is_a_change_that_the_recipe_does_not_have_yet(
    changes, bound, expected, monkeypatch
):
    monkeypatch.setattr(machine, "describe", lambda: MACHINE)
    what, change = suggest_next(SMALL.replace(**changes), bound)
    assert what and change == expected
    SMALL.replace(**changes).replace(**change)


@pytest.mark.parametrize(
    "bound, compiler, hardware, expected",
    [
        ("launch", "g++", True, {"compiler": "inductor"}),
        ("launch", None, True, {"batch_size": 128}),
        ("arithmetic", None, True, {"precision": "bf16"}),
        ("arithmetic", None, False, {"memory_format": "channels_last"}),
    ],
)
def test_the_advice_is_one_that_this_machine_can_follow(
    bound, compiler, hardware, expected, monkeypatch
):
    from dataclasses import replace

    monkeypatch.setattr(
        machine,
        "describe",
        lambda: replace(MACHINE, compiler=compiler, hardware={"bf16": hardware}),
    )
    assert suggest_next(SMALL.replace(threads=None), bound)[1] == expected


MACHINE = machine.Machine(
    name="a machine",
    system="",
    cores=2,
    memory_gib=8.0,
    units=(),
    gpus=(),
    compiler="g++",
    hardware={"bf16": True},
    missing={},
    versions={},
)


def test_stop_ends_an_explanation():
    stop, began = threading.Event(), time.monotonic()
    threading.Timer(1.0, stop.set).start()
    assert explain(SMALL.replace(model="VGG16", batch_size=128), stop=stop) is None
    assert time.monotonic() - began < 30  # a hang limit


def test_what_cannot_run_is_refused():
    with pytest.raises(CnnlabError):
        explain(
            SMALL.replace(device="cuda")
            if not torch.cuda.is_available()
            else SMALL.replace(batch_size=5000)
        )


def test_the_panel_says_why():
    live = widgets.TrainingPanel(SMALL.replace(steps=8, evaluate=False), {"threads": [1, 2]})
    assert live.why_button.disabled
    live.run()
    live.wait()
    assert not live.why_button.disabled and live.reason.value == ""
    live.explain()
    live.wait()
    assert "Most of a step is" in live.reason.value and "below" in live.status.value
    live.controls["threads"].value = 2
    live.wait()
    live.explain()
    live.wait()
    assert "B (threads=2)" in live.reason.value and not launch_is_busy()


def launch_is_busy():
    return any(thread.name == launcher.AGENT_THREAD for thread in threading.enumerate())
