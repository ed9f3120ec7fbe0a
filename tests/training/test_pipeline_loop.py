"""Pipeline-parallel training: the losses of one process, whatever the schedule."""

import shutil
from functools import partial

import numpy as np
import pytest
from helpers import kill_myself, train_float64

from cnnlab import plots
from cnnlab.events import Evaluated, Finished, Progress, Started
from cnnlab.launch import launcher
from cnnlab.launch.launcher import RankError, run
from cnnlab.recipe import Recipe

pytestmark = pytest.mark.usefixtures("nothing_is_left")

ONE = Recipe(batch_size=48, steps=6, warmup_steps=1, threads=1, augment="shift", schedule="cosine")
TWO = ONE.replace(strategy="pipeline", stages=2, micro_batches=4, pipeline_schedule="1f1b")
GPIPE = {"pipeline_schedule": "gpipe"}
NAIVE = ONE.replace(strategy="pipeline", stages=2)
RESNET = ONE.replace(model="ResNet9", width=4)


def only(kind, events):
    return [event for event in events if isinstance(event, kind)]


def losses(events):
    return plots.loss_curve(events)[1]


def without_dropout(rank, world, recipe):
    """`train_float64`, except that dropout does nothing: masks differ between micro-batches."""
    from torch import nn

    nn.Dropout.forward = lambda _, images: images
    yield from train_float64(rank, world, recipe)


def train(recipe, function=train_float64):
    return list(launcher.stream(function, (recipe,), recipe.ranks))


@pytest.fixture(scope="module")
def one_process():
    """{recipe: the events of its training in one process}, each trained once."""
    trained = {}

    def events(recipe, function=train_float64):
        if recipe not in trained:
            trained[recipe] = train(recipe, function)
        return trained[recipe]

    return events


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batches": 1, "pipeline_schedule": "gpipe"},
        {"pipeline_schedule": "gpipe"},
        {},
        {"stages": 3},
        {"recompute": True},
        {"replicas": 2, "micro_batches": 3},
        {"memory_format": "channels_last"},
        {"pooling": "before-relu"},
        {"loader_workers": 1},
        {"optimizer": "sgd"},
    ],
    ids=str,
)
def test_losses_and_accuracies_are_those_of_one_process(one_process, change):
    same = {name: change[name] for name in ("optimizer",) if name in change}
    expected = one_process(ONE.replace(**same))
    recipe = TWO.replace(**change)
    events = train(recipe)
    np.testing.assert_allclose(losses(events), losses(expected), atol=1e-10)
    [whole] = only(Evaluated, expected)
    tested = only(Evaluated, events)
    assert len(tested) == recipe.ranks
    for event in tested:
        assert (event.accuracy, event.images) == (whole.accuracy, 360)
        assert event.loss == pytest.approx(whole.loss, rel=1e-6)  # float32
    correct = [event.accuracy for event in only(Progress, events)]
    assert all(0 <= share <= 1 for share in correct)
    assert {event.parameters for event in only(Started, events)} == {
        only(Started, expected)[0].parameters
    }
    assert {event.images for event in only(Finished, events)} == {6 * 48}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_four_stages_train_a_deep_network_like_one_process(one_process, schedule):
    deep = ONE.replace(model="VGG16", width=2, steps=3, batch_size=32)
    changes = {"stages": 4, "micro_batches": 4, "pipeline_schedule": schedule}
    events = train(deep.replace(strategy="pipeline", **changes), without_dropout)
    expected = losses(one_process(deep, without_dropout))
    np.testing.assert_allclose(losses(events), expected, atol=1e-10)


def test_batch_norm_sees_micro_batches(one_process):
    """Without micro-batches, the losses are those of one process; with them, they differ."""
    expected = losses(one_process(RESNET))
    whole = RESNET.replace(strategy="pipeline", stages=2)
    np.testing.assert_allclose(losses(train(whole)), expected, atol=1e-10)
    recomputed = losses(train(whole.replace(recompute=True)))
    np.testing.assert_allclose(recomputed, expected, atol=1e-10)
    split = losses(train(whole.replace(micro_batches=4)))
    assert 1e-4 < max(abs(np.array(split) - expected)) < 0.5


def test_bf16_is_that_of_one_process():
    expected = losses(list(run(ONE.replace(precision="bf16"))))
    found = losses(list(run(NAIVE.replace(precision="bf16"))))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert max(abs(np.array(found) - losses(list(run(ONE))))) > 1e-4


# What the events say


def test_spans_show_each_micro_batch_and_the_bubble():
    """Between its forward and backward passes, a rank waits: exposed communication."""
    events = list(run(TWO.replace(batch_size=96, steps=8, evaluate=False)))
    for rank in range(2):
        spans = [event.spans for event in only(Progress, events) if event.rank == rank][-1]
        phases = [phase for phase, _, _ in spans]
        steps = phases.count("waiting")
        assert phases.count("backward") == 4 * steps
        assert phases.count("update") == steps
        for (_, _, end), (_, begin, _) in zip(spans, spans[1:], strict=False):
            assert begin >= end - 1e-9  # phases do not overlap
    for end in only(Finished, events):
        assert 0 < end.communication_s < end.step_s
        assert end.step_s == pytest.approx(end.compute_s + end.communication_s + end.waiting_s)


def test_recomputation_and_1f1b_need_less_memory_than_gpipe():
    """GPipe keeps the activations of all micro-batches until their backward passes."""
    gpipe = RESNET.replace(
        **{"width": 8, "data": "synthetic", "images": 256, "batch_size": 256, "steps": 2},
        **{"augment": "none", "evaluate": False, "strategy": "pipeline", "stages": 2},
        micro_batches=8,
    )

    def peak(recipe):
        return next(end.peak_memory_mib for end in only(Finished, run(recipe)) if end.rank == 0)

    most = peak(gpipe)
    assert peak(gpipe.replace(recompute=True)) < most - 30
    assert peak(gpipe.replace(pipeline_schedule="1f1b")) < most - 30


# Checkpoints and failures

KEPT = TWO.replace(steps=12, checkpoint_every=4, evaluate=False)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"stages": 3},
        {"replicas": 2},
        {"strategy": None, "stages": 1, "micro_batches": 1, "pipeline_schedule": "gpipe"},
        {"strategy": "fsdp", "replicas": 2} | {"stages": 1, "micro_batches": 1} | GPIPE,
    ],
    ids=str,
)
def test_any_number_of_ranks_resumes_what_two_stages_saved(tmp_path, change):
    whole = losses(list(run(KEPT, checkpoints=tmp_path)))
    shutil.rmtree(tmp_path / "step-00000012")
    resumed = list(run(KEPT.replace(**change), checkpoints=tmp_path))
    assert {event.first_step for event in only(Started, resumed)} == {8}
    np.testing.assert_allclose(losses(resumed), whole[8:], atol=1e-4)


def test_two_stages_resume_what_one_process_saved(tmp_path):
    alone = ONE.replace(steps=12, checkpoint_every=4, evaluate=False)
    whole = losses(list(run(alone, checkpoints=tmp_path)))
    shutil.rmtree(tmp_path / "step-00000012")
    np.testing.assert_allclose(losses(list(run(KEPT, checkpoints=tmp_path))), whole[8:], atol=1e-4)


def interrupted_pipeline(rank, world, recipe, checkpoints, victim, marks):
    """`train_rank`, except that a rank is killed in its tenth backward pass."""
    from torch.distributed.pipelining import stage

    from cnnlab.launch import worker

    run_backward, count = stage.stage_backward, 0

    def backward_or_die(*args, **options):
        nonlocal count
        count += 1
        if count == 10 and rank == victim:
            kill_myself(marks)
        return run_backward(*args, **options)

    stage.stage_backward = backward_or_die
    yield from worker.train_rank(rank, world, recipe, checkpoints)


@pytest.mark.parametrize("victim", range(3))
def test_a_killed_stage_is_named(monkeypatch, tmp_path, victim):
    killed = partial(interrupted_pipeline, victim=victim, marks=str(tmp_path / "marks"))
    monkeypatch.setattr(launcher, "train_rank", killed)
    with pytest.raises(RankError, match=f"rank {victim} failed.*killed"):
        list(run(TWO.replace(stages=3)))


def test_a_killed_stage_restarts_from_the_last_checkpoint(monkeypatch, tmp_path):
    kept = KEPT.replace(checkpoint_every=2)
    undisturbed = losses(list(run(kept)))
    killed = partial(interrupted_pipeline, victim=1, marks=str(tmp_path / "marks"))
    monkeypatch.setattr(launcher, "train_rank", killed)
    events = list(run(kept, checkpoints=tmp_path / "kept", max_restarts=1))
    assert sorted({event.first_step for event in only(Started, events)}) == [0, 2]
    np.testing.assert_allclose(losses(events), undisturbed, atol=1e-6)


def test_a_stopped_run_leaves_nothing():
    events = run(TWO.replace(stages=3, steps=10_000))
    while not isinstance(next(events), Progress):
        pass
    events.close()  # the fixture looks for what is left
