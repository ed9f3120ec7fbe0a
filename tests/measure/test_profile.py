"""Profiles: lanes, steps and shares from real and from made-up events of a GPU."""

import gzip
import json
import os
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.data import DataLoader

from cnnlab.measure.explain import count_flops_and_bytes
from cnnlab.measure.profile import Profile, profile, summarize_profile, union_s
from cnnlab.measure.profile_events import Span, is_arithmetic, readable_name
from cnnlab.recipe import Recipe

SMALL = Recipe(batch_size=64, threads=1)


class FakeProfiler:
    """Events as `torch.profiler.profile` reports them, in microseconds."""

    def __init__(self):
        self.list = []

    def events(self):
        return self.list

    def add(self, name, start, end, parent=None, on_gpu=False, number=0, launched_by=0, **fields):
        defaults = {"thread": 1, "stream": 7, "annotation": False}
        fields = SimpleNamespace(**{**defaults, **fields})
        event = SimpleNamespace(
            name=name,
            time_range=SimpleNamespace(start=start, end=end),
            device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU,
            device_resource_id=fields.stream,
            is_user_annotation=fields.annotation,
            is_python_function=False,
            activity_type=None,
            thread=fields.thread,
            id=number,
            linked_correlation_id=launched_by,
            cpu_parent=parent,
            cpu_children=[],
            self_cpu_time_total=0 if on_gpu else end - start,
        )
        if parent:
            parent.cpu_children.append(event)
        self.list.append(event)
        return event

    def add_step(self, at):
        """A step of 10 ms: two kernels, a copy, an all-reduce, the optimizer, a synchronization."""
        add, step = self.add, int(at)
        add("enumerate(DataLoader)#_Single.__next__", at, at + 900, annotation=True)
        rows = [
            ("aten::to", 950, "Memcpy HtoD (Pinned -> Device)", 1000, 1500, 7),
            ("aten::conv2d", 1100, "sm90_xmma_fprop_implicit_gemm_bf16", 1500, 3500, 7),
            ("aten::copy_", 1200, "Memcpy DtoD (Device -> Device)", 3500, 3600, 7),
            ("aten::relu", 1300, "void at::native::vectorized_elementwise<4>(int)", 3600, 4000, 7),
            ("c10d::allreduce_", 1400, "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 4000, 8000, 20),
            ("Optimizer.step#Adam.step", 1500, "multi_tensor_apply_kernel", 8000, 8500, 7),
        ]
        for number, (name, launched, kernel, start, end, stream) in enumerate(rows, 1):
            number += step
            note = name.startswith("Optimizer")
            call = add(name, at + launched, at + launched + 50, number=number, annotation=note)
            link = {"launched_by": number}
            add("cudaLaunchKernel", at + launched + 1, at + launched + 40, call, **link)
            add(kernel, at + start, at + end, on_gpu=True, stream=stream, **link)
        item = add("aten::item", at + 1600, at + 9000)
        add("cudaStreamSynchronize", at + 1610, at + 8990, item)
        add("Optimizer.step#Adam.step", at + 8000, at + 8500, on_gpu=True, annotation=True)
        add("## Call CompiledFxGraph abc ##", at, at + 9000, on_gpu=True, annotation=True)


@pytest.fixture(scope="module")
def on_gpu():
    profiler = FakeProfiler()
    for step in range(4):
        profiler.add_step(10_000.0 * step)
    profiler.add("enumerate(DataLoader)#_Single.__next__", 40_000, 40_010, annotation=True)
    return summarize_profile(profiler)


def rows(found):
    return {row.name: row for row in found.operations}


def test_a_gpu_has_lanes_for_launches_streams_and_communication(on_gpu):
    assert list(on_gpu.lanes) == ["loader", "CPU launches", "GPU stream 7", "communication"]
    shown = [span for span in on_gpu.lanes["GPU stream 7"] if span.start < 0.01]
    assert [(span.name, span.category) for span in shown] == [
        ("Memcpy HtoD", "copies"),
        ("conv2d", "arithmetic"),
        ("copy_", "memory"),
        ("relu", "memory"),
        ("Adam.step", "optimizer"),
    ]
    assert [span.start for span in shown] == pytest.approx([0.001, 0.0015, 0.0035, 0.0036, 0.008])
    assert shown[0].end == pytest.approx(0.0015)
    assert len(on_gpu.lanes["loader"]) == 2  # the last two steps, without the last, empty fetch


def test_each_kernel_of_a_gpu_counts_once_and_ranges_do_not_count(on_gpu):
    assert on_gpu.steps == 4 and on_gpu.num_operations == 5
    expected = {"arithmetic": 0.0020, "memory": 0.0010, "copies": 0.0005}
    assert on_gpu.parts == pytest.approx(expected)
    found = rows(on_gpu)
    assert set(found) == {
        *("next batch", "Memcpy HtoD", "conv2d", "copy_", "relu", "allreduce_", "Adam.step")
    }
    assert found["conv2d"].calls == 1 and found["conv2d"].seconds == pytest.approx(0.0020)
    assert on_gpu.step_s == pytest.approx(0.0385 / 4)  # until the last kernel ends
    assert found["conv2d"].share == pytest.approx(0.0020 / on_gpu.step_s)
    assert on_gpu.idle_s == pytest.approx(on_gpu.step_s - 0.0009 - 0.0075)


def test_a_hidden_synchronization_is_waiting_for_the_gpu(on_gpu):
    kinds = {span.name: span.category for span in on_gpu.lanes["CPU launches"]}
    assert kinds["item"] == "synchronize" and kinds["conv2d"] == "arithmetic"


def test_of_labels_within_labels_the_outer_ones_are_shown():
    profiler = FakeProfiler()
    outer = profiler.add("forward", 0, 5000, annotation=True)
    profiler.add("first layer", 1000, 2000, outer, annotation=True)
    profiler.add("backward", 5000, 9000, annotation=True)
    assert [span.name for span in summarize_profile(profiler).lanes["labels"]] == [
        "forward",
        "backward",
    ]


def test_a_thread_that_hardly_works_has_no_lane():
    profiler = FakeProfiler()
    profiler.add("aten::mm", 0, 9000)
    profiler.add("aten::copy_", 100, 110, thread=2)
    profiler.add("aten::mm", 200, 5000, thread=3)
    assert list(summarize_profile(profiler).lanes) == ["CPU thread", "CPU thread 3"]


def test_the_waiting_of_a_collective_is_no_operation():
    profiler = FakeProfiler()
    backward = profiler.add("autograd::engine::evaluate_function: AccumulateGrad", 0, 9000)
    profiler.add("c10d::allreduce_", 1, 8000, backward)
    profiler.add("gloo:all_reduce", 10, 8010, thread=9, annotation=True)
    profiler.add("aten::mul", 10_000, 11_000)
    found = summarize_profile(profiler)
    assert found.parts == {"arithmetic": 0, "memory": 0.001, "copies": 0}
    assert [span.name for span in found.lanes["communication"]] == ["all_reduce"]
    assert [span.category for span in found.lanes["CPU thread"]] == ["communication", "memory"]


def test_generated_code_fills_the_time_between_the_operations_that_a_graph_calls():
    profiler = FakeProfiler()
    region = profiler.add("Torch-Compiled Region: 0/0", 0, 10_000)
    graph = profiler.add("## Call CompiledFxGraph abc ##", 1000, 9000, region)
    profiler.add("aten::convolution", 3000, 5000, graph)
    graph.self_cpu_time_total = 6000
    found = summarize_profile(profiler)
    spans = [(span.name, 1000 * span.start, 1000 * span.end) for span in found.lanes["CPU thread"]]
    expected = [("compiled graph", 1, 3), ("convolution", 3, 5), ("compiled graph", 5, 9)]
    assert [name for name, *_ in spans] == [name for name, *_ in expected]
    assert [time for _, *times in spans for time in times] == pytest.approx([1, 3, 3, 5, 5, 9])
    assert found.parts == pytest.approx({"arithmetic": 0.002, "memory": 0.006, "copies": 0})


def test_a_program_of_a_lesson_is_profiled_without_a_recipe(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    optimizer = torch.optim.SGD(network.parameters())
    loader = DataLoader(torch.randn(6, 3, 8, 8), batch_size=2)
    with torch.profiler.profile() as profiler:
        for images in loader:
            with torch.profiler.record_function("forward"):
                loss = network(images).sum()
            loss.backward()
            optimizer.step()
    found = summarize_profile(profiler, trace_file=tmp_path / "trace.json.gz")
    assert found.steps == 3 and list(found.lanes) == ["labels", "loader", "CPU thread"]
    assert {span.name for span in found.lanes["labels"]} == {"forward"}
    assert rows(found)["conv2d"].calls == 1 and rows(found)["next batch"].calls == 1
    assert "forward" not in rows(found)
    assert found.lanes["loader"][0].start == pytest.approx(0)
    assert "https://ui.perfetto.dev" in str(found) and "conv2d" in str(found)
    with gzip.open(found.trace_file) as file:
        assert json.load(file)["traceEvents"]


def test_a_profile_of_nothing_is_empty():
    empty = summarize_profile(FakeProfiler())
    assert empty.lanes == {} and empty.operations == [] and "no operation" in str(empty)


@pytest.mark.parametrize(
    "name, arithmetic",
    [
        ("aten::mkldnn_convolution", True),
        ("aten::convolution_backward", True),
        ("aten::addmm", True),
        ("aten::baddbmm", True),
        ("aten::upsample_bilinear2d", False),
        ("void cudnn::convertTensor_kernel<float>", False),
        ("Cijk_Ailk_Bljk_SB_MT128x64", True),
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
    assert is_arithmetic(name) is arithmetic


@pytest.mark.parametrize(
    "name, readable",
    [
        ("aten::conv2d", "conv2d"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", "Convolution backward"),
        ("torch::autograd::AccumulateGrad", "AccumulateGrad"),
        ("Optimizer.step#Adam.step", "Adam.step"),
        ("void at::native::(anonymous namespace)::max_pool<float, at::X>(int)", "max_pool"),
        ("gloo:all_reduce", "all_reduce"),
    ],
)
def test_names_are_those_that_a_user_knows(name, readable):
    assert readable_name(name) == readable


def test_overlapping_spans_count_once():
    times = [(0, 4), (1, 2), (3, 5), (7, 8)]
    assert union_s([Span("", start, end, "memory") for start, end in times]) == 6


def test_a_recipe_is_profiled_after_its_warmup(tmp_path):
    found = profile(SMALL.replace(warmup_steps=3), steps=4, folder=tmp_path)
    assert isinstance(found, Profile) and found.steps == 4
    assert {"loader", "CPU thread"} == set(found.lanes)
    assert rows(found)["conv2d"].calls == 2 and rows(found)["Adam.step"].calls == 1
    assert found.trace_file.parent.parent == tmp_path and os.path.getsize(found.trace_file)
    again = profile(SMALL, steps=2, folder=tmp_path)
    assert again.trace_file != found.trace_file


def test_of_several_ranks_the_first_is_profiled_with_its_communication():
    found = profile(SMALL.replace(replicas=2), steps=4)
    assert [span.name for span in found.lanes["communication"]].count("all_reduce") >= 2


def test_bytes_grow_with_the_batch():
    moved = count_flops_and_bytes(SMALL.replace(steps=12))["moved"]
    assert moved > 2 * 4 * 64 * 16 * 32 * 32  # the first ReLU alone reads and writes that much
    twice = count_flops_and_bytes(SMALL.replace(batch_size=128, steps=12))["moved"]
    assert 1.9 < twice / moved < 2.0  # all but the parameters grows with the batch
