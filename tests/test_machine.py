"""What the machine says of itself."""

import dataclasses
import json
import os

import pytest

from cnnlab import machine
from cnnlab.measure import peaks
from cnnlab.recipe import Recipe

NAMES = {"NVIDIA GPU", "second GPU", "C++ compiler", "bf16 units", "fp16 units"}


@pytest.fixture
def asked_anew():
    """`describe()` looks again, now and after the test."""
    machine.describe.cache_clear()
    yield
    machine.describe.cache_clear()


def test_the_description_is_sane():
    found = machine.describe()
    assert found.name and found.system
    assert 1 <= found.cores <= os.cpu_count()
    assert found.memory_gib > 0.5
    assert found.hardware["fp32"] is True
    assert (
        found.versions["torch"] != "not installed" and found.versions["cnnlab"] != "not installed"
    )
    assert found.compiler is None or os.access(found.compiler, os.X_OK)


def test_the_description_is_json():
    assert json.loads(json.dumps(machine.describe().to_dict()))["cores"] == machine.describe().cores


def test_what_is_missing_has_a_reason_and_what_is_there_has_none():
    found = machine.describe()
    assert set(found.missing) <= NAMES
    assert all(len(reason.split()) > 5 for reason in found.missing.values())
    there = {
        "NVIDIA GPU": found.gpus,
        "second GPU": len(found.gpus) > 1,
        "C++ compiler": found.compiler,
        "bf16 units": found.hardware["bf16"],
        "fp16 units": found.hardware["fp16"],
    }
    assert set(found.missing) == {name for name in NAMES if not there[name]}


def test_the_default_recipe_runs_everywhere():
    assert machine.missing_for(Recipe()) == []


def test_a_gpu_recipe_without_a_gpu_is_named_with_the_mend(monkeypatch, asked_anew):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    [sentence] = machine.missing_for(Recipe(device="cuda"))
    assert sentence.startswith("NVIDIA GPU missing:") and "Colab" in sentence


def test_no_compiler_is_named_with_the_mend(monkeypatch, asked_anew, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    [sentence] = machine.missing_for(Recipe(compiler="inductor"))
    assert "C++ compiler missing" in sentence and "apt install g++" in sentence
    assert machine.missing_for(Recipe()) == []


def test_the_compiler_named_in_cxx_is_taken(monkeypatch, asked_anew, tmp_path):
    mine = tmp_path / "my-c++"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    assert machine.describe().compiler == str(mine)
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    machine.describe.cache_clear()
    assert machine.describe().compiler is None


@pytest.mark.parametrize(
    "gpus, missing",
    [((), {"NVIDIA GPU", "second GPU"}), (("A",), {"second GPU"}), (("A", "B"), set())],
)
def test_gpus_are_missed_by_number(gpus, missing):
    assert set(machine._missing({"bf16": True, "fp16": True}, gpus, "/usr/bin/g++")) == missing


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_peak_flops_gives_ordered_quartiles(precision):
    median, low, high = peaks.peak_flops(precision, size=128, threads=1)
    assert 0 < low <= median <= high


def test_the_quartiles_of_two_times_are_ordered(monkeypatch):
    """As slow machines give them: the timer gets only two runs into its time."""
    from torch.utils import benchmark

    class Timer(benchmark.Timer):
        def blocked_autorange(self, **options):
            return dataclasses.replace(
                super().blocked_autorange(min_run_time=1e-6), number_per_run=1, raw_times=[1.0, 3.0]
            )

    monkeypatch.setattr(benchmark, "Timer", Timer)
    median, low, high = peaks.peak_flops(size=8, threads=1)
    assert low < median < high


def test_copy_bandwidth_gives_ordered_quartiles():
    median, low, high = peaks.copy_bandwidth(mib=4, threads=1)
    assert 0 < low <= median <= high


def test_measuring_leaves_torch_as_it_was():
    import torch

    before = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    peaks.peak_flops(size=32, threads=1)
    assert (torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32) == before


def test_peaks_names_every_precision_and_the_copy():
    assert {name: value > 0 for name, value in peaks.peaks().items()} == dict.fromkeys(
        ("fp32", "bf16", "fp16", "copy"), True
    )
