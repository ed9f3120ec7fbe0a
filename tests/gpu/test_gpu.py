"""On a GPU: training in each precision, compiled or not, on one and two ranks; what measures it.

`make test-gpu` runs these tests. Those that this machine cannot run are skipped with the reason.
A part also runs on the CPU, which shows that they can fail.
"""

import gzip
import json
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

import cnnlab
from cnnlab import CnnlabError, Recipe, machine
from cnnlab.events import Finished, Progress

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).parents[2]
GPU = machine.accelerator() if machine.accelerator() != "cpu" else "cuda"
LIMITS = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 1e-2, "fp16": 1e-2}  # of a loss, relative to fp32
BASE = {
    "model": "ResNet9",
    "width": 8,
    "data": "synthetic",
    "images": 32,
    "batch_size": 32,
    "steps": 8,
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "threads": 1,
}
EVERYTHING = product(
    [GPU], ("fp32", "tf32", "bf16", "fp16"), ("eager", "inductor", "cudagraphs"), (1, 2)
)
ON_A_CPU = product(["cpu"], ("fp32", "bf16", "fp16"), ["eager"], [1])
SETTINGS = [
    {"loader": "device"},
    {"fused_optimizer": True},
    {"memory_format": "channels_last"},
    {"cudnn_benchmark": True},
]


def recipe_or_skip(**values):
    """A recipe that this machine can run; otherwise the test is skipped with the reason."""
    try:
        recipe = Recipe(**{**BASE, **values})
    except CnnlabError as error:
        pytest.skip(str(error))
    if missing := machine.missing_for(recipe):
        pytest.skip("; ".join(missing))
    gpus = machine.describe().accelerators
    if recipe.device != "cpu" and recipe.precision not in gpus[0].precisions:
        pytest.skip(f"{gpus[0].name} does not compute {recipe.precision} in hardware")
    if recipe.device != "cpu" and recipe.ranks > len(gpus):
        pytest.skip(f"{recipe.ranks} ranks need as many GPUs, and there is {len(gpus)}")
    return recipe


def train(recipe):
    """(losses of the first rank, its Finished event) of a run."""
    events = [event for event in cnnlab.run(recipe) if getattr(event, "rank", None) == 0]
    losses = [loss for event in events if isinstance(event, Progress) for loss in event.losses]
    [finished] = [event for event in events if isinstance(event, Finished)]
    return losses, finished


@cache
def expected_losses(ranks):
    """On the CPU, in fp32, with as many ranks: each normalizes its own share of the batch."""
    losses, _ = train(Recipe(**BASE, replicas=ranks))
    return losses


def check_losses(recipe):
    losses, finished = train(recipe)
    expected = expected_losses(recipe.ranks)
    assert len(losses) == len(expected) and expected[-1] < 0.9 * expected[0]
    # The first steps in fp16 may overflow: they train nothing, and all batches are the same.
    skipped = finished.skipped_steps
    assert skipped < 4
    limit = LIMITS[recipe.precision]
    assert losses[skipped:] == pytest.approx(expected[: len(expected) - skipped], rel=limit)


@pytest.mark.parametrize("device, precision, compiler, ranks", [*ON_A_CPU, *EVERYTHING])
def test_training_has_the_losses_of_the_cpu(device, precision, compiler, ranks):
    check_losses(
        recipe_or_skip(device=device, precision=precision, compiler=compiler, replicas=ranks)
    )


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("change", SETTINGS, ids=str)
def test_settings_that_make_training_faster_keep_its_losses(device, change):
    check_losses(recipe_or_skip(device=device, **change))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_other_losses_are_noticed(device):
    with pytest.raises(AssertionError):
        check_losses(recipe_or_skip(device=device, learning_rate=0.02))


def count_skipped_graphs(recipe):
    from torch._dynamo.utils import counters

    *_, finished = cnnlab.train(recipe)
    assert finished.steps == recipe.steps
    return counters["inductor"]["cudagraph_skips"]


def test_cuda_graphs_are_captured():
    recipe = recipe_or_skip(device=GPU, compiler="cudagraphs")
    assert cnnlab.ranks(count_skipped_graphs, 1, recipe) == [0]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_profile_has_a_table_and_a_trace(device):
    found = cnnlab.profile(recipe_or_skip(device=device))
    assert "conv" in str(found) and len(str(found).splitlines()) > 3
    with gzip.open(found.trace_file) as file:
        trace = json.load(file)
    assert trace["traceEvents"]
    if device == "cuda":
        assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_an_explanation_divides_a_step_into_its_parts(device):
    found = cnnlab.explain(recipe_or_skip(device=device, steps=None), repeats=1)
    assert sum(found.parts.values()) == pytest.approx(found.step_s, rel=0.05)
    assert found.parts["arithmetic"] > 0 and "Try next" in str(found)


def python(*words):
    """Run Python in the repository, and return what it printed."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_quick_ladder_tries_every_rung_of_the_gpu(tmp_path):
    recipe_or_skip(device=GPU)
    python("-m", "cnnlab", "ladder", "--quick", "--json", tmp_path / "ladder.json")
    result = json.loads((tmp_path / "ladder.json").read_text())
    failed = [reason for reason in result["impossible"].values() if "failed" in reason]
    assert not failed
    assert "GPU" in {rung["name"] for rung in result["rungs"]}


def test_the_device_can_be_recorded(tmp_path):
    recipe_or_skip(device=GPU)
    if GPU != "cuda":
        pytest.skip("only CUDA devices are recorded")
    python("notebooks/recorded/device.py", tmp_path, "--device", "cuda", "--quick")
    [path] = tmp_path.glob("device-*.json")
    found = json.loads(path.read_text())
    assert [name for name, figures in found.items() if "failed" in figures] == []
    assert found["checks"]["passed"]


def test_all_gpus_compute_what_the_cpu_computes():
    recipe_or_skip(device=GPU)
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    for number in range(torch.accelerator.device_count()):
        device = torch.device(GPU, number)
        torch.testing.assert_close((a.to(device) @ b.to(device)).cpu(), a @ b, rtol=1e-2, atol=1e-2)
