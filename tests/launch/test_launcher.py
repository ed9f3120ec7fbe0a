"""Real runs in real processes: their events, their values, and how they are stopped."""

import importlib
import os
import threading
import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import ranks_alive, wait_until

from cnnlab import model, plots
from cnnlab.data import datasets
from cnnlab.events import Evaluated, Finished, Progress, Started
from cnnlab.launch import launcher
from cnnlab.launch.failures import RankError
from cnnlab.launch.launcher import ranks
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training.loop import evaluate, train

pytestmark = pytest.mark.usefixtures("nothing_is_left")

SHORT = Recipe(steps=4, threads=1, evaluate=False)
ENDLESS = Recipe(data="synthetic", images=512, epochs=1_000_000, threads=1, evaluate=False)


def mean_losses(recipe):
    _, losses = plots.loss_curve(list(launcher.run(recipe)))
    return list(losses)


def count(rank, world, n):
    for number in range(n):
        yield rank, world, number


def run_forever(rank, world):
    while True:
        yield rank
        time.sleep(0.05)


# Runs: run(recipe) and stream(function)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_reports_its_run(world):
    events = list(launcher.run(SHORT.replace(replicas=world, evaluate=True)))
    for rank in range(world):
        mine = [event for event in events if event.rank == rank]
        assert isinstance(mine[0], Started)
        assert isinstance(mine[-1], Finished)
        assert mine[0].world == world
        assert sum(len(event.losses) for event in mine if isinstance(event, Progress)) == 4
    assert {event.rank for event in events} == set(range(world))
    # Each rank reports the accuracy over all images.
    assert len({event.accuracy for event in events if isinstance(event, Evaluated)}) == 1


@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_give_the_losses_of_one(world):
    """SmallCNN has no batch-norm. What remains is rounding: 5e-5 after 20 steps was measured."""
    recipe = SHORT.replace(steps=20)
    one = mean_losses(recipe)
    assert mean_losses(recipe.replace(replicas=world)) == pytest.approx(one, abs=5e-4)


def test_ranks_share_a_batch_under_every_loader():
    recipe = SHORT.replace(augment="shift", model="SmallCNN")
    several = recipe.replace(replicas=2, loader="batch", loader_workers=1)
    assert mean_losses(several) == pytest.approx(mean_losses(recipe), abs=1e-4)


def evaluate_with_different_statistics(rank, world):
    """Accuracy and loss of a network whose batch-norm statistics differ from rank to rank."""
    recipe = Recipe(model="ResNet9", width=4)
    network = model.build(recipe, (1, 32, 10))
    for buffer in network.buffers():
        buffer += rank
    state = SimpleNamespace(network=network, data_group=None)
    yield evaluate(state, recipe, datasets.digits().test, torch.device("cpu"), rank, world)


def test_ranks_evaluate_the_network_of_rank_0_on_each_image_once():
    [expected] = evaluate_with_different_statistics(0, 1)
    for found in launcher.stream(evaluate_with_different_statistics, (), 2):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_has_the_same_losses_as_training_in_this_process():
    _, losses = plots.loss_curve(list(train(SHORT)))
    assert mean_losses(SHORT) == list(losses)


def test_training_happens_in_other_processes():
    events = list(launcher.run(SHORT.replace(replicas=2)))
    pids = {event.pid for event in events if isinstance(event, Started)}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_the_environment_reaches_the_ranks():
    def read(rank, world):
        yield os.environ["CNNLAB_GREETING"]

    env = {"CNNLAB_GREETING": "hello"}
    assert list(launcher.stream(read, (), 2, env=env)) == ["hello", "hello"]
    assert "CNNLAB_GREETING" not in os.environ


def test_later_changes_of_the_environment_reach_the_ranks(monkeypatch):
    def read():
        return os.environ.get("CNNLAB_GREETING"), os.environ.get("PATH")

    ranks(int, 1)  # The fork server runs.
    path = os.environ["PATH"]
    monkeypatch.setenv("CNNLAB_GREETING", "hello")
    monkeypatch.delenv("PATH")
    assert ranks(read, 1) == [("hello", None)]
    monkeypatch.setenv("PATH", path)
    monkeypatch.delenv("CNNLAB_GREETING")
    assert ranks(read, 1) == [(None, path)]


def test_a_closure_can_be_run():
    secret = 7

    def function(rank, world):
        yield secret + rank

    assert sorted(launcher.stream(function, (), 2)) == [7, 8]


def test_events_of_one_rank_come_in_order():
    events = list(launcher.stream(count, (50,), 2))
    for rank in (0, 1):
        expected = [(rank, 2, number) for number in range(50)]
        assert [event for event in events if event[0] == rank] == expected


def test_what_this_machine_lacks_is_reported_before_any_process_starts(monkeypatch):
    missing = ["NVIDIA GPU missing: none here."]
    monkeypatch.setattr("cnnlab.machine.missing_for", lambda recipe: missing)
    monkeypatch.setattr(launcher, "stream", lambda *_: pytest.fail("it was started"))
    with pytest.raises(CnnlabError, match="NVIDIA GPU missing"):
        next(launcher.run(SHORT))


def test_data_that_do_not_fit_the_recipe_are_reported_without_a_rank():
    with pytest.raises(CnnlabError, match="batch_size=2000"):
        next(launcher.run(Recipe(batch_size=2000)))


def test_a_recipe_that_a_rank_rejects_is_a_cnnlab_error():
    recipe = Recipe(model="VGG16", data="synthetic", image_size=20, replicas=2)
    with pytest.raises(CnnlabError, match="VGG16.*multiple of 32 pixels, not 20"):
        list(launcher.run(recipe))


# Calls: ranks(function, n)


@pytest.mark.parametrize("n", [1, 3])
def test_values_come_in_the_order_of_the_ranks(n):
    def return_late(unit):
        time.sleep(unit * (n - dist.get_rank()))  # Rank 0 is the last one.
        return dist.get_rank(), dist.get_world_size()

    assert ranks(return_late, n, 0.05) == [(rank, n) for rank in range(n)]


def test_any_value_comes_back():
    class Star:
        name = "Vega"

    found = ranks(lambda: (None, torch.arange(3), {"a": [1.5, "b"]}, Star(), lambda: 7), 2)
    for nothing, tensor, values, star, function in found:
        assert nothing is None
        assert tensor.tolist() == [0, 1, 2]
        assert values == {"a": [1.5, "b"]}
        assert isinstance(star, Star)
        assert star.name == "Vega"
        assert function() == 7
    assert ranks(lambda: None, 2) == [None, None]


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2", None], ids=repr)
def test_an_invalid_number_of_ranks_is_rejected(n):
    with pytest.raises(CnnlabError, match=f"n={n!r} is not allowed. Use .* an integer >= 1"):
        ranks(print, n)


def test_something_that_is_not_callable_is_rejected():
    with pytest.raises(CnnlabError, match="function=3 cannot be called. Pass the function itself"):
        ranks(3, 2)


# Stopping


@pytest.mark.parametrize(
    "recipe",
    [ENDLESS, ENDLESS.replace(replicas=2), ENDLESS.replace(loader_workers=2)],
    ids=["1 rank", "2 ranks", "loader workers"],
)
def test_stop_ends_a_run_and_leaves_no_process(recipe):
    stop = threading.Event()
    kinds = set()
    for event in launcher.run(recipe, stop):
        kinds.add(type(event))
        if isinstance(event, Progress) and not event.warming_up:
            stop.set()
            stopped_at = time.monotonic()
    assert time.monotonic() - stopped_at < 5
    assert kinds == {Started, Progress}


def test_a_stop_before_the_start_ends_the_run():
    stop = threading.Event()
    stop.set()
    assert list(launcher.run(ENDLESS, stop)) == []


class StopAfterStart:
    """A `stop` that is only noticed once both ranks run, before any of their messages is read."""

    noticed_at = None

    def is_set(self):
        if not self.noticed_at:
            wait_until(lambda: len(ranks_alive()) == 2, "no rank came", seconds=30)
            time.sleep(0.5)
            self.noticed_at = time.monotonic()
        return True


def test_ranks_that_start_while_the_run_is_being_stopped_are_stopped_too():
    stop = StopAfterStart()
    assert list(launcher.stream(run_forever, (), 2, stop)) == []
    assert time.monotonic() - stop.noticed_at < 5
    wait_until(lambda: not ranks_alive(), "a rank escaped", seconds=1)


def test_a_rank_that_starts_after_the_stop_is_killed():
    group = launcher.RankProcesses(run_forever, (), 1, None, {}, print)
    group.cancelled.set()
    with group:
        group.threads[0].join(10)
        assert not ranks_alive()
    assert list(group.pids) == [0] and group.inbox.empty()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_closing_the_iterator_ends_the_run(world):
    events = launcher.stream(run_forever, (), world)
    list(islice(events, 5))
    closed_at = time.monotonic()
    events.close()
    assert time.monotonic() - closed_at < 5
    wait_until(lambda: not ranks_alive(), "a rank is left", seconds=1)


def test_an_error_in_the_loop_over_events_ends_the_run():
    def consume():
        for event in launcher.run(ENDLESS):
            raise OSError(f"cannot handle {type(event).__name__}")

    with pytest.raises(OSError, match="cannot handle Started"):
        consume()


# Several runs


def test_two_runs_at_once_do_not_mix():
    found = {}

    def work(name, recipe):
        found[name] = mean_losses(recipe)

    recipes = {"one": SHORT, "two": SHORT.replace(replicas=2), "other": SHORT.replace(seed=5)}
    threads = [threading.Thread(target=work, args=item) for item in recipes.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found["one"] == pytest.approx(found["two"], abs=1e-4)
    assert found["other"] != pytest.approx(found["one"], abs=1e-3)


def test_stopping_one_run_does_not_affect_another():
    stop = threading.Event()
    other = launcher.stream(run_forever, (), 2)
    next(other)
    for _ in launcher.stream(run_forever, (), 2, stop):
        stop.set()
    assert len(list(islice(other, 30))) == 30
    other.close()


def test_a_run_works_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(launcher.run(SHORT)))
    thread.start()
    thread.join(60)
    assert isinstance(found[-1], Finished)


def test_a_message_that_this_process_cannot_read_is_an_error(tmp_path, monkeypatch):
    """As after an edit of cnnlab, which new ranks have and the kernel has not."""
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "edited_module.py"
    module.write_text("def work(rank, world):\n    yield rank\n")
    work = importlib.import_module("edited_module").work
    module.write_text("class New: pass\n\n\ndef work(rank, world):\n    yield New()\n")
    with pytest.raises(RankError, match="cannot be read here.*New.*Restart the kernel"):
        list(launcher.stream(work, (), 2))
