"""The command that predicts: what it prints, writes, draws and rejects."""

import json
from functools import partial

import pytest
from helpers import points, render, texts
from many_machines import calibrate
from many_machines.predict import main, prediction_curve
from many_machines.predictor import predict

from cnnlab.recipe import Recipe

SPEC = {
    "model": {"name": "ResNet-50", "parameters": 25.6e6, "bytes_per_parameter": 4},
    "device": {"images_per_s": 360, "batch": 128},
    "node": {"devices": 8, "bandwidth_gbps": 1200, "latency_us": 5},
    "network": {"bandwidth_gbps": 100, "latency_us": 5},
    "devices": [1, 8, 64, 100_000],
}

# What is typed, and what the one line of the error must contain.
INVALID = {
    "": ["SPEC.json or --here"],
    "spec.json --here": ["SPEC.json or --here", "not both"],
    "nowhere.json": ["the spec nowhere.json cannot be read", "No such file"],
    "words.json": ["the spec words.json is not valid JSON"],
    "list.json": ["a spec is a JSON object, not list"],
    "null.json": ["a spec is a JSON object, not NoneType"],
    "typo.json": ["no field 'batchsize'"],
    "empty.json": ["no model.parameters", "a number above 0"],
    "zero.json": ["devices[1]=0", "an integer from 1"],
    "spec.json --json words.json/file.json": ["cannot write", "words.json"],
    "spec.json --png .": ["cannot write", "folder"],
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The current folder, with specs that can and cannot be used."""
    texts = {"words": "{not json", "list": "[1, 2]", "typo": '{"batchsize": 3}', "null": "null"}
    texts |= {"empty": "{}", "spec": json.dumps(SPEC)}
    texts["zero"] = json.dumps({**SPEC, "devices": [1, 0]})
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", INVALID)
def test_invalid_input_gets_one_clear_line(files, words, capsys):
    assert main(words.split()) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.startswith("cnnlab: ") and error.count("\n") == 1
    assert all(text in error for text in INVALID[words])


def test_a_cluster_on_paper_is_predicted_printed_written_and_drawn(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    assert main(["spec.json", "--json", "new/found.json", "--png", "found.png"]) == 0
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
        [line] = [line for line in lines if line.startswith(name)]
        assert line.endswith(assumption["origin"])


def test_this_machine_is_predicted_before_it_is_measured(tmp_path, monkeypatch, capsys):
    recipe = Recipe(batch_size=32, steps=4, evaluate=False, threads=1)
    short = partial(calibrate.predict_here, (2,), recipe)
    monkeypatch.setattr(calibrate, "REPEATS", 1)
    monkeypatch.setattr(calibrate, "predict_here", short)
    files = ["--json", str(tmp_path / "here.json"), "--png", str(tmp_path / "here.png")]
    assert main(["--here", *files]) == 0
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


def prediction(devices, efficiency, exposed_s=0.1, jitter_s=0.05):
    return {
        "devices": devices,
        "efficiency": efficiency,
        "step_s": 1.0,
        "exposed_communication_s": exposed_s,
        "jitter_s": jitter_s,
    }


def test_the_prediction_curve_shows_where_a_step_goes_and_published_points(ax):
    predictions = [prediction(1, 1.0, 0, 0), prediction(100_000, 0.7), prediction(1000, 0.8)]
    prediction_curve(ax, predictions, {"DGX": {8: 0.97, 64: 0.9}})
    curve, published = ax.lines
    assert points(curve) == ([1, 1000, 100_000], pytest.approx([100, 80, 70]))
    assert points(published) == ([8, 64], pytest.approx([97, 90]))
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in ax.collections]
    assert len(tops) == 4 and tops[-1] == pytest.approx(100)  # nothing of the step is missing
    assert ax.get_xscale() == "log" and ax.get_xlim() == (1, 100_000)
    assert "DGX" in texts(ax) and "exposed communication" in texts(ax)
    render(ax)
    assert "100,000" in texts(ax)


def test_a_single_prediction_can_be_drawn(ax):
    prediction_curve(ax, [prediction(4, 0.5)])
    assert points(ax.lines[0]) == ([4], [50])
    render(ax)
