"""Ranks that share optimizer state (ZeRO-1) or everything (FSDP) train like one process."""

import re
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import interrupted_train, kill_myself, train_float64

from cnnlab import plots
from cnnlab.data import datasets
from cnnlab.events import Evaluated, Finished, Progress
from cnnlab.launch import launcher
from cnnlab.launch.launcher import RankError, ranks, run
from cnnlab.parallel.data_parallel import local_tensor
from cnnlab.parallel.sharding import gather_rows
from cnnlab.recipe import Recipe
from cnnlab.training import loop
from cnnlab.training.clock import Clock

pytestmark = pytest.mark.usefixtures("nothing_is_left")

SMALL = Recipe(batch_size=72, steps=8, warmup_steps=1, threads=1)
ENDLESS = Recipe(data="synthetic", images=512, epochs=1_000_000, threads=1, evaluate=False)


def trained(recipe, train=train_float64):
    """(loss of each step, held-out loss)."""
    events = list(launcher.stream(train, (recipe,), recipe.ranks))
    held_out = [event.loss for event in events if isinstance(event, Evaluated)]
    return plots.loss_curve(events)[1], held_out[-1]


@pytest.fixture(scope="module")
def one_process():
    """(losses, held-out loss) of one process for each optimizer."""
    return {name: trained(SMALL.replace(optimizer=name)) for name in ("adam", "sgd")}


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
@pytest.mark.parametrize(
    "change",
    [{"replicas": 4}, {"optimizer": "sgd"}, {"recompute": True, "pooling": "before-relu"}],
    ids=str,
)
def test_shards_train_like_one_process(one_process, strategy, change):
    recipe = SMALL.replace(**{"strategy": strategy, "replicas": 2, **change})
    losses, held_out = trained(recipe)
    expected_losses, expected_held_out = one_process[recipe.optimizer]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)
    assert held_out == pytest.approx(expected_held_out, rel=1e-6)  # evaluated in float32


@pytest.mark.parametrize(
    "change",
    [{"accumulate": 2, "memory_format": "channels_last"}, {"bucket_mb": 0.01}],
    ids=str,
)
def test_zero1_supports_what_ddp_supports(one_process, change):
    recipe = SMALL.replace(strategy="zero1", replicas=3, **change)
    np.testing.assert_allclose(trained(recipe)[0], one_process["adam"][0], rtol=1e-10)


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"model": "ResNet9", "width": 4}])
@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_shards_train_like_ddp(strategy, change):
    """With batch norm and bf16, ranks differ from one process, but not from those of DDP."""
    recipe = SMALL.replace(replicas=2, batch_size=24, optimizer="sgd", **change)
    expected, found = list(run(recipe)), list(run(recipe.replace(strategy=strategy)))
    losses, expected_losses = plots.loss_curve(found)[1], plots.loss_curve(expected)[1]
    np.testing.assert_allclose(losses, expected_losses, atol=1e-3)
    assert found[-1].accuracy == pytest.approx(expected[-1].accuracy, abs=0.02)


def held_elements(recipe):
    """What this rank holds after a step: (parameters, Adam's moments, number of full gradients)."""
    device = torch.device("cpu")
    splits, _, state = loop.set_up(recipe, device, dist.get_world_size(), Clock(device))
    state.model(splits.test.tensors[0][:8]).square().mean().backward()
    state.optimizer.step()
    parameters = [local_tensor(parameter) for parameter in state.network.parameters()]
    moments = [
        local_tensor(values)
        for moments in state.optimizer.state.values()
        for values in moments.values()
        if values.dim()
    ]
    left = [p for p in state.network.parameters() if p.grad is not None]
    return sum(map(torch.numel, parameters)), sum(map(torch.numel, moments)), len(left)


@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_holds_its_part(world):
    total = 25_290
    recipe = SMALL.replace(replicas=world)
    zero1 = ranks(held_elements, world, recipe.replace(strategy="zero1"))
    fsdp = ranks(held_elements, world, recipe.replace(strategy="fsdp"))
    assert sum(moments for _, moments, _ in zero1) == 2 * total
    assert [moments for _, moments, _ in zero1] == [moments for _, moments, _ in fsdp]
    assert {parameters for parameters, _, _ in zero1} == {total}
    assert {gradients for _, _, gradients in zero1} == {0}
    assert sum(parameters for parameters, _, _ in fsdp) == total
    for parameters, moments, _ in fsdp:
        assert moments == 2 * parameters
        assert parameters < 1.3 * total / world  # ten classes do not divide evenly


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_gather_the_rows_of_all(world):
    """Also if the rows do not divide evenly, are fewer than the ranks, or are channels_last."""
    shapes = [(10, 3), (1, 5), (4, 2, 3, 3), (7,)]

    def gather():
        parameters = [torch.nn.Parameter(torch.full(shape, -1.0)) for shape in shapes]
        parameters[2].data = parameters[2].data.contiguous(memory_format=torch.channels_last)
        expected = [torch.randn(shape, generator=generator) for shape in shapes]
        for parameter, values in zip(parameters, expected, strict=True):
            own = values.chunk(world)[dist.get_rank() : dist.get_rank() + 1]
            begin = dist.get_rank() * len(values.chunk(world)[0])
            for part in own:
                parameter.data[begin : begin + len(part)] = part
        gather_rows(parameters, dist.group.WORLD)
        return [torch.equal(p, values) for p, values in zip(parameters, expected, strict=True)]

    generator = torch.Generator().manual_seed(0)
    assert ranks(gather, world) == [[True] * len(shapes)] * world


@pytest.mark.parametrize(
    "strategy, collectives",
    [
        ("zero1", 2),  # an all-reduce of DDP's bucket, and an all-gather
        ("fsdp", 9),  # two all-gathers and a reduce-scatter for each of three stages
    ],
)
def test_communication_is_recorded(strategy, collectives):
    recipe = SMALL.replace(replicas=2, strategy=strategy, evaluate=False)
    progress = [event for event in run(recipe) if isinstance(event, Progress)]
    phases = [phase for phase, _, _ in progress[-1].spans]
    assert phases.count("communication") == collectives * phases.count("waiting")


@pytest.mark.parametrize("world", [2, 3])
def test_evaluation_with_unequal_shares_does_not_block(world):
    """The forward pass of FSDP is collective, and one rank has an image more than another."""
    recipe = SMALL.replace(data="synthetic", images=8 * 2049, image_size=4, width=2, steps=2)
    assert len(datasets.load(recipe).test) == 2049
    _, expected = trained(recipe)
    _, found = trained(recipe.replace(strategy="fsdp", replicas=world))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named(tmp_path, strategy, victim):
    kill = partial(kill_myself, str(tmp_path / "marks"))
    killed = partial(interrupted_train, step=3, victim=victim, what=kill)
    recipe = SMALL.replace(replicas=2, strategy=strategy)
    with pytest.raises(RankError) as caught:
        list(launcher.stream(killed, (recipe, None), 2))
    assert (caught.value.rank, caught.value.error) == (victim, "the process was killed")


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_stop_ends_a_run_and_leaves_no_process(strategy):
    stop = threading.Event()
    for event in run(ENDLESS.replace(replicas=2, strategy=strategy), stop):
        assert not isinstance(event, Finished)
        if isinstance(event, Progress):
            stop.set()


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--strategy", "tensor", "--tensor-ranks", "2"], 0, "2 ranks"),
        (["--strategy", "pipeline", "--stages", "3"], 1, "torchrun started 2 ranks.*= 3. Change"),
    ],
    ids=["tensor", "a world size that does not fit"],
)
def test_torchrun_starts_the_ranks(options, code, message):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    words = ["cnnlab", "train", "--steps", "3", "--evaluate", "False", *options]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stdout + done.stderr)
