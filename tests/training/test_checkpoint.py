"""A killed run resumes where it was; a run that cannot resume says why."""

import os
import shutil
from functools import partial
from random import Random

import numpy as np
import pytest
from helpers import interrupted_train, kill_myself, train_float64

from cnnlab import cli, plots, record
from cnnlab.events import Checkpointed, Evaluated, Finished, Restarted, Started
from cnnlab.launch import launcher
from cnnlab.launch.launcher import RankError, run
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import loop
from cnnlab.training.loop import train

pytestmark = pytest.mark.usefixtures("nothing_is_left")

COSINE = Recipe(
    batch_size=72,
    steps=30,
    warmup_steps=1,
    threads=1,
    checkpoint_every=8,
    augment="shift",
    schedule="cosine",
    evaluate=False,
)
CONSTANT = COSINE.replace(schedule="constant")  # its number of steps may change
COMMAND = ["train", "--batch-size", "72", "--steps", "12", "--checkpoint-every", "5"]


def only(kind, events):
    return [event for event in events if isinstance(event, kind)]


def run_losses(recipe, checkpoints=None):
    return plots.loss_curve(list(run(recipe, checkpoints=checkpoints)))[1]


def first_steps(events):
    """The first step of each attempt of rank 0."""
    return [event.first_step for event in only(Started, events) if event.rank == 0]


@pytest.fixture
def kill_in_step(monkeypatch, tmp_path):
    """kill_in_step(step, victim, times=1) makes rank `victim` of the next runs die in a step."""

    def patch(step, victim, times=1):
        kill = partial(kill_myself, str(tmp_path / "marks"), times=times)
        killed = partial(interrupted_train, step=step, victim=victim, what=kill)
        monkeypatch.setattr(launcher, "train_rank", killed)

    return patch


@pytest.fixture
def half_way(tmp_path):
    """A folder with the checkpoints of steps 8 and 16."""
    list(run(CONSTANT.replace(steps=16), checkpoints=tmp_path))
    return tmp_path


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_resumes_from_its_last_checkpoint_with_the_same_losses(
    tmp_path, kill_in_step, world
):
    recipe = COSINE.replace(replicas=world)
    undisturbed = run_losses(recipe)
    kill_in_step(21, victim=world - 1)
    resumed = run(recipe, checkpoints=tmp_path / "kept", max_restarts=1)
    events = list(record.save(tmp_path / "run.jsonl", resumed, {"versions": {}}))
    [restarted] = only(Restarted, events)
    assert restarted.rank == world - 1
    assert "killed" in restarted.error
    assert first_steps(events) == [0, 16]  # of 20 steps, 4 are lost
    np.testing.assert_allclose(plots.loss_curve(events)[1], undisturbed, atol=1e-6)
    loaded = record.load(tmp_path / "run.jsonl")
    assert not loaded.truncated
    assert [type(event) for event in loaded.events] == [type(event) for event in events]


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_the_same_whichever_rank_is_killed_in_whichever_step(
    tmp_path, kill_in_step, seed
):
    random = Random(seed)
    strategy = ("ddp", "ring", "ring")[seed]
    every = random.randint(2, 6)
    recipe = COSINE.replace(replicas=3, strategy=strategy, steps=20, checkpoint_every=every)
    undisturbed = run_losses(recipe)
    step, victim = random.randint(1, 20), random.randrange(3)
    kill_in_step(step, victim)
    events = list(run(recipe, checkpoints=tmp_path / "kept", max_restarts=1))
    [restarted] = only(Restarted, events)
    assert (restarted.rank, restarted.attempt) == (victim, 1)
    assert first_steps(events)[-1] == (step - 1) // every * every
    np.testing.assert_allclose(plots.loss_curve(events)[1], undisturbed, atol=1e-6)
    assert len(only(Finished, events)) == 3


def killed_while_saving(rank, world, recipe, checkpoints, marks):
    """Rank 0 dies when all parts are written, before the checkpoint gets its name."""
    replace = os.replace

    def die_or_replace(*names):
        kill_myself(marks, times=2 if recipe.steps == 30 else 0)
        replace(*names)

    os.replace = die_or_replace
    yield from train(recipe, rank, world, checkpoints)


def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(tmp_path, monkeypatch):
    recipe, kept = CONSTANT.replace(replicas=2), tmp_path / "kept"
    undisturbed = run_losses(recipe)
    list(run(recipe.replace(steps=8), checkpoints=kept))
    killed = partial(killed_while_saving, marks=str(tmp_path / "marks"))
    monkeypatch.setattr(launcher, "train_rank", killed)
    events = list(run(recipe, checkpoints=kept, max_restarts=2))
    assert first_steps(events) == [8, 8, 8]
    np.testing.assert_allclose(plots.loss_curve(events)[1], undisturbed[8:], atol=1e-6)
    assert sorted(path.name for path in kept.iterdir()) == ["step-00000016", "step-00000024"]


def killed_while_evaluating(rank, world, recipe, checkpoints, marks):
    """The last rank dies after the last step and its checkpoint."""
    evaluate = loop.evaluate

    def die_or_evaluate(*args):
        if rank == world - 1:
            kill_myself(marks)
        return evaluate(*args)

    loop.evaluate = die_or_evaluate
    yield from loop.train(recipe, rank, world, checkpoints)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_after_its_last_checkpoint_only_evaluates(tmp_path, monkeypatch, world):
    recipe = COSINE.replace(replicas=world, steps=16, evaluate=True)
    accuracy = list(run(recipe))[-1].accuracy
    killed = partial(killed_while_evaluating, marks=str(tmp_path / "marks"))
    monkeypatch.setattr(launcher, "train_rank", killed)
    resumed = run(recipe, checkpoints=tmp_path / "kept", max_restarts=1)
    events = list(record.save(tmp_path / "run.jsonl", resumed, {"versions": {}}))
    assert first_steps(events) == [0, 16]
    assert {event.accuracy for event in only(Finished, events)} == {accuracy}
    assert len(plots.loss_curve(events)[1]) == 16
    assert record.load(tmp_path / "run.jsonl").events == events
    with pytest.raises(CnnlabError, match="asks for no more"):  # a new run, not a restart
        list(run(recipe, checkpoints=tmp_path / "kept"))


def test_without_checkpoints_a_run_restarts_from_its_first_step(kill_in_step):
    kill_in_step(9, victim=0)
    events = list(run(COSINE, max_restarts=1))
    assert first_steps(events) == [0, 0]
    assert isinstance(events[-1], Finished)


def test_a_run_restarts_at_most_as_often_as_allowed(kill_in_step):
    kill_in_step(3, victim=0, times=9)
    seen = []
    with pytest.raises(RankError, match="rank 0 failed"):
        for event in run(COSINE, max_restarts=2):
            seen.append(event)
    assert [event.attempt for event in only(Restarted, seen)] == [1, 2]


@pytest.mark.parametrize("fewer", [2, 1])
def test_fewer_ranks_resume_what_four_ranks_saved(tmp_path, fewer):
    whole = run_losses(CONSTANT)
    first = list(run(CONSTANT.replace(replicas=4, steps=16), checkpoints=tmp_path))
    assert [event.step for event in only(Checkpointed, first) if event.rank == 0] == [8, 16]
    rest = run_losses(CONSTANT.replace(replicas=fewer), tmp_path)
    np.testing.assert_allclose(rest, whole[16:], atol=1e-3)  # Adam amplifies rounding


def test_more_ranks_resume_what_one_rank_saved(tmp_path):
    whole = run_losses(CONSTANT)
    list(run(CONSTANT.replace(steps=16), checkpoints=tmp_path))
    rest = run_losses(CONSTANT.replace(replicas=3), tmp_path)
    np.testing.assert_allclose(rest, whole[16:], atol=1e-3)


SHARDED = {
    "one process": {},
    "ddp": {"replicas": 2},
    "zero1": {"strategy": "zero1", "replicas": 4},
    "fsdp": {"strategy": "fsdp", "replicas": 3},
    "tensor": {"strategy": "tensor", "tensor_ranks": 2, "replicas": 2},
    "pipeline": {"strategy": "pipeline", "stages": 3, "micro_batches": 2},
}


def float64_losses(recipe, checkpoints=None):
    stream = launcher.stream(train_float64, (recipe, checkpoints), recipe.ranks)
    return plots.loss_curve(list(stream))[1]


@pytest.fixture(scope="module")
def whole():
    """The losses of one process that is not interrupted."""
    return float64_losses(CONSTANT.replace(steps=12))


@pytest.mark.parametrize("saved", SHARDED)
def test_any_strategy_and_number_of_ranks_resumes_what_another_saved(tmp_path, whole, saved):
    """Parameters and optimizer state; equal up to rounding."""
    recipe = CONSTANT.replace(steps=12)
    names = list(SHARDED)
    number = names.index(saved)
    loaded = {"one process", saved, names[number - 1]}
    float64_losses(recipe.replace(steps=8, **SHARDED[saved]), str(tmp_path / "saved"))
    for name in sorted(loaded):
        shutil.copytree(tmp_path / "saved", tmp_path / name)
        rest = float64_losses(recipe.replace(**SHARDED[name]), str(tmp_path / name))
        np.testing.assert_allclose(rest, whole[8:], rtol=1e-10, err_msg=f"{saved} -> {name}")


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_a_killed_rank_with_shards_resumes_with_the_same_losses(tmp_path, kill_in_step, strategy):
    recipe = COSINE.replace(replicas=2, strategy=strategy, optimizer="sgd", steps=20)
    undisturbed = run_losses(recipe)
    kill_in_step(11, victim=1)
    events = list(run(recipe, checkpoints=tmp_path / "kept", max_restarts=1))
    assert first_steps(events) == [0, 8]
    np.testing.assert_allclose(plots.loss_curve(events)[1], undisturbed, atol=1e-6)


@pytest.mark.parametrize("left, timed", [(1, 1), (2, 2), (3, 1)])
def test_a_run_that_resumes_for_its_warm_up_only_reports_figures_too(tmp_path, left, timed):
    recipe = CONSTANT.replace(warmup_steps=2, evaluate=True)
    list(run(recipe.replace(steps=8), checkpoints=tmp_path))
    end = list(run(recipe.replace(steps=8 + left), checkpoints=tmp_path))[-1]
    assert end.steps == 8 + left
    assert end.images_per_s > 0
    assert end.seconds == pytest.approx(end.warmup_s + timed * end.step_s)


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_draws_the_same_dropout_masks(tmp_path, world):
    recipe = COSINE.replace(
        model="VGG16",
        width=2,
        batch_size=32,
        steps=12,
        checkpoint_every=6,
        schedule="constant",
        replicas=world,
    )
    whole = run_losses(recipe)
    list(run(recipe.replace(steps=6), checkpoints=tmp_path))
    np.testing.assert_allclose(run_losses(recipe, tmp_path), whole[6:], atol=1e-6)


def test_the_batch_norm_statistics_of_rank_0_are_saved(tmp_path):
    """With the ring strategy, statistics differ between ranks; evaluation takes rank 0's."""
    recipe = Recipe(
        model="ResNet9",
        width=4,
        batch_size=32,
        steps=12,
        warmup_steps=1,
        threads=1,
        checkpoint_every=10,
        learning_rate=0.03,
        replicas=2,
        strategy="ring",
    )
    expected = only(Evaluated, run(recipe))[0].loss
    list(run(recipe.replace(steps=10, evaluate=False), checkpoints=tmp_path))
    resumed = only(Evaluated, run(recipe, checkpoints=tmp_path))
    assert [event.loss for event in resumed] == pytest.approx([expected] * 2, rel=1e-6)


def test_an_interrupted_checkpoint_is_skipped(half_way):
    (half_way / "step-00000024.part").mkdir()
    events = list(run(CONSTANT, checkpoints=half_way))
    assert first_steps(events) == [16]
    assert isinstance(events[-1], Finished)


def test_only_the_newest_checkpoints_are_kept(half_way):
    list(run(CONSTANT, checkpoints=half_way))
    assert sorted(path.name for path in half_way.iterdir()) == ["step-00000016", "step-00000024"]


def overwrite(path):
    path.write_bytes(b"\0" * 10)


def delete(path):
    path.unlink()


@pytest.mark.parametrize("part", ["*.distcp", ".metadata", "recipe.json"])
@pytest.mark.parametrize("damage", [overwrite, delete])
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_resumes(half_way, part, damage):
    newest = half_way / "step-00000016"
    for path in newest.glob(part):
        damage(path)
    said = "step-00000016 cannot be loaded.*move it out of .* resumes from step-00000008"
    with pytest.raises(CnnlabError, match=said) as caught:
        list(train(CONSTANT, checkpoints=str(half_way)))
    assert len(str(caught.value).splitlines()) == 1
    shutil.rmtree(newest)
    assert next(train(CONSTANT, checkpoints=str(half_way))).first_step == 8


def test_the_only_checkpoint_is_not_given_up(half_way):
    shutil.rmtree(half_way / "step-00000008")
    (half_way / "step-00000016" / ".metadata").unlink()
    with pytest.raises(CnnlabError, match="No such file.*another folder.*has no older") as caught:
        next(train(CONSTANT, checkpoints=str(half_way)))
    assert "move it" not in str(caught.value)


TECHNIQUES = {
    "precision": "fp16",
    "memory_format": "channels_last",
    "pooling": "before-relu",
    "accumulate": 2,
    "loader": "device",
    "fused_optimizer": True,
    "threads": 2,
}


@pytest.mark.parametrize("name, value", TECHNIQUES.items())
def test_a_technique_may_change_when_a_run_resumes(tmp_path, name, value):
    plain, changed = CONSTANT.replace(steps=8), CONSTANT.replace(**{name: value}, steps=10)
    list(train(plain, checkpoints=str(tmp_path / "plain")))
    assert next(train(changed, checkpoints=str(tmp_path / "plain"))).first_step == 8
    list(train(changed.replace(steps=8), checkpoints=str(tmp_path / "changed")))
    assert (
        next(train(plain.replace(steps=10), checkpoints=str(tmp_path / "changed"))).first_step == 8
    )


OTHER_VALUES = {
    "batch_size": 36,
    "width": 4,
    "model": "ResNet9",
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "schedule": "cosine",
    "seed": 1,
    "augment": "none",
}


@pytest.mark.parametrize("name, value", OTHER_VALUES.items())
def test_a_checkpoint_of_another_recipe_is_rejected(half_way, name, value):
    change = f"of another recipe.*{name}={getattr(CONSTANT, name)}, now {value}"
    with pytest.raises(CnnlabError, match=change):
        next(train(CONSTANT.replace(**{name: value}), checkpoints=str(half_way)))


def test_a_checkpoint_that_two_ranks_cannot_load_is_rejected(half_way):
    (half_way / "step-00000016" / ".metadata").unlink()
    with pytest.raises(CnnlabError, match="step-00000016 cannot be loaded"):
        list(run(CONSTANT.replace(replicas=2), checkpoints=half_way))


@pytest.mark.parametrize("change", [{"steps": 40}, {"steps": None, "epochs": 2}], ids=str)
def test_a_cosine_schedule_does_not_resume_with_another_number_of_steps(tmp_path, change):
    list(run(COSINE.replace(steps=16), checkpoints=tmp_path))
    with pytest.raises(CnnlabError, match="of another recipe.*steps=16, now"):
        next(train(COSINE.replace(**change), checkpoints=str(tmp_path)))


@pytest.mark.parametrize("world", [1, 2])
def test_a_folder_that_vanishes_during_the_run_is_reported(tmp_path, world):
    folder = tmp_path / "kept"
    with pytest.raises(CnnlabError, match="cannot write .*kept: Not a directory"):
        for event in run(CONSTANT.replace(replicas=world), checkpoints=folder):
            if isinstance(event, Started) and folder.is_dir():
                folder.rmdir()
                folder.write_text("in the way")


def test_a_run_that_is_already_done_is_rejected(half_way):
    with pytest.raises(CnnlabError, match="has done 16 steps.*Raise epochs or steps"):
        list(run(CONSTANT.replace(steps=16), checkpoints=half_way))


@pytest.mark.parametrize("strategy", ["async", "local-sgd"])
def test_strategies_whose_ranks_differ_do_not_support_checkpoints(tmp_path, strategy):
    recipe = CONSTANT.replace(replicas=2, strategy=strategy)
    with pytest.raises(CnnlabError, match=f"{strategy}.*does not support checkpoints"):
        list(run(recipe, checkpoints=tmp_path))


def test_a_folder_that_cannot_be_written_is_rejected_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CnnlabError, match="cannot write .*file: File exists"):
        list(run(CONSTANT, checkpoints=tmp_path / "file"))


def test_a_folder_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    list(run(CONSTANT.replace(steps=8), checkpoints="~/kept"))
    assert [path.name for path in (tmp_path / "home" / "kept").iterdir()] == ["step-00000008"]
    assert not (tmp_path / "~").exists()


def test_the_command_line_resumes(tmp_path, capsys):
    words = [*COMMAND, "--checkpoint", str(tmp_path)]
    assert cli.main(words) == 0
    assert "step    10: checkpoint written" in capsys.readouterr().out
    assert cli.main(words) == 0
    assert "resuming from the checkpoint of step 10" in capsys.readouterr().out
    assert cli.main([*words, "--max-restarts", "-1"]) == 2
    assert "max_restarts=-1" in capsys.readouterr().err


@pytest.mark.parametrize("restarts, code", [(1, 0), (0, 1)])
def test_the_command_line_restarts_as_often_as_allowed(
    tmp_path, capsys, kill_in_step, restarts, code
):
    kill_in_step(8, victim=1)
    words = [*COMMAND, "--replicas", "2", "--checkpoint", str(tmp_path / "kept")]
    assert cli.main([*words, "--max-restarts", str(restarts)]) == code
    said, error = capsys.readouterr()
    if restarts:
        assert "rank 1 failed: the process was killed. Restart 1 of all ranks" in said
        assert "resuming from the checkpoint of step 5" in said
    else:
        assert "rank 1 failed: the process was killed" in error
        assert "Restart" not in said
