"""The loop against the same training written by hand, and what its events promise."""

import math
import time
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from cnnlab import model
from cnnlab.data import datasets
from cnnlab.events import Evaluated, Finished, Progress, Started
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training.loop import train

SHORT = Recipe(steps=6, threads=1, evaluate=False)
EXACT = dict(rel=0, abs=0)
ROUNDING = dict(rel=2e-4, abs=2e-5)  # fp32 sums in another order, after a few steps


def losses(recipe):
    return [loss for event in train(recipe) if isinstance(event, Progress) for loss in event.losses]


def only(kind, events):
    return [event for event in events if isinstance(event, kind)]


def by_hand(steps, optimizer=torch.optim.Adam, cosine=False, shift=False, network="SmallCNN"):
    """Plain PyTorch, as the notebooks have it."""
    torch.set_num_threads(1)
    images_of = datasets.digits()
    torch.manual_seed(0)
    network = getattr(model, network)(channels=1)
    loader = DataLoader(
        images_of.train,
        batch_size=64,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(0),
    )
    optimizer = optimizer(network.parameters(), lr=0.003)
    shifts, found = torch.Generator().manual_seed(0), []
    while len(found) < steps:
        for images, labels in loader:
            if cosine:
                optimizer.param_groups[0]["lr"] = (
                    0.003 * (1 + math.cos(math.pi * len(found) / steps)) / 2
                )
            if shift:
                images = images.roll(torch.randint(-2, 3, (2,), generator=shifts).tolist(), (2, 3))
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            if len(found) == steps:
                break
    return found


def test_training_is_what_one_writes_by_hand():
    assert losses(SHORT.replace(steps=50)) == pytest.approx(
        by_hand(50), **EXACT
    )  # 50 steps: into the third epoch


def test_sgd_is_what_one_writes_by_hand():
    assert losses(SHORT.replace(optimizer="sgd")) == pytest.approx(
        by_hand(6, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)), **EXACT
    )


def test_batch_normalisation_is_what_one_writes_by_hand():
    assert losses(SHORT.replace(model="ResNet9", steps=3)) == pytest.approx(
        by_hand(3, network="ResNet9"), **EXACT
    )


def test_cosine_and_shift_are_what_one_writes_by_hand():
    expected = by_hand(10, cosine=True, shift=True)
    assert losses(SHORT.replace(steps=10, schedule="cosine", augment="shift")) == pytest.approx(
        expected, rel=1e-5
    )  # the schedule rounds otherwise
    assert expected != pytest.approx(by_hand(10), rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"memory_format": "channels_last"},
        {"loader": "batch"},
        {"threads": 2},
        {"loader_workers": 1},
        {"memory_format": "channels_last", "loader": "batch", "threads": 2},
    ],
    ids=str,
)
def test_a_technique_that_keeps_the_maths_keeps_the_losses(change):
    assert losses(SHORT.replace(**change)) == pytest.approx(losses(SHORT), **ROUNDING)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_close(precision):
    found = losses(SHORT.replace(precision=precision))
    assert found == pytest.approx(
        losses(SHORT), abs=0.05
    )  # bf16 keeps 8 bits: 0.4% of logits of a few units
    assert found != losses(SHORT)


def test_another_seed_gives_other_losses():
    assert losses(SHORT.replace(seed=1)) != losses(SHORT)


def test_training_learns():
    assert (
        only(Finished, train(Recipe(epochs=2, threads=1)))[0].accuracy > 0.85
    )  # ten classes: guessing gives 0.1


def test_a_run_starts_and_finishes_once():
    events = list(train(SHORT))
    assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
    assert len(only(Started, events)) == len(only(Finished, events)) == 1
    assert (events[0].world, events[0].steps, events[0].parameters) == (1, 6, 25_290)
    assert (events[0].train_images, events[0].test_images) == (1437, 360)


@pytest.mark.parametrize(
    "change, steps, epochs",
    [
        ({"steps": 7}, 7, 1),
        ({"steps": 30}, 30, 2),
        ({"steps": None, "epochs": 2, "batch_size": 256}, 10, 2),
        ({"steps": 5, "epochs": 9, "batch_size": 256}, 5, 1),
        ({"steps": 3, "warmup_steps": 0}, 3, 1),
    ],
)
def test_it_stops_where_told(change, steps, epochs):
    events = list(train(SHORT.replace(evaluate=True, **change)))
    assert events[0].steps == events[-1].steps == steps
    assert only(Progress, events)[-1].step == steps
    assert [event.epoch for event in only(Evaluated, events)] == list(range(1, epochs + 1))
    assert events[-1].images == steps * events[0].recipe.batch_size


def test_progress_holds_one_loss_a_step():
    progress = only(Progress, train(SHORT.replace(steps=30)))
    assert sum(len(event.losses) for event in progress) == 30
    ends = [event.step for event in progress]
    assert [end - start for start, end in zip([0, *ends], ends)] == [
        len(event.losses) for event in progress
    ]


def test_the_warm_up_is_marked_and_timed_apart():
    events = list(train(SHORT.replace(warmup_steps=3)))
    progress = only(Progress, events)
    assert {event.step <= 3: event.warming_up for event in progress} == {True: True, False: False}
    assert events[-1].warmup_s == next(event.seconds for event in progress if event.step == 3)


def test_without_a_warm_up_every_step_counts():
    end = list(train(SHORT.replace(warmup_steps=0)))[-1]
    assert end.warmup_s == 0 and end.seconds == pytest.approx(6 * end.step_s)


@pytest.mark.parametrize(
    "change", [{}, {"warmup_steps": 0}, {"evaluate": True}, {"loader_workers": 1}], ids=str
)
def test_the_final_figures_are_consistent(change):
    events = list(train(SHORT.replace(**change)))
    recipe, end = events[0].recipe, events[-1]
    timed = end.steps - recipe.warmup_steps
    assert end.seconds == pytest.approx(end.warmup_s + timed * end.step_s)
    assert end.images_per_s == pytest.approx(recipe.batch_size / end.step_s)
    assert end.step_s == pytest.approx(end.waiting_s + end.compute_s)
    assert end.waiting_s >= 0 and end.compute_s > 0
    assert end.peak_memory_mib > 50
    assert (end.accuracy is None) == (not recipe.evaluate)
    assert end.seconds == pytest.approx(only(Progress, events)[-1].seconds, abs=0.1)


def test_the_consumers_time_is_not_counted():
    paused = 0
    for event in train(SHORT.replace(evaluate=True)):
        time.sleep(1)
        paused += 1
    assert paused >= 4 and event.seconds < paused / 2
    assert event.waiting_s < 0.5


def test_evaluation_counts_each_image_once():
    """Against accuracy and loss of the same weights, computed at one go."""
    events = train(SHORT.replace(evaluate=True, steps=3))
    found = only(Evaluated, events)[0]
    assert found.images == 360
    images_of = datasets.digits()
    torch.manual_seed(0)
    network = model.SmallCNN(channels=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for images, labels in islice(
        DataLoader(
            images_of.train, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0)
        ),
        3,
    ):
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    images, labels = images_of.test.tensors
    logits = network(images)
    assert found.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_evaluation_changes_nothing():
    assert losses(SHORT.replace(evaluate=True, steps=30, model="SmallCNN")) == losses(
        SHORT.replace(steps=30)
    )
    often = SHORT.replace(
        model="ResNet9", width=4, batch_size=512, steps=5, optimizer="sgd"
    )  # batch-norm; 2 steps an epoch
    assert losses(often.replace(evaluate=True)) == losses(often)


def test_training_accuracy_is_a_share():
    for event in only(Progress, train(SHORT.replace(steps=20))):
        assert 0 <= event.accuracy <= 1


def test_losses_that_are_no_number_do_not_end_the_run():
    events = list(train(SHORT.replace(optimizer="sgd", learning_rate=1e30, evaluate=True)))
    assert any(math.isnan(loss) for event in only(Progress, events) for loss in event.losses)
    assert isinstance(events[-1], Finished) and 0 <= events[-1].accuracy <= 1


def test_too_few_steps_are_refused_before_the_first():
    with pytest.raises(CnnlabError, match="warmup_steps=2"):
        next(train(Recipe(batch_size=700, threads=1)))


@pytest.mark.parametrize("name, size", [("ResNet9", 32), ("VGG16", 32)])
def test_every_model_trains(name, size):
    recipe = Recipe(
        model=name,
        width=2,
        data="synthetic",
        images=16,
        image_size=size,
        classes=3,
        batch_size=4,
        steps=3,
        threads=1,
    )
    assert all(map(math.isfinite, losses(recipe)))
