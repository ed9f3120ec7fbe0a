"""Real runs in real processes: their events, their failures, and that nothing is left behind."""

import os
import queue
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from itertools import islice

import psutil
import pytest

from cnnlab import launch, plot
from cnnlab.events import Evaluated, Failed, Finished, Progress, Started
from cnnlab.recipe import Recipe, Refused

SHORT = Recipe(steps=4, threads=1, evaluate=False)
ENDLESS = Recipe(data="synthetic", images=512, epochs=1_000_000, threads=1, evaluate=False)


def ranks_alive(root=None):
    """Processes below this one (or below `root`) that are neither the fork server nor multiprocessing's resource tracker."""
    found = []
    for process in (root or psutil.Process()).children(recursive=True):
        try:
            if process.parent().pid != os.getpid() or not any("forkserver" in word or "resource_tracker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return alive(found)


def alive(processes):
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch, tmp_path_factory):
    """After each test: no rank, and no folder in a temporary folder of its own (a short one: a socket's path has at most 104 characters)."""
    launch.prewarm(), tmp_path_factory.getbasetemp()        # whose folders stay
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        until(lambda: not ranks_alive(), "processes are left")
        until(lambda: not [name for name in os.listdir(folder) if name.startswith("cnnlab-")], "folders are left")


def until(condition, complaint, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.02)


def mean_losses(recipe):
    return list(plot.losses_of(list(launch.run(recipe)))[1])


# Generator functions for the ranks

def counting(rank, world, n):
    for number in range(n):
        yield rank, world, number


def failing(rank, world, culprit):
    yield rank
    if rank == culprit:
        raise LookupError("no such star")
    time.sleep(60)


def failing_in_a_collective(rank, world, culprit):
    import torch
    import torch.distributed as dist

    yield rank
    if rank == culprit:
        raise LookupError("no such star")
    dist.all_reduce(torch.ones(1))         # the others fail too, since the culprit is gone


def killed(rank, world, victim):
    yield rank
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def endless(rank, world):
    while True:
        yield rank
        time.sleep(0.05)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_tells_its_run(world):
    events = list(launch.run(SHORT.but(replicas=world, evaluate=True)))
    for rank in range(world):
        mine = [event for event in events if event.rank == rank]
        assert isinstance(mine[0], Started) and isinstance(mine[-1], Finished)
        assert mine[0].world == world
        assert sum(len(event.losses) for event in mine if isinstance(event, Progress)) == 4
    assert {event.rank for event in events} == set(range(world))
    assert len({event.accuracy for event in events if isinstance(event, Evaluated)}) == 1      # of all images, in all ranks


@pytest.mark.parametrize("world", [2, 4])
def test_n_ranks_give_the_losses_and_accuracy_of_one(world):
    """SmallCNN has no batch-norm; what is left is rounding: 5e-5 after 20 steps was measured for fp32."""
    recipe = SHORT.but(steps=20)
    assert mean_losses(recipe.but(replicas=world)) == pytest.approx(mean_losses(recipe), abs=5e-4)


def test_ranks_share_a_batch_under_every_loader():
    recipe = SHORT.but(replicas=2, loader="batch", loader_workers=1, augment="shift", model="SmallCNN")
    assert mean_losses(recipe) == pytest.approx(mean_losses(recipe.but(replicas=1, loader="sample", loader_workers=0)), abs=1e-4)


def evaluating(rank, world):
    """Accuracy and loss of a network whose batch-norm statistics differ from rank to rank."""
    import torch

    from cnnlab import data, model
    from cnnlab.train import evaluate

    recipe = Recipe(model="ResNet9", width=4)
    network = model.build(recipe, (1, 32, 10))
    for buffer in network.buffers():
        buffer += rank
    yield evaluate(network, recipe, data.digits().test, torch.device("cpu"), rank, world)


def test_ranks_evaluate_the_network_of_rank_0_on_each_image_once():
    [alone] = evaluating(0, 1)
    for found in launch.stream(evaluating, (), 2):
        assert found == pytest.approx(alone, rel=1e-5)


def test_a_run_is_the_same_as_in_this_process():
    from cnnlab.train import train

    assert mean_losses(SHORT) == list(plot.losses_of(list(train(SHORT)))[1])


def test_training_happens_in_other_processes():
    pids = {event.pid for event in launch.run(SHORT.but(replicas=2)) if isinstance(event, Started)}
    assert len(pids) == 2 and os.getpid() not in pids


def test_the_environment_reaches_the_ranks():
    def say(rank, world):
        yield os.environ["CNNLAB_SAID"]

    assert list(launch.stream(say, (), 2, env={"CNNLAB_SAID": "hello"})) == ["hello", "hello"]
    assert "CNNLAB_SAID" not in os.environ


def test_a_closure_can_be_run():
    secret = 7

    def function(rank, world):
        yield secret + rank

    assert sorted(launch.stream(function, (), 2)) == [7, 8]


def test_events_of_one_rank_come_in_order():
    events = list(launch.stream(counting, (50,), 2))
    for rank in (0, 1):
        assert [event for event in events if event[0] == rank] == [(rank, 2, number) for number in range(50)]


def test_what_this_machine_lacks_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr("cnnlab.machine.missing_for", lambda recipe: ["NVIDIA GPU missing: none here."])
    monkeypatch.setattr(launch, "stream", lambda *_: pytest.fail("it was started"))
    with pytest.raises(Refused, match="NVIDIA GPU missing"):
        next(launch.run(SHORT))


def test_bad_data_are_refused_here_and_name_no_rank():
    with pytest.raises(Refused, match="batch_size=2000"):
        next(launch.run(Recipe(batch_size=2000)))


def test_what_a_rank_refuses_is_a_refusal():
    with pytest.raises(Refused, match="VGG16.*multiple of 32 pixels, not 20"):
        list(launch.run(Recipe(model="VGG16", data="synthetic", image_size=20, replicas=2)))


# Failures

def fails(function, args, world):
    """The events and the error of a run that must fail."""
    events = []
    with pytest.raises(launch.RankError) as caught:
        for event in launch.stream(function, args, world):
            events.append(event)
    failed = events[-1]
    assert isinstance(failed, Failed) and not any(isinstance(event, Failed) for event in events[:-1])
    assert (failed.rank, failed.error, failed.traceback) == (caught.value.rank, caught.value.error, caught.value.traceback)
    assert f"rank {failed.rank} failed" in str(caught.value)
    return failed


@pytest.mark.parametrize("function", [failing, failing_in_a_collective])
@pytest.mark.parametrize("world, culprit", [(2, 0), (2, 1), (4, 2)])
def test_the_rank_that_raised_is_named_with_its_traceback(function, world, culprit):
    failed = fails(function, (culprit,), world)
    assert failed.rank == culprit
    assert failed.error == "LookupError: no such star"
    assert 'raise LookupError("no such star")' in failed.traceback and "test_launch.py" in failed.traceback


def test_a_lone_rank_that_raised_is_named():
    assert fails(failing, (0,), 1).error == "LookupError: no such star"


def test_an_exception_in_a_closure_is_named():
    def function(rank, world):
        yield rank
        if rank == 1:
            {}["no such key"]
        time.sleep(60)

    assert (fails(function, (), 2).rank, fails(function, (), 2).error) == (1, "KeyError: 'no such key'")


@pytest.mark.parametrize("world, victim", [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_a_killed_rank_is_named(world, victim):
    failed = fails(killed, (victim,), world)
    assert failed.rank == victim and "killed" in failed.error


def test_a_rank_killed_from_outside_while_training_is_named():
    events = launch.run(ENDLESS.but(replicas=2))
    pids = {}
    with pytest.raises(launch.RankError) as caught:
        for event in events:
            if isinstance(event, Started):
                pids[event.rank] = event.pid
                if len(pids) == 2:
                    os.kill(pids[1], signal.SIGKILL)
    assert caught.value.rank == 1 and "killed" in caught.value.error


def test_a_rank_that_leaves_by_the_back_door_is_named():
    def function(rank, world):
        yield rank
        os._exit(0) if rank == 1 else time.sleep(60)

    assert fails(function, (), 2).rank == 1


def test_an_error_while_unpacking_the_job_is_named():
    class Unwilling:
        def __reduce__(self):
            return eval, ("1 / 0",)

    def function(rank, world, unwilling):
        yield

    assert "ZeroDivisionError" in fails(function, (Unwilling(),), 1).error


def test_a_run_after_a_failure_works():
    for function in (failing, killed):
        fails(function, (1,), 2)
        assert sorted(launch.stream(counting, (1,), 2)) == [(0, 2, 0), (1, 2, 0)]


# Stopping

@pytest.mark.parametrize("recipe", [ENDLESS, ENDLESS.but(replicas=2), ENDLESS.but(loader_workers=2)], ids=["1 rank", "2 ranks", "loader workers"])
def test_stop_ends_a_run_and_leaves_no_process(recipe):
    stop, kinds = threading.Event(), set()
    for event in launch.run(recipe, stop):
        kinds.add(type(event))
        if isinstance(event, Progress) and not event.warming_up:
            stop.set()
            asked = time.monotonic()
    assert time.monotonic() - asked < 5
    assert kinds == {Started, Progress}


def test_a_stop_that_comes_before_the_start_ends_it():
    stop = threading.Event()
    stop.set()
    assert list(launch.run(ENDLESS, stop)) == []


class Late:
    """A stop that is noticed only when the ranks have come, and before any was asked about."""

    noticed = None

    def is_set(self):
        if not self.noticed:
            until(lambda: len(ranks_alive()) == 2, "no rank came", seconds=30)
            time.sleep(0.5)
            self.noticed = time.monotonic()
        return True


def test_ranks_that_come_while_the_run_is_being_stopped_are_stopped_too():
    stop = Late()
    assert list(launch.stream(endless, (), 2, stop)) == []
    assert time.monotonic() - stop.noticed < 5
    until(lambda: not ranks_alive(), "a rank slipped through", seconds=1)


def test_a_rank_that_comes_after_the_stop_gets_no_job(tmp_path):
    stopped, pids = threading.Event(), {}
    stopped.set()
    with launch.Listener(os.path.join(tempfile.gettempdir(), "socket")) as listener:
        reader = threading.Thread(target=launch._read, args=(listener, b"the job", queue.Queue(), threading.Event(), stopped, pids))
        reader.start()
        with launch.Client(listener.address) as connection:
            connection.send((3, 12345))
            with pytest.raises((EOFError, OSError)):
                connection.recv_bytes()
        reader.join(10)
    assert pids == {3: 12345}                   # to be killed


@pytest.mark.parametrize("world", [1, 2, 4])
def test_abandoning_the_iteration_ends_the_run(world):
    events = launch.stream(endless, (), world)
    list(islice(events, 5))
    asked = time.monotonic()
    events.close()
    assert time.monotonic() - asked < 5
    until(lambda: not ranks_alive(), "a rank is left", seconds=1)


def test_a_consumers_error_ends_the_run():
    def consume():
        for event in launch.run(ENDLESS):
            raise OSError("the consumer's own")

    with pytest.raises(OSError, match="own"):
        consume()


def test_two_runs_at_once_do_not_meet():
    found = {}

    def work(name, recipe):
        found[name] = mean_losses(recipe)

    recipes = {"one": SHORT, "two": SHORT.but(replicas=2), "other": SHORT.but(seed=5)}
    threads = [threading.Thread(target=work, args=item) for item in recipes.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found["one"] == pytest.approx(found["two"], abs=1e-4)
    assert found["other"] != pytest.approx(found["one"], abs=1e-3)


def test_stopping_one_run_leaves_the_other_alone():
    stop, other = threading.Event(), launch.stream(endless, (), 2)
    next(other)
    for _ in launch.stream(endless, (), 2, stop):
        stop.set()
    assert len(list(islice(other, 30))) == 30
    other.close()


def test_a_run_in_a_thread_of_its_own_works():
    found = []
    thread = threading.Thread(target=lambda: found.extend(launch.run(SHORT)))
    thread.start()
    thread.join(60)
    assert isinstance(found[-1], Finished)


# When the notebook itself goes

TRAINING = """
    from cnnlab.launch import run
    from cnnlab.events import Progress
    from cnnlab.recipe import Recipe

    if __name__ == "__main__":
        for event in run(Recipe(data="synthetic", images=512, epochs=1_000_000, threads=1, evaluate=False, replicas=2, loader_workers=1)):
            if isinstance(event, Progress):
                print("training", flush=True)
"""

SILENT = """
    import time
    from cnnlab.launch import stream

    def silent(rank, world):
        yield rank
        time.sleep(600)

    if __name__ == "__main__":
        for number, _ in enumerate(stream(silent, (), 2)):
            if number == 1:
                print("training", flush=True)
"""


@pytest.mark.parametrize("parent, processes", [(TRAINING, 5), (SILENT, 3)], ids=["training", "silent"])
def test_no_rank_outlives_a_killed_parent(tmp_path, parent, processes):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(parent))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}       # nobody is left to remove its folders
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout.readline() == "training\n"
        below = psutil.Process(parent.pid).children(recursive=True)
        assert len(below) >= processes          # fork server, two ranks, and their loader workers
        parent.kill()
        parent.wait()
        until(lambda: not alive(below), "ranks are left")
    finally:
        parent.kill()
        parent.stdout.close()


def test_an_interrupted_command_line_leaves_no_rank(tmp_path):
    words = [sys.executable, "-m", "cnnlab", "train", "--data", "synthetic", "--epochs", "1000000", "--replicas", "2", "--threads", "1", "--record", str(tmp_path)]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, "TMPDIR": str(tmp_path)})
    assert "2 ranks" in command.stdout.readline()
    time.sleep(1)
    below = psutil.Process(command.pid).children(recursive=True)
    os.killpg(command.pid, signal.SIGINT)       # as Ctrl-C does
    _, said = command.communicate(timeout=20)
    assert command.returncode == 130 and "interrupted" in said and "Traceback" not in said
    until(lambda: not alive(below), "ranks are left")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("cnnlab-")] == []
    assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
