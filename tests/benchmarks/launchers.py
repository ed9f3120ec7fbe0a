"""`ranks` compared with other launchers for notebooks: time to the first step, and failures.

    pip install accelerate torchrunx      # only for this comparison; those missing are left out
    python tests/benchmarks/launchers.py [ROUNDS]

Times are medians over fresh kernels. A kernel here is a Python process that reads its code from
standard input, as a notebook's kernel does. A case that has not ended after 20 s counts as hanging.
"""

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

LIMIT_S = 20
LEFT_AFTER_S = 5  # processes that still run so long after the end of the kernel are left behind
MARK = "LAUNCHER_BENCHMARK"  # environment variable that identifies the processes of a kernel
LAUNCH = {
    "cnnlab": """
from cnnlab.launch.launcher import ranks
def launch(function):
    ranks(function, WORLD)
""",
    "accelerate": """
from accelerate import notebook_launcher
def launch(function):
    notebook_launcher(function, (), num_processes=WORLD)
""",
    "torchrunx": """
import torchrunx
def launch(function):
    launcher = torchrunx.Launcher(
        hostnames=["localhost"], workers_per_host=WORLD, backend="gloo"
    )
    launcher.run(function)
""",
}
KERNEL = """
import json, os, signal, sys, time, traceback
import torch, torch.distributed as dist
WORLD, FOLDER, CASE = int(sys.argv[1]), sys.argv[2], sys.argv[3]

def train(fault=None, folder=FOLDER):
    import os, signal, sys, time, torch, torch.distributed as dist
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(14400, 10)
    ))
    model(torch.randn(8, 3, 32, 32)).sum().backward()
    with open(f"{folder}/{rank}", "w") as file:
        print(time.time(), file=file)
    if fault == "raise" and rank == 1:
        raise ValueError("rank one has had enough")
    if fault in ("SIGKILL", "SIGSTOP") and rank == 1:
        os.kill(os.getpid(), getattr(signal, fault))
    if fault == "endless":
        time.sleep(1000)
    if fault:
        dist.barrier()
    group = dist.group.WORLD
    del model

def timed(function):
    began = time.time()
    error = None
    try:
        launch(function)
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}" + traceback.format_exc()
    steps = []
    for rank in range(WORLD):
        path = f"{FOLDER}/{rank}"
        if os.path.exists(path):
            steps.append(float(open(path).read()))
            os.unlink(path)
    figures = {
        "first_step": max(steps, default=0) - began, "ended": time.time() - began, "error": error
    }
    print(json.dumps(figures), file=sys.__stdout__, flush=True)

if CASE == "prewarmed":
    from cnnlab.launch.launcher import prewarm
    prewarm()
    time.sleep(4)
if CASE == "busy":  # the kernel itself has trained before
    torch.set_num_threads(2)
    torch.nn.Conv2d(3, 64, 3)(torch.randn(64, 3, 64, 64)).sum().backward()
if CASE in ("first", "prewarmed", "busy"):
    for _ in range(3 if CASE == "first" else 1):
        timed(train)
else:
    timed(lambda: train(CASE))
"""


def start_kernel(name, world, case):
    """Start a fresh kernel that runs the case. Returns the process and its folder."""
    folder = tempfile.mkdtemp()
    process = subprocess.Popen(
        [sys.executable, "-", str(world), folder, case],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, MARK: folder, "TMPDIR": folder},
        start_new_session=True,
        cwd=folder,
    )
    process.stdin.write(LAUNCH[name] + KERNEL)
    process.stdin.close()
    return process, folder


def processes_left(folder):
    """Live processes of the kernel with this folder, also those that are no longer its children."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == folder
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def finish(process, folder, limit=LIMIT_S):
    """Wait for the kernel to end, then kill all that is left of it.

    Returns the figures that it printed, whether it hung, and how many processes it left behind.
    """
    hung = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        hung = True
        process.kill()
        process.wait()
    deadline = time.monotonic() + LEFT_AFTER_S
    while (left := len(processes_left(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for each in processes_left(folder):
        each.kill()
    lines = process.stdout.read().splitlines()
    figures = [json.loads(line) for line in lines if line.startswith('{"first_step"')]
    return figures, hung, left


def time_starts(name, world, rounds):
    """Seconds to the first step, as text: for the first call of a kernel, and for later calls."""
    first, later = [], []
    for _ in range(rounds):
        calls, hung, _ = finish(*start_kernel(name, world, "first"), 3 * LIMIT_S)  # three calls
        if hung or any(call["error"] for call in calls):
            return "fails", "fails"
        first.append(calls[0]["first_step"])
        later += [call["first_step"] for call in calls[1:]]
    return f"{statistics.median(first):.2f} s", f"{statistics.median(later):.2f} s"


def time_prewarmed_start(name, world, rounds):
    if name != "cnnlab":
        return "not available"
    times = []
    for _ in range(rounds):
        calls, hung, _ = finish(*start_kernel(name, world, "prewarmed"))
        if hung or calls[0]["error"]:
            return "fails"
        times.append(calls[0]["first_step"])
    return f"{statistics.median(times):.2f} s"


def describe(calls, hung, left):
    """What the user gets in a case that fails."""
    leftover = f", {left} processes left" if left else ""
    if hung or not calls:
        return "hangs" + leftover
    error = calls[0]["error"]
    if error is None:
        return "no error" + leftover
    named = any(text in error.lower() for text in ("rank 1", "rank: 1", "process 1"))
    rank = "names the rank" if named else "does not name the rank"
    seconds = calls[0]["ended"] - calls[0]["first_step"]
    return f"error {seconds:.1f} s later, {rank}{leftover}"


def describe_busy(calls, hung, left):
    if hung or not calls or calls[0]["error"]:
        return describe(calls, hung, left)
    return "works"


def describe_signal(name, world, number):
    """What happens when the kernel gets a signal while its ranks train indefinitely."""
    process, folder = start_kernel(name, world, "endless")
    deadline = time.monotonic() + LIMIT_S
    while len(list(Path(folder).glob("[0-9]"))) < world and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(number)
    _, hung, left = finish(process, folder)
    seconds = time.monotonic() - began
    if left:
        seconds -= LEFT_AFTER_S
    ended = "hangs" if hung else f"over in {seconds:.1f} s"
    return ended + (f", {left} processes left after 5 s" if left else ", none left")


def speed_rows(name, rounds):
    rows = {}
    for world in (2, 4):
        first, later = time_starts(name, world, rounds)
        rows[f"{world} ranks: call to first step, first call"] = first
        rows[f"{world} ranks: ... each later call"] = later
        prewarmed = time_prewarmed_start(name, world, rounds)
        rows[f"{world} ranks: ... first call, once a panel is open"] = prewarmed
    return rows


def failure_rows(name):
    return {
        "after the kernel itself has trained": describe_busy(
            *finish(*start_kernel(name, 2, "busy"))
        ),
        "rank 1 raises": describe(*finish(*start_kernel(name, 2, "raise"))),
        "rank 1 is killed": describe(*finish(*start_kernel(name, 2, "SIGKILL"))),
        "rank 1 is stopped (SIGSTOP)": describe(*finish(*start_kernel(name, 2, "SIGSTOP"))),
        "the kernel is interrupted": describe_signal(name, 2, signal.SIGINT),
        "the kernel is killed": describe_signal(name, 2, signal.SIGKILL),
    }


def main(rounds):
    columns = {
        name: speed_rows(name, rounds) | failure_rows(name)
        for name in LAUNCH
        if importlib.util.find_spec(name)
    }
    print("| | " + " | ".join(columns) + " |\n|-" + "|-" * len(columns) + "|")
    for row in columns["cnnlab"]:
        print(f"| {row} | " + " | ".join(rows[row] for rows in columns.values()) + " |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
