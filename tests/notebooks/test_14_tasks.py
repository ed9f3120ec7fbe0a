"""The solutions of lesson 14 against plain PyTorch in one process, the paper, and the package."""

import itertools
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from cnnlab import Recipe, data, ranks, run
from cnnlab.measure.memory_formula import state_formula
from cnnlab.model import SmallCNN
from cnnlab.parallel.pipeline_schedule import (
    action_order,
    bubble_fraction,
    equal_stages_bubble,
    simulate_schedule,
)
from cnnlab.plots import loss_curve

FILE = Path(__file__).parents[2] / "notebooks" / "solutions" / "14_model_parallel.py"
TASKS = runpy.run_path(str(FILE))["TASKS"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def results(task_id, *arguments):
    """The reference's result in each rank."""
    task = TASKS[task_id]
    return list(task.run(task.reference, *arguments).values())


def assert_equals_one_process(first, last, stages, images, labels):
    """The results of both ranks are the loss and the gradients of one process."""
    network = torch.nn.Sequential(*stages)
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    assert last["loss"] == pytest.approx(loss.item())
    gradients = [*first["gradients"], *last["gradients"]]
    for gradient, parameter in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_pipeline_computes_the_loss_and_the_gradients_of_one_process():
    ((stages, images, labels, shape),) = TASKS["14.1"].inputs()
    first, last = results("14.1", stages, images, labels, shape)
    assert_equals_one_process(first, last, stages, images, labels)


def test_gpipe_computes_the_loss_and_the_gradients_of_one_process():
    ((stages, images, labels, shape, micro_batches),) = TASKS["14.10"].inputs()
    first, last = results("14.10", stages, images, labels, shape, micro_batches)
    assert_equals_one_process(first, last, stages, images, labels)
    assert first["passes"] == last["passes"] == "FFFFBBBB"


@pytest.mark.parametrize("stages, micro_batches", [(1, 3), (2, 2), (4, 8), (8, 1)])
def test_the_schedule_respects_dependencies_and_has_the_bubble_of_the_formula(
    stages, micro_batches
):
    table = TASKS["14.7"].reference(stages, micro_batches)
    for batch, stage in itertools.product(range(micro_batches), range(stages - 1)):
        assert table[stage].index(f"F{batch}") < table[stage + 1].index(f"F{batch}")
        assert table[stage + 1].index(f"B{batch}") < table[stage].index(f"B{batch}")
    busy = [[(tick, tick + 1) for tick, entry in enumerate(row) if entry] for row in table]
    assert all(len(spans) == 2 * micro_batches for spans in busy)
    bubble = TASKS["14.6"].reference(busy)
    assert bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@pytest.mark.parametrize("task_id", ["14.2", "14.3"])
def test_both_linear_layers_compute_the_outputs_of_one_process(task_id):
    inputs, weight, bias = torch.randn(5, 6), torch.randn(8, 6), torch.randn(8)
    for outputs in results(task_id, inputs, weight, bias):
        torch.testing.assert_close(outputs, F.linear(inputs, weight, bias))


def test_the_convolution_computes_all_channels_with_half_of_the_operations():
    images, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(6, 3, 3, 3), torch.randn(6)
    for result in results("14.9", images, weight, bias):
        torch.testing.assert_close(result["outputs"], F.conv2d(images, weight, bias, padding=1))
        assert result["FLOPs"] == 2 * 2 * 3 * 9 * 3 * 64  # N, inputs, filter, outputs, H x W


def test_zero1_updates_the_parameters_as_sgd_in_one_process():
    start, gradients = torch.randn(8), torch.randn(3, 2, 8)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    for step in gradients:
        parameter.grad = step.mean(0)
        optimizer.step()
    momentum = optimizer.state[parameter]["momentum_buffer"]
    for rank, result in enumerate(results("14.4", start, gradients, 0.1)):
        torch.testing.assert_close(result["parameters"], parameter.detach())
        torch.testing.assert_close(result["momentum"], momentum.chunk(2)[rank])


@pytest.mark.parametrize("stage, gigabytes", [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_memory_is_that_of_the_zero_paper(stage, gigabytes):
    memory = TASKS["14.5"].reference(7.5e9, 64, stage)
    assert round(sum(memory.values()) / 1e9, 1) == gigabytes


def test_the_balanced_cut_is_the_best_of_all():
    assert TASKS["14.8"].reference([5, 1, 1, 1, 4, 4], 3) == (2, 5)
    assert TASKS["14.8"].reference([1, 1, 4, 1, 1], 3) == (2, 3)


@pytest.mark.parametrize("stages, micro_batches", [(2, 4), (3, 4), (4, 8), (4, 2)])
def test_under_1f1b_no_stage_blocks_and_stage_s_keeps_at_most_stages_minus_s(stages, micro_batches):
    orders = [TASKS["14.11"].reference(stage, stages, micro_batches) for stage in range(stages)]
    done = [set() for _ in orders]
    kept = [0] * stages
    for _ in range(2 * stages * micro_batches):
        for stage, order in enumerate(orders):
            entry = order[len(done[stage]) :][:1]
            neighbor = stage - 1 if entry and entry[0].startswith("F") else stage + 1
            if entry and (neighbor in (-1, stages) or entry[0] in done[neighbor]):
                done[stage].add(entry[0])
                kept[stage] += 1 if entry[0].startswith("F") else -1
            assert kept[stage] <= stages - stage
    assert [len(entries) for entries in done] == [2 * micro_batches] * stages


# The functions that the learner writes, against those of the package.


def test_the_pipeline_gives_the_losses_of_the_packaged_one():
    step = TASKS["14.1"].reference

    def train():
        torch.manual_seed(0)
        network = SmallCNN(channels=1)
        stages = [network.stage1, torch.nn.Sequential(network.stage2, network.classifier)]
        stage = stages[dist.get_rank()]
        optimizer = torch.optim.Adam(stage.parameters(), lr=0.003)
        order, losses = torch.Generator().manual_seed(0), []
        loader = DataLoader(data.digits().train, 64, shuffle=True, generator=order)
        for images, labels in itertools.islice(loader, 5):
            losses.append(step(stage, images, labels, (64, 16, 16, 16)))
            optimizer.step()
            optimizer.zero_grad()
        return losses

    recipe = Recipe(strategy="pipeline", stages=2, steps=5, threads=1, evaluate=False)
    _, packaged = loss_curve(list(run(recipe)))
    assert ranks(train, 2)[1] == pytest.approx(packaged.tolist(), abs=1e-5)


@pytest.mark.parametrize("stages, micro_batches", [(2, 4), (3, 5), (4, 8)])
def test_schedules_are_those_of_the_package(stages, micro_batches):
    table = TASKS["14.7"].reference(stages, micro_batches)
    spans = simulate_schedule("gpipe", [1.0] * stages, [1.0] * stages, micro_batches)
    busy = [[] for _ in range(stages)]
    for stage, phase, batch, begin, end in spans:
        assert table[stage][int(begin)] == f"{phase[0].upper()}{batch}"
        busy[stage].append((begin, end))
    bubble = TASKS["14.6"].reference(busy)
    assert bubble == pytest.approx(bubble_fraction(spans, stages))
    assert bubble == pytest.approx(equal_stages_bubble("gpipe", stages, micro_batches))
    for stage in range(stages):
        actions = action_order("1f1b", stages, micro_batches, stage)
        order = TASKS["14.11"].reference(stage, stages, micro_batches)
        assert order == [f"{phase[0].upper()}{batch}" for _, phase, batch in actions]


@pytest.mark.parametrize("stage, strategy", [(0, "ddp"), (1, "zero1"), (3, "fsdp")])
def test_memory_is_that_of_the_package(stage, strategy):
    packaged = state_formula(1000, 4, strategy, (2, 2, 12))
    assert TASKS["14.5"].reference(1000, 4, stage) == pytest.approx(packaged)
