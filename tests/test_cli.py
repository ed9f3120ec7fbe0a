"""`python -m cnnlab`, as a user types it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from functools import partial

import pytest

from cnnlab import predict, record
from cnnlab.cli import main
from cnnlab.events import Finished
from cnnlab.measure import calibrate, ladder
from cnnlab.recipe import Recipe

SHORT = ["--batch-size", "64", "--steps", "4", "--threads", "1"]
TINY_LADDER = (
    "ladder --quick --repeats 2 --model SmallCNN --data synthetic --images 64 --image-size 8 "
    "--batch-size 16 --steps 2"
)

SPEC = {
    "model": {"name": "ResNet-50", "parameters": 25.6e6, "bytes_per_parameter": 4},
    "device": {"images_per_s": 360, "batch": 128},
    "node": {"devices": 8, "bandwidth_gbps": 1200, "latency_us": 5},
    "network": {"bandwidth_gbps": 100, "latency_us": 5},
    "devices": [1, 8, 64, 100_000],
}

# What is typed, and what the one-line error must contain.
INVALID = {
    "train --batch-size -1": ["batch_size=-1", "at least 1"],
    "train --steps 0": ["steps=0", "at least 1"],
    "train --learning-rate nan": ["learning_rate=nan", "finite"],
    "train --learning-rate -0.1": ["learning_rate=-0.1", "above 0"],
    "train --learning-rate inf": ["learning_rate=inf", "finite"],
    "train --batch-size 2000": ["batch_size=2000", "1437"],
    "train --data synthetic --images 8": ["batch_size=64", "images=8"],
    "train --batch-size 700": ["2 steps", "warmup_steps"],
    "train --model VGG16 --data synthetic --image-size 20": ["VGG16", "multiple of 32", "20"],
    "train --replicas 3": ["replicas=3", "63"],
    "train --seed 4294967296": ["seed=4294967296"],
    "train --steps 3 --record words.json/deeper": ["cannot write", "words.json"],
    "train --steps 3 --record /proc/nowhere": ["cannot write", "/proc/nowhere"],
    "train --steps 3 --checkpoint words.json": ["cannot write", "words.json", "folder"],
    "train --steps 3 --strategy async --checkpoint kept": ["strategy='async'", "strategy='ddp'"],
    "train --steps 3 --max-restarts -1": ["max_restarts=-1", "0"],
    "train --strategy ring --compression fp16": ["compression='fp16'", "ddp, zero1"],
    "train --latency-ms -1": ["latency_ms=-1.0", "at least 0"],
    "train nowhere.json": ["nowhere.json", "No such file"],
    "train .": ["cannot be read"],
    "train words.json": ["words.json", "not valid JSON"],
    "train binary.json": ["binary.json", "not valid JSON"],
    "train list.json": ["JSON object", "list"],
    "train typo.json": ["batchsize", "Did you mean 'batch_size'?"],
    "train types.json": ["batch_size='3'"],
    "train choice.json": ["model='Resnet9'", "Did you mean 'ResNet9'?"],
    "replay nowhere.jsonl": ["no record nowhere.jsonl", "good.jsonl"],
    "replay torn.jsonl": ["damaged", "line 1"],
    "replay good.jsonl": ["good.jsonl", "not a cnnlab record"],
    "replay other.jsonl": ["other.jsonl", "not a cnnlab record"],
    "replay binary.json": ["cannot be read"],
    "ladder --repeats 1": ["--repeats 1", "at least 2"],
    "ladder --json words.json/ladder.json": ["cannot write", "words.json"],
    "ladder --png .": ["cannot write", "folder"],
    "ladder --batch-size 0": ["batch_size=0", "at least 1"],
    "ladder --model VGG16 --data digits --batch-size 2000": ["batch_size=2000"],
    "predict": ["SPEC.json or --here"],
    "predict spec.json --here": ["SPEC.json or --here", "not both"],
    "predict nowhere.json": ["the spec nowhere.json cannot be read", "No such file"],
    "predict words.json": ["the spec words.json is not valid JSON"],
    "predict list.json": ["a spec is a JSON object, not list"],
    "predict typo.json": ["no field 'batchsize'"],
    "predict empty.json": ["no model.parameters", "a number above 0"],
    "predict zero.json": ["devices[1]=0", "an integer from 1"],
    "predict spec.json --json words.json/file.json": ["cannot write", "words.json"],
    "predict spec.json --png .": ["cannot write", "folder"],
    "doctor --json words.json/doctor.json": ["cannot write words.json/doctor.json"],
}

# What is typed, and what the usage error must contain.
MISUSED = {
    "": ["Missing subcommand", "doctor, train, ladder, predict, replay"],
    "fly": ["Unrecognized", "fly", "doctor, train, ladder, predict, replay"],
    "replay": ["RECORD.jsonl"],
    "train --batch-size many": ["--batch-size", "many"],
    "train --threads many": ["--threads", "None", "many"],
    "train --thread 3": ["--thread", "--threads"],
    "train --model LeNet": ["'LeNet'", "--model", "'SmallCNN', 'ResNet9', 'VGG16', 'VGG19'"],
    "train --strategy horovod": ["'horovod'", "--strategy", "'local-sgd'"],
    "train --evaluate maybe": ["'maybe'", "--evaluate", "'True', 'False'"],
    "train one.json two.json": ["Unrecognized", "two.json"],
    "ladder --precision bf16": ["Unrecognized", "--precision"],
}


def cnnlab(*words, folder=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "cnnlab", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, **environment},
    )


def unwrapped(text):
    """Text without the boxes and line breaks that fit it to the terminal."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def files(tmp_path):
    """Files that are not what they should be."""
    (tmp_path / "words.json").write_text("{not json")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "typo.json").write_text('{"batchsize": 3}')
    (tmp_path / "types.json").write_text('{"batch_size": "3"}')
    (tmp_path / "choice.json").write_text('{"model": "Resnet9"}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    (tmp_path / "zero.json").write_text(json.dumps({**SPEC, "devices": [1, 0]}))
    (tmp_path / "good.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"cnnlab": 1\n{"event": ')
    (tmp_path / "other.jsonl").write_text('{"some": "json"}\n')
    return tmp_path


def test_doctor_prints_what_is_here_and_what_is_missing(tmp_path):
    done = cnnlab("doctor", "--json", tmp_path / "doctor.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert set(found) == {"machine", "versions", "peaks", "gpu_peaks"}
    machine = found["machine"]
    described = "name system cores memory_gib units gpus compiler hardware missing versions"
    described += " accelerators physical_cores logical_cores"
    assert set(machine) == set(described.split())
    assert set(found["peaks"]) == {"fp32", "bf16", "fp16", "copy"}
    assert min(found["peaks"].values()) > 0
    for text in (machine["name"], "GFLOP/s measured", "GB/s measured", *machine["missing"]):
        assert text in done.stdout


def test_a_run_is_recorded_and_replayed(tmp_path):
    done = cnnlab("train", *SHORT, "--record", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "runs").iterdir()
    assert path.name == "SmallCNN-digits-fp32-1-1.jsonl"
    loaded = record.load(path)
    assert loaded.recipe == Recipe(batch_size=64, steps=4, threads=1)
    assert isinstance(loaded.events[-1], Finished)
    assert loaded.machine["cores"] >= 1 and loaded.truncated is None
    again = cnnlab("replay", path)
    assert again.returncode == 0, again.stderr
    place, *lines = again.stdout.splitlines()
    assert loaded.machine["name"] in place
    assert len(lines) >= 3 and lines == done.stdout.splitlines()


@pytest.mark.parametrize("words", [["--record=~/runs"], ["--record", "~/runs"]])
def test_a_tilde_in_an_option_is_the_home_folder(tmp_path, words):
    done = cnnlab("train", *SHORT, *words, folder=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in (tmp_path / "runs").iterdir()] == [".jsonl"]
    assert not (tmp_path / "~").exists()


def test_options_replace_values_of_a_recipe_file(tmp_path):
    recipe = Recipe(batch_size=32, steps=3, seed=5, threads=2, learning_rate=1, replicas=2)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    options = "--steps 4 --evaluate False --replicas 1 --threads None"
    file = str(tmp_path / "recipe.json")
    assert main(["train", *options.split(), file, "--record", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.jsonl")
    expected = recipe.replace(steps=4, evaluate=False, replicas=1, threads=None)
    assert record.load(path).recipe == expected


def test_an_option_can_set_a_default_where_the_file_has_another_value(tmp_path):
    (tmp_path / "recipe.json").write_text('{"batch_size": 32, "steps": 4, "threads": 1}')
    words = ["train", str(tmp_path / "recipe.json"), "--batch-size", "64"]
    assert main([*words, "--record", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.jsonl")
    assert record.load(path).recipe == Recipe(batch_size=64, steps=4, threads=1)


def test_a_file_and_options_are_checked_together(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text('{"steps": 3}')
    assert main(["train", str(tmp_path / "recipe.json"), "--warmup-steps", "3"]) == 2
    error = capsys.readouterr().err
    assert "steps=3" in error and "warmup_steps=3" in error


def test_a_second_record_leaves_the_first_alone(tmp_path):
    for _ in range(2):
        assert main(["train", *SHORT, "--record", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_an_interrupted_record_is_left_alone(tmp_path):
    part = tmp_path / "SmallCNN-digits-fp32-1-1.jsonl.part"
    part.write_text("an hour's work")
    assert main(["train", *SHORT, "--record", str(tmp_path)]) == 0
    assert part.read_text() == "an hour's work" and len(list(tmp_path.glob("*.jsonl"))) == 1


def test_an_interrupted_ladder_has_saved_its_rungs(tmp_path, monkeypatch):
    climb = ladder.climb

    def interrupted(*args, **options):
        for rung in climb(*args, **options):
            yield rung
            if rung.kept is not None and rung.name != "baseline":
                raise KeyboardInterrupt

    monkeypatch.setattr(ladder, "climb", interrupted)
    assert main([*TINY_LADDER.split(), "--json", str(tmp_path / "ladder.json")]) == 130
    assert len(json.loads((tmp_path / "ladder.json").read_text())["rungs"]) == 2


def test_the_ladder_writes_its_json_picture_and_record(tmp_path):
    files = ["--json", tmp_path / "ladder.json", "--png", tmp_path / "ladder.png"]
    # Without a compiler the test takes half a minute less.
    done = cnnlab(*TINY_LADDER.split(), *files, "--record", tmp_path / "runs", CXX="/no/compiler")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ladder.json").read_text())
    rungs = {rung["name"]: rung for rung in found["rungs"]}
    assert next(iter(rungs)) == "baseline" and len(rungs) > 2
    assert min(rung["images_per_s"]["n"] for rung in rungs.values()) >= 2
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    [saved] = (tmp_path / "runs").glob("ladder-*.json")
    [run] = (tmp_path / "runs").glob("*.jsonl")
    assert sorted((tmp_path / "runs").iterdir()) == sorted([saved, run])
    # The lessons read it from there.
    assert list(record.recorded_ladders(tmp_path / "runs").values()) == [found]
    assert record.load(run).recipe.to_dict() == rungs[found["best"]]["recipe"]
    assert f"best here: {found['best']}" in done.stdout
    assert "torch.compile" in found["impossible"]
    for name in found["impossible"]:
        assert f"{name:24} not tried" in done.stdout


def test_a_cluster_on_paper_is_predicted_printed_written_and_drawn(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    assert main(["predict", "spec.json", "--json", "new/found.json", "--png", "found.png"]) == 0
    found = json.loads((files / "new" / "found.json").read_text())
    assert found == predict(SPEC)
    assert (files / "found.png").read_bytes().startswith(b"\x89PNG")
    output, error = capsys.readouterr()
    assert error == ""
    lines = output.splitlines()
    for row, line in zip(found["predictions"], lines[1:5], strict=True):
        assert line.split()[0] == f"{row['devices']:,}"
        assert f"{row['images_per_s']:,.0f}" in line and f"{row['efficiency']:.1%}" in line
        assert line.endswith(row["bound_by"])
    for name, assumption in found["assumptions"].items():
        [line] = [line for line in lines if line.startswith(f"{name} ")]
        assert line.endswith(assumption["origin"])


def test_this_machine_is_predicted_before_it_is_measured(tmp_path, monkeypatch, capsys):
    recipe = Recipe(batch_size=32, steps=4, evaluate=False, threads=1)
    monkeypatch.setattr(calibrate, "REPEATS", 1)
    monkeypatch.setattr(calibrate, "predict_here", partial(calibrate.predict_here, (2,), recipe))
    files = ["--json", str(tmp_path / "here.json"), "--png", str(tmp_path / "here.png")]
    assert main(["predict", "--here", *files]) == 0
    found = json.loads((tmp_path / "here.json").read_text())
    [prediction], [measured] = found["predictions"], found["measured"]
    assert prediction["devices"] == measured["ranks"] == 2
    ratio = prediction["images_per_s"] / measured["images_per_s"]
    assert measured["error"] == pytest.approx(ratio - 1)
    assert found["recipe"] == recipe.to_dict() and found["machine"]["cores"] >= 1
    assert (tmp_path / "here.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert output.index(" predicted") < output.index(" measured, error")
    assert f"{measured['images_per_s']:,.1f} images/s measured" in output
    assert f"{measured['error']:+.1%}" in output


def assert_one_line_error(code, output, error, expected):
    assert code == 2
    # The ladder's progress bar may precede it.
    lines = [line for line in error.splitlines() if line.strip() and "rung/s" not in line]
    lines = [line for line in lines if not line.startswith("measuring")]
    assert len(lines) == 1 and lines[0].startswith("cnnlab: ") and "Traceback" not in error
    assert [text for text in expected if text not in error] == [], error
    assert output == ""


@pytest.mark.parametrize("words", INVALID)
def test_invalid_input_gets_one_clear_line(files, words, monkeypatch, capsys):
    monkeypatch.chdir(files)
    code = main(words.split())
    assert_one_line_error(code, *capsys.readouterr(), INVALID[words])


@pytest.mark.parametrize(
    "words",
    [
        "train --steps 0",
        "train --learning-rate nan",
        "train --batch-size 2000",
        "train typo.json",
        "train --steps 3 --record words.json/deeper",
        "replay nowhere.jsonl",
        "replay torn.jsonl",
    ],
)
def test_invalid_input_ends_the_process_with_2(files, words):
    done = cnnlab(*words.split(), folder=files)
    assert_one_line_error(done.returncode, done.stdout, done.stderr, INVALID[words])


@pytest.mark.parametrize("words", MISUSED)
def test_unknown_commands_options_and_values_exit_with_2_and_name_the_help(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words.split())
    output, error = capsys.readouterr()
    assert left.value.code == 2 and output == ""
    error = unwrapped(error)
    assert [text for text in MISUSED[words] if text not in error] == [], error
    assert re.search(r"python -m cnnlab.* --help", error)


def test_a_misused_command_ends_the_process_with_2():
    done = cnnlab("train", "--model", "LeNet")
    assert done.returncode == 2 and "'ResNet9'" in done.stderr and "Traceback" not in done.stderr


def test_a_truncated_record_is_replayed_and_said_to_be_truncated(tmp_path, capsys):
    assert main(["train", *SHORT, "--record", str(tmp_path)]) == 0
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
    assert main(["train", *SHORT]) == 1
    assert "rank 0 failed: LookupError: no such star" in capsys.readouterr().err


def test_an_unexpected_error_is_not_hidden(monkeypatch):
    def run(recipe, checkpoints, max_restarts):
        raise RuntimeError("gloo: a defect of cnnlab itself")

    monkeypatch.setattr("cnnlab.launch.launcher.run", run)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train", *SHORT])


def test_under_torchrun_a_rank_that_loses_another_ends_with_1(monkeypatch, capsys):
    def train_under_torchrun(recipe, checkpoints):
        raise RuntimeError("gloo: Connection closed by peer\nand more")

    monkeypatch.setattr("cnnlab.launch.worker.train_under_torchrun", train_under_torchrun)
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *SHORT]) == 1
    error = capsys.readouterr().err
    assert error == "cnnlab: rank 1 has lost another rank: gloo: Connection closed by peer\n"


@pytest.mark.parametrize("command", ["train", "ladder", "doctor", "predict", "replay"])
def test_help_says_what_a_command_does(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: python -m cnnlab {command}" in capsys.readouterr().out


def test_help_explains_every_field_of_a_recipe_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    output = unwrapped(capsys.readouterr().out)
    for field in fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        default = re.escape(f"(default: {field.default})")
        assert re.search(rf"{option} \S+ \w[^()]*(\([^()]*\))?[^()]* ?{default}", output), option
    assert "images per step, all ranks together (default: 64)" in output
    assert "--model {SmallCNN,ResNet9,VGG16,VGG19}" in output
