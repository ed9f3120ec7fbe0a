"""The command line: `python -m cnnlab doctor | train | ladder | predict | replay`.

tyro makes an option of each field of these classes and of `Recipe`, with its comment as help.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm.auto import tqdm
from tyro.conf import FlagConversionOff, FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from cnnlab import machine, record
from cnnlab.console import doctor_lines, prediction_lines, rung_line, show
from cnnlab.events import Event
from cnnlab.launch.failures import PEER_ERRORS, RankError
from cnnlab.recipe import CnnlabError, Data, Model, Recipe

QUICK: dict[str, Any] = {"learning_rate": 0.001, "batch_size": 64, "steps": 3, "warmup_steps": 1}
FULL: dict[str, Any] = {"learning_rate": 0.001, "batch_size": 128, "steps": 22, "warmup_steps": 2}

File = Annotated[Path | None, arg(metavar="FILE")]
Folder = Annotated[Path | None, arg(metavar="DIR")]
RecipeFile = Annotated[Path | None, arg(metavar="[RECIPE.json]")]
SpecFile = Annotated[Path | None, arg(metavar="[SPEC.json]")]
RecordFile = Annotated[Path, arg(metavar="RECORD.jsonl")]


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: a run failed. 2: the request is invalid. 130: interrupted.
    """
    try:
        parse(words).run()
        return 0
    except (CnnlabError, RankError) as error:
        print(f"cnnlab: {error}", file=sys.stderr)
        return 1 if isinstance(error, RankError) else 2
    except RuntimeError as error:
        if not (under_torchrun() and any(text in str(error) for text in PEER_ERRORS)):
            raise
        reason = str(error).strip().splitlines()[0]
        print(f"cnnlab: rank {os.environ['RANK']} has lost another rank: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cnnlab: interrupted; all processes were stopped.", file=sys.stderr)
        return 130


def parse(words: Sequence[str] | None) -> "Doctor | Train | Ladder | Predict | Replay":
    """The command with its options. Exits with 2 if an option or the type of a value is wrong."""

    def cli(train: Train) -> Any:
        train_command = Annotated[Train, tyro.conf.subcommand(default=train)]
        commands = Doctor | train_command | Ladder | Predict | Replay
        about = "Train one CNN, measure it honestly, make it faster."
        return tyro.cli(commands, prog="python -m cnnlab", description=about, args=words)

    words = [expand_home(word) for word in (sys.argv[1:] if words is None else words)]
    command = cli(Train())
    if isinstance(command, Train) and command.recipe_file:
        recipe = Recipe.from_dict(read_json(command.recipe_file, "recipe"))
        command = cli(Train(recipe=RecipeOptions(**recipe.to_dict())))
    return command


def expand_home(word: str) -> str:
    """The word with ~ expanded: shells leave it in --record=~/folder."""
    option, equals, value = word.rpartition("=")
    return option + equals + str(record.expand_home(value)) if value.startswith("~") else word


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show what this machine can do, what it lacks, and why."""

    json: File = None  # also write it as JSON

    def run(self) -> None:
        from cnnlab.measure.peaks import peaks as measure_peaks

        if self.json:
            record.check_writable(self.json)
        print("measuring ...", end="\r", file=sys.stderr)
        here = machine.describe()
        peaks = measure_peaks()
        gpu_peaks = measure_peaks(here.accelerator) if here.accelerators else {}
        print("\n".join(doctor_lines(here, peaks, gpu_peaks)))
        if self.json:
            result = {"machine": here.to_dict(), "versions": here.versions, "peaks": peaks}
            result["gpu_peaks"] = gpu_peaks
            record.write_json(self.json, result)


class RecipeOptions(Recipe):
    """All fields of a recipe."""

    def __post_init__(self) -> None:
        """Check nothing: a recipe file may still replace the defaults, and `Recipe` checks all."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a recipe."""

    recipe_file: Positional[RecipeFile] = None  # a recipe; options replace its values
    record: Folder = None  # save the run in this folder
    checkpoint: Folder = None  # keep checkpoints in this folder, and resume from the newest
    max_restarts: int = 0  # how often to restart all ranks after one has failed
    recipe: OmitArgPrefixes[FlagConversionOff[RecipeOptions]] = RecipeOptions()

    def run(self) -> None:
        """Train in new processes; under torchrun, as one of its ranks, of which rank 0 prints."""
        values = self.recipe.to_dict()
        if under_torchrun():
            from cnnlab.launch.worker import train_under_torchrun

            model_ranks = values["stages"] * values["tensor_ranks"]
            replicas = max(1, int(os.environ["WORLD_SIZE"]) // model_ranks)
            recipe = Recipe(**{**values, "replicas": replicas})
            stream = train_under_torchrun(recipe, self.checkpoint)
            if os.environ["RANK"] != "0":
                for _ in stream:
                    pass
                return
        else:
            from cnnlab.launch.launcher import run

            recipe = Recipe(**values)
            stream = run(recipe, checkpoints=self.checkpoint, max_restarts=self.max_restarts)
        if self.record:
            stream = save_run(self.record, recipe, stream)
        show(stream)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Try every technique, keep those that pay, and print the best recipe."""

    quick: FlagCreatePairsOff[bool] = False  # few steps and repeats: a minute, wider intervals
    repeats: int | None = None  # runs of each rung; None: 3 if quick or with a GPU, otherwise 5
    json: File = None  # write the result as JSON
    png: File = None  # draw the result
    record: Folder = None  # save the result and a run of the best recipe in this folder
    model: Model = "ResNet9"  # network to train
    width: int | None = None  # channels of the first convolution; None: the model's default
    data: Data = Recipe.data  # data set to train on
    images: int = Recipe.images  # number of images (synthetic and photos only)
    image_size: int = Recipe.image_size  # height and width in pixels (synthetic and photos only)
    classes: int = Recipe.classes  # number of classes (synthetic only)
    batch_size: int | None = None  # images per step; None: 64 if quick, otherwise 128
    steps: int | None = None  # training steps of each run; None: 3 if quick, otherwise 22
    seed: int = Recipe.seed  # seed of the initial weights and of the order of the images

    def run(self) -> None:
        from cnnlab.launch.launcher import run
        from cnnlab.measure.ladder import techniques

        recipe = self.base_recipe()
        if self.repeats is not None and self.repeats < 2:
            raise CnnlabError(f"--repeats {self.repeats} is not allowed. Use at least 2 runs.")
        here = machine.describe()
        json_files = [self.json] if self.json else []
        if self.record:
            json_files.append(self.record / record.file_name("ladder", here.to_dict()))
        for path in json_files + ([self.png] if self.png else []):
            record.check_writable(path)
        rungs, impossible = techniques(here)
        result = self.climb(recipe, rungs, impossible, json_files)
        for name, reason in impossible.items():
            print(f"{name:24} not tried: {reason}")
        best = next(rung for rung in result["rungs"] if rung["name"] == result["best"])
        speedup = f"a speedup of {best['speedup']:.2f} over the naive baseline"
        print(f"\nbest here: {best['name']}, {speedup}: {result['best_recipe']}")
        if self.png:
            from cnnlab.plots import ladder_bars, machine_label

            place = f"{machine_label(result['machine'])}, torch {result['versions']['torch']}"
            title = f"{result['recipe']['model']} on {place}"
            draw(self.png, ladder_bars, result["rungs"], title=title)
        if self.record:
            recipe = Recipe.from_dict(best["recipe"])
            list(save_run(self.record, recipe, run(recipe)))

    def base_recipe(self) -> Recipe:
        settings = {f.name: getattr(self, f.name, None) for f in fields(Recipe)}
        given = {name: value for name, value in settings.items() if value is not None}
        return Recipe(**{**(QUICK if self.quick else FULL), **given})

    def climb(self, recipe: Recipe, rungs: dict, impossible: dict, files: list[Path]) -> dict:
        """Measure the rungs. The result is saved after each: the next one may be interrupted."""
        from cnnlab.measure.ladder import climb, ladder_result

        def save() -> dict[str, Any]:
            result = ladder_result(found.values(), impossible)
            for path in files:
                record.write_json(path, result)
            return result

        found: dict[str, Any] = {}
        short = self.quick or machine.describe().accelerators
        repeats = self.repeats or (3 if short else 5)
        gpu_seconds = 0.2 if self.quick else 2.0
        with tqdm(total=len(rungs), unit="rung", file=sys.stderr) as bar:
            for rung in climb(recipe, rungs, repeats, gpu_seconds=gpu_seconds):
                bar.set_description(f"{rung.name}, run {len(rung.measurement.images_per_s) + 1}")
                found[rung.name] = rung
                if rung.kept is not None and rung.name != "baseline":
                    bar.write(rung_line(rung), file=sys.stdout)
                    bar.update()
                    save()
        return save()


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict the throughput of a cluster on paper, or of this machine."""

    spec_file: Positional[SpecFile] = None  # the cluster: see cnnlab/measure/predictor.py
    here: FlagCreatePairsOff[bool] = False  # predict more ranks on this machine, then run them
    json: File = None  # write the predictions as JSON
    png: File = None  # draw them

    def run(self) -> None:
        if self.here == bool(self.spec_file):
            raise CnnlabError("predict needs a SPEC.json or --here, and not both.")
        for path in filter(None, (self.json, self.png)):
            record.check_writable(path)
        if self.spec_file:
            from cnnlab.measure.predictor import predict

            result = predict(read_json(self.spec_file, "spec"))
            print("\n".join(prediction_lines(result)))
        else:
            from cnnlab.measure.calibrate import predict_here

            result = predict_here()
        if self.json:
            record.write_json(self.json, result)
        if self.png:
            from cnnlab.plots import prediction_curve

            here = {row["ranks"]: row["efficiency"] for row in result.get("measured", [])}
            points = {"measured here": here} if here else {}
            draw(self.png, prediction_curve, result["predictions"], points)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Print a recorded run."""

    file: Positional[RecordFile]  # what `train --record` has saved

    def run(self) -> None:
        loaded = record.load(self.file)
        place = f"{loaded.machine['name']}, {loaded.machine['cores']} cores"
        versions = f"torch {loaded.versions['torch']}, commit {loaded.commit}"
        print(f"recorded {loaded.date} on {place}, {versions}")
        show(loaded.events)
        if loaded.truncated:
            print(f"cnnlab: the record is truncated: {loaded.truncated}.", file=sys.stderr)


def draw(path: Path, plot: Callable, *data: Any, title: str = "") -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    plot(figure.subplots(), *data)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def read_json(path: Path, kind: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CnnlabError(f"the {kind} {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CnnlabError(f"the {kind} {path} is not valid JSON: {error}.") from None


def save_run(folder: Path, recipe: Recipe, stream: Iterable[Event]) -> Iterator[Event]:
    """Save a run while it is consumed, in a file that no earlier run, even interrupted, has."""
    stem = f"{recipe.model}-{recipe.data}-{recipe.precision}-{recipe.ranks}"
    for number in count(1):
        path = folder / f"{stem}-{number}.jsonl"
        if not path.exists() and not path.with_name(f"{path.name}.part").exists():
            break
    return record.save(path, stream, machine.describe().to_dict())
