"""Runs on disk: complete, interrupted, torn, damaged, and paths that cannot be written."""

import json
import os
import re
from dataclasses import replace

import pytest

from cnnlab import record
from cnnlab.events import Checkpointed, Failed, Progress, Restarted
from cnnlab.recipe import CnnlabError

MACHINE = {"name": "Test processor", "cores": 2, "versions": {"torch": "9.9"}}


@pytest.fixture
def saved(tmp_path, short_run):
    path = tmp_path / "run.jsonl"
    list(record.save(path, short_run, MACHINE))
    return path


def test_save_passes_every_event_through(tmp_path, short_run):
    assert list(record.save(tmp_path / "run.jsonl", short_run, MACHINE)) == short_run


def test_a_path_may_start_with_a_tilde(tmp_path, short_run, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    list(record.save("~/runs/run.jsonl", short_run, MACHINE))
    record.write_json("~/runs/values.json", {})
    record.check_writable("~/runs/other")
    assert list(record.replay("~/runs/run.jsonl")) == short_run
    assert sorted(os.listdir(tmp_path / "runs")) == ["run.jsonl", "values.json"]
    assert os.listdir(tmp_path) == ["runs"]


def test_a_tilde_without_a_home_folder_is_rejected(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(CnnlabError, match="~/runs/x cannot be used: there is no home folder. Set"):
        record.check_writable("~/runs/x")


def test_a_replay_yields_the_events_of_the_run(saved, short_run):
    assert list(record.replay(saved)) == short_run


def test_a_record_has_recipe_machine_versions_and_date(saved, short_run):
    loaded = record.load(saved)
    assert loaded.recipe == short_run[0].recipe
    assert loaded.machine == MACHINE and loaded.versions == MACHINE["versions"]
    assert re.match(r"\d{4}-\d\d-\d\dT", loaded.date)
    assert loaded.truncated is None


def test_the_final_name_appears_only_at_the_end(tmp_path, short_run):
    path = tmp_path / "deep" / "run.jsonl"
    for _ in record.save(path, short_run, MACHINE):
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["run.jsonl"]


def test_an_interrupted_run_leaves_a_part_file_that_can_be_loaded(tmp_path, short_run):
    path = tmp_path / "run.jsonl"
    saving = record.save(path, short_run, MACHINE)
    taken = [next(saving), next(saving)]
    saving.close()
    assert not path.exists()
    loaded = record.load(tmp_path / "run.jsonl.part")
    assert loaded.events == taken
    assert "the end of the run is missing" in loaded.truncated


def test_an_old_record_survives_an_interrupted_new_one(saved, short_run):
    before = saved.read_bytes()
    saving = record.save(saved, short_run, MACHINE)
    next(saving)
    saving.close()
    assert saved.read_bytes() == before


def test_any_rank_may_start_first(tmp_path, short_run):
    started = short_run[0]
    events = [replace(started, rank=1, world=2), replace(started, world=2), *short_run[1:]]
    path = tmp_path / "run.jsonl"
    list(record.save(path, events, MACHINE))
    assert record.load(path).events == events


def test_a_run_of_two_ranks_ends_when_both_have_finished(tmp_path, short_run):
    started, *rest = short_run
    started = replace(started, recipe=started.recipe.replace(replicas=2), world=2)
    both = [replace(event, rank=rank) for rank in (0, 1) for event in (started, *rest)]
    list(record.save(tmp_path / "complete.jsonl", both, MACHINE))
    list(record.save(tmp_path / "cut.jsonl", both[:-1], MACHINE))
    assert record.load(tmp_path / "complete.jsonl").truncated is None
    assert "the end of the run is missing" in record.load(tmp_path / "cut.jsonl").truncated


def test_a_failed_run_is_complete(tmp_path, short_run):
    events = [short_run[0], Failed(rank=0, error="ValueError: no", traceback="...")]
    list(record.save(tmp_path / "run.jsonl", events, MACHINE))
    assert record.load(tmp_path / "run.jsonl").truncated is None


def test_a_run_restarted_from_a_checkpoint_is_replayed_completely(tmp_path, short_run):
    started, progress, *rest = short_run
    events = [
        started,
        progress,
        Checkpointed(rank=0, step=progress.step, path="/kept/step-00000002", took_s=0.1),
        Restarted(rank=0, error="the process was killed", attempt=1),
        replace(started, first_step=progress.step),
        *rest,
    ]
    list(record.save(tmp_path / "run.jsonl", events, MACHINE))
    assert list(record.replay(tmp_path / "run.jsonl")) == events
    assert record.load(tmp_path / "run.jsonl").truncated is None


def test_a_restart_is_not_the_end_of_a_run(tmp_path, short_run):
    restarted = Restarted(rank=0, error="the process was killed", attempt=1)
    list(record.save(tmp_path / "cut.jsonl", [*short_run[:2], restarted], MACHINE))
    assert "the end of the run is missing" in record.load(tmp_path / "cut.jsonl").truncated


def test_a_run_that_failed_before_it_started_is_replayed_completely(tmp_path, short_run):
    events = [Restarted(rank=0, error="the process was killed", attempt=1), *short_run]
    assert list(record.save(tmp_path / "run.jsonl", events, MACHINE)) == events
    assert list(record.replay(tmp_path / "run.jsonl")) == events


def test_nan_and_infinite_losses_survive(tmp_path, short_run):
    progress = next(event for event in short_run if isinstance(event, Progress))
    progress = replace(progress, losses=[float("nan"), float("inf")])
    list(record.save(tmp_path / "run.jsonl", [short_run[0], progress], MACHINE))
    losses = record.load(tmp_path / "run.jsonl").events[1].losses
    assert losses[0] != losses[0] and losses[1] == float("inf")


def test_a_torn_last_line_is_dropped_with_a_warning(saved, short_run):
    saved.write_bytes(saved.read_bytes()[:-20])
    last = len(short_run) + 1
    with pytest.warns(UserWarning, match=rf"truncated: the last line \({last}\) is torn"):
        assert list(record.replay(saved)) == short_run[:-1]


def test_a_missing_end_is_named_in_a_warning(saved, short_run):
    lines = saved.read_text().splitlines(keepends=True)
    saved.write_text("".join(lines[:3]))
    message = "truncated: the end of the run is missing. Replaying the 2 events"
    with pytest.warns(UserWarning, match=message):
        assert list(record.replay(saved)) == short_run[:2]


def test_a_complete_record_gives_no_warning(saved, recwarn):
    list(record.replay(saved))
    assert not recwarn.list


def test_a_replay_at_tempo_gives_the_same_events(saved, short_run):
    assert list(record.replay(saved, tempo=1000)) == short_run


def test_a_damaged_line_in_the_middle_is_named(saved):
    lines = saved.read_text().splitlines()
    lines[2] = lines[2][:-10]
    saved.write_text("\n".join(lines))
    with pytest.raises(CnnlabError, match="damaged in line 3: it is not JSON") as raised:
        record.load(saved)
    assert str(saved) in str(raised.value)


HEADER = {
    "cnnlab": record.FORMAT,
    "recipe": {},
    "machine": {},
    "versions": {},
    "commit": None,
    "date": "",
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello",
        b"[]",
        b"5",
        b'"words"',
        b"{}",
        b'{"some": "json"}',
        b"\xff\xfe\x00",
        b"\x00" * 100,
        json.dumps({**HEADER, "recipe": None}).encode(),
        json.dumps({**HEADER, "recipe": {"model": "LeNet"}}).encode(),
        *[
            json.dumps(HEADER).encode() + b"\n" + line
            for line in (
                b"5",
                b'"words"',
                b'{"event": "Exploded"}',
                b'{"event": "Failed"}',
                b"[[1]]",
                b"null",
            )
        ],
    ],
    ids=lambda content: repr(content[-30:]),
)
def test_a_file_that_is_not_a_record_is_rejected_by_name(tmp_path, content):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(content)
    with pytest.raises(CnnlabError) as raised:
        record.load(path)
    assert str(path) in str(raised.value)


def test_another_format_is_rejected_with_its_number(saved):
    saved.write_text(saved.read_text().replace(f'{{"cnnlab": {record.FORMAT}', '{"cnnlab": 99', 1))
    with pytest.raises(CnnlabError, match=f"has format 99.*reads {record.FORMAT}"):
        record.load(saved)


def test_the_error_for_a_missing_record_lists_the_existing_ones(saved, tmp_path):
    message = "there is no record .*other.jsonl. The folder has run.jsonl"
    with pytest.raises(CnnlabError, match=message):
        record.load(tmp_path / "other.jsonl")
    with pytest.raises(
        CnnlabError, match="there is no record .*nowhere.*The folder has no records"
    ):
        record.load(tmp_path / "nowhere" / "run.jsonl")


def test_a_folder_is_not_a_record(tmp_path):
    with pytest.raises(CnnlabError, match="cannot be read"):
        record.load(tmp_path)


def unwritable(folder):
    """Paths that nobody, not even root, can write to."""
    (folder / "file").write_text("in the way")
    (folder / "taken").mkdir()
    return {
        "under a file": folder / "file" / "run.json",
        "in /proc": "/proc/run.json",
        "a folder's name": folder / "taken",
    }


def save_all(path, events):
    list(record.save(path, events, MACHINE))


WRITERS = {
    "save": save_all,
    "write_json": lambda path, _: record.write_json(path, {"a": 1}),
    "check_writable": lambda path, _: record.check_writable(path),
}


@pytest.mark.parametrize("where", ["under a file", "in /proc", "a folder's name"])
@pytest.mark.parametrize("write", WRITERS)
def test_unwritable_paths_are_rejected(tmp_path, short_run, where, write):
    path = unwritable(tmp_path)[where]
    with pytest.raises(CnnlabError, match="cannot write") as raised:
        WRITERS[write](path, short_run)
    assert str(path) in str(raised.value)


def test_an_unwritable_path_is_reported_before_the_run_starts(tmp_path):
    def run():
        pytest.fail("the run was started")
        yield

    with pytest.raises(CnnlabError):
        save_all(unwritable(tmp_path)["under a file"], run())


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs /dev/full, a Linux device that is always full"
)
@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_reported_and_the_old_file_is_kept(tmp_path, short_run, write):
    path = tmp_path / "run.json"
    path.write_text("the old one")
    (tmp_path / "run.json.part").symlink_to("/dev/full")
    with pytest.raises(CnnlabError, match="No space left"):
        WRITERS[write](path, short_run)
    assert path.read_text() == "the old one" and not path.is_symlink()


def test_a_file_is_replaced_only_by_complete_json(tmp_path):
    path = tmp_path / "new folder" / "value.json"
    record.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        record.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    record.write_json(path, {"new": [1, 2]})
    assert json.loads(path.read_text()) == {"new": [1, 2]}
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_check_writable_leaves_no_file(tmp_path):
    record.check_writable(tmp_path / "new" / "value.json")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_commit_is_a_hash_marked_if_the_code_was_edited():
    commit = record.git_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{12}(\+changes)?", commit)


def test_there_is_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    assert record.git_commit() is None
