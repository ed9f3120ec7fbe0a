"""The process group: its backend, its GPU, and what a rank is told that asks for another one.

Nothing runs on a GPU here: torch claims to have some.
"""

import os
import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cnnlab.launch import backends
from cnnlab.launch.backends import check_backend, select_backend
from cnnlab.launch.launcher import ranks
from cnnlab.recipe import CnnlabError, Recipe


@pytest.fixture
def fake_gpus(monkeypatch):
    """fake_gpus(device, number) lets torch claim to have so many GPUs."""

    def set_gpus(device, number):
        monkeypatch.setattr("cnnlab.machine.accelerator", lambda: device if number else "cpu")
        monkeypatch.setattr("torch.accelerator.device_count", lambda: number)

    return set_gpus


@pytest.mark.parametrize(
    "device, gpus, backend",
    [
        ("cpu", 8, "gloo"),
        ("mps", 1, "gloo"),
        ("cuda", 2, "cpu:gloo,cuda:nccl"),
        ("xpu", 2, "cpu:gloo,xpu:xccl"),
    ],
)
def test_the_backend_is_that_of_the_gpus_if_each_rank_has_one(device, gpus, backend, fake_gpus):
    fake_gpus(device, gpus)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend(Recipe(device=device), 2) == backend
        assert check_backend(None, 2) == ("gloo" if device == "cpu" else backend)
        assert check_backend("gloo", 2) == "gloo"


def test_ranks_that_share_a_gpu_are_told_that_they_use_gloo(fake_gpus):
    fake_gpus("cuda", 1)
    with pytest.warns(UserWarning, match="share a GPU communicate through gloo.* than nccl"):
        assert select_backend(Recipe(device="cuda", replicas=2), 2) == "gloo"
    with pytest.warns(UserWarning, match="share a GPU communicate through gloo"):
        assert check_backend(None, 2) == "gloo"


def test_nccl_is_used_where_it_can_be(fake_gpus):
    fake_gpus("cuda", 2)
    assert check_backend("nccl", 2) == "cpu:gloo,cuda:nccl"
    for device, number in (("cuda", 1), ("cpu", 0), ("xpu", 2)):
        fake_gpus(device, number)
        there = number if device == "cuda" else 0
        message = f"GPU for each of the 2 ranks, and there are {there}. Use backend='gloo'"
        with pytest.raises(CnnlabError, match=message):
            check_backend("nccl", 2)


@pytest.mark.parametrize("backend", ["mpi", 3])
def test_an_unknown_backend_is_rejected(backend):
    with pytest.raises(CnnlabError, match=f"backend={backend!r} .* Use None, 'gloo' or 'nccl'"):
        ranks(int, 1, backend=backend)


@pytest.fixture
def joined(monkeypatch):
    """The options of each call of PyTorch's `init_process_group`, which does nothing."""
    calls = []

    def init_process_group(*args, **options):
        calls.append((*args, options))

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(dist.distributed_c10d, "init_process_group", init_process_group)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: None)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: None)
    monkeypatch.setattr(backends, "live_groups", [])
    return calls


@pytest.mark.parametrize("visible, number", [(4, 3), (1, 0)])
def test_nccl_gets_the_gpu_of_the_rank(joined, fake_gpus, visible, number):
    fake_gpus("cuda", visible)
    backends.join_process_group("cpu:gloo,cuda:nccl", 3, rank=3)
    backend, options = joined[0]
    assert backend == "cpu:gloo,cuda:nccl"
    assert options == {"rank": 3, "device_id": torch.device("cuda", number)}
    joined.clear()
    dist.init_process_group("gloo")
    assert joined == [("gloo", {})]


@pytest.mark.parametrize(
    "ids, backend", [("ab", "cpu:gloo,cuda:nccl"), ("aa", "gloo")], ids=["own", "shared"]
)
def test_under_torchrun_one_visible_gpu_per_rank_is_enough_for_nccl(
    joined, fake_gpus, monkeypatch, ids, backend
):
    """Each rank sees one GPU, as with Slurm's --gpus-per-task=1."""
    fake_gpus("cuda", 1)
    store = dist.HashStore()
    store.set("gpu of rank 1", ids[1])
    monkeypatch.setattr(backends, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    properties = SimpleNamespace(uuid=ids[0])
    module = SimpleNamespace(get_device_properties=lambda number: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if backend == "gloo" else "error")
        backends.join_under_torchrun(Recipe(device="cuda", replicas=2), timedelta(seconds=5))
    assert joined[0][0] == backend
    assert joined[0][1]["world_size"] == 2
    if backend == "gloo":
        monkeypatch.setattr(backends, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
        recipe = Recipe(device="cuda", replicas=2, strategy="zero1")
        with pytest.raises(CnnlabError, match="a GPU for each of its 2 ranks, and they have 1"):
            backends.join_under_torchrun(recipe, timedelta(seconds=5))


def test_a_rank_that_asks_for_nccl_is_told_why_it_gets_gloo():
    def function(asked):
        dist.init_process_group(asked, rank=int(os.environ["RANK"]), world_size=2)
        return dist.get_backend()

    lines = []
    assert ranks(function, 2, "nccl", say=lines.append) == ["gloo", "gloo"]
    text = " ".join(lines)
    assert "[rank 0]" in text and "[rank 1]" not in text
    assert "init_process_group('nccl') keeps the process group that the ranks have" in text
    assert "NCCL needs an NVIDIA or AMD GPU for each of the 2 ranks, and there are 0." in text
    lines.clear()
    ranks(function, 2, "gloo", say=lines.append)
    assert not lines
