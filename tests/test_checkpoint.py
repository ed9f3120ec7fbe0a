"""A run that was killed goes on where it was; what cannot go on says why."""

from functools import partial

import numpy as np
import pytest
from conftest import interrupted_train, kill_myself

from cnnlab import __main__, launch, plot, record
from cnnlab.events import Checkpointed, Finished, Restarted, Started
from cnnlab.launch import RankError, run
from cnnlab.recipe import Recipe, Refused

KEPT = Recipe(batch_size=72, steps=30, warmup_steps=1, threads=1, checkpoint_every=8, augment="shift", schedule="cosine", evaluate=False)


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_goes_on_from_its_last_checkpoint_as_if_nothing_had_been(tmp_path, monkeypatch, world):
    recipe = KEPT.but(replicas=world)
    undisturbed = plot.losses_of(list(run(recipe)))[1]
    killed = partial(interrupted_train, step=21, victim=world - 1, what=partial(kill_myself, str(tmp_path / "marks")))
    monkeypatch.setattr(launch, "train_rank", killed)
    events = list(record.save(tmp_path / "run.jsonl", run(recipe, checkpoints=tmp_path / "kept", max_restarts=1), {"versions": {}}))
    restarted, = [event for event in events if isinstance(event, Restarted)]
    assert restarted.rank == world - 1 and "killed" in restarted.error
    assert [event.first_step for event in events if isinstance(event, Started) and event.rank == 0] == [0, 16]      # of 20 steps, 4 are lost
    np.testing.assert_allclose(plot.losses_of(events)[1], undisturbed, atol=1e-6)
    loaded = record.load(tmp_path / "run.jsonl")
    assert not loaded.truncated and [type(event) for event in loaded.events] == [type(event) for event in events]


def test_restarts_come_to_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "train_rank", partial(interrupted_train, step=3, victim=0, what=partial(kill_myself, str(tmp_path / "marks"), times=9)))
    seen = []
    with pytest.raises(RankError, match="rank 0 failed"):
        for event in run(KEPT, max_restarts=2):
            seen.append(event)
    assert [event.attempt for event in seen if isinstance(event, Restarted)] == [1, 2]


@pytest.mark.parametrize("fewer", [2, 1])
def test_four_ranks_save_and_fewer_go_on(tmp_path, fewer):
    recipe = KEPT.but(schedule="constant")
    whole = plot.losses_of(list(run(recipe)))[1]
    first = list(run(recipe.but(replicas=4, steps=16), checkpoints=tmp_path))
    assert [event.step for event in first if isinstance(event, Checkpointed) and event.rank == 0] == [8, 16]
    rest = plot.losses_of(list(run(recipe.but(replicas=fewer), checkpoints=tmp_path)))[1]
    np.testing.assert_allclose(rest, whole[16:], atol=1e-3)          # Adam makes more of rounding than SGD


def test_dropout_goes_on_with_the_numbers_that_it_would_have_drawn(tmp_path):
    recipe = Recipe(model="VGG16", width=2, batch_size=32, steps=12, warmup_steps=1, threads=1, checkpoint_every=6, evaluate=False)
    whole = plot.losses_of(list(run(recipe)))[1]
    list(run(recipe.but(steps=6), checkpoints=tmp_path))
    np.testing.assert_allclose(plot.losses_of(list(run(recipe, checkpoints=tmp_path)))[1], whole[6:], atol=1e-6)


@pytest.fixture
def half_way(tmp_path):
    list(run(KEPT.but(steps=16), checkpoints=tmp_path))
    return tmp_path


def test_a_checkpoint_that_was_interrupted_is_passed_over(half_way):
    (half_way / "step-00000024.part").mkdir()
    assert started(KEPT, half_way).first_step == 16


def test_only_the_newest_checkpoints_are_kept(half_way):
    list(run(KEPT, checkpoints=half_way))
    assert sorted(path.name for path in half_way.iterdir()) == ["step-00000016", "step-00000024"]


def test_a_damaged_checkpoint_is_refused_and_named(half_way):
    for path in (half_way / "step-00000016").glob("*.distcp"):
        path.write_bytes(b"\0" * 10)
    with pytest.raises(Refused, match="step-00000016 cannot be loaded.*Delete it"):
        list(run(KEPT, checkpoints=half_way))


def test_another_recipes_checkpoint_is_refused(half_way):
    with pytest.raises(Refused, match="of another recipe.*batch_size=72, now 36"):
        list(run(KEPT.but(batch_size=36), checkpoints=half_way))


def test_a_run_that_is_done_already_is_refused(half_way):
    with pytest.raises(Refused, match="has done 16 steps.*raise epochs or steps"):
        list(run(KEPT.but(steps=16), checkpoints=half_way))


@pytest.mark.parametrize("strategy", ["async", "local-sgd"])
def test_ranks_that_differ_keep_no_checkpoints(tmp_path, strategy):
    with pytest.raises(Refused, match=f"{strategy}.*keeps no checkpoints"):
        list(run(KEPT.but(replicas=2, strategy=strategy, schedule="constant"), checkpoints=tmp_path))


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot write checkpoints"):
        list(run(KEPT, checkpoints=tmp_path / "file"))


def test_the_command_line_goes_on_too(tmp_path, capsys):
    words = ["train", "--batch-size", "72", "--steps", "12", "--checkpoint-every", "5", "--checkpoint", str(tmp_path)]
    assert __main__.main(words) == 0 and "step    10: checkpoint written" in capsys.readouterr().out
    assert __main__.main(words) == 0 and "goes on from the checkpoint of step 10" in capsys.readouterr().out
    assert __main__.main([*words, "--max-restarts", "-1"]) == 2 and "max_restarts=-1" in capsys.readouterr().err


def started(recipe, folder):
    events = list(run(recipe, checkpoints=folder))
    assert any(isinstance(event, Finished) for event in events)
    return next(event for event in events if isinstance(event, Started))
