"""Real runs in real processes: their events, their failures, and that nothing is left behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from helpers import alive, interrupted_train, loop_for_ever, ranks_alive, wait_until

from cnnlab import model, plots, widgets
from cnnlab.data import datasets
from cnnlab.events import Evaluated, Failed, Finished, Progress, Started
from cnnlab.launch import launcher
from cnnlab.launch.launcher import RankError, ranks
from cnnlab.parallel.async_sgd import SharedParameters
from cnnlab.recipe import CnnlabError, Recipe

pytestmark = pytest.mark.usefixtures("nothing_is_left")

SHORT = Recipe(steps=4, threads=1, evaluate=False)
ENDLESS = Recipe(data="synthetic", images=512, epochs=1_000_000, threads=1, evaluate=False)
SLACK = 6  # seconds that a busy machine may take on top


def mean_losses(recipe):
    return list(plots.loss_curve(list(launcher.run(recipe)))[1])


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
    dist.all_reduce(torch.ones(1))  # the others fail too, since the culprit is gone


def killed(rank, world, victim):
    yield rank
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def endless_together(rank, world):
    while True:
        dist.barrier()
        yield rank, os.getpid()


def endless(rank, world):
    while True:
        yield rank
        time.sleep(0.05)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_tells_its_run(world):
    events = list(launcher.run(SHORT.replace(replicas=world, evaluate=True)))
    for rank in range(world):
        mine = [event for event in events if event.rank == rank]
        assert isinstance(mine[0], Started) and isinstance(mine[-1], Finished)
        assert mine[0].world == world
        assert sum(len(event.losses) for event in mine if isinstance(event, Progress)) == 4
    assert {event.rank for event in events} == set(range(world))
    assert (
        len({event.accuracy for event in events if isinstance(event, Evaluated)}) == 1
    )  # of all images, in all ranks


@pytest.mark.parametrize("world", [2, 4])
def test_n_ranks_give_the_losses_and_accuracy_of_one(world):
    """SmallCNN has no batch-norm; what is left is rounding: 5e-5 after 20 steps was measured for fp32."""
    recipe = SHORT.replace(steps=20)
    assert mean_losses(recipe.replace(replicas=world)) == pytest.approx(
        mean_losses(recipe), abs=5e-4
    )


def test_ranks_share_a_batch_under_every_loader():
    recipe = SHORT.replace(
        replicas=2, loader="batch", loader_workers=1, augment="shift", model="SmallCNN"
    )
    assert mean_losses(recipe) == pytest.approx(
        mean_losses(recipe.replace(replicas=1, loader="sample", loader_workers=0)), abs=1e-4
    )


def evaluating(rank, world):
    """Accuracy and loss of a network whose batch-norm statistics differ from rank to rank."""
    import torch

    from cnnlab.training.loop import evaluate

    recipe = Recipe(model="ResNet9", width=4)
    network = model.build(recipe, (1, 32, 10))
    for buffer in network.buffers():
        buffer += rank
    yield evaluate(network, recipe, datasets.digits().test, torch.device("cpu"), rank, world)


def test_ranks_evaluate_the_network_of_rank_0_on_each_image_once():
    [alone] = evaluating(0, 1)
    for found in launcher.stream(evaluating, (), 2):
        assert found == pytest.approx(alone, rel=1e-5)


def test_a_run_is_the_same_as_in_this_process():
    from cnnlab.training.loop import train

    assert mean_losses(SHORT) == list(plots.loss_curve(list(train(SHORT)))[1])


def test_training_happens_in_other_processes():
    pids = {
        event.pid for event in launcher.run(SHORT.replace(replicas=2)) if isinstance(event, Started)
    }
    assert len(pids) == 2 and os.getpid() not in pids


def test_the_environment_reaches_the_ranks():
    def say(rank, world):
        yield os.environ["CNNLAB_SAID"]

    assert list(launcher.stream(say, (), 2, env={"CNNLAB_SAID": "hello"})) == ["hello", "hello"]
    assert "CNNLAB_SAID" not in os.environ


def test_a_closure_can_be_run():
    secret = 7

    def function(rank, world):
        yield secret + rank

    assert sorted(launcher.stream(function, (), 2)) == [7, 8]


def test_events_of_one_rank_come_in_order():
    events = list(launcher.stream(counting, (50,), 2))
    for rank in (0, 1):
        assert [event for event in events if event[0] == rank] == [
            (rank, 2, number) for number in range(50)
        ]


def test_what_this_machine_lacks_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(
        "cnnlab.machine.missing_for", lambda recipe: ["NVIDIA GPU missing: none here."]
    )
    monkeypatch.setattr(launcher, "stream", lambda *_: pytest.fail("it was started"))
    with pytest.raises(CnnlabError, match="NVIDIA GPU missing"):
        next(launcher.run(SHORT))


def test_bad_data_are_refused_here_and_name_no_rank():
    with pytest.raises(CnnlabError, match="batch_size=2000"):
        next(launcher.run(Recipe(batch_size=2000)))


# Calls: ranks(function, n)


@pytest.mark.parametrize("n", [1, 3])
def test_values_come_in_the_order_of_the_ranks(n):
    def late(unit):
        time.sleep(unit * (n - dist.get_rank()))  # rank 0 is last
        return dist.get_rank(), dist.get_world_size()

    assert ranks(late, n, 0.05) == [(rank, n) for rank in range(n)]


def test_any_value_comes_back():
    class Star:
        name = "Vega"

    found = ranks(lambda: (None, torch.arange(3), {"a": [1.5, "b"]}, Star(), lambda: 7), 2)
    for nothing, tensor, values, star, function in found:
        assert nothing is None and tensor.tolist() == [0, 1, 2] and values == {"a": [1.5, "b"]}
        assert isinstance(star, Star) and star.name == "Vega" and function() == 7
    assert ranks(lambda: None, 2) == [None, None]


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2", None], ids=repr)
def test_a_bad_number_of_ranks_is_refused(n):
    with pytest.raises(
        CnnlabError, match=f"n={n!r} is not allowed.*whole number of ranks, 1 or more"
    ):
        ranks(print, n)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(CnnlabError, match="function=3 cannot be called: pass the function itself"):
        ranks(3, 2)


def test_one_rank_that_raises_ends_the_call_at_once():
    def function():
        if dist.get_rank() == 1:
            raise LookupError("no such star")
        time.sleep(600)

    ranks(int, 3)  # all is warm
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks(function, 3)
    assert time.monotonic() - began < 2 + SLACK
    assert caught.value.rank == 1 and "LookupError: no such star" in str(caught.value)
    assert 'raise LookupError("no such star")' in caught.value.traceback
    wait_until(lambda: not ranks_alive(), "a rank is left", seconds=2)


def test_what_cannot_be_sent_back_is_an_error_of_its_rank():
    with pytest.raises(RankError, match="rank 0 failed: TypeError: cannot pickle"):
        ranks(threading.Lock, 1)


def spinning():
    if dist.get_rank() == 2:
        while True:
            pass
    if dist.get_rank() == 1:
        dist.barrier()
    ahead = SimpleNamespace(rank=0, steps=[9], bound=0, timeout=600)
    SharedParameters._wait_for(ahead, torch.zeros(3))


def test_a_timeout_names_the_rank_that_hangs_not_those_that_wait_and_where():
    ranks(int, 3)  # all is warm
    with pytest.raises(RankError) as caught:
        ranks(spinning, 3, timeout=2)
    assert caught.value.rank == 2 and caught.value.error == "it was not done in 2 s"
    loop = spinning.__code__.co_firstlineno + 2
    assert any(
        f'test_launcher.py", line {line} in spinning' in caught.value.traceback
        for line in (loop, loop + 1)
    )
    assert (
        "in spinning" in caught.value.traceback
        and "cnnlab" not in caught.value.traceback.splitlines()[2]
    )


def test_a_timeout_that_comes_while_the_rank_starts_or_ends_is_no_riddle():
    with pytest.raises(RankError, match="rank 0 failed: it was not done in 1e-06 s"):
        ranks(int, 1, timeout=1e-6)


def test_what_ends_in_time_is_not_touched_by_its_timeout():
    assert ranks(lambda: 1, 2, timeout=60) == [1, 1]


def test_what_a_rank_refuses_is_a_refusal():
    with pytest.raises(CnnlabError, match="VGG16.*multiple of 32 pixels, not 20"):
        list(launcher.run(Recipe(model="VGG16", data="synthetic", image_size=20, replicas=2)))


# Failures


def fails(function, args, world):
    """The events and the error of a run that must fail."""
    events = []
    with pytest.raises(launcher.RankError) as caught:
        for event in launcher.stream(function, args, world):
            events.append(event)
    failed = events[-1]
    assert isinstance(failed, Failed) and not any(
        isinstance(event, Failed) for event in events[:-1]
    )
    assert (failed.rank, failed.error, failed.traceback) == (
        caught.value.rank,
        caught.value.error,
        caught.value.traceback,
    )
    assert f"rank {failed.rank} failed" in str(caught.value)
    return failed


@pytest.mark.parametrize("function", [failing, failing_in_a_collective])
@pytest.mark.parametrize("world, culprit", [(2, 0), (2, 1), (4, 2)])
def test_the_rank_that_raised_is_named_with_its_traceback(function, world, culprit):
    failed = fails(function, (culprit,), world)
    assert failed.rank == culprit
    assert failed.error == "LookupError: no such star"
    assert (
        'raise LookupError("no such star")' in failed.traceback
        and "test_launcher.py" in failed.traceback
    )


def test_a_lone_rank_that_raised_is_named():
    assert fails(failing, (0,), 1).error == "LookupError: no such star"


def test_an_exception_in_a_closure_is_named():
    def function(rank, world):
        yield rank
        if rank == 1:
            {}["no such key"]
        time.sleep(60)

    assert (fails(function, (), 2).rank, fails(function, (), 2).error) == (
        1,
        "KeyError: 'no such key'",
    )


@pytest.mark.parametrize("world, victim", [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_a_killed_rank_is_named(world, victim):
    failed = fails(killed, (victim,), world)
    assert failed.rank == victim and "killed" in failed.error


def test_a_rank_killed_from_outside_while_training_is_named():
    events = launcher.run(ENDLESS.replace(replicas=2))
    pids = {}
    with pytest.raises(launcher.RankError) as caught:
        for event in events:
            if isinstance(event, Started):
                pids[event.rank] = event.pid
                if len(pids) == 2:
                    os.kill(pids[1], signal.SIGKILL)
    assert caught.value.rank == 1 and "killed" in caught.value.error


def test_a_rank_killed_with_loader_workers_is_named():
    """They live on for seconds, and know the way to the notebook too."""
    killing = None
    with pytest.raises(RankError) as caught:
        for event in launcher.run(ENDLESS.replace(loader_workers=2)):
            if isinstance(event, Started):
                pid = event.pid
            elif not killing:
                killing = time.monotonic()
                os.kill(pid, signal.SIGKILL)
    assert caught.value.rank == 0 and caught.value.error == "the process was killed"
    assert time.monotonic() - killing < 2 + SLACK


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot halt a process")
@pytest.mark.parametrize("world, victim", [(1, 0), (2, 1)])
def test_a_halted_rank_is_named(world, victim):
    pids, halted = {}, None
    with pytest.raises(RankError) as caught:
        for event in launcher.stream(endless_together, (), world):
            if not isinstance(event, Failed):
                pids[event[0]] = event[1]
            if len(pids) == world and not halted:
                halted = time.monotonic()
                os.kill(pids[victim], signal.SIGSTOP)
    assert (
        caught.value.rank == victim
        and "halted (SIGSTOP)" in caught.value.error
        and str(pids[victim]) in caught.value.traceback
    )
    assert time.monotonic() - halted < 4 + SLACK


@pytest.mark.parametrize(
    "change",
    [{}, {"strategy": "ring"}, {"strategy": "async", "staleness": 1}, {"latency_ms": 0.1}],
    ids=str,
)
def test_a_rank_that_never_comes_to_a_collective_is_named_with_its_stack(monkeypatch, change):
    monkeypatch.setattr(launcher, "COLLECTIVE_TIMEOUT_S", 3)
    stuck = partial(interrupted_train, step=4, victim=2, what=loop_for_ever)
    with pytest.raises(RankError) as caught:
        list(
            launcher.stream(
                stuck, (Recipe(batch_size=60, steps=9, threads=1, replicas=3, **change), None), 3
            )
        )
    assert (
        caught.value.rank == 2
        and caught.value.error == "it did not come to a collective operation in 3 s"
    )
    assert "in loop_for_ever" in caught.value.traceback


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
        assert sorted(launcher.stream(counting, (1,), 2)) == [(0, 2, 0), (1, 2, 0)]


# Stopping


@pytest.mark.parametrize(
    "recipe",
    [ENDLESS, ENDLESS.replace(replicas=2), ENDLESS.replace(loader_workers=2)],
    ids=["1 rank", "2 ranks", "loader workers"],
)
def test_stop_ends_a_run_and_leaves_no_process(recipe):
    stop, kinds = threading.Event(), set()
    for event in launcher.run(recipe, stop):
        kinds.add(type(event))
        if isinstance(event, Progress) and not event.warming_up:
            stop.set()
            asked = time.monotonic()
    assert time.monotonic() - asked < 5
    assert kinds == {Started, Progress}


def test_a_stop_that_comes_before_the_start_ends_it():
    stop = threading.Event()
    stop.set()
    assert list(launcher.run(ENDLESS, stop)) == []


class Late:
    """A stop that is noticed only when the ranks have come, and before any was asked about."""

    noticed = None

    def is_set(self):
        if not self.noticed:
            wait_until(lambda: len(ranks_alive()) == 2, "no rank came", seconds=30)
            time.sleep(0.5)
            self.noticed = time.monotonic()
        return True


def test_ranks_that_come_while_the_run_is_being_stopped_are_stopped_too():
    stop = Late()
    assert list(launcher.stream(endless, (), 2, stop)) == []
    assert time.monotonic() - stop.noticed < 5
    wait_until(lambda: not ranks_alive(), "a rank slipped through", seconds=1)


def test_a_rank_that_comes_after_the_stop_gets_no_job():
    group = launcher.RankProcesses(endless, (), 1, None, {}, print)
    group.stopped.set()
    with group.listener:
        reader = threading.Thread(target=group._read)
        reader.start()
        with launcher.Client(group.listener.address) as connection:
            connection.send((3, 12345))
            with pytest.raises((EOFError, OSError)):
                connection.recv_bytes()
        reader.join(10)
    shutil.rmtree(group.folder)
    assert group.pids == {3: 12345}  # to be killed


@pytest.mark.parametrize("world", [1, 2, 4])
def test_abandoning_the_iteration_ends_the_run(world):
    events = launcher.stream(endless, (), world)
    list(islice(events, 5))
    asked = time.monotonic()
    events.close()
    assert time.monotonic() - asked < 5
    wait_until(lambda: not ranks_alive(), "a rank is left", seconds=1)


def test_a_consumers_error_ends_the_run():
    def consume():
        for event in launcher.run(ENDLESS):
            raise OSError("the consumer's own")

    with pytest.raises(OSError, match="own"):
        consume()


def test_two_runs_at_once_do_not_meet():
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


def test_stopping_one_run_leaves_the_other_alone():
    stop, other = threading.Event(), launcher.stream(endless, (), 2)
    next(other)
    for _ in launcher.stream(endless, (), 2, stop):
        stop.set()
    assert len(list(islice(other, 30))) == 30
    other.close()


def test_a_run_in_a_thread_of_its_own_works():
    found = []
    thread = threading.Thread(target=lambda: found.extend(launcher.run(SHORT)))
    thread.start()
    thread.join(60)
    assert isinstance(found[-1], Finished)


def test_an_interrupt_while_the_ranks_are_being_started_leaves_none(monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name == launcher.AGENT_THREAD:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(launcher.stream(endless, (), 2))


def test_a_run_works_after_the_fork_server_was_killed():
    ranks(int, 1)
    [server] = [
        child
        for child in psutil.Process().children()
        if any("forkserver" in word for word in child.cmdline())
    ]
    server.kill()
    wait_until(lambda: not alive([server]), "it does not die")
    assert ranks(int, 2) == [0, 0]


def with_a_block(rank, world):
    """Its worker is killed while it has a block of shared memory open that still has a name."""
    make = "import os, time; open(f'/dev/shm/torch_{os.getpid()}_1_0', 'w').close(); print(flush=True); time.sleep(1000)"
    worker = subprocess.Popen([sys.executable, "-c", make], stdout=subprocess.PIPE)
    worker.stdout.readline()
    yield worker.pid
    loop_for_ever()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="shared memory has no folder here")
def test_shared_memory_of_a_killed_worker_is_removed():
    with closing(launcher.stream(with_a_block, (), 2)) as events:
        blocks = [Path(f"/dev/shm/torch_{next(events)}_1_0") for _ in range(2)]
        assert all(block.exists() for block in blocks)
    assert not any(block.exists() for block in blocks)


class Traces:
    """What this process and those below it hold: processes, listening sockets, shared memory, threads, file descriptors, files for a while."""

    def __init__(self):
        self.pids = {os.getpid()}

    def look(self):
        self.pids |= {process.pid for process in psutil.Process().children(recursive=True)}
        return self.pids

    def found(self):
        me, shared = psutil.Process(), os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
        family = [me, *me.children(recursive=True)]
        files = [
            path.resolve() for path in Path("/proc/self/fd").glob("*")
        ]  # Linux only; matplotlib keeps the fonts of up to 64 threads open
        return {
            "processes": len(alive(family)),
            "sockets": sum(
                c.status == psutil.CONN_LISTEN
                for process in alive(family)
                for c in process.net_connections()
            ),
            "shared memory": sorted(
                name for name in shared if set(re.split("[._-]", name)) & set(map(str, self.pids))
            ),
            "threads": threading.active_count(),
            "file descriptors": sum(path.suffix != ".ttf" for path in files),
            "files": sorted(os.listdir(tempfile.gettempdir())),
        }


def test_a_hundred_moves_of_hectic_hands_leave_nothing():
    """Run, stop, abandon, and move the sliders, at random, long before a run has ended, and often before it has begun."""

    random, traces, begun = Random(0), Traces(), 0
    live = widgets.TrainingPanel(
        ENDLESS,
        {
            "replicas": (1, 2, 4),
            "strategy": ("ddp", "ring", "local-sgd", "async"),
            "loader_workers": (0, 1),
        },
    )

    def abandon():
        with closing(launcher.run(live.recipe)) as events:
            return len(list(islice(events, random.choice((0, 1, 3)))))

    def slide():
        name = random.choice(list(live.controls))
        live.controls[name].value = random.choice(live.controls[name].options)

    live.controls["replicas"].value = 2  # first a run, for what is set up once
    live.run()
    wait_until(lambda: live.events, "it does not start", seconds=30)
    live.stop(), live.wait()
    before = traces.found()
    for _ in range(100):
        random.choice((live.run, live.run, live.stop, abandon, slide, slide))()
        time.sleep(random.choice((0, 0.02, 0.1, 0.2)))
        traces.look()
        begun += bool(live.events)
    live.stop(), live.wait()
    assert begun > 10
    with suppress(AssertionError):
        wait_until(lambda: traces.found() == before, "something is left", seconds=5 + SLACK)
    assert traces.found() == before


# When the notebook itself goes

TRAINING = """
    import sys
    from cnnlab.launch.launcher import run
    from cnnlab.events import Progress
    from cnnlab.recipe import Recipe

    if __name__ == "__main__":
        replicas = int(sys.argv[1])
        for event in run(Recipe(data="synthetic", images=512, epochs=1_000_000, threads=1, evaluate=False, replicas=replicas, loader_workers=1)):
            if isinstance(event, Progress):
                print("training", flush=True)
"""

SILENT = """
    import time
    from cnnlab.launch.launcher import stream

    def silent(rank, world):
        yield rank
        time.sleep(600)

    if __name__ == "__main__":
        for number, _ in enumerate(stream(silent, (), 2)):
            if number == 1:
                print("training", flush=True)
"""


TALKING = """
    from cnnlab.launch.launcher import ranks

    said = []

    def talk():
        while True:
            print("word")

    ranks(talk, 2, say=lambda line: said.append(line) or len(said) == 1000 and print("training", flush=True))
"""


@pytest.mark.parametrize(
    "parent, replicas, signals",
    [
        (TRAINING, 2, [signal.SIGKILL]),
        (SILENT, 2, [signal.SIGKILL]),
        (TALKING, 2, [signal.SIGKILL]),
        (TRAINING, 4, [signal.SIGTERM]),
        (TRAINING, 1, [signal.SIGINT]),
        (TRAINING, 2, [signal.SIGINT, signal.SIGINT]),
    ],
    ids=[
        "killed",
        "killed in silence",
        "killed in a word",
        "terminated",
        "interrupted",
        "interrupted twice",
    ],
)
def test_nothing_outlives_its_parent(tmp_path, parent, replicas, signals):
    """`parent`: the script; `signals`: what it gets, the group that it leads as well where that is Ctrl-C."""
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(parent))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # nobody is left to remove its folders
    loader_workers = replicas if parent == TRAINING else 0
    parent = subprocess.Popen(
        [sys.executable, str(script), str(replicas)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert parent.stdout.readline() == "training\n"
        below = psutil.Process(parent.pid).children(recursive=True)
        assert len(below) >= 1 + replicas + loader_workers  # one more: the fork server
        for number in signals:
            os.killpg(parent.pid, number) if number == signal.SIGINT else os.kill(
                parent.pid, number
            )
            time.sleep(0.03)
        parent.wait(20)
        wait_until(lambda: not alive(below), "processes are left", seconds=5 + SLACK)
        wait_until(
            lambda: not [*tmp_path.glob("cnnlab-*"), *tmp_path.glob("pytorch-*")], "files are left"
        )
    finally:
        parent.kill()
        parent.stdout.close()


def test_a_program_that_ends_in_the_middle_of_a_run_ends(tmp_path):
    program = """if True:
        from cnnlab.launch.launcher import run
        from cnnlab.recipe import Recipe
        events = run(Recipe(data="synthetic", images=512, epochs=1_000_000, threads=1, evaluate=False, replicas=2))
        print(type(next(events)).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Started\n", "")
    assert not list(tmp_path.glob("cnnlab-*"))


def test_an_interrupted_command_line_leaves_no_rank(tmp_path):
    words = [
        sys.executable,
        "-m",
        "cnnlab",
        "train",
        "--data",
        "synthetic",
        "--epochs",
        "1000000",
        "--replicas",
        "2",
        "--threads",
        "1",
        "--record",
        str(tmp_path),
    ]
    command = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        assert "2 ranks" in command.stdout.readline()
        time.sleep(1)
        below = psutil.Process(command.pid).children(recursive=True)
        os.killpg(command.pid, signal.SIGINT)  # as Ctrl-C does
        _, said = command.communicate(timeout=20)
    finally:
        command.kill()
    assert command.returncode == 130 and "interrupted" in said and "Traceback" not in said
    wait_until(lambda: not alive(below), "ranks are left")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("cnnlab-")] == []
    assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
