"""`python -m cnnlab` as a person types it."""

import json
import os
import subprocess
import sys

import pytest
from recorded.device import MEASUREMENTS

from cnnlab import record
from cnnlab.cli import main
from cnnlab.events import Finished
from cnnlab.measure import ladder
from cnnlab.recipe import Recipe

QUICK = ["--batch-size", "64", "--steps", "4", "--threads", "1"]


def cnnlab(*words, folder=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "cnnlab", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, **environment},
    )


def test_doctor_says_what_is_here_and_what_is_missing(tmp_path):
    done = cnnlab("doctor", "--json", tmp_path / "doctor.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert set(found) == {"machine", "versions", "peaks"}
    assert {
        "name",
        "system",
        "cores",
        "memory_gib",
        "units",
        "gpus",
        "compiler",
        "hardware",
        "missing",
        "versions",
    } == set(found["machine"])
    assert (
        set(found["peaks"]) == {"fp32", "bf16", "fp16", "copy"} and min(found["peaks"].values()) > 0
    )
    for text in (
        found["machine"]["name"],
        "GFLOP/s measured",
        "GB/s measured",
        *found["machine"]["missing"],
    ):
        assert text in done.stdout


def test_a_run_is_recorded_and_replayed(tmp_path):
    done = cnnlab("train", *QUICK, "--record", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "runs").iterdir()
    assert path.name == "SmallCNN-digits-fp32-1-1.jsonl"
    loaded = record.load(path)
    assert loaded.recipe == Recipe(batch_size=64, steps=4, threads=1) and isinstance(
        loaded.events[-1], Finished
    )
    assert loaded.machine["cores"] >= 1 and loaded.truncated is None
    again = cnnlab("replay", path)
    assert again.returncode == 0, again.stderr
    assert (
        again.stdout.splitlines()[1:] == done.stdout.splitlines()
    )  # the same, below a line that says where it ran
    assert loaded.machine["name"] in again.stdout.splitlines()[0]


def test_a_recipe_file_is_read_and_options_change_it(tmp_path):
    (tmp_path / "recipe.json").write_text(
        json.dumps(Recipe(batch_size=32, steps=3, seed=5).to_dict())
    )
    assert (
        main(
            [
                "train",
                str(tmp_path / "recipe.json"),
                "--steps",
                "4",
                "--evaluate",
                "false",
                "--record",
                str(tmp_path),
            ]
        )
        == 0
    )
    [path] = tmp_path.glob("*.jsonl")
    assert record.load(path).recipe == Recipe(batch_size=32, steps=4, seed=5, evaluate=False)


def test_a_second_record_leaves_the_first_alone(tmp_path):
    for _ in range(2):
        assert main(["train", *QUICK, "--record", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_a_record_that_was_cut_short_is_left_alone(tmp_path):
    part = tmp_path / "SmallCNN-digits-fp32-1-1.jsonl.part"
    part.write_text("an hour's work")
    assert main(["train", *QUICK, "--record", str(tmp_path)]) == 0
    assert part.read_text() == "an hour's work" and len(list(tmp_path.glob("*.jsonl"))) == 1


def test_a_climb_that_is_cut_short_has_saved_its_rungs(tmp_path, monkeypatch):
    climb = ladder.climb

    def cut(*args, **options):
        for rung in climb(*args, **options):
            yield rung
            if rung.kept is not None and rung.name != "baseline":
                raise KeyboardInterrupt

    monkeypatch.setattr(ladder, "climb", cut)
    assert (
        main(
            [
                "ladder",
                "--quick",
                "--repeats",
                "2",
                "--model",
                "SmallCNN",
                "--data",
                "synthetic",
                "--images",
                "64",
                "--image-size",
                "8",
                "--batch-size",
                "16",
                "--steps",
                "2",
                "--json",
                str(tmp_path / "ladder.json"),
            ]
        )
        == 130
    )
    assert len(json.loads((tmp_path / "ladder.json").read_text())["rungs"]) == 2


def test_the_ladder_writes_its_json_picture_and_record(tmp_path):
    done = cnnlab(
        "ladder",
        "--quick",
        "--repeats",
        "2",
        "--model",
        "SmallCNN",
        "--data",
        "synthetic",
        "--images",
        "64",
        "--image-size",
        "8",
        "--batch-size",
        "16",
        "--steps",
        "2",
        "--json",
        tmp_path / "ladder.json",
        "--png",
        tmp_path / "ladder.png",
        "--record",
        tmp_path / "runs",
        CXX="/no/compiler",
    )  # which saves the half minute that compiling takes
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert found["rungs"][0]["name"] == "baseline" and len(found["rungs"]) > 2
    assert {rung["images_per_s"]["n"] >= 2 for rung in found["rungs"]} == {True}
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert list(record.recorded_ladders(tmp_path / "runs").values()) == [
        found
    ]  # where the lessons look
    [run] = (tmp_path / "runs").glob("*.jsonl")
    assert (
        record.load(run).recipe.to_dict()
        == next(rung for rung in found["rungs"] if rung["name"] == found["best"])["recipe"]
    )
    [path] = (tmp_path / "runs").glob("device-*.json")
    device = json.loads(path.read_text())
    assert set(device) == {"machine", *MEASUREMENTS} and not [
        name for name, figures in device.items() if "failed" in figures
    ]
    assert f"best here: {found['best']}" in done.stdout
    assert "torch.compile" in found["impossible"]
    for name in found["impossible"]:
        assert f"{name:24} not tried" in done.stdout


@pytest.fixture
def files(tmp_path):
    """Files that are not what they should be."""
    (tmp_path / "words.json").write_text("{not json")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "typo.json").write_text('{"batchsize": 3}')
    (tmp_path / "types.json").write_text('{"batch_size": "3"}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "good.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"cnnlab": 1\n{"event": ')
    (tmp_path / "other.jsonl").write_text('{"some": "json"}\n')
    return tmp_path


BAD = {  # what is typed: what the one sentence must name
    "train --model LeNet": ["model='LeNet'", "SmallCNN"],
    "train --model Resnet9": ["Did you mean 'ResNet9'?"],
    "train --batch-size -1": ["batch_size=-1", "1 or more"],
    "train --steps 0": ["steps=0"],
    "train --learning-rate nan": ["learning_rate=nan", "finite"],
    "train --learning-rate -0.1": ["learning_rate=-0.1"],
    "train --learning-rate inf": ["learning_rate=inf"],
    "train --batch-size 2000": ["batch_size=2000", "1437"],
    "train --data synthetic --images 8": ["batch_size=64", "images=8"],
    "train --batch-size 700": ["2 steps", "warmup_steps"],
    "train --model VGG16 --data synthetic --image-size 20": ["VGG16", "multiple of 32", "not 20"],
    "train --replicas 3": ["replicas=3", "63"],
    "train --evaluate maybe": ["evaluate='maybe'"],
    "train --seed 4294967296": ["seed=4294967296"],
    "train --steps 3 --record words.json/deeper": ["cannot write", "words.json"],
    "train --steps 3 --record /proc/nowhere": ["cannot write", "/proc/nowhere"],
    "train --steps 3 --checkpoint words.json": ["cannot write checkpoints to words.json"],
    "train --steps 3 --strategy async --checkpoint kept": [
        "strategy='async' keeps no checkpoints",
        "strategy='ddp'",
    ],
    "train --steps 3 --max-restarts -1": ["max_restarts=-1", "0 or more"],
    "train --strategy ring --compression fp16": ["compression='fp16'", "strategy='ddp'"],
    "train --strategy horovod": ["strategy='horovod'", "local-sgd"],
    "train --latency-ms -1": ["latency_ms=-1.0", "0 or more"],
    "train nowhere.json": ["nowhere.json", "No such file"],
    "train .": ["cannot be read"],
    "train words.json": ["words.json", "no JSON"],
    "train binary.json": ["binary.json", "no JSON"],
    "train list.json": ["JSON object", "list"],
    "train typo.json": ["batchsize", "Did you mean 'batch_size'?"],
    "train types.json": ["batch_size='3'"],
    "replay nowhere.jsonl": ["no record nowhere.jsonl", "good.jsonl"],
    "replay torn.jsonl": ["damaged in line 1"],
    "replay good.jsonl": ["good.jsonl", "no cnnlab record"],
    "replay other.jsonl": ["other.jsonl", "no cnnlab record"],
    "replay binary.json": ["cannot be read"],
    "ladder --repeats 1": ["--repeats 1", "at least 2"],
    "ladder --json words.json/ladder.json": ["cannot write", "words.json"],
    "ladder --png .": ["cannot write", "folder"],
    "ladder --batch-size 0": ["batch_size=0"],
    "ladder --model VGG16 --data digits --batch-size 2000": ["batch_size=2000"],
}


def refused(code, said, error, words):
    assert code == 2
    lines = [
        line for line in error.splitlines() if line.strip() and "rung/s" not in line
    ]  # the ladder's bar may stand before it
    assert len(lines) == 1 and lines[0].startswith("cnnlab: ") and "Traceback" not in error
    assert all(word in error for word in BAD[words]), error
    assert said == ""


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_clear_sentence(files, words, monkeypatch, capsys):
    monkeypatch.chdir(files)
    code = main(words.split())
    refused(code, *capsys.readouterr(), words)


@pytest.mark.parametrize(
    "words",
    [
        "train --model LeNet",
        "train --learning-rate nan",
        "train --batch-size 2000",
        "replay nowhere.jsonl",
        "replay torn.jsonl",
        "train --steps 3 --record words.json/deeper",
        "train typo.json",
    ],
)
def test_bad_input_ends_the_process_with_2(files, words):
    done = cnnlab(*words.split(), folder=files)
    refused(done.returncode, done.stdout, done.stderr, words)


@pytest.mark.parametrize(
    "words", ["", "fly", "train --batch-size many", "train --no-such-option 3", "replay"]
)
def test_words_that_are_no_command_get_the_usage(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words.split())
    assert left.value.code == 2
    assert "usage: python -m cnnlab" in capsys.readouterr().err


def test_doctor_refuses_a_file_that_cannot_be_written(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    assert main(["doctor", "--json", "words.json/doctor.json"]) == 2
    assert "cannot write words.json/doctor.json" in capsys.readouterr().err


def test_a_truncated_record_is_replayed_with_a_word_about_it(tmp_path, capsys):
    assert main(["train", *QUICK, "--record", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-10])
    assert main(["replay", str(path)]) == 0
    assert "the record is truncated: the last line" in capsys.readouterr().err


def test_a_failed_run_ends_with_1_and_names_the_rank(monkeypatch, capsys):
    def run(recipe, checkpoints, max_restarts):
        from cnnlab.launch.launcher import stream

        def function(rank, world):
            yield from ()
            raise LookupError("no such star")

        return stream(function, (), 1)

    monkeypatch.setattr("cnnlab.launch.launcher.run", run)
    assert main(["train", *QUICK]) == 1
    assert "rank 0 failed: LookupError: no such star" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "ladder", "doctor", "replay"])
def test_help_says_what_a_command_does(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and "usage:" in capsys.readouterr().out
