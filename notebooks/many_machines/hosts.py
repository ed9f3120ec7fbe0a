"""Start one command on two hosts: virtual hosts where possible, else two local processes."""

import contextlib
import os
import queue
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

FOLDER = Path(__file__).resolve().parent
LOOPBACK = "127.0.0.1"
NO_BASH = "Virtual hosts are not available here: there is no bash."
STEP = re.compile(r"step (\d+) of rank (\d+): ([\d.]+) ms, loss ([\d.]+)")


class Line(NamedTuple):
    """A line of output."""

    seconds: float  # since the start
    host: int | None  # None: the program that starts the hosts
    text: str


class Step(NamedTuple):
    """A training step of one rank, from a line of `train_digits.py`."""

    seconds: float  # since the start
    host: int | None
    step: int
    rank: int
    ms: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Two hosts that can run a command."""

    virtual: bool  # each has its own name, address and network
    limited: bool  # and the network can be slowed down
    reason: str  # what works here, in a sentence

    def new_job(self) -> tuple[dict[str, str], list[str]]:
        """A job as Slurm describes it to the first host: (environment, names of the hosts)."""
        number = random.randrange(1000, 100_000)
        if not self.virtual:
            number = _free_port()
        slurm = {
            "SLURM_JOB_ID": str(number),
            "SLURM_NNODES": "2",
            "SLURM_NTASKS": "2",
            "SLURM_NODEID": "0",
            "SLURM_GPUS_ON_NODE": "1",
        }
        return slurm, ["host0", "host1"] if self.virtual else [LOOPBACK, LOOPBACK]

    def run(
        self,
        command: Sequence[Any],
        rate: str | None = None,
        script: Mapping[str, str] | None = None,
        timeout: float = 180,
        **environment: str,
    ) -> list[Line]:
        """Run a command on both hosts until it ends; after `timeout` seconds, stop it.

        `command` starts with "python" or "torchrun"; programs of this folder need no path. `rate`,
        such as "20mbit", limits the network.
        `script`: {text: order}. When a line contains the text for the first time, the order
        ("kill 1", "start 1") is given. The last line tells how it ended.
        """
        began = time.monotonic()
        process = self._start(command, rate, environment)
        inbox: queue.Queue = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, inbox), daemon=True)
        reader.start()
        lines, orders = [], dict(script or {})
        end = f"stopped after {timeout:g} seconds"
        try:
            while time.monotonic() - began < timeout:
                try:
                    text = inbox.get(timeout=max(0.01, began + timeout - time.monotonic()))
                except queue.Empty:
                    break
                if text is None:
                    end = f"the end, with exit status {process.wait(10)}"
                    break
                lines.append(_parse(time.monotonic() - began, text))
                for key in [key for key in orders if key in text]:
                    process.stdin.write(orders.pop(key) + "\n")
        finally:
            _stop(process)
        return [*lines, Line(time.monotonic() - began, None, end)]

    def _start(self, command, rate, environment):
        programs = {"python": [sys.executable], "torchrun": [sys.executable, FOLDER / "agent.py"]}
        here = [sys.executable, FOLDER / "here.py"]
        launcher = ["bash", FOLDER / "hosts.sh"] if self.virtual else here
        limit = ["--rate", rate] if rate and self.limited else []
        # Programs of this folder are given by their names.
        names = {path.name for path in FOLDER.glob("*.py")}
        rest = [FOLDER / word if word in names else word for word in command[1:]]
        words = [*launcher, "2", *limit, "--", *programs[command[0]], *rest]
        settings = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        if os.name == "nt":
            settings["USE_LIBUV"] = "0"  # PyTorch for Windows is built without libuv.
        settings["PORT"] = "29400" if self.virtual else str(_free_port())
        # Without it, restarted ranks find the addresses of dead ones (pytorch issue 135712).
        settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        return subprocess.Popen(
            [str(word) for word in words],
            env={**os.environ, **settings, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )


def find_hosts() -> Hosts:
    """What works on this machine."""
    status, reason = 1, NO_BASH
    if shutil.which("bash") and sys.platform == "linux":
        words = ["bash", str(FOLDER / "hosts.sh"), "--check"]
        try:
            check = subprocess.run(words, capture_output=True, text=True, timeout=60)
            status, reason = check.returncode, check.stdout.strip()
        except subprocess.TimeoutExpired:
            reason = "Virtual hosts are not available here: the check did not finish."
    elif sys.platform != "linux":
        reason = f"Virtual hosts are not available here: they need Linux, not {sys.platform}."
    return Hosts(virtual=status in (0, 3), limited=status == 0, reason=reason)


def find_steps(lines: Iterable[Line]) -> list[Step]:
    """The training steps in the output of `train_digits.py`."""
    steps = []
    for line in lines:
        if found := STEP.search(line.text):
            step, rank, ms, loss = found.groups()
            steps.append(Step(*line[:2], int(step), int(rank), float(ms), float(loss)))
    return steps


def mean_losses(steps: Iterable[Step]) -> dict[int, float]:
    """{step: mean loss over the ranks}. After a restart, the repeated steps count."""
    losses: dict[int, list[float]] = {}
    newest: dict[int, int] = {}
    for entry in steps:
        if entry.step <= newest.get(entry.rank, 0):  # a restart
            losses = {step: values for step, values in losses.items() if step < entry.step}
            newest = {}
        losses.setdefault(entry.step, []).append(entry.loss)
        newest[entry.rank] = entry.step
    return {step: sum(values) / len(values) for step, values in losses.items()}


def _free_port() -> int:
    """A port from 20,000 to 29,999 that no program uses."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        return port


def _read(output, inbox):
    for text in output:
        inbox.put(text.rstrip())
    inbox.put(None)


def _parse(seconds, text):
    found = re.match(r"\[host (\d+)\] ?(.*)", text)
    return Line(seconds, int(found[1]), found[2]) if found else Line(seconds, None, text)


def _stop(process):
    """End the process and everything that it started."""
    try:
        left = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        left = []
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.stdin.close()
