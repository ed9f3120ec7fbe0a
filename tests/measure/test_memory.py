"""What training takes of each rank: formulas next to real ranks, thousands of them, and limits."""

import sys
import threading

import pytest
import torch
import torch.distributed as dist
from recorded import device
from torch._subclasses.fake_tensor import FakeTensorMode

import cnnlab
from cnnlab import machine
from cnnlab.events import Finished
from cnnlab.launch import launcher
from cnnlab.measure.memory import bytes_sent, measure_memory
from cnnlab.measure.memory_formula import (
    PARTS,
    memory_formula,
    saved_tensor_bytes,
    state_formula,
)
from cnnlab.model import build
from cnnlab.parallel.data_parallel import local_tensor
from cnnlab.parallel.mesh import make_mesh
from cnnlab.parallel.sharding import shard_model
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import techniques

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Recipe(data="synthetic", images=64, batch_size=16, threads=1)
PARAMETERS = 4 * (16 * 28 + 32 * 145 + 10 * 2049)  # bytes of SmallCNN
BETWEEN = 4 * 16 * 16 * 16 * 16  # bytes of a batch between its convolutions, 16 channels of 16x16

STRATEGIES = {
    "one rank": {},
    "sgd, bf16": {"optimizer": "sgd", "precision": "bf16"},
    "recompute": {"model": "ResNet9", "width": 8, "recompute": True},
    "ddp": {"replicas": 2},
    "zero1": {"replicas": 2, "strategy": "zero1"},
    "fsdp": {"replicas": 2, "strategy": "fsdp"},
    "fsdp, recompute": {
        "model": "ResNet9",
        "width": 8,
        "replicas": 2,
        "strategy": "fsdp",
        "recompute": True,
    },
    "tensor": {"tensor_ranks": 2, "strategy": "tensor"},
    "gpipe": {"stages": 2, "strategy": "pipeline", "micro_batches": 4},
    "1f1b": {
        "stages": 2,
        "strategy": "pipeline",
        "micro_batches": 4,
        "pipeline_schedule": "1f1b",
    },
}

# Parameters, gradients and Adam's moments take 289 MiB.
LARGE = Recipe(
    model="VGG16",
    width=48,
    data="synthetic",
    images=32,
    batch_size=16,
    steps=2,
    warmup_steps=1,
    evaluate=False,
    threads=1,
)
# Activations take 90 MiB.
WIDE = LARGE.replace(model="SmallCNN", width=32, images=256, batch_size=256)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits CPU memory")


def test_saved_bytes_of_a_training_step_are_those_counted_by_hand():
    """SmallCNN on 8 images of 16x16, in fp32, with pooling indices of 8 bytes."""
    recipe = Recipe(data="synthetic", images=8, batch_size=8, image_size=16, optimizer="sgd")
    trainer = device.make_trainer(recipe)
    saved = saved_tensor_bytes(trainer.loss, [*trainer.network.parameters(), trainer.images])
    relu = 8 * (16 * 16 * 16 + 32 * 8 * 8)  # outputs of ReLU are inputs of the poolings
    pooled = 8 * (16 * 8 * 8 + 32 * 4 * 4)  # outputs of the poolings are inputs of the next layers
    head = 4 * 8 * 10 + 8 * 8 + 4  # log-probabilities, labels, total weight
    assert saved == 4 * relu + (4 + 8) * pooled + head


def test_shared_storage_counts_once():
    x = torch.ones(1000, requires_grad=True)
    y = torch.ones(1000, requires_grad=True)
    assert saved_tensor_bytes(lambda: x.exp() * 1.0) == 4000  # exp saves its result
    assert saved_tensor_bytes(lambda: x * y) == 8000
    assert saved_tensor_bytes(lambda: x * x) == 4000
    assert saved_tensor_bytes(lambda: x * y, [y]) == 4000


# Formulas


def test_the_formula_gives_the_table_of_the_zero_paper():
    """7.5 billion parameters, 64 ranks, Adam in mixed precision: figure 1 of arXiv 1910.02054."""
    mixed = (2, 2, 12)
    gigabytes = {
        strategy: sum(state_formula(7.5e9, 64, strategy, mixed).values()) / 1e9
        for strategy in ("ddp", "zero1", "fsdp")
    }
    assert gigabytes == pytest.approx({"ddp": 120, "zero1": 31.4, "fsdp": 1.9}, abs=0.05)


def test_adam_in_fp32_takes_16_bytes_per_parameter():
    assert list(state_formula(1).values()) == [4, 4, 8]


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_rank_holds_what_the_formula_says(name):
    recipe = SMALL.replace(**STRATEGIES[name])
    ranks = measure_memory(recipe)
    assert len(ranks) == recipe.ranks
    for rank, measured in enumerate(ranks):
        formula = memory_formula(recipe, rank)
        for part in PARTS[:3]:
            # Tensor parallelism does not shard the bias of the last layer.
            assert measured[part] == pytest.approx(formula[part], rel=0.001), (rank, part)
        # A result lives until the next layer has run. Tensor parallelism gathers copies, too.
        lowest = {"tensor": 0.7, "gpipe": 0.9, "1f1b": 0.9}.get(name, 0.92)
        assert lowest < formula["activations"] / measured["activations"] <= 1.001, rank


def test_1f1b_keeps_fewer_activations_than_gpipe():
    gpipe, one_f_one_b = (
        memory_formula(SMALL.replace(**STRATEGIES[name]), rank=1)["activations"]
        for name in ("gpipe", "1f1b")
    )
    stage = memory_formula(SMALL)["activations"] / 4  # of a micro-batch in all layers
    assert 0 < gpipe - one_f_one_b < 3 * stage


def test_recomputation_keeps_one_stage_and_the_inputs_of_those_before():
    images = 4 * 16 * 3 * 32 * 32
    first_stage = 4 * BETWEEN + 2 * BETWEEN  # ReLU's results, and the pooling's indices
    formula = memory_formula(SMALL.replace(recompute=True))
    assert formula["activations"] == images + first_stage


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_a_thousand_ranks_are_measured_in_one_process(strategy):
    """A layer with 16 rows has 16 shards at most: far fewer than ranks."""
    recipe = SMALL.replace(replicas=1000, strategy=strategy, batch_size=1000, images=3000)
    [measured] = measure_memory(recipe, fake=True)
    formula = memory_formula(recipe)
    assert {part: measured[part] for part in PARTS[:3]} == {
        part: formula[part] for part in PARTS[:3]
    }
    one_row_of_each = 4 * ((27 + 1) + (144 + 1) + (2048 + 1))
    assert measured["optimizer state"] == 2 * one_row_of_each


def large_fsdp_shard(rank, world, recipe):
    """The number of parameters in the real FSDP model of rank 0, which has no values."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=recipe.replicas)
    mesh = make_mesh(recipe, torch.device("cpu"))["data"]
    with FakeTensorMode():
        network = shard_model(build(recipe, (3, 32, 10)), mesh, None)
        yield sum(local_tensor(parameter).numel() for parameter in network.parameters())


def test_fsdp_shards_7_5_billion_parameters_as_in_the_zero_paper():
    recipe = LARGE.replace(width=956, replicas=64, strategy="fsdp", batch_size=64, images=64)
    [shard] = launcher.stream(large_fsdp_shard, (recipe,), 1, backend=None)
    assert 16 * shard / 1e9 == pytest.approx(1.9, abs=0.05)


def test_fake_ranks_of_a_pipeline_are_rejected():
    with pytest.raises(CnnlabError, match="memory_formula"):
        measure_memory(SMALL.replace(strategy="pipeline", stages=2), fake=True)


def test_a_stopped_measurement_returns():
    stop = threading.Event()
    stop.set()
    assert measure_memory(SMALL, stop) == []
    assert bytes_sent(SMALL, stop) == 0


# Messages


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0),
        # With two ranks, a ring sends half of the bytes to gather, and twice that to reduce.
        ({"replicas": 2}, PARAMETERS),
        ({"replicas": 2, "compression": "bf16"}, PARAMETERS / 2),
        ({"replicas": 2, "strategy": "ring"}, PARAMETERS),
        ({"replicas": 2, "strategy": "local-sgd", "sync_every": 4}, PARAMETERS / 4),
        ({"replicas": 2, "strategy": "zero1"}, 1.5 * PARAMETERS),
        ({"replicas": 2, "strategy": "fsdp"}, 1.5 * PARAMETERS),
        # All-gathers of the channels, all-reduce of the gradient of the second convolution's
        # inputs, all-reduce of the logits, all-gather of the gradient of the features.
        (
            {"tensor_ranks": 2, "strategy": "tensor"},
            (3 * BETWEEN + 2 * BETWEEN / 2 + 2 * 4 * 16 * 10) / 2,
        ),
        ({"stages": 2, "strategy": "pipeline", "micro_batches": 4}, BETWEEN),
        (  # each replica has 8 images; the second stage averages its gradients in addition
            {"stages": 2, "replicas": 2, "strategy": "pipeline"},
            BETWEEN / 2 + PARAMETERS - 4 * 16 * 28,
        ),
    ],
)
def test_each_rank_sends_what_the_formula_of_its_strategy_says(changes, expected):
    assert bytes_sent(SMALL.replace(**changes)) == pytest.approx(expected, abs=100)


# Limits


@on_linux
@pytest.mark.parametrize(
    ("recipe", "limit", "changes"),
    [
        (LARGE, 330, {"replicas": 2, "strategy": "fsdp"}),
        (LARGE, 330, {"tensor_ranks": 2, "strategy": "tensor"}),
        (WIDE, 95, STRATEGIES["1f1b"]),
        (WIDE, 95, {"replicas": 2}),
    ],
    ids=["fsdp", "tensor", "pipeline", "ddp"],
)
def test_a_model_that_does_not_fit_on_one_rank_trains_on_two(recipe, limit, changes):
    limited = recipe.replace(memory_limit_mib=limit)
    with pytest.raises(CnnlabError, match=f"memory_limit_mib={limit} on a rank.*fsdp"):
        list(cnnlab.run(limited))
    events = list(cnnlab.run(limited.replace(**changes)))
    assert sum(isinstance(event, Finished) for event in events) == 2


@on_linux
def test_a_run_within_its_limit_is_not_changed_by_it():
    def losses(recipe):
        return [loss for event in cnnlab.run(recipe) for loss in getattr(event, "losses", [])]

    recipe = SMALL.replace(steps=3, warmup_steps=1, evaluate=False)
    assert losses(recipe) == losses(recipe.replace(memory_limit_mib=2000))


def test_other_errors_of_a_limited_rank_stay_as_they_are():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert techniques.memory_limit_error(LARGE.replace(memory_limit_mib=1), error) is None
    assert techniques.memory_limit_error(LARGE, MemoryError()) is None


def test_the_limit_needs_a_process_of_its_own():
    with pytest.raises(CnnlabError, match="cnnlab.run"):
        list(cnnlab.train(SMALL.replace(memory_limit_mib=100)))


def test_a_system_that_cannot_limit_memory_says_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    [sentence] = machine.missing_for(Recipe(memory_limit_mib=100))
    assert "memory_limit_mib" in sentence and "Linux" in sentence
