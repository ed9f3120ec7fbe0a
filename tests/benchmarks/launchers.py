"""`launch.ranks` beside other launchers for notebooks: how soon the first step is done, and what happens when things go wrong.

    pip install accelerate torchrunx      # only for this comparison; what is not installed is left out
    python tests/benchmarks/launchers.py [ROUNDS]

Each line is the median of fresh "kernels": Python processes that get their code on standard input, as a notebook's kernel does.
A case that has not ended after 20 s counts as hanging.
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

LIMIT = 20
LAUNCH = {
    "cnnlab": "from cnnlab.launch import ranks\ngo = lambda function: ranks(function, WORLD)",
    "accelerate": "from accelerate import notebook_launcher\ngo = lambda function: notebook_launcher(function, (), num_processes=WORLD)",
    "torchrunx": "import torchrunx\ngo = lambda function: torchrunx.Launcher(hostnames=['localhost'], workers_per_host=WORLD, backend='gloo').run(function)",
}
KERNEL = """
import json, os, signal, sys, time
import torch, torch.distributed as dist
WORLD, FOLDER, CASE = int(sys.argv[1]), sys.argv[2], sys.argv[3]
{launch}

def train(fault=None, folder=FOLDER):
    import os, signal, sys, time, torch, torch.distributed as dist
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(14400, 10)))
    model(torch.randn(8, 3, 32, 32)).sum().backward()
    with open(f"{{folder}}/{{rank}}", "w") as file:
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
        go(function)
    except BaseException as caught:
        error = f"{{type(caught).__name__}}: {{caught}}"
        import traceback; error += traceback.format_exc()
    steps = [float(open(f"{{FOLDER}}/{{rank}}").read()) for rank in range(WORLD) if os.path.exists(f"{{FOLDER}}/{{rank}}")]
    for rank in range(WORLD):
        if os.path.exists(f"{{FOLDER}}/{{rank}}"): os.unlink(f"{{FOLDER}}/{{rank}}")
    print(json.dumps({{"first_step": max(steps, default=0) - began, "ended": time.time() - began, "error": error}}), file=sys.__stdout__, flush=True)

if CASE == "prewarmed":
    from cnnlab.launch.launcher import prewarm
    prewarm(); time.sleep(4)
if CASE == "busy":                      # the kernel itself has trained before
    torch.set_num_threads(2)
    torch.nn.Conv2d(3, 64, 3)(torch.randn(64, 3, 64, 64)).sum().backward()
if CASE in ("first", "prewarmed", "busy"):
    for _ in range(3 if CASE == "first" else 1):
        timed(train)
else:
    timed(lambda: train(CASE))
"""


def kernel(name, world, case):
    """A fresh kernel that runs the case, its folder, and the environment's mark by which its processes are known."""
    folder = tempfile.mkdtemp()
    mark = {"LAUNCHER_BENCHMARK": folder}
    process = subprocess.Popen(
        [sys.executable, "-", str(world), folder, case],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **mark, "TMPDIR": folder},
        start_new_session=True,
        cwd=folder,
    )
    process.stdin.write(KERNEL.format(launch=LAUNCH[name]))
    process.stdin.close()
    return process, folder


def family(folder):
    """Living processes of that kernel, itself left out, wherever they have gone."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("LAUNCHER_BENCHMARK") == folder
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            pass
    return found


def finish(process, folder, limit=LIMIT):
    """(what it printed, how many of its processes are left 5 s after its end); then all are killed."""
    try:
        process.wait(limit)
        hung = False
    except subprocess.TimeoutExpired:
        hung = True
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while (left := len(family(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for each in family(folder):
        each.kill()
    lines = [
        json.loads(line)
        for line in process.stdout.read().splitlines()
        if line.startswith('{"first_step"')
    ]
    return lines, hung, left


def starts(name, world, rounds):
    first, later = [], []
    for _ in range(rounds):
        lines, hung, _ = finish(*kernel(name, world, "first"), 3 * LIMIT)  # three calls
        if hung or any(line["error"] for line in lines):
            return "fails", "fails"
        first.append(lines[0]["first_step"])
        later += [line["first_step"] for line in lines[1:]]
    return f"{statistics.median(first):.2f} s", f"{statistics.median(later):.2f} s"


def prewarmed(name, world, rounds):
    if name != "cnnlab":
        return "no such thing"
    return f"{statistics.median(finish(*kernel(name, world, 'prewarmed'))[0][0]['first_step'] for _ in range(rounds)):.2f} s"


def said(lines, hung, left):
    """What a learner gets from a case that goes wrong."""
    if hung or not lines:
        return "hangs" + f", {left} processes left" * bool(left)
    error = lines[0]["error"] or "no error at all"
    rank = (
        "names the rank"
        if "rank 1" in error.lower() or "rank: 1" in error.lower() or "process 1" in error.lower()
        else "does not name the rank"
    )
    return (
        f"error {lines[0]['ended'] - lines[0]['first_step']:.1f} s later, {rank}"
        + f", {left} processes left" * bool(left)
    )


def interrupted(name, world, number):
    """The kernel gets a signal while its ranks train for ever."""
    process, folder = kernel(name, world, "endless")
    deadline = time.monotonic() + LIMIT
    while len(list(Path(folder).glob("[0-9]"))) < world and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(number)
    lines, hung, left = finish(process, folder)
    took = time.monotonic() - began - 5 * bool(left)
    return ("hangs" if hung else f"over in {took:.1f} s") + (
        f", {left} processes left after 5 s" if left else ", none left"
    )


def main(rounds):
    names = [name for name in LAUNCH if importlib.util.find_spec(name)]
    rows = {}
    for world in (2, 4):
        for name in names:
            (
                rows.setdefault(f"{world} ranks: call to first step, first time", {})[name],
                rows.setdefault(f"{world} ranks: ... each further time", {})[name],
            ) = starts(name, world, rounds)
            rows.setdefault(f"{world} ranks: ... first time, once a panel is open", {})[name] = (
                prewarmed(name, world, rounds)
            )
    for name in names:
        lines, hung, left = finish(*kernel(name, 2, "busy"))
        rows.setdefault("after the kernel itself has trained", {})[name] = (
            said(lines, hung, left) if hung or not lines or lines[0]["error"] else "works"
        )
        for fault, words in (
            ("raise", "rank 1 raises"),
            ("SIGKILL", "rank 1 is killed"),
            ("SIGSTOP", "rank 1 is halted (SIGSTOP)"),
        ):
            rows.setdefault(words, {})[name] = said(*finish(*kernel(name, 2, fault)))
        rows.setdefault("the kernel is interrupted", {})[name] = interrupted(name, 2, signal.SIGINT)
        rows.setdefault("the kernel is killed", {})[name] = interrupted(name, 2, signal.SIGKILL)
    print("| | " + " | ".join(names) + " |\n|-" + "|-" * len(names) + "|")
    for row, cells in rows.items():
        print(f"| {row} | " + " | ".join(cells[name] for name in names) + " |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
