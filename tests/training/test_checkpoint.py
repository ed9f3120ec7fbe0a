"""A run that was killed goes on where it was; what cannot go on says why."""

import os
import shutil
from functools import partial
from random import Random

import numpy as np
import pytest
from helpers import interrupted_train, kill_myself

from cnnlab import cli, plots, record
from cnnlab.events import Checkpointed, Evaluated, Finished, Restarted, Started
from cnnlab.launch import launcher
from cnnlab.launch.launcher import RankError, run
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.training import loop
from cnnlab.training.loop import train

pytestmark = pytest.mark.usefixtures("nothing_is_left")

KEPT = Recipe(
    batch_size=72,
    steps=30,
    warmup_steps=1,
    threads=1,
    checkpoint_every=8,
    augment="shift",
    schedule="cosine",
    evaluate=False,
)
STEADY = KEPT.replace(schedule="constant")  # may be made longer


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_goes_on_from_its_last_checkpoint_as_if_nothing_had_been(
    tmp_path, monkeypatch, world
):
    recipe = KEPT.replace(replicas=world)
    undisturbed = plots.loss_curve(list(run(recipe)))[1]
    killed = partial(
        interrupted_train,
        step=21,
        victim=world - 1,
        what=partial(kill_myself, str(tmp_path / "marks")),
    )
    monkeypatch.setattr(launcher, "train_rank", killed)
    events = list(
        record.save(
            tmp_path / "run.jsonl",
            run(recipe, checkpoints=tmp_path / "kept", max_restarts=1),
            {"versions": {}},
        )
    )
    (restarted,) = [event for event in events if isinstance(event, Restarted)]
    assert restarted.rank == world - 1 and "killed" in restarted.error
    assert [
        event.first_step for event in events if isinstance(event, Started) and event.rank == 0
    ] == [0, 16]  # of 20 steps, 4 are lost
    np.testing.assert_allclose(plots.loss_curve(events)[1], undisturbed, atol=1e-6)
    loaded = record.load(tmp_path / "run.jsonl")
    assert not loaded.truncated and [type(event) for event in loaded.events] == [
        type(event) for event in events
    ]


@pytest.mark.parametrize("seed", range(3))
def test_whichever_rank_is_killed_at_whichever_step_the_losses_are_the_same(
    tmp_path, monkeypatch, seed
):
    random = Random(seed)
    recipe = KEPT.replace(
        replicas=3,
        strategy=("ddp", "ring", "ring")[seed],
        steps=20,
        checkpoint_every=random.randint(2, 6),
    )
    undisturbed = plots.loss_curve(list(run(recipe)))[1]
    step, victim = random.randint(1, 20), random.randrange(3)
    monkeypatch.setattr(
        launcher,
        "train_rank",
        partial(
            interrupted_train,
            step=step,
            victim=victim,
            what=partial(kill_myself, str(tmp_path / "marks")),
        ),
    )
    events = list(run(recipe, checkpoints=tmp_path / "kept", max_restarts=1))
    [restarted] = [event for event in events if isinstance(event, Restarted)]
    second = [event for event in events if isinstance(event, Started)][-1]
    assert restarted.rank == victim and restarted.attempt == 1
    assert (
        second.first_step == (step - 1) // recipe.checkpoint_every * recipe.checkpoint_every
    )  # less than that many steps are lost
    np.testing.assert_allclose(plots.loss_curve(events)[1], undisturbed, atol=1e-6)
    assert len([event for event in events if isinstance(event, Finished)]) == 3


def killed_while_saving(rank, world, recipe, checkpoints, marks):
    """Rank 0 dies when all parts are written, and the whole has not got its name."""
    replace = os.replace
    os.replace = lambda *names: (
        kill_myself(marks, 2 if recipe.steps == 30 else 0) or replace(*names)
    )
    yield from train(recipe, rank, world, checkpoints)


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch):
    recipe, kept = STEADY.replace(replicas=2), tmp_path / "kept"
    undisturbed = plots.loss_curve(list(run(recipe)))[1]
    list(run(recipe.replace(steps=8), checkpoints=kept))
    monkeypatch.setattr(
        launcher, "train_rank", partial(killed_while_saving, marks=str(tmp_path / "marks"))
    )
    events = list(run(recipe, checkpoints=kept, max_restarts=2))
    assert [
        event.first_step for event in events if isinstance(event, Started) and event.rank == 0
    ] == [8, 8, 8]
    np.testing.assert_allclose(plots.loss_curve(events)[1], undisturbed[8:], atol=1e-6)
    assert sorted(path.name for path in kept.iterdir()) == ["step-00000016", "step-00000024"]


def killed_while_evaluating(rank, world, recipe, checkpoints, marks):
    """The last rank dies after the last step and its checkpoint."""

    evaluate = loop.evaluate
    loop.evaluate = lambda *args: rank == world - 1 and kill_myself(marks) or evaluate(*args)
    yield from loop.train(recipe, rank, world, checkpoints)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_after_its_last_checkpoint_is_only_evaluated(tmp_path, monkeypatch, world):
    recipe = KEPT.replace(replicas=world, steps=16, evaluate=True)
    accuracy = list(run(recipe))[-1].accuracy
    monkeypatch.setattr(
        launcher, "train_rank", partial(killed_while_evaluating, marks=str(tmp_path / "marks"))
    )
    events = list(
        record.save(
            tmp_path / "run.jsonl",
            run(recipe, checkpoints=tmp_path / "kept", max_restarts=1),
            {"versions": {}},
        )
    )
    assert [
        event.first_step for event in events if isinstance(event, Started) and event.rank == 0
    ] == [0, 16]
    assert {event.accuracy for event in events if isinstance(event, Finished)} == {
        accuracy
    } and len(plots.loss_curve(events)[1]) == 16
    assert record.load(tmp_path / "run.jsonl").events == events
    with pytest.raises(CnnlabError, match="asks for no more"):  # whoever asks for it anew is told
        list(run(recipe, checkpoints=tmp_path / "kept"))


def test_without_checkpoints_a_run_starts_anew_from_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(
        launcher,
        "train_rank",
        partial(
            interrupted_train, step=9, victim=0, what=partial(kill_myself, str(tmp_path / "marks"))
        ),
    )
    events = list(run(KEPT, max_restarts=1))
    assert [event.first_step for event in events if isinstance(event, Started)] == [
        0,
        0,
    ] and isinstance(events[-1], Finished)


def test_restarts_come_to_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(
        launcher,
        "train_rank",
        partial(
            interrupted_train,
            step=3,
            victim=0,
            what=partial(kill_myself, str(tmp_path / "marks"), times=9),
        ),
    )
    seen = []
    with pytest.raises(RankError, match="rank 0 failed"):
        for event in run(KEPT, max_restarts=2):
            seen.append(event)
    assert [event.attempt for event in seen if isinstance(event, Restarted)] == [1, 2]


@pytest.mark.parametrize("fewer", [2, 1])
def test_four_ranks_save_and_fewer_go_on(tmp_path, fewer):
    recipe = STEADY
    whole = plots.loss_curve(list(run(recipe)))[1]
    first = list(run(recipe.replace(replicas=4, steps=16), checkpoints=tmp_path))
    assert [
        event.step for event in first if isinstance(event, Checkpointed) and event.rank == 0
    ] == [8, 16]
    rest = plots.loss_curve(list(run(recipe.replace(replicas=fewer), checkpoints=tmp_path)))[1]
    np.testing.assert_allclose(rest, whole[16:], atol=1e-3)  # Adam makes more of rounding than SGD


def test_ranks_that_were_not_there_before_join_in(tmp_path):
    recipe = STEADY
    whole = plots.loss_curve(list(run(recipe)))[1]
    list(run(recipe.replace(steps=16), checkpoints=tmp_path))
    np.testing.assert_allclose(
        plots.loss_curve(list(run(recipe.replace(replicas=3), checkpoints=tmp_path)))[1],
        whole[16:],
        atol=1e-3,
    )


@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_run_that_goes_on_for_its_warm_up_only_has_figures_too(tmp_path, left):
    recipe = STEADY.replace(warmup_steps=2, evaluate=True)
    list(run(recipe.replace(steps=8), checkpoints=tmp_path))
    end = list(run(recipe.replace(steps=8 + left), checkpoints=tmp_path))[-1]
    assert (
        end.steps == 8 + left
        and end.images_per_s > 0
        and end.seconds == pytest.approx(end.warmup_s + (1 if left == 3 else left) * end.step_s)
    )


@pytest.mark.parametrize("world", [1, 2])
def test_dropout_goes_on_with_the_numbers_that_it_would_have_drawn(tmp_path, world):
    recipe = Recipe(
        model="VGG16",
        width=2,
        batch_size=32,
        steps=12,
        warmup_steps=1,
        threads=1,
        checkpoint_every=6,
        evaluate=False,
        augment="shift",
        replicas=world,
    )
    whole = plots.loss_curve(list(run(recipe)))[1]
    list(run(recipe.replace(steps=6), checkpoints=tmp_path))
    np.testing.assert_allclose(
        plots.loss_curve(list(run(recipe, checkpoints=tmp_path)))[1], whole[6:], atol=1e-6
    )


def test_the_batch_norm_statistics_of_rank_0_are_kept(tmp_path):
    """Under ring each rank has its own; rank 0's are what evaluation takes."""
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
    [whole, *_] = [event.loss for event in run(recipe) if isinstance(event, Evaluated)]
    list(run(recipe.replace(steps=10, evaluate=False), checkpoints=tmp_path))
    assert [
        event.loss for event in run(recipe, checkpoints=tmp_path) if isinstance(event, Evaluated)
    ] == pytest.approx([whole] * 2, rel=1e-6)


@pytest.fixture
def half_way(tmp_path):
    list(run(STEADY.replace(steps=16), checkpoints=tmp_path))
    return tmp_path


def test_a_checkpoint_that_was_interrupted_is_passed_over(half_way):
    (half_way / "step-00000024.part").mkdir()
    assert started(STEADY, half_way).first_step == 16


def test_only_the_newest_checkpoints_are_kept(half_way):
    list(run(STEADY, checkpoints=half_way))
    assert sorted(path.name for path in half_way.iterdir()) == ["step-00000016", "step-00000024"]


@pytest.mark.parametrize("part", ["*.distcp", ".metadata", "recipe.json"])
@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(b"\0" * 10), lambda path: path.unlink()],
    ids=["garbage", "missing"],
)
def test_a_damaged_checkpoint_is_refused_and_named_and_without_it_the_run_goes_on(
    half_way, part, damage
):
    newest = half_way / "step-00000016"
    for path in newest.glob(part):
        damage(path)
    with pytest.raises(CnnlabError, match="step-00000016 cannot be loaded.*Delete it") as refused:
        list(train(STEADY, checkpoints=str(half_way)))
    assert len(str(refused.value).splitlines()) == 1
    shutil.rmtree(newest)
    assert next(train(STEADY, checkpoints=str(half_way))).first_step == 8


OTHERS = {
    "batch_size": 36,
    "width": 4,
    "model": "ResNet9",
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "schedule": "cosine",
    "seed": 1,
    "augment": "none",
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_recipes_checkpoint_is_refused(half_way, name):
    with pytest.raises(
        CnnlabError, match=f"of another recipe.*{name}={getattr(STEADY, name)}, now {OTHERS[name]}"
    ):
        next(train(STEADY.replace(**{name: OTHERS[name]}), checkpoints=str(half_way)))


def test_what_two_ranks_cannot_load_is_refused_in_one_sentence(half_way):
    (half_way / "step-00000016" / ".metadata").unlink()
    with pytest.raises(CnnlabError, match="step-00000016 cannot be loaded"):
        list(run(STEADY.replace(replicas=2), checkpoints=half_way))


@pytest.mark.parametrize("change", [{"steps": 40}, {"steps": None, "epochs": 2}], ids=str)
def test_a_learning_rate_that_came_down_with_the_steps_does_not_go_on_to_others(tmp_path, change):
    list(run(KEPT.replace(steps=16), checkpoints=tmp_path))
    with pytest.raises(CnnlabError, match="of another recipe.*steps=16, now"):
        next(train(KEPT.replace(**change), checkpoints=str(tmp_path)))


@pytest.mark.parametrize("world", [1, 2])
def test_a_folder_that_is_gone_in_the_middle_is_refused(tmp_path, world):
    folder = tmp_path / "kept"
    with pytest.raises(CnnlabError, match="cannot write checkpoints to .*kept.*Not a directory"):
        for event in run(STEADY.replace(replicas=world), checkpoints=folder):
            if isinstance(event, Started) and folder.is_dir():
                folder.rmdir()
                folder.write_text("in the way")


def test_a_run_that_is_done_already_is_refused(half_way):
    with pytest.raises(CnnlabError, match="has done 16 steps.*raise epochs or steps"):
        list(run(STEADY.replace(steps=16), checkpoints=half_way))


@pytest.mark.parametrize("strategy", ["async", "local-sgd"])
def test_ranks_that_differ_keep_no_checkpoints(tmp_path, strategy):
    with pytest.raises(CnnlabError, match=f"{strategy}.*keeps no checkpoints"):
        list(
            run(
                STEADY.replace(replicas=2, strategy=strategy, schedule="constant"),
                checkpoints=tmp_path,
            )
        )


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CnnlabError, match="cannot write checkpoints"):
        list(run(STEADY, checkpoints=tmp_path / "file"))


def test_the_command_line_goes_on_too(tmp_path, capsys):
    words = [
        "train",
        "--batch-size",
        "72",
        "--steps",
        "12",
        "--checkpoint-every",
        "5",
        "--checkpoint",
        str(tmp_path),
    ]
    assert cli.main(words) == 0 and "step    10: checkpoint written" in capsys.readouterr().out
    assert (
        cli.main(words) == 0 and "resuming from the checkpoint of step 10" in capsys.readouterr().out
    )
    assert (
        cli.main([*words, "--max-restarts", "-1"]) == 2
        and "max_restarts=-1" in capsys.readouterr().err
    )


@pytest.mark.parametrize("restarts, code", [(1, 0), (0, 1)])
def test_the_command_line_starts_anew_as_often_as_it_may(
    tmp_path, capsys, monkeypatch, restarts, code
):
    monkeypatch.setattr(
        launcher,
        "train_rank",
        partial(
            interrupted_train, step=8, victim=1, what=partial(kill_myself, str(tmp_path / "marks"))
        ),
    )
    words = [
        "train",
        "--batch-size",
        "72",
        "--steps",
        "12",
        "--replicas",
        "2",
        "--checkpoint-every",
        "5",
        "--checkpoint",
        str(tmp_path / "kept"),
    ]
    assert cli.main([*words, "--max-restarts", str(restarts)]) == code
    said, error = capsys.readouterr()
    if restarts:
        assert (
            "rank 1 failed: the process was killed. Restart 1 of all ranks" in said
            and "resuming from the checkpoint of step 5" in said
        )
    else:
        assert "rank 1 failed: the process was killed" in error and "Restart" not in said


def started(recipe, folder):
    events = list(run(recipe, checkpoints=folder))
    assert any(isinstance(event, Finished) for event in events)
    return next(event for event in events if isinstance(event, Started))
