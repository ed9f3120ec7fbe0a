"""Many machines: torchrun over virtual hosts with a network of their own, a host that dies, one that comes back, the Slurm script."""

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import alive, wait_until
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from cnnlab import plots, record
from cnnlab.events import Evaluated, Finished, Started
from cnnlab.launch import launcher
from cnnlab.recipe import Recipe

FOLDER = Path(__file__).parents[2] / "notebooks" / "many_machines"
VIRTUAL = ["bash", str(FOLDER / "hosts.sh")]
HERE = [sys.executable, str(FOLDER / "here.py")]
DIGITS = Recipe(steps=20, threads=1, checkpoint_every=10)
PATIENCE = 120  # seconds after which something hangs; none of the tests below waits so long when all is well

# how a rank says that another is gone; the last one says its agent, when host 0 and with it the place to meet is gone
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "The connection to the C10d store has failed",
)
COMES_BACK = {
    "max-restarts": 2,
    "rdzv-conf": "keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60",
}


def possible():
    check = (
        subprocess.run([*VIRTUAL, "--check"], capture_output=True, text=True)
        if shutil.which("bash")
        else None
    )
    return (check.returncode, check.stdout.strip()) if check else (1, "there is no bash")


STATUS, SENTENCE = possible()
needs_hosts = pytest.mark.skipif(STATUS not in (0, 3), reason=SENTENCE)
needs_rate = pytest.mark.skipif(STATUS != 0, reason=SENTENCE)


class Hosts:
    """A running hosts.sh or here.py: its lines as they come, and its standard input."""

    def __init__(self, launcher, count, *command, rate=None, env=None):
        words = [*launcher, str(count), *(["--rate", rate] if rate else []), "--", *command]
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", **(env or {})},
        )
        self.seen, self.inbox = [], queue.Queue()
        self.reader = threading.Thread(
            target=lambda: [self.inbox.put(line.rstrip()) for line in self.process.stdout],
            daemon=True,
        )
        self.reader.start()

    def wait_until(self, condition, what):
        """Take in lines until `condition()` holds."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}:\n{self.text()}"
            over = self.process.poll() is not None
            try:
                self.seen.append(self.inbox.get(timeout=0.05))
            except queue.Empty:
                assert not over, f"it ended before {what}:\n{self.text()}"

    def says(self, text, times=1):
        """Wait until so many lines have the text in them; returns the last."""
        found = lambda: [line for line in self.seen if text in line]
        self.until(lambda: len(found()) >= times, f"the line {text!r}")
        return found()[-1]

    def steer(self, line):
        self.process.stdin.write(line + "\n")

    def end(self):
        """The exit status; all lines are in `seen`."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end:\n{self.text()}")
        self.reader.join(5)
        while not self.inbox.empty():
            self.seen.append(self.inbox.get())
        return status

    def text(self):
        return "\n".join(self.seen)

    def processes(self):
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def start():
    """start(launcher, count, command ...) -> Hosts. Afterwards they are gone, with all that ran in them."""
    started = []

    def begin(*args, **options):
        started.append(Hosts(*args, **options))
        return started[-1]

    yield begin
    for hosts in started:
        left = hosts.processes() if hosts.process.poll() is None else []
        hosts.process.terminate()
        hosts.process.wait(10)
        gone(left)


def pythons(hosts):
    """The Python processes in the hosts: their command, and what it started."""
    return [process for process in alive(hosts.processes()) if process.name().startswith("python")]


def gone(processes, seconds=5):
    wait_until(lambda: not alive(processes), "processes are left", seconds)


def torchrun(hosts, recipe, folder, endpoint="host0:29500", ranks=1, **options):
    """The command that every host runs; it trains `recipe` and keeps the record and checkpoints in `folder`."""
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    flags = {
        "nnodes": hosts,
        "nproc-per-node": ranks,
        "rdzv-backend": "c10d",
        "rdzv-endpoint": endpoint,
        "rdzv-id": "test",
        **options,
    }
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()),
        "-m",
        "cnnlab",
        "train",
        str(folder / "recipe.json"),
        "--record",
        str(folder),
        "--checkpoint",
        str(folder / "checkpoints"),
    ]


def kept(folder):
    """True when a whole checkpoint is there."""
    return any(path.suffix != ".part" for path in (folder / "checkpoints").glob("step-*"))


def recorded(folder):
    [path] = folder.glob("*.jsonl")
    found = record.load(path)
    assert not found.truncated
    return found.events


def losses(events):
    return list(plots.loss_curve(events)[1])


def result(events):
    """(accuracy, loss) on the held-out images at the end."""
    last = [event for event in events if isinstance(event, Evaluated)][-1]
    return last.accuracy, last.loss


def parameters(folder):
    """All numbers of the model in the checkpoint of the last step, read without cnnlab."""
    dcp_to_torch_save(folder / "checkpoints" / f"step-{DIGITS.steps:08}", folder / "last.pt")
    return torch.cat(
        [
            values.flatten()
            for values in torch.load(folder / "last.pt", weights_only=False)["model"].values()
        ]
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Virtual hosts


@needs_hosts
def test_each_host_has_a_name_an_address_and_a_network_of_its_own(start):
    script = 'echo "$(hostname) $HOST of $HOSTS $HOST_ADDRESS $FIRST_ADDRESS $GLOO_SOCKET_IFNAME" $(ip -br addr show dev eth0)'
    hosts = start(VIRTUAL, 3, "bash", "-c", script)
    assert hosts.end() == 0
    for host in range(3):
        line = next(
            line
            for line in hosts.seen
            if line.startswith(
                f"[host {host}] host{host} {host} of 3 10.77.0.{host + 1} 10.77.0.1 eth0"
            )
        )
        assert f"10.77.0.{host + 1}/24" in line


@needs_hosts
def test_a_host_that_fails_is_a_failure_of_all(start):
    assert start(VIRTUAL, 2, "bash", "-c", "exit $HOST").end() == 1


@pytest.mark.parametrize(
    "launcher", [pytest.param(VIRTUAL, marks=needs_hosts), HERE], ids=["virtual", "here"]
)
def test_a_host_can_be_killed_and_come_back(start, tmp_path, launcher):
    go = tmp_path / "go"
    script = f"""
import os, subprocess, sys, time
print("up", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep({PATIENCE})"], start_new_session=True)     # as torchrun starts its ranks
while not os.path.exists({str(go)!r}):
    time.sleep(0.02)
child.kill()
"""
    hosts = start(launcher, 2, sys.executable, "-c", script)
    hosts.says("[host 1] up")
    hosts.until(lambda: len(pythons(hosts)) == 4, "two processes in each host")
    before = pythons(hosts)
    hosts.steer("kill 1")
    hosts.says("[host 1] is killed")
    hosts.until(lambda: len(alive(before)) == 2, "the end of both in host 1")
    hosts.steer("start 1")
    hosts.says("[host 1] up", times=2)
    go.touch()
    assert hosts.end() == 0


@needs_hosts
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_script_that_made_the_hosts(start, how):
    hosts = start(VIRTUAL, 2, "bash", "-c", f"echo up; setsid sleep {PATIENCE} & wait")
    hosts.says("[host 0] up"), hosts.says("[host 1] up")
    processes = hosts.processes()
    assert sum(process.name() == "sleep" for process in processes) >= 2
    hosts.process.send_signal(how)
    gone(processes)


def test_the_check_says_what_is_missing(tmp_path):
    """On a machine that lacks `ip`, and on one that is no Linux."""
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("there is no bash")
    for tool in ("unshare", "nsenter", "setpriv", "tc", "hostname"):
        (tmp_path / tool).symlink_to("/bin/true")
    for system, said in (
        ("Linux", "the command ip is missing. Install the package iproute2."),
        ("Darwin", "this is Darwin"),
    ):
        (tmp_path / "uname").unlink(missing_ok=True)
        (tmp_path / "uname").write_text(f"#!{bash}\necho {system}\n")
        (tmp_path / "uname").chmod(0o755)
        check = subprocess.run(
            [bash, FOLDER / "hosts.sh", "--check"],
            env={"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert (
            check.returncode == 1 and said in check.stdout and len(check.stdout.splitlines()) == 1
        )


@pytest.mark.parametrize(
    "words, said",
    [
        (["0", "--", "true"], "number of hosts"),
        (["2", "true"], "a command is missing"),
        (["2", "--rate", "fast", "--", "true"], "such as 100mbit"),
    ],
)
def test_wrong_words_are_refused_with_the_mend(words, said):
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    refused = subprocess.run([*VIRTUAL, *words], capture_output=True, text=True)
    assert refused.returncode == 2 and said in refused.stderr


SEND = """
import os, socket, time
BYTES = 2_000_000
where = os.environ["FIRST_ADDRESS"], 5000
if os.environ["HOST"] == "0":
    connection, _ = socket.create_server(where).accept()
    began, got = time.perf_counter(), 0
    while got < BYTES:
        got += len(connection.recv(65536))
    print("seconds", time.perf_counter() - began)
else:
    while True:
        try:
            connection = socket.create_connection(where)
            break
        except OSError:
            time.sleep(0.02)
    connection.sendall(bytes(BYTES))
"""


@needs_rate
def test_a_limited_network_takes_the_time_it_must(start):
    """16 Mbit at 20 Mbit/s: 0.8 s, and no bound above, since a busy machine may be as slow as it likes."""
    hosts = start(VIRTUAL, 2, sys.executable, "-c", SEND, rate="20mbit")
    seconds = float(hosts.says("seconds").split()[-1])
    assert hosts.end() == 0 and seconds > 0.75


# Training over them


@needs_hosts
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_train_as_ranks_on_one_machine_do(start, tmp_path, count):
    hosts = start(VIRTUAL, count, *torchrun(count, DIGITS, tmp_path))
    assert hosts.end() == 0, hosts.text()
    (tmp_path / "here").mkdir()
    there, here = (
        recorded(tmp_path),
        list(
            launcher.run(
                DIGITS.replace(replicas=count), checkpoints=tmp_path / "here" / "checkpoints"
            )
        ),
    )
    assert {event.rank for event in there} == set(range(count)) and sum(
        isinstance(event, Finished) for event in there
    ) == count
    assert (
        losses(there) == pytest.approx(losses(here), abs=1e-6)
        and len(losses(there)) == DIGITS.steps
    )
    assert result(there) == pytest.approx(result(here), abs=1e-6)
    assert torch.allclose(parameters(tmp_path), parameters(tmp_path / "here"), rtol=0, atol=1e-6)


@needs_hosts
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_host_dies_the_rest_ends_and_says_why(start, tmp_path, victim):
    endless = DIGITS.replace(steps=1_000_000, checkpoint_every=5, evaluate=False)
    hosts = start(VIRTUAL, 2, *torchrun(2, endless, tmp_path))
    hosts.until(lambda: kept(tmp_path), "a checkpoint")
    processes = hosts.processes()
    killed = time.monotonic()
    hosts.steer(f"kill {victim}")
    assert hosts.end() == 1
    assert time.monotonic() - killed < 30
    said = [
        line
        for line in hosts.seen
        if line.startswith(f"[host {1 - victim}]") and any(reason in line for reason in LOST)
    ]
    assert said, hosts.text()
    gone(processes)
    assert not list(tmp_path.glob("*.jsonl"))  # no record pretends that the run came to its end


@needs_hosts
def test_a_host_that_comes_back_goes_on_from_the_checkpoint(start, tmp_path):
    slow = DIGITS.replace(steps=60, straggler_ms=50)  # slow enough to be killed in the middle
    hosts = start(
        VIRTUAL,
        2,
        *torchrun(2, slow, tmp_path, **COMES_BACK),
        env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    hosts.until(lambda: kept(tmp_path), "a checkpoint")
    hosts.steer("kill 1")
    hosts.says("[host 1] is killed")
    hosts.steer("start 1")
    assert hosts.end() == 0, hosts.text()
    after, whole = (
        recorded(tmp_path),
        losses(list(launcher.run(slow.replace(straggler_ms=0.0, replicas=2)))),
    )
    [first] = {event.first_step for event in after if isinstance(event, Started)}
    assert first in (10, 20, 30, 40, 50)
    assert losses(after) == pytest.approx(whole[first:], abs=1e-6)


def test_two_agents_at_127_0_0_1_train_where_there_are_no_virtual_hosts(start, tmp_path):
    hosts = start(HERE, 2, *torchrun(2, DIGITS, tmp_path, f"127.0.0.1:{free_port()}"))
    assert hosts.end() == 0, hosts.text()
    assert losses(recorded(tmp_path)) == pytest.approx(
        losses(list(launcher.run(DIGITS.replace(replicas=2)))), abs=1e-6
    )


def test_a_rank_leaves_without_taking_python_apart(tmp_path):
    """Threads of gloo may hold tensors at that time, and then abort the process, rarely (pytorch pull request 179291): here Python itself does, always."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os.abort)\n")
    rank = {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    env = {
        **os.environ,
        **rank,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, "-m", "cnnlab", "train", "--steps", "4"],
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and "images/s" in done.stdout, done.stdout + done.stderr


# Slurm

SLURM = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "host[0-1]"}


def slurm(folder, srun, first_host):
    """Stand-ins for Slurm's commands on the PATH."""
    for name, body in (
        ("scontrol", f'[ "$*" = "show hostnames host[0-1]" ] && printf "{first_host}\\nhost1\\n"'),
        ("srun", f'shift; exec {srun} "$@"'),
    ):
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (folder / name).chmod(0o755)
    return {
        **SLURM,
        "PATH": os.pathsep.join(
            [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
    }


@pytest.mark.parametrize("nodes", [pytest.param(2, marks=needs_hosts), 1])
def test_the_slurm_script_trains(tmp_path, nodes):
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    (tmp_path / "recipe.json").write_text(json.dumps(DIGITS.to_dict()))
    srun, first_host = (
        (f"bash {FOLDER / 'hosts.sh'} 2 --", "host0") if nodes == 2 else ("", "127.0.0.1")
    )
    env = {
        **os.environ,
        **slurm(tmp_path, srun, first_host),
        "SLURM_NNODES": str(nodes),
        "RANKS_PER_NODE": str(2 // nodes),
    }
    done = subprocess.run(
        ["bash", FOLDER / "train.sbatch", tmp_path / "recipe.json", tmp_path],
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(recorded(tmp_path)) == pytest.approx(
        losses(list(launcher.run(DIGITS.replace(replicas=2)))), abs=1e-6
    )
    assert (tmp_path / f"checkpoints-{os.getpid()}" / "step-00000020").is_dir()


def test_the_slurm_script_asks_for_what_it_needs():
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    for words in ([], ["recipe.json"]):
        refused = subprocess.run(
            ["bash", FOLDER / "train.sbatch", *words], capture_output=True, text=True
        )
        assert (
            refused.returncode != 0 and "sbatch train.sbatch RECIPE.json FOLDER" in refused.stderr
        )
