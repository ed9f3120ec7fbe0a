"""What a rank does for code that knows nothing of it: tutorials, other launchers' functions, notebook cells, scripts; its words and its place."""

import linecache
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
"""  # pytorch.org/tutorials/intermediate/ddp_tutorial.html, on the CPU; the last line is ours


def cell(source, name="/tmp/ipykernel_1/1234.py"):
    """Run source as a notebook does; returns its names."""
    source = textwrap.dedent(source)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), names)
    return names


@pytest.mark.parametrize(
    "prefix", ["dist.", ""], ids=["dist.init_process_group", "init_process_group"]
)
def test_the_official_tutorial_runs_unchanged(prefix, capsys):
    names = cell(
        TUTORIAL.format(
            init=prefix + "init_process_group", destroy=prefix + "destroy_process_group"
        )
    )
    demo_basic = names["demo_basic"]
    found = ranks(lambda: demo_basic(int(os.environ["RANK"]), 2), 2)
    assert found[0] == pytest.approx(found[1])  # the models are one
    lines = capsys.readouterr().out.splitlines()
    for rank in (0, 1):
        assert [line for line in lines if line.startswith(f"[rank {rank}]")] == [
            f"[rank {rank}] {word} basic DDP example on rank {rank}."
            for word in ("Running", "Finished running")
        ]


def test_a_function_for_torchrun_runs_unchanged():
    def main():
        rank, world, local = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        dist.init_process_group()
        total = torch.tensor(rank + 1.0)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return rank, world, local, total.item()

    assert ranks(main, 3) == [(rank, 3, rank, 6.0) for rank in range(3)]


def test_a_closure_takes_its_model_and_its_loader_with_it():
    torch.manual_seed(0)
    model = SmallCNN(channels=1, size=8)
    loader = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8)), batch_size=4)

    def step():
        return [nn.functional.cross_entropy(model(images), labels) for images, labels in loader]

    assert torch.allclose(torch.stack(ranks(step, 2)[1]), torch.stack(step()), atol=1e-5)


def test_ddp_models_that_outlive_their_process_group_hang_nothing(tmp_path):
    """Gloo's threads, destroyed while a model of theirs is deleted, wait for the interpreter, which waits for them."""

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


# What a rank says


def test_what_a_rank_prints_comes_in_whole_lines_with_its_number(capsys):
    def talk():
        rank = dist.get_rank()
        for number in range(50):
            print("line", number, end="")
            time.sleep(0.001)
            print(" of", rank)
        warnings.warn(f"careful, {rank}")
        print("two\nlines", file=sys.stderr)
        print("no end", end="")

    ranks(talk, 2)
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("[rank 0] ", "[rank 1] ")) for line in said)
    for rank in (0, 1):
        mine = [
            line.removeprefix(f"[rank {rank}] ")
            for line in said
            if line.startswith(f"[rank {rank}]")
        ]
        assert mine[:50] == [f"line {number} of {rank}" for number in range(50)]
        assert any(f"UserWarning: careful, {rank}" in line for line in mine)
        assert mine[-3:] == ["two", "lines", "no end"]


def test_what_a_rank_printed_before_it_failed_is_shown(capsys):
    def function():
        print("almost there", end="")
        raise LookupError("no such star")

    with pytest.raises(RankError):
        ranks(function, 1)
    assert capsys.readouterr().out == "[rank 0] almost there\n"


def test_a_loader_worker_that_prints_leaves_the_ranks_words_alone():
    class Talking(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, index):
            print("a word", flush=True)
            return index

    said = []
    assert ranks(
        lambda: sum(batch.sum().item() for batch in DataLoader(Talking(), num_workers=1)),
        1,
        say=said.append,
    ) == [1225]
    assert not said  # loader workers have the terminal


def test_the_traceback_shows_lines_of_notebook_cells():
    function = cell("""
        def function():
            star = {}
            return star["Vega"]     # not there
    """)["function"]
    with pytest.raises(RankError) as caught:
        ranks(function, 2)
    assert (
        'return star["Vega"]     # not there' in caught.value.traceback
        and "KeyError: 'Vega'" in str(caught.value)
    )


SCRIPT = """
import os

class Star:
    def __init__(self, name):
        self.name = name

def function(name):
    return Star(f"{name} {os.environ['RANK']}")

stars = ranks(function, 2, "Vega")
print(*(star.name for star in stars), all(isinstance(star, Star) for star in stars))
"""


@pytest.mark.parametrize("how", ["file", "standard input"])
def test_a_script_needs_no_main_guard_and_gets_objects_of_its_own_classes(tmp_path, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, "script.py"] if how == "file" else [sys.executable, "-"]
    done = subprocess.run(
        words,
        input=None if how == "file" else SCRIPT,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.stdout == "Vega 0 Vega 1 True\n", done.stderr


# Its place


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system cannot pin processes to cores"
)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ranks_share_the_cores_out(n):
    cores = sorted(os.sched_getaffinity(0))
    found = ranks(lambda: (sorted(os.sched_getaffinity(0)), torch.get_num_threads()), n)
    pinned = [core for mine, _ in found for core in mine]
    if n <= len(cores):
        assert len(pinned) == len(set(pinned)) == n * (len(cores) // n) and set(pinned) <= set(
            cores
        )
    else:  # more ranks than cores: they take turns, each on one
        assert [len(mine) for mine, _ in found] == [1] * n and set(pinned) == set(cores)
    assert {threads for _, threads in found} == {max(1, len(cores) // n)}


def test_a_run_says_where_its_ranks_are():
    [one] = [
        event
        for event in launcher.run(Recipe(steps=3, evaluate=False))
        if isinstance(event, Started)
    ]
    two = [
        event
        for event in launcher.run(Recipe(steps=3, evaluate=False, replicas=2))
        if isinstance(event, Started)
    ]
    if hasattr(os, "sched_getaffinity"):
        assert one.cores == sorted(os.sched_getaffinity(0))
        assert len(os.sched_getaffinity(0)) == 1 or not set(two[0].cores) & set(two[1].cores)
    assert two[0].threads == two[1].threads == max(1, one.threads // 2)


def test_ranks_listen_on_loopback_only():
    listening = set()
    for event in launcher.run(Recipe(steps=2000, replicas=2, threads=1, evaluate=False)):
        if isinstance(event, Progress) and not event.warming_up:
            for process in psutil.Process().children(recursive=True):
                listening |= {
                    connection.laddr.ip
                    for connection in process.net_connections()
                    if connection.status == psutil.CONN_LISTEN
                }
            break
    assert listening and listening <= {"127.0.0.1", "::1"}
    assert ranks(lambda: os.environ["GLOO_SOCKET_IFNAME"], 1) == [
        "lo0" if sys.platform == "darwin" else "lo"
    ]  # whatever this machine's name stands for


@pytest.mark.parametrize(
    "recipe, checkpoints, words",
    [
        (Recipe(strategy="local-sgd", replicas=2), "kept", "keeps no checkpoints"),
        (Recipe(replicas=2), "file/kept", "cannot write checkpoints"),
        (Recipe(strategy="async", replicas=2), None, "one machine"),
    ],
)
def test_under_torchrun_what_cannot_be_done_is_refused_before_ranks_meet(
    tmp_path, monkeypatch, recipe, checkpoints, words
):
    (tmp_path / "file").touch()
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(CnnlabError, match=words):
        next(train_under_torchrun(recipe, checkpoints and tmp_path / checkpoints))
    monkeypatch.setattr(
        "cnnlab.machine.missing_for", lambda recipe: ["NVIDIA GPU missing: none here."]
    )
    with pytest.raises(CnnlabError, match="NVIDIA GPU missing"):
        next(train_under_torchrun(Recipe(replicas=2)))
