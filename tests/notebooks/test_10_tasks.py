"""The solutions of lesson 10 against PyTorch and the package."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cnnlab.training.techniques import pool_before_relu

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SOLUTIONS = runpy.run_path(str(NOTEBOOKS / "solutions" / "10_operator_fusion.py"))
TASKS = SOLUTIONS["TASKS"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def test_the_bytes_of_a_chain_are_those_that_pytorch_moves():
    x, a, b, c = torch.randn(4, 100).unbind()
    with SOLUTIONS["Moved"]() as moved:
        torch.relu(torch.addcmul(torch.add(x, a), b, c))
    tensors = 4 * (1 + 3 + 1)  # the input, three extras, the result
    assert TASKS["10.1"].reference(100, [1, 2, 0]) == (moved.bytes, 100 * tensors)


def test_chunks_give_the_result_of_the_chain_and_move_the_bytes_of_a_fused_one():
    x, numbers = torch.randn(50), [0.5, -1.0, 2.0]
    found = SOLUTIONS["run_in_chunks"](TASKS["10.2"].reference, x, numbers, 16)
    torch.testing.assert_close(found["result"], torch.relu(x + sum(numbers)))
    fused = TASKS["10.1"].reference(50, [0] * 4)[1]
    assert found["bytes to and from memory"] == fused
    whole = SOLUTIONS["run_in_chunks"](SOLUTIONS["each_operation_in_chunks"], x, numbers, 16)
    assert whole["bytes to and from memory"] == TASKS["10.1"].reference(50, [0] * 4)[0]


def test_a_convolution_with_folded_batch_norm_is_pytorchs():
    conv, norm = nn.Conv2d(3, 5, 3).eval(), SOLUTIONS["random_norm"](nn.BatchNorm2d, 5)
    weight, bias = TASKS["10.5"].reference(conv.weight, conv.bias, norm)
    expected = fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(weight, expected.weight)
    torch.testing.assert_close(bias, expected.bias)


def test_at_the_break_even_point_both_runs_take_equally_long():
    break_even = TASKS["10.6"].reference
    assert break_even(10.0, 3.0, 1.0) == 5
    assert break_even(10.1, 3.0, 1.0) == 6
    assert break_even(10.0, 1.0, 1.0) == float("inf")


def test_pooling_before_relu_is_that_of_the_package():
    x = torch.randn(2, 3, 8, 8)
    layers = pool_before_relu(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    assert torch.equal(TASKS["10.7"].reference(x), layers(x))
    assert torch.equal(TASKS["10.7"].reference(x), SOLUTIONS["relu_first"](x))


def test_padding_also_avoids_recompilations():
    def pad(compiled, batches):
        rows = max(map(len, batches))
        padded = [F.pad(batch, (0, 0, 0, rows - len(batch))) for batch in batches]
        outputs = [compiled(batch, torch.tensor(n)) for n, batch in enumerate(padded)]
        return [output[: len(batch)] for output, batch in zip(outputs, batches, strict=True)]

    ((batches,), _) = TASKS["10.8"].inputs()
    found = SOLUTIONS["count_compilations"](pad, batches)
    assert found["compilations"] == 1
    for number, (output, batch) in enumerate(zip(found["outputs"], batches, strict=True)):
        torch.testing.assert_close(output, SOLUTIONS["decay"](batch, number))
