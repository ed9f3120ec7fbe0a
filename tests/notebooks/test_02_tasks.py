"""The solutions of lesson 02 against PyTorch and the package's training loop."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from cnnlab import Recipe, data, run
from cnnlab.model import SmallCNN
from cnnlab.plots import loss_curve

FILE = Path(__file__).parents[2] / "notebooks" / "solutions" / "02_training_loop.py"
TASKS = runpy.run_path(str(FILE))["TASKS"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


@pytest.mark.parametrize("scale", [1, 1000])
def test_the_cross_entropy_is_that_of_torch(scale):
    logits, labels = scale * torch.randn(20, 10), torch.randint(10, (20,))
    torch.testing.assert_close(
        TASKS["02.1"].reference(logits, labels), F.cross_entropy(logits, labels)
    )


def test_sgd_and_adam_are_those_of_torch():
    start = torch.randn(5)
    sgd, adam, by_hand, by_hand_adam = (start.clone().requires_grad_() for _ in range(4))
    optimizers = [torch.optim.SGD([sgd], lr=0.1), torch.optim.Adam([adam], lr=0.1)]
    mean, square = torch.zeros(5), torch.zeros(5)
    for step in range(1, 6):
        gradient = torch.randn(5)
        for parameter in (sgd, adam, by_hand):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        TASKS["02.2"].reference([by_hand], 0.1)
        with torch.no_grad():
            TASKS["02.7"].reference(by_hand_adam, gradient, mean, square, step, 0.1)
    torch.testing.assert_close(by_hand, sgd)
    torch.testing.assert_close(by_hand_adam, adam)


def test_the_loop_has_the_losses_and_the_accuracy_of_the_package():
    recipe = Recipe(batch_size=64, epochs=1, schedule="cosine", threads=1)
    events = list(run(recipe))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    digits = data.digits()
    torch.manual_seed(0)
    model = SmallCNN(channels=1)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(digits.train, 64, shuffle=True, drop_last=True, generator=order)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    schedule = CosineAnnealingLR(optimizer, len(loader))
    losses = TASKS["02.3"].reference(model, loader, optimizer, schedule)
    accuracy = TASKS["02.4"].reference(model, DataLoader(digits.test, 100))
    torch.set_num_threads(threads)
    assert losses == pytest.approx(loss_curve(events)[1], rel=1e-4)
    assert accuracy == pytest.approx(events[-1].accuracy)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_fast_recipe_reaches_98_percent_accuracy(seed):
    *_, finished = run(TASKS["02.8"].reference().replace(seed=seed))
    assert finished.accuracy >= 0.98
