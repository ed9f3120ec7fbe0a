"""The solutions of lesson 01 against PyTorch's layers, autograd, and the package's network."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cnnlab import check
from cnnlab.model import SmallCNN, count_parameters

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FILE = NOTEBOOKS / "solutions" / "01_cnn_from_scratch.py"
TASKS = runpy.run_path(str(FILE))["TASKS"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def solve(task_id, *arguments):
    return TASKS[task_id].reference(*arguments)


def conv2d(images, weight, bias):
    """A convolution with padding 1 from the solutions, as in the lesson."""
    outputs = []
    for image in F.pad(images, [1] * 4):
        matrix = weight.flatten(1) @ solve("01.2", image, 3)
        outputs.append(matrix.reshape(len(weight), *images.shape[2:]))
    return torch.stack(outputs) + bias.reshape(-1, 1, 1)


@pytest.mark.parametrize("task_id, padding", [("01.1", 0), ("01.9", 1), ("01.10", 0)])
def test_the_convolutions_are_those_of_pytorch(task_id, padding):
    image, kernel = torch.randn(6, 9), torch.randn(3, 3)
    expected = F.conv2d(image[None, None], kernel[None, None], padding=padding)[0, 0]
    torch.testing.assert_close(solve(task_id, image, kernel), expected)


@pytest.mark.parametrize("channels, size", [(1, 3), (3, 2), (2, 5)])
def test_im2col_is_unfold(channels, size):
    image = torch.randn(channels, 6, 8)
    assert torch.equal(solve("01.2", image, size), F.unfold(image[None], size)[0])


def test_pooling_is_that_of_pytorch():
    maps = torch.randn(2, 3, 6, 8)
    assert torch.equal(solve("01.3", maps), F.max_pool2d(maps, 2))


@pytest.mark.parametrize("channels, outputs, size", [(1, 1, 3), (3, 4, 2), (2, 5, 1)])
def test_the_gradients_are_those_of_autograd(channels, outputs, size):
    image = torch.randn(channels, 5, 7, requires_grad=True)
    weight = torch.randn(outputs, channels, size, size, requires_grad=True)
    result = F.conv2d(image, weight)
    gradient = torch.randn(result.shape)
    result.backward(gradient)
    by_hand = solve("01.4", image.detach(), gradient, size)
    torch.testing.assert_close(by_hand, weight.grad)
    torch.testing.assert_close(solve("01.5", gradient, weight.detach()), image.grad)


@pytest.mark.parametrize("layers", [[(3, 1), (2, 2)] * 2, [(5, 2), (3, 1), (2, 3)]])
def test_the_receptive_field_is_where_the_gradient_is_not_zero(layers):
    values = pixels = torch.zeros(1, 1, 60, requires_grad=True)
    for size, stride in layers:
        values = F.conv1d(values, torch.ones(1, 1, size), stride=stride)
    values[0, 0, 2].backward()
    assert solve("01.6", layers) == pixels.grad.count_nonzero()


def test_the_costs_are_those_that_pytorch_counts():
    network = SmallCNN(channels=1)
    costs = [solve("01.7", 1, 16, 3, 32, 32), solve("01.7", 16, 32, 3, 16, 16)]
    costs.append((10 * 2048 + 10, 2 * 10 * 2048))
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, 32, 32))
    assert sum(cost[0] for cost in costs) == count_parameters(network)
    assert sum(cost[1] for cost in costs) == counter.get_total_flops()


@pytest.mark.parametrize(
    "pixels, size, stride, padding", [(32, 3, 1, 1), (31, 5, 2, 0), (9, 2, 4, 1)]
)
def test_the_size_of_the_output_is_that_of_pytorch(pixels, size, stride, padding):
    line, kernel = torch.zeros(1, 1, pixels), torch.zeros(1, 1, size)
    expected = F.conv1d(line, kernel, stride=stride, padding=padding).shape[-1]
    assert solve("01.8", pixels, size, stride, padding) == expected


@torch.no_grad()
def test_the_built_and_the_packaged_network_agree():
    network, images = SmallCNN(channels=1), torch.randn(2, 1, 32, 32)
    maps = images
    for stage in (network.stage1, network.stage2):
        maps = solve("01.3", conv2d(maps, stage[0].weight, stage[0].bias).clamp(min=0))
    linear = network.classifier[1]
    logits = maps.flatten(1) @ linear.weight.T + linear.bias
    torch.testing.assert_close(logits, network(images))


def test_the_program_to_repair_has_both_mistakes(capsys):
    cells = json.loads((NOTEBOOKS / f"{FILE.stem}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (broken,) = [source for source in sources if "def conv2d_same(" in source]
    exec(broken, {"torch": torch, "check": check})
    output = capsys.readouterr().out
    assert "not yet" in output and "There are still two mistakes" in output
