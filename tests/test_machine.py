"""What the machine has and lacks."""

import io
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

from cnnlab import machine
from cnnlab.console import doctor_lines
from cnnlab.launch import worker
from cnnlab.machine import Accelerator
from cnnlab.plots.style import machine_label
from cnnlab.recipe import Recipe
from cnnlab.training import techniques

NAMES = {"NVIDIA GPU", "second GPU", "C++ compiler", "bf16 units", "fp16 units"}


T4 = SimpleNamespace(name="T4", total_memory=15 * 2**30, major=7, minor=5)
H100 = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
MI300 = SimpleNamespace(name="MI300X", total_memory=192 * 2**30, gcnArchName="gfx942")
ARC = SimpleNamespace(name="Arc", total_memory=16 * 2**30)


@pytest.fixture
def fake_gpus(monkeypatch, fresh_description):
    """Let torch report GPUs with these properties. Nothing runs on them."""

    def fake(device, *properties):
        module = SimpleNamespace(get_device_properties=lambda number: properties[number])
        best = torch.device(device)
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: best)
        monkeypatch.setattr("torch.accelerator.device_count", lambda: len(properties))
        monkeypatch.setattr("torch.get_device_module", lambda device=None: module)

    return fake


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
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    [sentence] = machine.missing_for(Recipe(device="cuda"))
    assert sentence.startswith("NVIDIA GPU missing:") and "Colab" in sentence


def test_model_parallel_ranks_need_a_gpu_each(monkeypatch, fake_gpus):
    fake_gpus("cuda", H100, H100)
    recipe = Recipe(device="cuda", replicas=2, strategy="tensor", tensor_ranks=2)
    [sentence] = machine.missing_for(recipe)
    assert "strategy='tensor'" in sentence
    assert "4 ranks, and there are 2. Use fewer ranks, device='cpu' or strategy='ddp'" in sentence
    assert not machine.missing_for(recipe.replace(replicas=1))
    assert not machine.missing_for(Recipe(device="cuda", replicas=4))  # DDP's ranks share GPUs
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun on two machines
    assert not machine.missing_for(recipe)
    machine.describe.cache_clear()
    fake_gpus("cuda", H100)  # of this rank alone, as with Slurm's --gpus-per-task=1
    assert not machine.missing_for(recipe)


def test_a_missing_compiler_is_named_with_a_fix(monkeypatch, fresh_description, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    [sentence] = machine.missing_for(Recipe(compiler="inductor"))
    assert "C++ compiler missing" in sentence and "apt install g++" in sentence
    assert machine.missing_for(Recipe()) == []


class NoExec:
    f_flag = getattr(os, "ST_NOEXEC", 0)


OBSTACLES = {
    "torch": ("torch.__path__", ["/home/me/My Lessons/torch"], "My Lessons.*another folder"),
    "TMPDIR": ("tempfile.tempdir", "/tmp/of me", "of me.*space.*Set TMPDIR"),
    "noexec": ("os.statvfs", lambda path: NoExec, "noexec.*Set TMPDIR"),
}


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="needs Linux")
@pytest.mark.parametrize("name", OBSTACLES)
def test_a_compiler_that_cannot_build_is_named_with_a_fix(monkeypatch, fresh_description, name):
    target, value, sentence = OBSTACLES[name]
    monkeypatch.setattr(machine, "_find_compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(target, value)
    assert re.search(sentence, machine.describe().missing["C++ compiler"])
    assert len(machine.missing_for(Recipe(compiler="inductor"))) == 1


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
    "devices, missing",
    [
        ([], {"NVIDIA GPU", "second GPU"}),
        (["cuda"], {"second GPU"}),
        (["cuda", "cuda"], set()),
        (["mps"], {"NVIDIA GPU", "second GPU"}),
        (["xpu", "xpu"], {"NVIDIA GPU"}),
    ],
)
def test_missing_gpus_depend_on_their_number_and_kind(devices, missing):
    gpus = tuple(
        Accelerator(device=name, name="A", memory_gib=8.0, capability="", precisions=("fp32",))
        for name in devices
    )
    assert set(machine._missing({"bf16": True, "fp16": True}, gpus, "/usr/bin/g++")) == missing


@pytest.mark.parametrize(
    "device, properties, hip, capability, precisions",
    [
        ("cuda", T4, None, "7.5", ("fp32", "fp16")),
        ("cuda", H100, None, "9.0", ("fp32", "tf32", "bf16", "fp16")),
        ("cuda", MI300, "6.4", "gfx942", ("fp32", "bf16", "fp16")),
        ("xpu", ARC, None, "", ("fp32", "bf16", "fp16")),
    ],
    ids=["T4", "H100", "MI300", "Arc"],
)
def test_gpus_are_described(
    fake_gpus, monkeypatch, device, properties, hip, capability, precisions
):
    """From what torch reports of such GPUs; not tried on them."""
    fake_gpus(device, properties)
    monkeypatch.setattr("torch.version.hip", hip)
    here = machine.describe()
    [gpu] = here.accelerators
    assert here.accelerator == machine.accelerator() == gpu.device == device
    assert (gpu.name, gpu.capability) == (properties.name, capability)
    assert gpu.memory_gib == properties.total_memory / 2**30
    assert gpu.precisions == precisions
    assert here.gpus == ((properties.name,) if device == "cuda" else ())
    assert not machine.missing_for(Recipe(device=device))
    json.dumps(here.to_dict())


def test_an_apple_gpu_is_described(fake_gpus, monkeypatch):
    """From what torch reports there; not tried on one."""
    fake_gpus("mps", None)
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 12 * 2**30)
    monkeypatch.setattr(machine, "_cpu_name", lambda capabilities: "Apple M3")
    [gpu] = machine.describe().accelerators
    assert (gpu.name, gpu.memory_gib, gpu.precisions) == ("Apple M3 GPU", 12.0, ("fp32", "fp16"))
    assert not machine.missing_for(Recipe(device="mps", precision="fp16"))


def test_without_a_gpu_the_best_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert machine.accelerator() == "cpu"


def test_a_device_that_is_not_here_is_named_with_one_that_is(fake_gpus):
    fake_gpus("cuda", H100)
    [sentence] = machine.missing_for(Recipe(device="xpu"))
    assert "device='xpu'" in sentence and "Use device='cuda'" in sentence


def test_tf32_needs_a_gpu_that_has_it(fake_gpus):
    fake_gpus("cuda", T4)
    [sentence] = machine.missing_for(Recipe(device="cuda", precision="tf32"))
    assert "precision='tf32'" in sentence and "T4" in sentence and "'fp16'" in sentence


def test_ranks_on_intel_gpus_need_one_each(fake_gpus):
    fake_gpus("xpu", ARC)
    [sentence] = machine.missing_for(Recipe(device="xpu", replicas=2))
    assert "needs a GPU for each of its 2 ranks, and there are 1" in sentence


def test_instructions_that_the_system_does_not_list_are_unknown(monkeypatch, fresh_description):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"architecture": "x86_64"})
    here = machine.describe()
    assert here.hardware == {"fp32": True, "bf16": None, "fp16": None}
    assert here.missing["bf16 units"].startswith("unknown")
    lines = "\n".join(doctor_lines(here, {"fp32": 1e9, "copy": 1e9}, {}))
    assert re.search("emulated +none", lines) and re.search("unknown +bf16, fp16", lines)


@pytest.mark.parametrize(
    "quota, cores", [("50000 100000", 1), ("1000 100000", 1), ("max 100000", 2)]
)
def test_a_quota_of_a_container_below_one_core_is_one_core(monkeypatch, quota, cores):
    """With a control group like `docker run --cpus=0.5`."""
    from joblib.externals.loky.backend import context

    def open_group(path, *_):
        assert path == "/sys/fs/cgroup/cpu.max"
        return io.StringIO(quota)

    monkeypatch.setattr(context, "open", open_group, raising=False)
    monkeypatch.setattr(context.os.path, "exists", lambda path: str(path).endswith("cpu.max"))
    monkeypatch.setattr(context, "_cpu_count_affinity", lambda count: 2)
    monkeypatch.setattr(context.os, "cpu_count", lambda: 2)
    assert machine.cores() == cores
    for rank in range(4):
        threads = []
        monkeypatch.setattr(torch, "set_num_threads", threads.append)
        monkeypatch.setattr("cnnlab.training.techniques.pin_to_cores", lambda *_: None)
        worker._configure_process(rank, 4)
        techniques.set_threads(Recipe())
        assert threads == [1, cores]


def test_physical_and_logical_cores_are_told_apart(monkeypatch, fresh_description, fake_gpus):
    fake_gpus("cuda", H100)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(machine, "cores", lambda: 16)
    here = machine.describe()
    lines = list(doctor_lines(here, {"fp32": 1e9, "copy": 1e9}, {"bf16": 9e14, "copy": 3e12}))
    assert any("8 physical, 16 logical, 16 usable" in line for line in lines)
    assert any("H100 (device='cuda', 80.0 GiB, capability 9.0)" in line for line in lines)
    assert any(re.match("GPU peak bf16 +900,000 GFLOP/s", line) for line in lines)
    assert "8 cores (16 logical)" in machine_label(here.to_dict())
    older = {"name": "a laptop", "cores": 16, "gpus": []}  # as in records
    assert machine_label(older) == "a laptop, 16 cores"
