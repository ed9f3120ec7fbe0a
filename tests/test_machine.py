"""What the machine has and lacks."""

import json
import os

import pytest

from cnnlab import machine
from cnnlab.recipe import Recipe

NAMES = {"NVIDIA GPU", "second GPU", "C++ compiler", "bf16 units", "fp16 units"}


@pytest.fixture
def fresh_description():
    """Clear the cache of `describe()` before and after the test."""
    machine.describe.cache_clear()
    yield
    machine.describe.cache_clear()


def test_the_description_is_sane():
    found = machine.describe()
    assert found.name and found.system
    assert 1 <= found.cores <= os.cpu_count()
    assert found.memory_gib > 0.5
    assert found.hardware["fp32"] is True
    assert found.versions["torch"] != "not installed"
    assert found.versions["cnnlab"] != "not installed"
    assert found.compiler is None or os.access(found.compiler, os.X_OK)


def test_the_description_survives_json():
    found = machine.describe()
    assert json.loads(json.dumps(found.to_dict()))["cores"] == found.cores


def test_every_missing_capability_has_a_reason_and_every_present_one_has_none():
    found = machine.describe()
    assert set(found.missing) <= NAMES
    assert all(len(reason.split()) > 5 for reason in found.missing.values())
    present = {
        "NVIDIA GPU": found.gpus,
        "second GPU": len(found.gpus) > 1,
        "C++ compiler": found.compiler,
        "bf16 units": found.hardware["bf16"],
        "fp16 units": found.hardware["fp16"],
    }
    assert set(found.missing) == {name for name in NAMES if not present[name]}


def test_the_default_recipe_runs_everywhere():
    assert machine.missing_for(Recipe()) == []


def test_a_missing_gpu_is_named_with_a_fix(monkeypatch, fresh_description):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    [sentence] = machine.missing_for(Recipe(device="cuda"))
    assert sentence.startswith("NVIDIA GPU missing:") and "Colab" in sentence


def test_model_parallel_ranks_need_a_gpu_each(monkeypatch, fresh_description):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: "a GPU")
    recipe = Recipe(device="cuda", replicas=2, strategy="tensor", tensor_ranks=2)
    [sentence] = machine.missing_for(recipe)
    assert "strategy='tensor'" in sentence
    assert "4 ranks, and there are 2. Use fewer ranks, device='cpu' or strategy='ddp'" in sentence
    assert not machine.missing_for(recipe.replace(replicas=1))
    assert not machine.missing_for(Recipe(device="cuda", replicas=4))  # DDP's ranks share GPUs
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun on two machines
    assert not machine.missing_for(recipe)


def test_a_missing_compiler_is_named_with_a_fix(monkeypatch, fresh_description, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    [sentence] = machine.missing_for(Recipe(compiler="inductor"))
    assert "C++ compiler missing" in sentence and "apt install g++" in sentence
    assert machine.missing_for(Recipe()) == []


def test_the_compiler_in_cxx_is_used(monkeypatch, fresh_description, tmp_path):
    compiler = tmp_path / "custom-c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert machine.describe().compiler == str(compiler)
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    machine.describe.cache_clear()
    assert machine.describe().compiler is None


@pytest.mark.parametrize(
    "gpus, missing",
    [((), {"NVIDIA GPU", "second GPU"}), (("A",), {"second GPU"}), (("A", "B"), set())],
)
def test_missing_gpus_depend_on_their_number(gpus, missing):
    assert set(machine._missing({"bf16": True, "fp16": True}, gpus, "/usr/bin/g++")) == missing
