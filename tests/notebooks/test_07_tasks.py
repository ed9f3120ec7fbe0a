"""The solutions of lesson 07 against PyTorch and the package, and how the lesson draws records."""

import ast
import json
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from helpers import texts

from cnnlab import plots
from cnnlab.measure.memory_formula import saved_tensor_bytes
from cnnlab.model import SmallCNN

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SOLUTIONS = runpy.run_path(str(NOTEBOOKS / "solutions" / "07_gpu.py"))
TASKS = SOLUTIONS["TASKS"]
RECORD = {
    "machine": {"device": "cuda", "device_name": "GPU X"},
    "batch_sizes": {"sizes": {"4": {"images_per_s": 10.0, "n": 3}, "8": {"failed": "no memory"}}},
    "graphs": {"failed": "RuntimeError"},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def test_events_find_the_seconds_of_the_kernels_alone():
    seconds = SOLUTIONS["random_seconds"](5)
    found = SOLUTIONS["run_on_device"](TASKS["07.1"].reference, seconds)
    assert found == pytest.approx(seconds)


def test_the_repaired_loop_reports_what_the_broken_one_does():
    run = SOLUTIONS["run_training"]
    found = []
    for function in (TASKS["07.2"].reference, SOLUTIONS["as_in_the_lesson"]):
        torch.manual_seed(2)
        found.append(run(function, 6))
    repaired, broken = found
    assert repaired["(mean, lowest)"] == pytest.approx(broken["(mean, lowest)"])
    torch.testing.assert_close(repaired["weights"], broken["weights"])
    assert broken["numbers read"] == str(2 * 6 + 1)


def test_equal_items_take_the_longer_stage_and_the_first_or_last_item_of_the_other():
    pipelined = TASKS["07.3"].reference
    assert pipelined([2.0] * 10, [3.0] * 10) == 2 + 10 * 3
    assert pipelined([3.0] * 10, [2.0] * 10) == 10 * 3 + 2


def test_images_are_normalized_as_by_plain_pytorch():
    pixels, mean, std = SOLUTIONS["random_pixels"](2, 3, 4)
    images = TASKS["07.4"].reference(pixels, torch.clone, mean, std)
    torch.testing.assert_close(images, (pixels.float() / 255 - mean) / std)


def test_activations_are_those_of_the_package():
    model, images = SmallCNN(), torch.randn(4, 3, 32, 32)
    arguments = partial(model, images), [*model.parameters(), images]
    assert TASKS["07.5"].reference(*arguments) == saved_tensor_bytes(*arguments) > 0


def test_the_smallest_batch_close_to_the_best_is_chosen():
    assert TASKS["07.6"].reference({1: 10, 8: 80, 64: 95, 256: 100, 1024: None}) == 64


def test_a_trace_of_short_kernels_is_launch_bound():
    launches = [(number, number + 1) for number in range(4)]
    kernels = [(number + 1, number + 1.25) for number in range(4)]
    assert TASKS["07.7"].reference(launches, kernels) == (
        pytest.approx(2.25 / 3.25),
        "launch-bound",
    )


def test_a_large_product_gets_the_speedup_of_the_rates_and_a_small_one_none():
    speedup = TASKS["07.8"].reference
    assert speedup(1e18, 1e6, 1e11, 1e13, 1e10, 1e-5) == pytest.approx(100, rel=1e-3)
    assert speedup(1e3, 1e3, 1e11, 1e13, 1e10, 1e-5) < 0.01


@pytest.mark.parametrize("copy_s, train_s", [(0.01, 0.03), (0.03, 0.01)])
def test_two_buffers_are_enough_for_a_perfect_overlap(copy_s, train_s):
    found = SOLUTIONS["run_prefetch"](TASKS["07.9"].reference, 6, copy_s, train_s)
    assert found["with wrong images"] == [] and found["trained"] == list(range(6))
    expected = TASKS["07.3"].reference([copy_s] * 6, [train_s] * 6)
    assert found["seconds"] == pytest.approx(expected)


def cell_with(words):
    notebook = nbformat.read(NOTEBOOKS / "07_gpu.ipynb", as_version=4)
    return next(cell.source for cell in notebook.cells if words in cell.source)


def test_the_lesson_draws_the_records_of_a_gpu_and_published_figures(tmp_path, monkeypatch):
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded" / "device-x.json").write_text(json.dumps(RECORD))
    monkeypatch.setattr(plt, "show", lambda: None)
    tree = ast.parse(cell_with("def recorded_gpus"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names = {"record": SimpleNamespace(NOTEBOOKS=tmp_path), "json": json}
    exec(compile(tree, "lesson", "exec"), names)
    assert names["recorded_gpus"]("graphs") == {}
    lesson = {"plt": plt, "plots": plots, "np": np, "device": "cpu"}
    lesson |= {"rates": {1: [5.0]}, "prediction": SimpleNamespace(value=None)}
    lesson["recorded_gpus"] = names["recorded_gpus"]
    exec(cell_with("plots.batch_size_curve"), lesson)
    assert "recorded: ResNet9 on GPU X" in texts(lesson["ax"])
    assert "published: VGG-16" in texts(lesson["ax"])
    plt.close(lesson["figure"])
