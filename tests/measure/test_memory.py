"""The memory of a step: what autograd saves and what the allocator reports."""

import pytest
import torch
from recorded import device

from cnnlab.measure.memory import allocated_bytes, saved_tensor_bytes
from cnnlab.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_saved_bytes_of_a_training_step_are_those_counted_by_hand():
    """SmallCNN on 8 images of 16x16, in fp32, with pooling indices of 8 bytes."""
    recipe = Recipe(data="synthetic", images=8, batch_size=8, image_size=16, optimizer="sgd")
    trainer = device.make_trainer(recipe)
    saved = saved_tensor_bytes(trainer.loss, [*trainer.network.parameters(), trainer.images])
    relu = 8 * (16 * 16 * 16 + 32 * 8 * 8)  # outputs of ReLU are inputs of the poolings
    pooled = 8 * (16 * 8 * 8 + 32 * 4 * 4)  # outputs of the poolings are inputs of the next layers
    head = 4 * 8 * 10 + 8 * 8 + 4  # log-probabilities, labels, total weight
    assert saved == 4 * relu + (4 + 8) * pooled + head


def test_shared_storage_counts_once():
    x = torch.ones(1000, requires_grad=True)
    y = torch.ones(1000, requires_grad=True)
    assert saved_tensor_bytes(lambda: x.exp() * 1.0) == 4000  # exp saves its result
    assert saved_tensor_bytes(lambda: x * y) == 8000
    assert saved_tensor_bytes(lambda: x * x) == 4000
    assert saved_tensor_bytes(lambda: x * y, [y]) == 4000


def test_the_allocator_reports_what_remains_and_the_peak():
    def work():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second

    kept, peak = allocated_bytes(work, "cpu")
    assert kept == 4000 and 8000 <= peak < 9000
