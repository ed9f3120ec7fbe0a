"""The solutions of lesson 11 against PyTorch and JAX, and its programs."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PROGRAMS = NOTEBOOKS / "programs"
TASKS = runpy.run_path(str(NOTEBOOKS / "solutions" / "11_whole_program.py"))["TASKS"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def test_a_graph_computes_the_same_before_and_after_dead_code_is_removed():
    execute, remove_dead_code = (TASKS[task_id].reference for task_id in ("11.2", "11.3"))
    values = {"x": torch.rand(3)}
    for (graph,) in TASKS["11.3"].inputs():
        short = remove_dead_code(graph)
        torch.testing.assert_close(execute(short, values), execute(graph, values))
        assert len(short) <= len(graph)


def test_a_graph_computes_the_same_before_and_after_repetitions_are_merged():
    execute, merge_equal = (TASKS[task_id].reference for task_id in ("11.2", "11.7"))
    graph = next(iter(TASKS["11.7"].inputs()))[0]
    values = {"x": torch.rand(3)}
    torch.testing.assert_close(execute(merge_equal(graph), values), execute(graph, values))
    assert [name for name, _, _ in merge_equal(graph)] == ["t0", "t2", "t4"]


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_clipping_is_that_of_pytorch(limit):
    parameter = torch.nn.Parameter(torch.zeros(6))
    parameter.grad = torch.randn(6)
    clipped = TASKS["11.4"].reference(parameter.grad.clone(), limit)
    clip_grad_norm_([parameter], limit)
    torch.testing.assert_close(clipped, parameter.grad)


def test_the_pure_update_is_that_of_sgd():
    ((params, momenta, _),) = TASKS["11.5"].inputs()
    momenta = {name: torch.zeros_like(value) for name, value in momenta.items()}
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in params.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9)
    for _ in range(3):
        grads = {name: torch.randn_like(value) for name, value in params.items()}
        params, momenta = TASKS["11.5"].reference(params, momenta, grads)
        for name, parameter in parameters.items():
            parameter.grad = grads[name]
        optimizer.step()
    torch.testing.assert_close(params, {name: p.detach() for name, p in parameters.items()})


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
def test_the_predicted_result_is_that_of_a_trace():
    def double_until_large(x):
        while x.sum() < 100:
            x = x * 2
        return x

    for example, x in TASKS["11.6"].inputs():
        traced = torch.jit.trace(double_until_large, (example,), check_trace=False)
        torch.testing.assert_close(TASKS["11.6"].reference(example, x), traced(x))


def test_the_mean_over_shards_is_that_of_the_batch():
    for losses, valid, devices in TASKS["11.10"].inputs():
        _, mean = TASKS["11.10"].reference(losses, valid, devices)
        torch.testing.assert_close(mean, losses[valid > 0].mean())


def test_the_running_mean_is_the_mean():
    task = TASKS["11.9"]
    ((values,),) = task.inputs()
    torch.testing.assert_close(task.run(task.reference, values)[-1], values.mean(0))


def test_the_sharded_program_has_the_losses_of_one_device_and_an_all_reduce():
    pytest.importorskip("jax")
    outputs = [
        subprocess.run(
            [sys.executable, PROGRAMS / "sharded_step.py", devices],
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for devices in ("1", "8")
    ]
    losses = [output.partition("losses: ")[2] for output in outputs]
    assert losses[0] and losses[0] == losses[1]
    assert "all-reduce" in outputs[1] and "device 7" in outputs[1]


def test_jax_has_the_update_and_the_networks_of_pytorch(monkeypatch):
    jax = pytest.importorskip("jax")
    monkeypatch.syspath_prepend(str(PROGRAMS))
    from jax_models import smallcnn_loss, to_jax, update, vgg19_forward, vgg19_layers

    from cnnlab.model import VGG19, SmallCNN

    ((params, momenta, grads),) = TASKS["11.5"].inputs()
    ours = update(*map(to_jax, (params, momenta, grads)))
    expected = to_jax(TASKS["11.5"].reference(params, momenta, grads))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(abs(a - b).max() < 1e-5), ours, expected))

    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    network = SmallCNN()
    loss = smallcnn_loss(*to_jax([dict(network.named_parameters()), images, labels]))
    expected = torch.nn.functional.cross_entropy(network(images), labels)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4)

    vgg = VGG19(width=4).eval()
    logits = vgg19_forward(to_jax(vgg19_layers(vgg)), to_jax(images))
    torch.testing.assert_close(
        torch.tensor(logits.tolist()), vgg(images).detach(), rtol=1e-3, atol=1e-5
    )
