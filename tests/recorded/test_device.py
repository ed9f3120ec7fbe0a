"""The record of one device: plausible figures, checks that can fail, and a record in any case."""

import json

import pytest
import torch
from helpers import ordered
from recorded import device
from torch import nn

from cnnlab.data import datasets
from cnnlab.model import SmallCNN, build
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import techniques

SMALL = Recipe(data="synthetic", images=8, batch_size=8, image_size=16, optimizer="sgd")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(one_thread):
    """All measurements on the CPU, small, as read from the record."""
    return json.loads(json.dumps(dict(device.measure_all("cpu", quick=True)), allow_nan=False))


def test_the_allocator_reports_what_remains_and_the_peak():
    def work():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second

    kept, peak = device.allocated_bytes(work, "cpu")
    assert kept == 4000 and 8000 <= peak < 9000


def test_functions_run_interleaved_and_the_first_call_is_separate():
    order = []
    functions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = device.benchmark_interleaved(functions, "cpu", 3, calls=2)
    assert "".join(order) == "ab" + "aabb" * 3
    assert found["a"]["n"] == 3 and ordered(found["a"]) and ordered(found["b"])


def test_a_gpu_has_more_warmup_calls():
    calls = []
    device.benchmark_interleaved({"a": lambda: calls.append(1)}, "cuda", 2)
    assert len(calls) == 1 + device.WARMUP_CALLS + 2


def test_repeats_stop_when_time_is_up_but_not_before_the_second():
    found = device.benchmark_interleaved({"a": lambda: None}, "cpu", 50, seconds=0)
    assert found["a"]["n"] == 2


def test_a_function_that_fails_does_not_affect_the_others():
    def fails():
        raise RuntimeError("out of\n memory")

    found = device.benchmark_interleaved({"bad": fails, "good": lambda: None}, "cpu", 2)
    assert found["bad"] == {"failed": "RuntimeError: out of memory"} and ordered(found["good"])
    assert list(found) == ["bad", "good"]


@pytest.mark.parametrize(
    "recipe",
    [
        SMALL,
        SMALL.replace(precision="bf16"),
        SMALL.replace(memory_format="channels_last"),
        SMALL.replace(optimizer="adam"),
    ],
)
def test_a_trainer_trains_like_a_loop_by_hand(recipe):
    trainer = device.make_trainer(recipe)
    losses = [float(trainer.step()) for _ in range(4)]
    torch.manual_seed(recipe.seed)
    model = SmallCNN(size=16)
    images, labels = datasets.synthetic(8, 16, 10, recipe.seed).train.tensors
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    tolerance = 1e-2 if recipe.precision == "bf16" else 1e-5
    for loss in losses:
        expected = nn.functional.cross_entropy(model(images), labels)
        assert loss == pytest.approx(expected.item(), rel=tolerance)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()


def test_the_fused_optimizer_trains_like_the_plain_one():
    plain, fused = (device.make_trainer(SMALL.replace(fused_optimizer=it)) for it in (False, True))
    losses = [float(plain.step()) for _ in range(4)]
    assert losses == pytest.approx([float(fused.step()) for _ in range(4)], rel=1e-5)


def test_every_measurement_succeeds(found):
    assert list(found) == ["machine", *device.MEASUREMENTS]
    assert "failed" not in json.dumps(found)
    assert found["machine"]["device_name"] and found["machine"]["quick"] is True
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert all(found[name]["took_s"] > 0 for name in device.MEASUREMENTS)


def test_the_checks_pass_and_show_the_losses_next_to_each_other(found):
    checks = found["checks"]
    ways = checks["ways"]
    assert checks["passed"] is True and list(ways) == ["fp32", "channels_last", "bf16"]
    assert ways["fp32"]["errors"]["logits"] < 1e-5 < ways["bf16"]["errors"]["logits"]
    assert len(checks["fp64_losses"]) >= 3
    assert all(len(way["losses"]) == len(checks["fp64_losses"]) for way in ways.values())
    assert checks["fp64_losses"][-1] < checks["fp64_losses"][0]


def test_on_a_cpu_the_naive_clock_is_right(found):
    clock = found["clock"]
    assert ordered(clock) and 0.5 * clock["median"] < clock["returned_s"] <= clock["median"]
    flop = clock["products"] * 2 * clock["size"] ** 3
    assert clock["flops"] == pytest.approx(flop / clock["median"])


def test_a_copy_counts_bytes_read_and_written(found):
    [(name, copy)] = found["copies"]["ways"].items()
    assert name == "within its memory" and ordered(copy)
    moved = 2 * found["copies"]["mib"] * 2**20
    assert copy["gb_per_s"] == pytest.approx(moved / copy["median"] / 1e9)


@pytest.mark.parametrize("name", ["overlap", "graphs"])
def test_what_only_a_gpu_can_do_is_explained(found, name):
    assert "needs device='cuda'" in found[name]["missing"]


def test_the_small_step_is_timed_without_a_gpu(found):
    ways = found["graphs"]["ways"]
    assert ordered(ways["one by one"]) and ways["one CUDA graph"] is None


def test_throughput_follows_from_the_time_of_a_step(found):
    sizes = found["batch_sizes"]["sizes"]
    assert len(sizes) >= 2
    for size, figures in sizes.items():
        assert ordered(figures)
        assert figures["images_per_s"] == pytest.approx(int(size) / figures["median"])


def test_training_is_compared_with_the_peak(found):
    training = found["training"]
    assert Recipe.from_dict(training["recipe"])
    assert list(training["ways"])[0] == "fp32" and len(training["ways"]) == 3
    for figures in training["ways"].values():
        assert ordered(figures)
        flops = figures["images_per_s"] * training["flop_per_image"]
        assert figures["share_of_bf16_peak"] == pytest.approx(flops / training["bf16_peak"])


def test_a_training_step_of_resnet9_has_the_known_flop():
    """2.27 GFLOP per image at width 64, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    recipe = Recipe(model="ResNet9", width=64, data="synthetic", images=2, batch_size=2)
    with FlopCounterMode(display=False) as counter:
        device.make_trainer(recipe).step()
    assert counter.get_total_flops() / 2 == pytest.approx(2.27e9, rel=0.01)


def test_every_variant_of_vgg19_gives_the_same_logits(found):
    assert list(found["forward"]["images"]) == ["1", "2"]
    for ways in found["forward"]["images"].values():
        assert list(ways) == ["fp32", "channels_last", "bf16 autocast", "bf16 weights"]
        assert all(map(ordered, ways.values()))
        assert ways["fp32"]["error"] == 0 and ways["channels_last"]["error"] < 1e-5
        assert 0 < ways["bf16 weights"]["error"] < 0.05


def test_measuring_restores_the_settings_of_torch():
    def settings():
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        precisions = matmul.fp32_precision, cudnn.conv.fp32_precision
        return *precisions, cudnn.benchmark, torch.get_num_threads()

    before = settings()
    device.clock("cpu", quick=True)
    assert settings() == before


def test_a_technique_that_changes_the_math_fails_its_check(monkeypatch):
    def careless(model):
        with torch.no_grad():  # not the first parameter: batch normalization would undo it
            list(model.parameters())[-1].mul_(1.01)
        return model.to(memory_format=torch.channels_last)

    monkeypatch.setattr(techniques, "channels_last", careless)
    checks = device.checks("cpu", quick=True)
    assert checks["passed"] is False
    assert checks["ways"]["fp32"]["passed"] is True
    assert checks["ways"]["channels_last"]["passed"] is False


def test_a_wrong_update_shows_in_the_losses(monkeypatch):
    make = device.make_optimizer

    def careless(recipe, model, steps):
        fp32 = next(model.parameters()).dtype == torch.float32
        factor = 2 if fp32 else 1
        return make(recipe.replace(learning_rate=factor * recipe.learning_rate), model, steps)

    monkeypatch.setattr(device, "make_optimizer", careless)
    fp32 = device.checks("cpu", quick=True)["ways"]["fp32"]
    assert fp32["errors"]["logits"] < fp32["limits"]["logits"]
    assert fp32["errors"]["losses"] > fp32["limits"]["losses"] and not fp32["passed"]


def test_a_technique_that_cannot_run_here_is_no_wrong_result(monkeypatch):
    def broken(model):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(techniques, "channels_last", broken)
    checks = device.checks("cpu", quick=True)
    assert checks["passed"] is True and checks["ways"]["fp32"]["passed"] is True
    assert "C compiler" in checks["ways"]["channels_last"]["failed"]


def test_nan_logits_fail_and_remain_json(monkeypatch):
    def fill_with_nan(model):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(techniques, "channels_last", fill_with_nan)
    checks = device.checks("cpu", quick=True)
    assert checks["ways"]["channels_last"]["passed"] is False
    assert checks["ways"]["fp32"]["passed"] is True
    json.dumps(checks, allow_nan=False)


def test_counted_memory_agrees_with_autograd_and_the_allocator(found):
    counted, measured = found["memory"]["counted"], found["memory"]["measured"]
    assert set(counted) == {"parameters", "gradients", "optimizer state", "images", "activations"}
    assert min(counted.values()) > 0
    # Adam keeps two averages of each gradient.
    assert counted["optimizer state"] == pytest.approx(2 * counted["gradients"], rel=0.01)
    assert measured["kept by the forward pass"] == pytest.approx(counted["activations"], rel=0.01)
    total = sum(counted.values())
    assert total - counted["gradients"] <= measured["most at once"] <= 1.5 * total


def test_fused_convolution_and_relu_give_the_same_result(monkeypatch):
    """With cuDNN's function, which needs a GPU, replaced by what its documentation says."""
    calls = []

    def conv_relu(images, weight, bias, stride, padding, dilation, groups):
        calls.append(1)
        return nn.functional.conv2d(images, weight, bias, stride, padding, dilation, groups).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    model = build(Recipe(model="VGG19", width=2), (3, 32, 10)).eval()
    images = torch.randn(2, 3, 32, 32)
    fused = device.fuse_conv_relu(model)
    torch.testing.assert_close(fused(images), model(images))
    assert len(calls) == 16
    assert not any(isinstance(layer, nn.ReLU) for layer in fused[0])
    assert any(isinstance(layer, nn.ReLU) for layer in model[0])  # the original is unchanged


@pytest.fixture
def instant(monkeypatch):
    """Measurements that take no time; returns the names of those that ran."""
    ran = []

    def measure_nothing(name):
        def measure(device, quick):
            ran.append(name)
            return {"fine": True}

        return measure

    for name in device.MEASUREMENTS:
        monkeypatch.setitem(device.MEASUREMENTS, name, measure_nothing(name))
    return ran


def fail_on_purpose(device, quick):
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("broken", ["checks", "overlap", "forward"])
def test_the_others_are_measured_after_a_failure(instant, monkeypatch, broken):
    monkeypatch.setitem(device.MEASUREMENTS, broken, fail_on_purpose)
    found = dict(device.measure_all("cpu", quick=True))
    assert found[broken]["failed"] == "ZeroDivisionError: on purpose"
    assert all(found[name]["fine"] for name in device.MEASUREMENTS if name != broken)


def test_each_measurement_runs_only_when_its_figures_are_requested(instant):
    measurements = device.measure_all("cpu", quick=True)
    assert next(measurements)[0] == "machine" and next(measurements)[0] == "checks"
    assert instant == ["checks"]
    measurements.close()


def test_a_missing_gpu_is_rejected_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CnnlabError, match="NVIDIA GPU"):
        next(device.measure_all("cuda"))


def test_the_command_line_records_the_device_after_each_measurement(
    instant, monkeypatch, tmp_path, capsys
):
    recorded = []

    def read_record(device, quick):
        [path] = tmp_path.glob("device-*.json")
        recorded.extend(json.loads(path.read_text()))
        raise ZeroDivisionError("on purpose")

    monkeypatch.setitem(device.MEASUREMENTS, "copies", read_record)
    assert device.main([str(tmp_path), "--device", "cpu", "--quick"]) == 0
    assert recorded == ["machine", "checks", "clock"]
    [path] = tmp_path.iterdir()
    assert list(json.loads(path.read_text())) == ["machine", *device.MEASUREMENTS]
    output = capsys.readouterr()
    assert str(path) in output.out and "copies: failed: ZeroDivisionError" in output.err


def test_the_command_line_rejects_a_folder_that_cannot_be_written(instant, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert device.main([str(file), "--device", "cpu"]) == 2
    assert str(file) in capsys.readouterr().err and not instant


def test_the_command_line_rejects_a_missing_gpu(instant, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.main([str(tmp_path), "--device", "cuda"]) == 2
    assert "NVIDIA GPU" in capsys.readouterr().err and not instant


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_passes_its_checks_and_its_graph_trains_alike():
    assert device.checks("cuda", quick=True)["passed"]
    graphs = device.graphs("cuda", quick=True)
    one_by_one = graphs["losses"]["one by one"]
    assert graphs["losses"]["one CUDA graph"] == pytest.approx(one_by_one, rel=1e-3)
    assert device.overlap("cuda", quick=True)["ways"]["at the same time"]["n"] >= 2


def test_benchmark_mode_restores_the_settings_of_torch():
    def settings():
        cudnn = torch.backends.cudnn
        precisions = torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision
        return *precisions, cudnn.benchmark

    before = settings()
    with pytest.raises(ZeroDivisionError), device.benchmark_mode():
        assert settings() == ("ieee", "ieee", True)
        raise ZeroDivisionError
    assert settings() == before


def test_the_relative_error_is_that_of_the_norms():
    exact = torch.tensor([3.0, 4.0])
    assert device.relative_error(exact, exact) == 0
    assert device.relative_error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
