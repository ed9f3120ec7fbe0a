"""The command line: `python -m cnnlab doctor | train | ladder | replay`."""

import argparse
import json
import os
import sys
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import get_args

from cnnlab.recipe import CHOICES, CnnlabError, Recipe

QUICK = {"batch_size": 64, "steps": 3, "warmup_steps": 1}


FULL = {"batch_size": 128, "steps": 22, "warmup_steps": 2}


def main(words=None):
    """Run one command. Returns the exit code: 0; 1 when a run failed; 2 when what was asked for cannot be done."""
    options = parser().parse_args(words)
    try:
        return options.command(options) or 0
    except CnnlabError as error:
        print(f"cnnlab: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from cnnlab.launch.launcher import RankError
        from cnnlab.launch.worker import PEER_ERRORS

        if "TORCHELASTIC_RUN_ID" in os.environ and any(word in str(error) for word in PEER_ERRORS):
            error = f"rank {os.environ['RANK']} has lost another rank: {str(error).strip().splitlines()[0]}"
        elif not isinstance(error, RankError):
            raise
        print(f"cnnlab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cnnlab: interrupted; the processes were stopped.", file=sys.stderr)
        return 130


def parser():
    top = argparse.ArgumentParser(
        prog="python -m cnnlab", description="Train one CNN, measure it honestly, make it faster."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    doctor_ = commands.add_parser("doctor", help="what this machine can do, what it lacks and why")
    doctor_.add_argument("--json", type=Path, metavar="FILE", help="write it as JSON too")
    doctor_.set_defaults(command=doctor)

    train_ = commands.add_parser("train", help="train a recipe")
    train_.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="RECIPE.json",
        help="a recipe; options below change it",
    )
    train_.add_argument("--record", type=Path, metavar="DIR", help="save the run in this folder")
    train_.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="keep checkpoints in this folder, and go on from the newest",
    )
    train_.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start all ranks anew up to N times after one has failed",
    )
    _recipe_options(train_, [field.name for field in fields(Recipe)])
    train_.set_defaults(command=train)

    ladder_ = commands.add_parser(
        "ladder", help="try every technique, keep those that pay, name the best recipe"
    )
    ladder_.add_argument(
        "--quick",
        action="store_true",
        help="few steps and repeats: about a minute, wider intervals",
    )
    ladder_.add_argument(
        "--repeats", type=int, metavar="N", help="runs of each rung (default: 3 quick, else 5)"
    )
    ladder_.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    ladder_.add_argument("--png", type=Path, metavar="FILE", help="draw the result")
    ladder_.add_argument(
        "--record",
        type=Path,
        metavar="DIR",
        help="save the ladder, a run of its best recipe, and what lessons 06 and 09 measure, in this folder",
    )
    _recipe_options(
        ladder_,
        [
            "model",
            "width",
            "data",
            "images",
            "image_size",
            "classes",
            "batch_size",
            "steps",
            "seed",
        ],
    )
    ladder_.set_defaults(command=ladder)

    replay_ = commands.add_parser("replay", help="show a recorded run")
    replay_.add_argument("file", type=Path, metavar="RECORD.jsonl")
    replay_.set_defaults(command=replay)
    return top


def doctor(options):
    from cnnlab import machine, record

    if options.json:
        record.check_writable(options.json)
    print("measuring ...", end="\r", file=sys.stderr)
    from cnnlab.measure.peaks import peaks as measure_peaks

    found, peaks = machine.describe(), measure_peaks()
    rows = {
        "processor": found.name,
        "system": found.system,
        "cores": found.cores,
        "memory": f"{found.memory_gib} GiB",
        "vector and matrix units": ", ".join(found.units) or "none known",
        "GPUs": ", ".join(found.gpus) or "none",
        "C++ compiler": found.compiler or "none",
        "computed in hardware": ", ".join(name for name, own in found.hardware.items() if own),
        "emulated": ", ".join(name for name, own in found.hardware.items() if not own) or "nothing",
        **found.versions,
        **{
            f"peak {name}": f"{value / 1e9:,.0f} GFLOP/s measured"
            for name, value in peaks.items()
            if name != "copy"
        },
        "copy bandwidth": f"{peaks['copy'] / 1e9:.1f} GB/s measured (reads and writes)",
    }
    for name, value in rows.items():
        print(f"{name:24} {value}")
    for name, reason in found.missing.items():
        print(f"missing: {name:15} {reason}")
    if options.json:
        record.write_json(
            options.json, {"machine": found.to_dict(), "versions": found.versions, "peaks": peaks}
        )


def train(options):
    """Train here, or, under torchrun, as one of its ranks: rank 0 then prints and records for all."""
    from cnnlab import machine, record

    recipe = _recipe(options, _read_recipe(options.file) if options.file else {})
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from cnnlab.launch.worker import train_under_torchrun

        recipe = recipe.replace(replicas=int(os.environ["WORLD_SIZE"]))
        events, speaks = train_under_torchrun(recipe, options.checkpoint), os.environ["RANK"] == "0"
    else:
        from cnnlab.launch.launcher import run

        events, speaks = (
            run(recipe, checkpoints=options.checkpoint, max_restarts=options.max_restarts),
            True,
        )
    if not speaks:
        return sum(0 for _ in events)  # the exit code
    if options.record:
        events = record.save(
            _record_path(options.record, recipe), events, machine.describe().to_dict()
        )
    _show(events)


def ladder(options):
    from tqdm.auto import tqdm

    from cnnlab import record
    from cnnlab.machine import describe
    from cnnlab.measure.ladder import climb, ladder_result, techniques

    device = "cuda" if describe().gpus else "cpu"
    recorded = options.record and options.record / record.file_name("ladder", describe().to_dict())
    recipe = _recipe(
        options, {"model": "ResNet9", "learning_rate": 0.001, **(QUICK if options.quick else FULL)}
    )
    if options.repeats is not None and options.repeats < 2:
        raise CnnlabError(
            f"--repeats {options.repeats} is not allowed: a spread needs at least 2 runs."
        )
    repeats = options.repeats or (3 if options.quick else 5)
    for path in filter(None, (options.json, options.png, recorded)):
        record.check_writable(path)  # before the work, not after it
    rungs, impossible = techniques(describe())
    if options.quick and rungs.pop("compiled except pooling", None):
        impossible["compiled except pooling"] = (
            "--quick compiles once only; without it, this rung is tried, too"
        )
    found = {}

    def save():
        """What there is so far: whatever ends the climb, the rungs that were measured stay."""
        outcome = ladder_result(found.values(), impossible)
        for path in filter(None, (options.json, recorded)):
            record.write_json(path, outcome)
        return outcome

    with tqdm(total=len(rungs), unit="rung", file=sys.stderr) as bar:
        for rung in climb(recipe, rungs, repeats, seconds=0 if options.quick else 4.0):
            bar.set_description(f"{rung.name}, run {len(rung.measurement.images_per_s) + 1}")
            found[rung.name] = rung
            if rung.kept is not None and rung.name != "baseline":
                bar.write(_rung_line(rung), file=sys.stdout)
                bar.update()
                save()
    for name, reason in impossible.items():
        print(f"{name:24} not tried: {reason}")
    outcome = save()
    best = next(rung for rung in outcome["rungs"] if rung["name"] == outcome["best"])
    print(
        f"\nbest here: {outcome['best']}, {best['speedup']:.2f} times the naive baseline: {outcome['best_recipe']}"
    )
    if options.png:
        _draw(outcome, options.png)
    if options.record:
        from cnnlab.launch.launcher import run

        best_recipe = Recipe.from_dict(best["recipe"])
        for _ in record.save(
            _record_path(options.record, best_recipe), run(best_recipe), describe().to_dict()
        ):
            pass


def replay(options):
    from cnnlab import record

    loaded = record.load(options.file)
    print(
        f"recorded {loaded.date} on {loaded.machine['name']}, {loaded.machine['cores']} cores, torch {loaded.versions['torch']}, "
        f"commit {loaded.commit}"
    )
    _show(iter(loaded.events))
    if loaded.truncated:
        print(f"cnnlab: the record is truncated: {loaded.truncated}.", file=sys.stderr)


def _show(events):
    """Print a run: a bar while it trains, a line at each evaluation and at the end."""
    from tqdm.auto import tqdm

    from cnnlab.events import (
        Checkpointed,
        Evaluated,
        Failed,
        Finished,
        Progress,
        Restarted,
        Started,
    )

    first = list(islice(events, 1))  # before the bar: a refusal then stands alone
    with tqdm(
        unit="step", file=sys.stderr, leave=False, disable=None
    ) as bar:  # None: off where nobody looks
        for event in chain(first, events):
            if isinstance(event, Failed):
                bar.write(f"rank {event.rank} failed: {event.error}", file=sys.stdout)
            elif isinstance(event, Restarted):
                bar.write(
                    f"rank {event.rank} failed: {event.error}. All ranks start anew, for time {event.attempt}",
                    file=sys.stdout,
                )
            if event.rank:
                continue
            if isinstance(event, Started):
                bar.reset(event.steps)
                bar.update(event.first_step)
                if event.first_step:
                    bar.write(
                        f"goes on from the checkpoint of step {event.first_step}", file=sys.stdout
                    )
                bar.write(
                    f"{event.recipe.model}, {event.parameters:,} parameters; {event.train_images:,} images to train on, "
                    f"{event.test_images:,} held out; {event.world} rank{'s' * (event.world > 1)}",
                    file=sys.stdout,
                )
            elif isinstance(event, Progress):
                bar.update(event.step - bar.n)
                bar.set_postfix_str(
                    f"loss {event.losses[-1]:.3f}, {event.images_per_s:,.0f} images/s"
                )
            elif isinstance(event, Checkpointed):
                bar.write(
                    f"step {event.step:5}: checkpoint written in {event.took_s:.2f} s",
                    file=sys.stdout,
                )
            elif isinstance(event, Evaluated):
                bar.write(
                    f"epoch {event.epoch:3}: held-out accuracy {100 * event.accuracy:.1f}%, loss {event.loss:.3f}",
                    file=sys.stdout,
                )
            elif isinstance(event, Finished):
                bar.write(
                    f"{event.images:,} images in {event.seconds:.1f} s, of which {event.warmup_s:.1f} s warm-up; then {event.images_per_s:,.0f} images/s "
                    f"({1000 * event.step_s:.1f} ms a step: {1000 * event.waiting_s:.1f} waiting for data"
                    + (
                        ""
                        if event.communication_s is None
                        else f", {1000 * event.communication_s:.1f} for other ranks"
                    )
                    + "); "
                    f"peak memory {event.peak_memory_mib:,.0f} MiB",
                    file=sys.stdout,
                )


def _rung_line(rung):
    if rung.failed:
        return f"{rung.name:24} failed, left out: {rung.failed}"
    verdict = "kept" if rung.kept else "does not pay, left out"
    return (
        f"{rung.name:24} {rung.measurement.quartiles[1]:10,.0f} images/s  {rung.over_baseline.value:5.2f}x baseline  "
        f"{verdict}: {rung.over_below}"
    )


def _draw(outcome, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    from cnnlab.plots import speed, style

    speed.ladder_bars(figure.subplots(), outcome["rungs"])
    machine, versions = outcome["machine"], outcome["versions"]
    title = (
        f"{outcome['recipe']['model']} on {style.machine_label(machine)}, torch {versions['torch']}"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def _recipe_options(parser, names):
    """An option for each field of a recipe, such as --batch-size."""
    group = parser.add_argument_group("the recipe")
    read = {bool: lambda text: {"true": True, "false": False}.get(text.lower(), text)}
    for field in fields(Recipe):
        if field.name in names:
            kind = str if field.name in CHOICES else (*get_args(field.type), field.type)[0]
            choices = filter(None, CHOICES.get(field.name, [field.name.upper()]))
            default = "" if field.default is None else f"default: {field.default}"
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                type=read.get(kind, kind),
                default=argparse.SUPPRESS,
                metavar="|".join(choices),
                help=default,
            )


def _recipe(options, values):
    """The recipe of `values`, changed by what was given on the command line."""
    given = {
        field.name: getattr(options, field.name)
        for field in fields(Recipe)
        if hasattr(options, field.name)
    }
    return Recipe.from_dict({**values, **given} if isinstance(values, dict) else values)


def _read_recipe(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CnnlabError(f"the recipe {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CnnlabError(f"the recipe {path} is no JSON: {error}.") from None


def _record_path(folder, recipe):
    """A name that no earlier run has."""
    stem = f"{recipe.model}-{recipe.data}-{recipe.precision}-{recipe.replicas}"
    taken = lambda number: any(
        (folder / f"{stem}-{number}.jsonl{end}").exists() for end in ("", ".part")
    )  # .part: it was interrupted
    number = next(number for number in range(1, 1_000_000) if not taken(number))
    return folder / f"{stem}-{number}.jsonl"
