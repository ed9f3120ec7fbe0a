"""The loop trains like the same training written by hand, and its events keep their promises."""

import math
import time
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from cnnlab import model
from cnnlab.console import event_lines
from cnnlab.data import datasets
from cnnlab.events import Evaluated, Finished, Progress, Started
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import loop
from cnnlab.training.loop import make_optimizer, train
from cnnlab.widgets.status import status_line

SHORT = Recipe(steps=6, threads=1, evaluate=False)
ROUNDING = {"rel": 2e-4, "abs": 2e-5}  # fp32 sums in another order, after a few steps


def only(kind, events):
    return [event for event in events if isinstance(event, kind)]


def losses(recipe):
    return [loss for event in only(Progress, train(recipe)) for loss in event.losses]


def digits_loader():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        datasets.digits().train, batch_size=64, shuffle=True, drop_last=True, generator=generator
    )


def train_by_hand(steps, optimizer=torch.optim.Adam, cosine=False, shift=False, name="SmallCNN"):
    """Plain PyTorch, as in the lessons: (losses, share of correct predictions)."""
    torch.set_num_threads(1)
    loader = digits_loader()
    torch.manual_seed(0)
    network = getattr(model, name)(channels=1)
    optimizer = optimizer(network.parameters(), lr=0.003)
    shifts = torch.Generator().manual_seed(0)
    found, correct = [], 0
    while len(found) < steps:
        for images, labels in islice(loader, steps - len(found)):
            if cosine:
                decay = (1 + math.cos(math.pi * len(found) / steps)) / 2
                optimizer.param_groups[0]["lr"] = 0.003 * decay
            if shift:
                images = images.roll(torch.randint(-2, 3, (2,), generator=shifts).tolist(), (2, 3))
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            correct += (logits.argmax(1) == labels).sum().item()
    return found, correct / (64 * steps)


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def test_training_equals_training_by_hand():
    assert losses(SHORT.replace(steps=50)) == train_by_hand(50)[0]  # into the third epoch


def test_sgd_equals_sgd_by_hand():
    assert losses(SHORT.replace(optimizer="sgd")) == train_by_hand(6, sgd)[0]


def test_batch_norm_equals_batch_norm_by_hand():
    expected = train_by_hand(3, name="ResNet9")[0]
    assert losses(SHORT.replace(model="ResNet9", steps=3)) == expected


def test_cosine_and_shift_equal_those_by_hand():
    expected = train_by_hand(10, cosine=True, shift=True)[0]
    found = losses(SHORT.replace(steps=10, schedule="cosine", augment="shift"))
    assert found == pytest.approx(expected, rel=1e-5)  # the schedule rounds differently
    assert expected != pytest.approx(train_by_hand(10)[0], rel=1e-3)


def test_the_training_accuracy_equals_that_by_hand():
    progress = only(Progress, train(SHORT.replace(steps=20)))
    correct = sum(event.accuracy * len(event.losses) for event in progress)
    assert correct / 20 == pytest.approx(train_by_hand(20)[1])


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
def test_techniques_that_keep_the_mathematics_keep_the_losses(change):
    assert losses(SHORT.replace(**change)) == pytest.approx(losses(SHORT), **ROUNDING)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_close(precision):
    found, expected = losses(SHORT.replace(precision=precision)), losses(SHORT)
    assert found == pytest.approx(expected, abs=0.05)  # bf16 has 8 bits: 0.4% of the logits
    assert found != expected


def test_another_seed_gives_other_losses():
    assert losses(SHORT.replace(seed=1)) != losses(SHORT)


def test_training_learns():
    [end] = only(Finished, train(Recipe(epochs=2, threads=1)))
    assert end.accuracy > 0.85  # guessing one of ten classes gives 0.1


def test_a_run_starts_and_finishes_once():
    events = list(train(SHORT))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
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
def test_training_stops_after_the_steps_or_epochs_of_the_recipe(change, steps, epochs):
    events = list(train(SHORT.replace(evaluate=True, **change)))
    assert events[0].steps == events[-1].steps == steps
    assert only(Progress, events)[-1].step == steps
    assert [event.epoch for event in only(Evaluated, events)] == list(range(1, epochs + 1))
    assert events[-1].images == steps * events[0].recipe.batch_size


def test_progress_has_one_loss_per_step():
    progress = only(Progress, train(SHORT.replace(steps=30)))
    done = 0
    for event in progress:
        assert event.step - done == len(event.losses)
        done = event.step
    assert done == 30


def test_the_warm_up_is_marked_and_timed_separately():
    events = list(train(SHORT.replace(warmup_steps=3)))
    progress = only(Progress, events)
    assert {(event.step <= 3, event.warming_up) for event in progress} == {
        (True, True),
        (False, False),
    }
    assert events[-1].warmup_s == next(event.seconds for event in progress if event.step == 3)


def test_without_a_warm_up_every_step_is_timed():
    end = list(train(SHORT.replace(warmup_steps=0)))[-1]
    assert end.warmup_s == 0
    assert end.seconds == pytest.approx(6 * end.step_s)


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
    assert end.waiting_s >= 0
    assert end.compute_s > 0
    assert end.peak_memory_mib > 50
    assert (end.accuracy is None) == (not recipe.evaluate)
    assert end.seconds == pytest.approx(only(Progress, events)[-1].seconds, abs=0.1)


def test_the_time_of_the_consumer_is_not_counted():
    pauses_s, events = 0, []
    for event in train(SHORT.replace(evaluate=True)):
        time.sleep(1)
        pauses_s += 1
        events.append(event)
    assert pauses_s >= 4
    assert events[-1].seconds < pauses_s / 2
    assert events[-1].waiting_s < 0.5


def test_evaluation_counts_each_image_once():
    """Against accuracy and loss of the same weights on all images at once."""
    [found] = only(Evaluated, train(SHORT.replace(evaluate=True, steps=3)))
    assert found.images == 360
    torch.manual_seed(0)
    network = model.SmallCNN(channels=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for images, labels in islice(digits_loader(), 3):
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    images, labels = datasets.digits().test.tensors
    logits = network(images)
    assert found.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        SHORT.replace(steps=30),
        # With batch norm, and 2 steps per epoch.
        SHORT.replace(model="ResNet9", width=4, batch_size=512, steps=5, optimizer="sgd"),
    ],
    ids=["SmallCNN", "ResNet9"],
)
def test_evaluation_does_not_change_the_training(recipe):
    assert losses(recipe.replace(evaluate=True)) == losses(recipe)


def test_a_loss_of_nan_does_not_end_the_run():
    events = list(train(SHORT.replace(optimizer="sgd", learning_rate=1e30, evaluate=True)))
    assert any(math.isnan(loss) for event in only(Progress, events) for loss in event.losses)
    assert isinstance(events[-1], Finished)
    assert 0 <= events[-1].accuracy <= 1


def test_too_few_steps_are_rejected_before_the_first():
    with pytest.raises(CnnlabError, match="warmup_steps=2"):
        next(train(Recipe(batch_size=700, threads=1)))


@pytest.mark.parametrize("name", ["ResNet9", "VGG16"])
def test_every_model_trains(name):
    recipe = Recipe(
        model=name,
        width=2,
        data="synthetic",
        images=16,
        image_size=32,
        classes=3,
        batch_size=4,
        steps=3,
        threads=1,
    )
    found = losses(recipe)
    assert len(found) == 3
    assert all(map(math.isfinite, found))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_optimizer_is_used_on_request_and_gives_the_same_losses(optimizer, fused):
    recipe = SHORT.replace(optimizer=optimizer, fused_optimizer=fused)
    updater, _ = make_optimizer(recipe, torch.nn.Linear(2, 2), steps=1)
    assert bool(updater.param_groups[0]["fused"]) == fused
    assert losses(recipe) == pytest.approx(losses(SHORT.replace(optimizer=optimizer)), **ROUNDING)


def test_images_kept_on_the_device_give_the_same_losses(monkeypatch):
    expected, moved = losses(SHORT), []
    to = datasets.ImageSplits.to
    monkeypatch.setattr(
        datasets.ImageSplits, "to", lambda *args: moved.append(args[1]) or to(*args)
    )
    assert losses(SHORT.replace(loader="device")) == expected
    assert moved == [torch.device("cpu")]


def test_a_step_that_overflows_in_fp16_is_counted_and_does_not_advance_the_schedule(monkeypatch):
    schedules = []

    def recorded_optimizer(*args):
        optimizer, schedule = make_optimizer(*args)
        schedules.append(schedule)
        return optimizer, schedule

    too_large = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-28)
    monkeypatch.setattr(loop.techniques, "grad_scaler", lambda recipe: too_large)
    monkeypatch.setattr(loop, "make_optimizer", recorded_optimizer)
    [end] = only(Finished, train(SHORT.replace(precision="fp16", schedule="cosine")))
    assert end.skipped_steps == 1 and end.steps == 6
    assert schedules[0].last_epoch == 5
    assert "1 step skipped (fp16 overflow)" in status_line(end, [])[1]
    assert "steps skipped, because fp16 overflowed: 1" in " ".join(event_lines(end))


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_each_rank_selects_a_gpu_and_ranks_share_them(device, monkeypatch):
    """With a torch that claims to have one GPU; nothing runs on it."""
    selected = []
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    monkeypatch.setattr("torch.accelerator.set_device_index", selected.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for rank in (0, 1):
        assert loop.select_device(Recipe(device=device), rank) == torch.device(device, 0)
    assert selected == 2 * [torch.device(device, 0)]


def test_without_fp16_no_step_is_skipped():
    [end] = only(Finished, train(SHORT))
    assert end.skipped_steps == 0 and "skipped" not in status_line(end, [])[1]
