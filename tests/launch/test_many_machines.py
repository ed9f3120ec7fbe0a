"""torchrun on several (virtual) hosts: training, hosts that die and return, the Slurm script."""

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
PATIENCE = 120  # seconds; a test that waits longer hangs

# What a rank reports when another host is gone. The last is its agent's, when host 0 is gone.
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


def check_hosts():
    """(exit status, explanation) of the check: 0 if everything works, 3 if only --rate does not."""
    if not shutil.which("bash"):
        return 1, "there is no bash"
    check = subprocess.run([*VIRTUAL, "--check"], capture_output=True, text=True)
    return check.returncode, check.stdout.strip()


STATUS, SENTENCE = check_hosts()
needs_hosts = pytest.mark.skipif(STATUS not in (0, 3), reason=SENTENCE)
needs_rate = pytest.mark.skipif(STATUS != 0, reason=SENTENCE)
needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")


class Hosts:
    """A running hosts.sh or here.py: the lines of its output, and its standard input."""

    def __init__(self, launcher, count, *command, rate=None, env=None):
        rate_option = ["--rate", rate] if rate else []
        self.process = subprocess.Popen(
            [*launcher, str(count), *rate_option, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", **(env or {})},
        )
        self.lines = []
        self.inbox = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.inbox.put(line.rstrip())

    def wait_until(self, condition, what):
        """Collect lines until `condition()` is true."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}:\n{self.text()}"
            has_ended = self.process.poll() is not None
            try:
                self.lines.append(self.inbox.get(timeout=0.05))
            except queue.Empty:
                assert not has_ended, f"it ended before {what}:\n{self.text()}"

    def wait_for_line(self, text, times=1):
        """Wait until that many lines contain the text; returns the last of them."""
        self.wait_until(lambda: len(self.lines_with(text)) >= times, f"the line {text!r}")
        return self.lines_with(text)[-1]

    def lines_with(self, text):
        return [line for line in self.lines if text in line]

    def send(self, line):
        self.process.stdin.write(line + "\n")

    def wait(self):
        """Wait for the end; returns the exit status. All lines are in `lines`."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end:\n{self.text()}")
        self.reader.join(5)
        while not self.inbox.empty():
            self.lines.append(self.inbox.get())
        return status

    def text(self):
        return "\n".join(self.lines)

    def processes(self):
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def start():
    """start(launcher, count, command ...) -> Hosts, which end with the test."""
    started = []

    def begin(*args, **options):
        started.append(Hosts(*args, **options))
        return started[-1]

    yield begin
    for hosts in started:
        left = hosts.processes() if hosts.process.poll() is None else []
        hosts.process.terminate()
        hosts.process.wait(10)
        wait_until_gone(left)


def python_processes(hosts):
    """The Python processes in the hosts: their command, and what it started."""
    return [process for process in alive(hosts.processes()) if process.name().startswith("python")]


def wait_until_gone(processes, seconds=5):
    wait_until(lambda: not alive(processes), "processes are left", seconds)


def torchrun(hosts, recipe, folder, endpoint="host0:29500", ranks=1, **options):
    """The command for every host: train `recipe`, with the record and checkpoints in `folder`."""
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    flags = {
        "nnodes": hosts,
        "nproc-per-node": ranks,
        "rdzv-backend": "c10d",
        "rdzv-endpoint": endpoint,
        "rdzv-id": "test",
        **options,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    recipe_path, checkpoints = str(folder / "recipe.json"), str(folder / "checkpoints")
    return [
        *(sys.executable, "-m", "torch.distributed.run", *words),
        *("-m", "cnnlab", "train", recipe_path),
        *("--record", str(folder), "--checkpoint", checkpoints),
    ]


def has_checkpoint(folder):
    """True when a complete checkpoint is there."""
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
    state = torch.load(folder / "last.pt", weights_only=False)["model"]
    return torch.cat([values.flatten() for values in state.values()])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Virtual hosts


SHOW_NETWORK = """
echo "$(hostname) $HOST of $HOSTS $HOST_ADDRESS $FIRST_ADDRESS $GLOO_SOCKET_IFNAME" \\
    $(ip -br addr show dev eth0)
"""


@needs_hosts
def test_each_host_has_its_own_name_address_and_network(start):
    hosts = start(VIRTUAL, 3, "bash", "-c", SHOW_NETWORK)
    assert hosts.wait() == 0
    for host in range(3):
        address = f"10.77.0.{host + 1}"
        expected = f"[host {host}] host{host} {host} of 3 {address} 10.77.0.1 eth0"
        [line] = [line for line in hosts.lines if line.startswith(expected)]
        assert f"{address}/24" in line


@needs_hosts
def test_the_failure_of_one_host_is_a_failure_of_all(start):
    assert start(VIRTUAL, 2, "bash", "-c", "exit $HOST").wait() == 1


# The child has a session of its own, as ranks of torchrun do.
WAIT_FOR_FILE = """
import os, subprocess, sys, time

print("up", flush=True)
sleep = f"import time; time.sleep({sys.argv[2]})"
child = subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
child.kill()
"""


@pytest.mark.parametrize(
    "launcher", [pytest.param(VIRTUAL, marks=needs_hosts), HERE], ids=["virtual", "here"]
)
def test_a_host_can_be_killed_and_restarted(start, tmp_path, launcher):
    file = tmp_path / "go"
    hosts = start(launcher, 2, sys.executable, "-c", WAIT_FOR_FILE, str(file), str(PATIENCE))
    hosts.wait_for_line("[host 1] up")
    hosts.wait_until(lambda: len(python_processes(hosts)) == 4, "two processes in each host")
    before = python_processes(hosts)
    hosts.send("kill 1")
    hosts.wait_for_line("[host 1] is killed")
    hosts.wait_until(lambda: len(alive(before)) == 2, "the end of both in host 1")
    hosts.send("start 1")
    hosts.wait_for_line("[host 1] up", times=2)
    file.touch()
    assert hosts.wait() == 0


@needs_hosts
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_script_that_made_the_hosts(start, how):
    hosts = start(VIRTUAL, 2, "bash", "-c", f"echo up; setsid sleep {PATIENCE} & wait")
    hosts.wait_for_line("[host 0] up")
    hosts.wait_for_line("[host 1] up")
    processes = hosts.processes()
    assert sum(process.name() == "sleep" for process in processes) >= 2
    hosts.process.send_signal(how)
    wait_until_gone(processes)


@needs_bash
@pytest.mark.parametrize(
    "system, explanation",
    [
        ("Linux", "the command ip is missing. Install the package iproute2."),
        ("Darwin", "this is Darwin"),
    ],
)
def test_the_check_reports_what_is_missing(tmp_path, system, explanation):
    bash = shutil.which("bash")
    for tool in ("unshare", "nsenter", "setpriv", "tc", "hostname"):
        (tmp_path / tool).symlink_to("/bin/true")
    (tmp_path / "uname").write_text(f"#!{bash}\necho {system}\n")
    (tmp_path / "uname").chmod(0o755)
    check = subprocess.run(
        [bash, FOLDER / "hosts.sh", "--check"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert check.returncode == 1
    assert explanation in check.stdout
    assert len(check.stdout.splitlines()) == 1


@needs_bash
@pytest.mark.parametrize(
    "words, explanation",
    [
        (["0", "--", "true"], "number of hosts"),
        (["2", "true"], "a command is missing"),
        (["2", "--rate", "fast", "--", "true"], "such as 100mbit"),
    ],
)
def test_invalid_arguments_are_rejected_with_a_suggested_fix(words, explanation):
    rejected = subprocess.run([*VIRTUAL, *words], capture_output=True, text=True)
    assert rejected.returncode == 2
    assert explanation in rejected.stderr


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
def test_a_limited_network_takes_the_minimal_time(start):
    """16 Mbit at 20 Mbit/s take 0.8 s. There is no upper bound, because the machine may be busy."""
    hosts = start(VIRTUAL, 2, sys.executable, "-c", SEND, rate="20mbit")
    seconds = float(hosts.wait_for_line("seconds").split()[-1])
    assert hosts.wait() == 0
    assert seconds > 0.75


# Training on them


@needs_hosts
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_train_as_ranks_on_one_machine_do(start, tmp_path, count):
    hosts = start(VIRTUAL, count, *torchrun(count, DIGITS, tmp_path))
    assert hosts.wait() == 0, hosts.text()
    there = recorded(tmp_path)
    (tmp_path / "here").mkdir()
    checkpoints = tmp_path / "here" / "checkpoints"
    here = list(launcher.run(DIGITS.replace(replicas=count), checkpoints=checkpoints))
    assert {event.rank for event in there} == set(range(count))
    assert sum(isinstance(event, Finished) for event in there) == count
    assert losses(there) == pytest.approx(losses(here), abs=1e-6)
    assert len(losses(there)) == DIGITS.steps
    assert result(there) == pytest.approx(result(here), abs=1e-6)
    assert torch.allclose(parameters(tmp_path), parameters(tmp_path / "here"), rtol=0, atol=1e-6)


@needs_hosts
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_host_dies_the_others_end_and_report_why(start, tmp_path, victim):
    endless = DIGITS.replace(steps=1_000_000, checkpoint_every=5, evaluate=False)
    hosts = start(VIRTUAL, 2, *torchrun(2, endless, tmp_path))
    hosts.wait_until(lambda: has_checkpoint(tmp_path), "a checkpoint")
    processes = hosts.processes()
    killed_at = time.monotonic()
    hosts.send(f"kill {victim}")
    assert hosts.wait() == 1
    assert time.monotonic() - killed_at < 30
    survivor = [line for line in hosts.lines if line.startswith(f"[host {1 - victim}]")]
    reasons = [line for line in survivor if any(reason in line for reason in LOST)]
    assert reasons, hosts.text()
    wait_until_gone(processes)
    assert not list(tmp_path.glob("*.jsonl"))  # No record claims that the run finished.


@needs_hosts
def test_a_host_that_returns_resumes_from_the_checkpoint(start, tmp_path):
    slow = DIGITS.replace(steps=60, straggler_ms=50)  # Slow enough to be killed during training.
    command = torchrun(2, slow, tmp_path, **COMES_BACK)
    hosts = start(VIRTUAL, 2, *command, env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    hosts.wait_until(lambda: has_checkpoint(tmp_path), "a checkpoint")
    hosts.send("kill 1")
    hosts.wait_for_line("[host 1] is killed")
    hosts.send("start 1")
    assert hosts.wait() == 0, hosts.text()
    resumed = recorded(tmp_path)
    uninterrupted = list(launcher.run(slow.replace(straggler_ms=0.0, replicas=2)))
    [first] = {event.first_step for event in resumed if isinstance(event, Started)}
    assert first in (10, 20, 30, 40, 50)
    assert losses(resumed) == pytest.approx(losses(uninterrupted)[first:], abs=1e-6)


def test_two_agents_on_loopback_train_without_virtual_hosts(start, tmp_path):
    hosts = start(HERE, 2, *torchrun(2, DIGITS, tmp_path, f"127.0.0.1:{free_port()}"))
    assert hosts.wait() == 0, hosts.text()
    expected = losses(list(launcher.run(DIGITS.replace(replicas=2))))
    assert losses(recorded(tmp_path)) == pytest.approx(expected, abs=1e-6)


def test_a_rank_exits_without_the_interpreters_cleanup(tmp_path):
    """During cleanup, threads of gloo may still hold tensors, and rarely abort the process.

    See PyTorch's pull request 179291. Here the interpreter's cleanup always aborts.
    """
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os.abort)\n")
    python_path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **os.environ,
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join(python_path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "cnnlab", "train", "--steps", "4"],
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "images/s" in done.stdout


# Slurm

SLURM = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "host[0-1]"}


def slurm_environment(folder, srun, first_host):
    """An environment with stand-ins for Slurm's commands."""
    hosts = f'[ "$*" = "show hostnames host[0-1]" ] && printf "{first_host}\\nhost1\\n"'
    for name, body in {"scontrol": hosts, "srun": f'shift; exec {srun} "$@"'}.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (folder / name).chmod(0o755)
    path = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, **SLURM, "PATH": os.pathsep.join(path)}


@needs_bash
@pytest.mark.parametrize(
    "nodes, srun, first_host",
    [
        pytest.param(2, f"bash {FOLDER / 'hosts.sh'} 2 --", "host0", marks=needs_hosts),
        (1, "", "127.0.0.1"),
    ],
)
def test_the_slurm_script_trains(tmp_path, nodes, srun, first_host):
    (tmp_path / "recipe.json").write_text(json.dumps(DIGITS.to_dict()))
    env = slurm_environment(tmp_path, srun, first_host)
    done = subprocess.run(
        ["bash", FOLDER / "train.sbatch", tmp_path / "recipe.json", tmp_path],
        env={**env, "SLURM_NNODES": str(nodes), "RANKS_PER_NODE": str(2 // nodes)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = losses(list(launcher.run(DIGITS.replace(replicas=2))))
    assert losses(recorded(tmp_path)) == pytest.approx(expected, abs=1e-6)
    assert (tmp_path / f"checkpoints-{os.getpid()}" / "step-00000020").is_dir()


@needs_bash
@pytest.mark.parametrize("words", [[], ["recipe.json"]], ids=str)
def test_the_slurm_script_reports_missing_arguments(words):
    command = ["bash", FOLDER / "train.sbatch", *words]
    rejected = subprocess.run(command, capture_output=True, text=True)
    assert rejected.returncode != 0
    assert "sbatch train.sbatch RECIPE.json FOLDER" in rejected.stderr
