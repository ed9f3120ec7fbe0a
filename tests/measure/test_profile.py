"""Profiles of one rank: what counts as arithmetic, what is counted, and when profiling starts."""

from types import SimpleNamespace

import pytest
import torch

from cnnlab.measure import profile
from cnnlab.recipe import Recipe

SMALL = Recipe(batch_size=64, threads=1)


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
def test_arithmetic_is_recognized_by_the_names_of_operations_and_kernels(name, arithmetic):
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
        event("Optimizer.step#SGD.step", "CUDA", 0, 9_000_000),  # a range over others
    ]
    assert profile.time_by_category(events, gpu, steps=2) == expected


@pytest.mark.parametrize("warmup", [0, 3])
def test_profiling_starts_after_the_warmup_however_often_training_reports(monkeypatch, warmup):
    recipe = SMALL.replace(steps=warmup + 4, warmup_steps=warmup, evaluate=False)
    monkeypatch.setattr("cnnlab.training.meter.REPORT_EVERY", 0.0)  # after every step
    [(_, often)] = profile.profile_steps(0, 1, recipe)
    monkeypatch.setattr("cnnlab.training.meter.REPORT_EVERY", 1e9)
    [(_, rarely)] = profile.profile_steps(0, 1, recipe)
    assert (
        50 < often["operations"] < 1.1 * rarely["operations"]
    )  # with one step more it would be 5/4


def test_bytes_grow_with_the_batch():
    moved = profile.count_flops_and_bytes(SMALL.replace(steps=12))["moved"]
    assert moved > 2 * 4 * 64 * 16 * 32 * 32  # the first ReLU alone reads and writes that much
    twice = profile.count_flops_and_bytes(SMALL.replace(batch_size=128, steps=12))["moved"]
    assert 1.9 < twice / moved < 2.0  # all but the parameters grows with the batch
