"""The instruments themselves: what they time and count is what is there."""

import pytest
import torch
from helpers import ordered
from recorded import device
from torch import nn

from cnnlab.data import datasets
from cnnlab.measure import benchmark, memory
from cnnlab.model import SmallCNN
from cnnlab.recipe import Recipe

SMALL = Recipe(data="synthetic", images=8, batch_size=8, image_size=16, optimizer="sgd")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_a_step_keeps_is_what_a_reader_counts_by_hand():
    """SmallCNN on 8 images of 16x16: inputs of layers, indices of the poolings, log-probabilities and labels."""
    work = device.make_trainer(SMALL)
    kept = memory.saved_tensor_bytes(work.loss, [*work.network.parameters(), work.images])
    relu = (
        4 * 8 * (16 * 16 * 16 + 32 * 8 * 8)
    )  # outputs, which the poolings keep as their inputs, too
    pooled = 8 * (
        16 * 8 * 8 + 32 * 4 * 4
    )  # numbers that come out of the poolings: inputs of the next layers ...
    head = 4 * 8 * 10 + 8 * 8 + 4  # log-probabilities, labels, total weight
    assert kept == relu + (4 + 8) * pooled + head  # ... with an index of 8 bytes each


def test_memory_that_is_shared_counts_once():
    x = torch.ones(1000, requires_grad=True)
    assert (
        memory.saved_tensor_bytes(lambda: x.exp() * 1.0) == 4000
    )  # exp keeps its result; times a constant keeps nothing
    y = torch.ones(1000, requires_grad=True)
    assert memory.saved_tensor_bytes(lambda: x * y) == 8000
    assert memory.saved_tensor_bytes(lambda: x * x) == 4000
    assert memory.saved_tensor_bytes(lambda: x * y, [y]) == 4000


def test_the_allocator_tells_what_stays_and_what_was_there_meanwhile():
    def work():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second

    stays, most = memory.allocated_bytes(work, "cpu")
    assert stays == 4000 and 8000 <= most < 9000


@pytest.mark.parametrize(
    "recipe",
    [
        SMALL,
        SMALL.replace(precision="bf16"),
        SMALL.replace(memory_format="channels_last"),
        SMALL.replace(optimizer="adam"),
    ],
)
def test_the_work_trains_as_the_plain_loop_does(recipe):
    work, images = device.make_trainer(recipe), None
    losses = [float(work.step()) for _ in range(4)]
    torch.manual_seed(recipe.seed)
    model = SmallCNN(size=16)
    images, labels = datasets.synthetic(8, 16, 10, recipe.seed).train.tensors
    kinds = {
        "sgd": torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9),
        "adam": torch.optim.Adam(model.parameters(), lr=0.003),
    }
    for loss in losses:
        expected = nn.functional.cross_entropy(model(images), labels)
        assert loss == pytest.approx(
            expected.item(), rel=1e-2 if recipe.precision == "bf16" else 1e-5
        )
        kinds[recipe.optimizer].zero_grad()
        expected.backward()
        kinds[recipe.optimizer].step()


def test_the_fused_optimizer_trains_alike():
    plain, fused = device.make_trainer(SMALL), device.make_trainer(SMALL, fused=True)
    assert [float(plain.step()) for _ in range(4)] == pytest.approx(
        [float(fused.step()) for _ in range(4)], rel=1e-5
    )


def test_ways_run_in_turn_and_the_first_call_stands_apart():
    order = []
    found = benchmark.benchmark_interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", 3, calls=2
    )
    assert "".join(order) == "ab" + "aabb" * 3
    assert found["a"]["n"] == 3 and ordered(found["a"]) and ordered(found["b"])


def test_rounds_end_when_time_is_up_but_two_are_done():
    assert benchmark.benchmark_interleaved({"a": lambda: None}, "cpu", 50, seconds=0)["a"]["n"] == 2


def test_a_way_that_fails_does_not_spoil_the_others():
    def fails():
        raise RuntimeError("out of\n memory")

    found = benchmark.benchmark_interleaved({"bad": fails, "good": lambda: None}, "cpu", 2)
    assert found["bad"] == {"failed": "RuntimeError: out of memory"} and ordered(found["good"])
