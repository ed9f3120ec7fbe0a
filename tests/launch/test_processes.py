"""Nothing outlives a run: no process, socket, shared memory, thread, or file, whatever ends it."""

import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from random import Random
from types import CodeType

import cloudpickle
import psutil
import pytest
from helpers import alive, loop_for_ever, wait_until

from cnnlab import machine, widgets
from cnnlab.launch import launcher, processes
from cnnlab.launch.launcher import ranks
from cnnlab.recipe import Recipe

pytestmark = pytest.mark.usefixtures("nothing_is_left")

ENDLESS = Recipe(data="synthetic", images=512, epochs=1_000_000, threads=1, evaluate=False)
SLACK = 6  # seconds that a busy machine may take in addition


def run_forever(rank, world):
    while True:
        yield rank
        time.sleep(0.05)


def test_an_interrupt_while_the_ranks_are_being_started_leaves_none(monkeypatch):
    start = threading.Thread.start

    def start_and_interrupt(thread):
        start(thread)
        if thread.name == launcher.RANK_NAME:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(launcher.stream(run_forever, (), 2))


def test_a_run_works_after_the_fork_server_was_killed():
    ranks(int, 1)
    children = psutil.Process().children()
    [server] = [child for child in children if "forkserver" in " ".join(child.cmdline())]
    server.kill()
    wait_until(lambda: not alive([server]), "the fork server does not end")
    assert ranks(int, 2) == [0, 0]


CREATE_BLOCK = """
import os, time
open(f"/dev/shm/torch_{os.getpid()}_1_0", "w").close()
print(flush=True)
time.sleep(1000)
"""


def create_block(rank, world):
    """Have a loader worker that is killed after it created shared memory, before it unlinked it."""
    command = [sys.executable, "-c", CREATE_BLOCK]
    loader_worker = subprocess.Popen(command, stdout=subprocess.PIPE)
    loader_worker.stdout.readline()
    yield loader_worker.pid
    loop_for_ever()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="shared memory has no folder here")
def test_shared_memory_of_a_killed_loader_worker_is_removed():
    with closing(launcher.stream(create_block, (), 2)) as events:
        blocks = [Path(f"/dev/shm/torch_{next(events)}_1_0") for _ in range(2)]
        assert all(block.exists() for block in blocks)
    assert not any(block.exists() for block in blocks)


class Resources:
    """What this process and its descendants hold."""

    def __init__(self):
        self.pids = {str(os.getpid())}  # also of processes that have ended

    def update_pids(self):
        children = psutil.Process().children(recursive=True)
        self.pids |= {str(process.pid) for process in children}

    def count(self):
        me = psutil.Process()
        processes = alive([me, *me.children(recursive=True)])
        connections = [each for process in processes for each in process.net_connections()]
        shared_memory = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
        # Linux only. matplotlib keeps the font files of up to 64 threads open.
        files = [path.resolve() for path in Path("/proc/self/fd").glob("*")]
        return {
            "processes": len(processes),
            "sockets": sum(each.status == psutil.CONN_LISTEN for each in connections),
            "shared memory": sorted(filter(self.is_ours, shared_memory)),
            "threads": threading.active_count(),
            "file descriptors": sum(path.suffix != ".ttf" for path in files),
            "temporary files": sorted(os.listdir(tempfile.gettempdir())),
        }

    def is_ours(self, name):
        return not self.pids.isdisjoint(re.split("[._-]", name))


def test_a_hundred_random_actions_on_a_panel_leave_nothing():
    """Run, stop, abandon, and move sliders, long before a run has ended or even started."""
    random = Random(0)
    resources = Resources()
    controls = {
        "replicas": (1, 2, 4),
        "strategy": ("ddp", "ring", "local-sgd", "async"),
        "loader_workers": (0, 1),
    }
    panel = widgets.TrainingPanel(ENDLESS, controls)

    def abandon():
        with closing(launcher.run(panel.recipe)) as events:
            list(islice(events, random.choice((0, 1, 3))))

    def move_slider():
        control = random.choice(list(panel.controls.values()))
        control.value = random.choice(control.options)

    panel.controls["replicas"].value = 2
    panel.run()  # Sets up what later runs share.
    wait_until(lambda: panel.events, "the run does not start", seconds=30)
    panel.stop()
    panel.wait()
    before = resources.count()
    started = 0
    for _ in range(100):
        action = random.choice(
            (panel.run, panel.run, panel.stop, abandon, move_slider, move_slider)
        )
        action()
        time.sleep(random.choice((0, 0.02, 0.1, 0.2)))
        resources.update_pids()
        started += bool(panel.events)
    panel.stop()
    panel.wait()
    assert started > 10
    with suppress(AssertionError):
        wait_until(lambda: resources.count() == before, "something is left", seconds=5 + SLACK)
    assert resources.count() == before


# The notebook's process itself ends

TRAINING = """
    import sys
    from cnnlab.launch.launcher import run
    from cnnlab.events import Progress
    from cnnlab.recipe import Recipe

    recipe = Recipe(
        data="synthetic",
        images=512,
        epochs=1_000_000,
        threads=1,
        evaluate=False,
        replicas=int(sys.argv[1]),
        loader_workers=1,
    )
    if __name__ == "__main__":
        for event in run(recipe):
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


PRINTING = """
    from cnnlab.launch.launcher import ranks

    lines = []

    def print_forever():
        while True:
            print("word")

    def say(line):
        lines.append(line)
        if len(lines) == 1000:
            print("training", flush=True)

    ranks(print_forever, 2, say=say)
"""


@pytest.mark.parametrize(
    "script, replicas, signals",
    [
        pytest.param(TRAINING, 2, [signal.SIGKILL], id="killed while training"),
        pytest.param(SILENT, 2, [signal.SIGKILL], id="killed while ranks are silent"),
        pytest.param(PRINTING, 2, [signal.SIGKILL], id="killed while ranks print"),
        pytest.param(TRAINING, 4, [signal.SIGTERM], id="terminated"),
        pytest.param(TRAINING, 1, [signal.SIGINT], id="interrupted"),
        pytest.param(TRAINING, 2, [signal.SIGINT, signal.SIGINT], id="interrupted twice"),
    ],
)
def test_nothing_outlives_its_parent(tmp_path, script, replicas, signals):
    """Interrupts go to the parent's whole process group, as Ctrl-C does."""
    path = tmp_path / "parent.py"
    path.write_text(textwrap.dedent(script))
    parent = subprocess.Popen(
        [sys.executable, str(path), str(replicas)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    loader_workers = replicas if script == TRAINING else 0
    try:
        assert parent.stdout.readline() == "training\n"
        descendants = psutil.Process(parent.pid).children(recursive=True)
        fork_server = 1
        assert len(descendants) >= fork_server + replicas + loader_workers
        for number in signals:
            if number == signal.SIGINT:
                os.killpg(parent.pid, number)
            else:
                os.kill(parent.pid, number)
            time.sleep(0.03)
        parent.wait(20)
        wait_until(lambda: not alive(descendants), "processes are left", seconds=5 + SLACK)
        wait_until(lambda: not [*tmp_path.glob("cnnlab-*")], "folders of cnnlab are left")
        wait_until(lambda: not [*tmp_path.glob("pytorch-*")], "folders of PyTorch are left")
    finally:
        parent.kill()
        parent.stdout.close()


UNFINISHED = """
from cnnlab.launch.launcher import run
from cnnlab.recipe import Recipe

recipe = Recipe(
    data="synthetic", images=512, epochs=1_000_000, threads=1, evaluate=False, replicas=2
)
events = run(recipe)
print(type(next(events)).__name__)
"""


def test_edits_of_cnnlab_that_do_not_reach_the_ranks_are_announced(monkeypatch):
    ranks(os.getpid, 1)
    monkeypatch.setattr(processes, "code_time", time.time)
    with pytest.warns(UserWarning, match="before its last edits. Restart the kernel"):
        ranks(os.getpid, 1)


FEW_FILES = """
import resource
import sys

resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)

from cnnlab.launch.launcher import ranks
from cnnlab.recipe import CnnlabError

try:
    print(ranks(int, int(sys.argv[2])))
except CnnlabError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="this system has no limit of open files")
@pytest.mark.parametrize(
    "limit, world, answer",
    [
        (24, 2, "2 ranks need .* open files, but this process may have 24. Use fewer ranks, or "),
        (64, 40, "40 ranks need .* or run ulimit -n .* in the shell"),
        (64, 4, r"\[0, 0, 0, 0\]"),
    ],
)
def test_few_open_files_give_one_sentence(limit, world, answer):
    command = [sys.executable, "-c", FEW_FILES, str(limit), str(world)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert re.match(answer, done.stdout), done.stdout
    assert "Errno" not in done.stdout + done.stderr


@pytest.mark.parametrize("threads", [None, 2])
def test_the_recipe_decides_the_threads_and_says_so(monkeypatch, threads):
    expected = threads or machine.cores()
    monkeypatch.setenv("OMP_NUM_THREADS", str(expected + 1))
    with pytest.warns(UserWarning, match="Ranks ignore OMP_NUM_THREADS=.* and use Recipe.threads"):
        events = list(launcher.run(Recipe(threads=threads, steps=3, evaluate=False)))
    assert events[0].threads == expected


def test_a_program_that_ends_during_a_run_ends_the_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", UNFINISHED],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Started\n", "")
    assert not list(tmp_path.glob("cnnlab-*"))


def test_an_interrupted_command_line_leaves_no_rank(tmp_path):
    options = f"--data synthetic --epochs 1000000 --replicas 2 --threads 1 --record {tmp_path}"
    torch_cache = {"TORCHINDUCTOR_CACHE_DIR": tempfile.gettempdir()}  # Importing torch makes it.
    command = subprocess.Popen(
        [sys.executable, "-m", "cnnlab", "train", *options.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path), **torch_cache},
    )
    try:
        assert "2 ranks" in command.stdout.readline()
        time.sleep(1)
        descendants = psutil.Process(command.pid).children(recursive=True)
        os.killpg(command.pid, signal.SIGINT)  # As Ctrl-C does.
        _, errors = command.communicate(timeout=20)
    finally:
        command.kill()
    assert command.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    wait_until(lambda: not alive(descendants), "ranks are left")
    assert not list(tmp_path.glob("cnnlab-*"))
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]


def test_functions_keep_the_file_names_of_their_cells(monkeypatch):
    """Also with cloudpickle from 3.1.3 on, which replaces them."""
    table = cloudpickle.Pickler.dispatch_table
    reduce_code = table[CodeType]

    def forget_name(code):
        function, values = reduce_code(code)
        return function, tuple("<dynamic-code>" if v == code.co_filename else v for v in values)

    monkeypatch.setitem(table, CodeType, forget_name)
    names = {"__name__": "__main__"}
    exec(compile("def outer():\n    def inner(): ...\n    return inner", "/cell.py", "exec"), names)
    job = pickle.loads(processes.pack_job(names["outer"], (), None, None))
    function, _ = pickle.loads(job.call)
    assert function.__code__.co_filename == function().__code__.co_filename == "/cell.py"
