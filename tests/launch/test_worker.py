"""Ranks run tutorials, torchrun functions, cells and scripts unchanged; their output and cores."""

import linecache
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
import warnings

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cnnlab.events import Progress, Started
from cnnlab.launch import launcher
from cnnlab.launch.launcher import RankError, ranks
from cnnlab.launch.worker import train_under_torchrun
from cnnlab.model import SmallCNN
from cnnlab.recipe import CnnlabError, Recipe

pytestmark = pytest.mark.usefixtures("nothing_is_left")

# https://pytorch.org/tutorials/intermediate/ddp_tutorial.html on the CPU; the last line is ours.
TUTORIAL = """
import os
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.optim as optim
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel as DDP

def setup(rank, world_size):
    os.environ['MASTER_ADDR'] = 'localhost'
    os.environ['MASTER_PORT'] = '12355'

    # initialize the process group
    {init}("gloo", rank=rank, world_size=world_size)

def cleanup():
    {destroy}()

class ToyModel(nn.Module):
    def __init__(self):
        super(ToyModel, self).__init__()
        self.net1 = nn.Linear(10, 10)
        self.relu = nn.ReLU()
        self.net2 = nn.Linear(10, 5)

    def forward(self, x):
        return self.net2(self.relu(self.net1(x)))

def demo_basic(rank, world_size):
    print(f"Running basic DDP example on rank {{rank}}.")
    setup(rank, world_size)

    model = ToyModel()
    ddp_model = DDP(model)

    loss_fn = nn.MSELoss()
    optimizer = optim.SGD(ddp_model.parameters(), lr=0.001)

    optimizer.zero_grad()
    outputs = ddp_model(torch.randn(20, 10))
    labels = torch.randn(20, 5)
    loss_fn(outputs, labels).backward()
    optimizer.step()

    cleanup()
    print(f"Finished running basic DDP example on rank {{rank}}.")
    return sum(parameter.sum().item() for parameter in model.parameters())
"""


def run_cell(source, name="/tmp/ipykernel_1/1234.py"):
    """Run source as a notebook does; returns its names."""
    source = textwrap.dedent(source)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), names)
    return names


@pytest.mark.parametrize("module", ["dist.", ""], ids=["dist.init_process_group", "imported name"])
def test_the_official_tutorial_runs_unchanged(module, capsys):
    init, destroy = f"{module}init_process_group", f"{module}destroy_process_group"
    demo_basic = run_cell(TUTORIAL.format(init=init, destroy=destroy))["demo_basic"]
    found = ranks(lambda: demo_basic(int(os.environ["RANK"]), 2), 2)
    assert found[0] == pytest.approx(found[1])  # Both ranks have the same model.
    lines = capsys.readouterr().out.splitlines()
    for rank in (0, 1):
        assert [line for line in lines if line.startswith(f"[rank {rank}]")] == [
            f"[rank {rank}] Running basic DDP example on rank {rank}.",
            f"[rank {rank}] Finished running basic DDP example on rank {rank}.",
        ]


def test_a_function_for_torchrun_runs_unchanged():
    def main():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, world, local_rank = (int(os.environ[name]) for name in names)
        dist.init_process_group()
        total = torch.tensor(rank + 1.0)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return rank, world, local_rank, total.item()

    assert ranks(main, 3) == [(rank, 3, rank, 6.0) for rank in range(3)]


def test_a_closure_brings_its_model_and_its_loader():
    torch.manual_seed(0)
    model = SmallCNN(channels=1, size=8)
    loader = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8)), batch_size=4)

    def step():
        return [nn.functional.cross_entropy(model(images), labels) for images, labels in loader]

    _, losses = ranks(step, 2)
    assert torch.allclose(torch.stack(losses), torch.stack(step()), atol=1e-5)


@pytest.mark.parametrize("module", [multiprocessing, torch.multiprocessing], ids=["std", "torch"])
def test_a_rank_may_set_the_start_method(module):
    def set_start_method():
        module.set_start_method("spawn")
        return multiprocessing.get_start_method()

    assert ranks(set_start_method, 1) == ["spawn"]
    if sys.platform == "linux":
        assert ranks(multiprocessing.get_start_method, 1) == ["fork"]


def test_ddp_models_that_outlive_their_process_group_do_not_hang(tmp_path):
    """Without `live_groups`, deleting a model waits for gloo's threads, which wait for the GIL."""

    def cycles():
        for cycle in range(30):
            dist.init_process_group(
                "gloo",
                init_method=f"file://{tmp_path}/{cycle}",
                rank=int(os.environ["RANK"]),
                world_size=2,
            )
            model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
            model(torch.ones(2, 4)).sum().backward()
            dist.destroy_process_group()
            del model
        return "all done"

    assert ranks(cycles, 2, timeout=60) == ["all done"] * 2


# What a rank cannot do


@pytest.mark.parametrize(
    "source", ["input()", "breakpoint()", "import pdb; pdb.set_trace(); print()"]
)
def test_asking_for_input_is_rejected_with_advice(source):
    with pytest.raises(CnnlabError, match="do not work in a rank.*by calling it in the notebook"):
        ranks(exec, 2, source)


def test_a_generator_function_is_rejected_with_advice():
    def function():
        yield 1

    with pytest.raises(CnnlabError, match="returned a generator.*Return a list instead"):
        ranks(function, 2)


# Output


def test_the_output_of_ranks_comes_in_complete_lines_with_the_rank(capsys):
    def print_a_lot():
        rank = dist.get_rank()
        for number in range(50):
            print("line", number, end="")
            time.sleep(0.001)
            print(" of", rank)
        warnings.warn(f"careful, {rank}", stacklevel=1)
        print("two\nlines", file=sys.stderr)
        print("no end", end="")

    ranks(print_a_lot, 2)
    output = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("[rank 0] ", "[rank 1] ")) for line in output)
    for rank in (0, 1):
        prefix = f"[rank {rank}] "
        mine = [line.removeprefix(prefix) for line in output if line.startswith(prefix)]
        assert mine[:50] == [f"line {number} of {rank}" for number in range(50)]
        assert any(f"UserWarning: careful, {rank}" in line for line in mine)
        assert mine[-3:] == ["two", "lines", "no end"]


def test_of_a_progress_bar_the_last_state_is_shown():
    def count():
        for number in range(50):
            print(f"\r{number} of 50", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        print("\rgone\r    \r", end="", flush=True)
        print("finished")

    lines = []
    ranks(count, 1, say=lines.append)
    assert lines == ["[rank 0] 49 of 50", "[rank 0] finished"]


def test_of_a_slow_progress_bar_some_states_are_shown(monkeypatch):
    monkeypatch.setattr("cnnlab.launch.output.BAR_S", 0)

    def count():
        print("\r1 of 2", end="", flush=True)
        time.sleep(0.5)
        print("\r2 of 2")

    lines = []
    ranks(count, 1, say=lines.append)
    assert lines == ["[rank 0] 1 of 2", "[rank 0] 2 of 2"]


def test_the_level_of_the_root_logger_reaches_the_ranks(caplog):
    caplog.set_level(logging.INFO)
    lines = []
    ranks(lambda: logging.info("a star"), 1, say=lines.append)
    assert lines == ["[rank 0] INFO:root:a star"]


def test_the_output_before_a_failure_is_shown(capsys):
    def function():
        print("almost there", end="")
        raise LookupError("no such star")

    with pytest.raises(RankError):
        ranks(function, 1)
    assert capsys.readouterr().out == "[rank 0] almost there\n"


def test_the_output_of_loader_workers_is_shown():
    class PrintingDataset(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, index):
            print("a word", flush=True)
            return index

    def add_all():
        return sum(batch.sum().item() for batch in DataLoader(PrintingDataset(), num_workers=1))

    output = []
    assert ranks(add_all, 1, say=output.append) == [1225]
    assert output == ["[rank 0] a word"] * 50


def test_the_traceback_shows_lines_of_notebook_cells():
    function = run_cell("""
        def function():
            star = {}
            return star["Vega"]     # not there
    """)["function"]
    with pytest.raises(RankError) as caught:
        ranks(function, 2)
    assert 'return star["Vega"]     # not there' in caught.value.traceback
    assert "KeyError: 'Vega'" in str(caught.value)
    assert "launch" not in caught.value.traceback  # no frames of the launcher


SCRIPT = """
import os
from cnnlab.launch.launcher import ranks

class Star:
    def __init__(self, name):
        self.name = name

def function(name):
    return Star(f"{name} {os.environ['RANK']}")

stars = ranks(function, 2, "Vega")
print(*(star.name for star in stars), all(isinstance(star, Star) for star in stars))
"""


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_script_needs_no_main_guard_and_gets_objects_of_its_own_classes(tmp_path, source):
    (tmp_path / "script.py").write_text(SCRIPT)
    from_file = source == "file"
    done = subprocess.run(
        [sys.executable, "script.py" if from_file else "-"],
        input=None if from_file else SCRIPT,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.stdout == "Vega 0 Vega 1 True\n", done.stderr


# Cores and network


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system cannot pin processes to cores"
)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ranks_divide_the_cores_among_themselves(n):
    cores = sorted(os.sched_getaffinity(0))
    found = ranks(lambda: (sorted(os.sched_getaffinity(0)), torch.get_num_threads()), n)
    pinned = [core for own, _ in found for core in own]
    if n <= len(cores):
        assert len(pinned) == len(set(pinned)) == n * (len(cores) // n)
        assert set(pinned) <= set(cores)
    else:  # Each rank has one core, which it shares with others.
        assert [len(own) for own, _ in found] == [1] * n
        assert set(pinned) == set(cores)
    assert {threads for _, threads in found} == {max(1, len(cores) // n)}


def started(recipe):
    return [event for event in launcher.run(recipe) if isinstance(event, Started)]


def test_a_run_reports_the_cores_and_threads_of_its_ranks():
    recipe = Recipe(steps=3, evaluate=False)
    [single] = started(recipe)
    first, second = started(recipe.replace(replicas=2))
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        assert single.cores == cores
        assert len(cores) == 1 or not set(first.cores) & set(second.cores)
    assert first.threads == second.threads == max(1, single.threads // 2)


def test_ranks_listen_on_loopback_only():
    """Whatever address the name of this machine has."""
    listening = set()
    for event in launcher.run(Recipe(steps=2000, replicas=2, threads=1, evaluate=False)):
        if isinstance(event, Progress) and not event.warming_up:
            for process in psutil.Process().children(recursive=True):
                for connection in process.net_connections():
                    if connection.status == psutil.CONN_LISTEN:
                        listening.add(connection.laddr.ip)
            break
    assert listening
    assert listening <= {"127.0.0.1", "::1"}
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    assert ranks(lambda: os.environ["GLOO_SOCKET_IFNAME"], 1) == [loopback]


# torchrun


@pytest.mark.parametrize(
    "recipe, checkpoints, message",
    [
        (Recipe(strategy="local-sgd", replicas=2), "kept", "does not support checkpoints"),
        (Recipe(replicas=2), "file/kept", "cannot write .*kept"),
        (Recipe(strategy="async", replicas=2), None, "one machine"),
    ],
)
def test_invalid_requests_under_torchrun_are_rejected_before_ranks_connect(
    tmp_path, monkeypatch, recipe, checkpoints, message
):
    (tmp_path / "file").touch()
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(CnnlabError, match=message):
        next(train_under_torchrun(recipe, checkpoints and tmp_path / checkpoints))
    missing = ["NVIDIA GPU missing: none here."]
    monkeypatch.setattr("cnnlab.machine.missing_for", lambda recipe: missing)
    with pytest.raises(CnnlabError, match="NVIDIA GPU missing"):
        next(train_under_torchrun(Recipe(replicas=2)))
