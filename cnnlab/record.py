"""Runs on disk: JSON lines, the first saying what ran where, then the run's events. Also the records that ship."""

import json
import os
import re
import subprocess
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from cnnlab.events import Failed, Finished, Started, from_dict, to_dict
from cnnlab.recipe import CnnlabError, Recipe

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Record:
    """A loaded run. `truncated` says what is missing at its end, or is None when it is whole."""

    recipe: Recipe
    machine: dict
    versions: dict
    commit: str | None
    date: str
    events: list
    truncated: str | None


def save(path, events, machine):
    """Pass the events of a run through, writing each to `path`; `machine` is `Machine.to_dict()`.

    Lines go to `path.part`, which takes the final name only when the run is over: a record is whole or not there.
    An interrupted run leaves its `.part`, which `load` reads as well. Raises `CnnlabError` where it cannot be written.
    """
    path = Path(path)
    with _atomic_file(path) as file:
        headed, early = (
            False,
            [],
        )  # before the first start there may have been a failure and a restart
        for event in events:
            if isinstance(event, Started) and not headed:  # of whichever rank starts first
                headed = True
                _write_line(
                    file,
                    path,
                    {
                        "cnnlab": FORMAT,
                        "recipe": event.recipe.to_dict(),
                        "machine": machine,
                        "versions": machine["versions"],
                        "commit": git_commit(),
                        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    },
                )
            early.append(event)
            while headed and early:
                _write_line(file, path, to_dict(early.pop(0)))
            yield event


def load(path):
    """The `Record` at `path`. A torn last line is left out and named in `truncated`; other damage raises `CnnlabError`."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise CnnlabError(f"there is no record {path}. {_list_records(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CnnlabError(f"the record {path} cannot be read: {error}.") from None
    values, torn = [], None
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError:
            if number < len(lines) or number == 1:
                raise CnnlabError(
                    f"the record {path} is damaged in line {number}: it is no JSON. Record the run again."
                ) from None
            torn = f"the last line ({number}) is torn"
    try:
        header = values[0]
        if header["cnnlab"] != FORMAT:
            raise CnnlabError(
                f"it has format {header['cnnlab']}; this version of cnnlab reads {FORMAT}."
            )
        events = [from_dict(value) for value in values[1:]]
        recipe = Recipe.from_dict(header["recipe"])
        ends = [type(event) for event in events]
        ended = ends.count(Finished) >= recipe.replicas or Failed in ends
        return Record(
            recipe=recipe,
            events=events,
            truncated=torn or (None if ended else "the run's end is missing"),
            **{name: header[name] for name in ("machine", "versions", "commit", "date")},
        )
    except CnnlabError as error:
        raise CnnlabError(f"the record {path} cannot be used: {error}") from None
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise CnnlabError(
            f"the record {path} is no cnnlab record, or damaged ({type(error).__name__}: {error})."
        ) from None


def replay(path, tempo=None):
    """The events of a recorded run, as `launcher.run` would yield them; warns when the record is truncated.

    `tempo`: None, all at once; 1, as fast as it ran; 10, ten times as fast.
    """
    record = load(path)
    if record.truncated:
        warnings.warn(
            f"{path} is truncated: {record.truncated}. The {len(record.events)} events before it are replayed.",
            stacklevel=2,
        )
    clock = 0.0
    for event in record.events:
        seconds = getattr(event, "seconds", clock)
        if tempo and seconds > clock:
            time.sleep((seconds - clock) / tempo)
        clock = max(clock, seconds)
        yield event


def recorded_ladders(folder=Path(__file__).parent.parent / "notebooks" / "recorded"):
    """The ladders of other machines that ship with the lessons: {name: what `cnnlab ladder --json` wrote there}."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("ladder-*.json"))
    }


def file_name(kind, machine):
    """What a file about a machine (as JSON has it) is called, such as "ladder-nvidia-h200.json" or "device-amd-epyc-2-cores.json"."""
    name = machine["gpus"][0] if machine["gpus"] else f"{machine['name']} {machine['cores']} cores"
    return f"{kind}-" + re.sub(r"\W+", "-", name.lower()).strip("-") + ".json"


def write_json(path, value):
    """Write `value` as JSON to `path` in one step: the old file stays whole until the new one is."""
    path = Path(path)
    with _atomic_file(path) as file:
        _write_line(file, path, value, indent=1)


def check_writable(path):
    """Raise `CnnlabError` now if `path` cannot be written, rather than after the work."""
    path = Path(path)
    part = _partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w") as file:
            file.write(" " * 65536)  # a full disk refuses the bytes, not the name
        part.unlink()
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(
    path: str | Path,
    error: BaseException,
    fix: str = "Free some space, or choose a folder that you can write to.",
) -> CnnlabError:
    """The error to raise when writing `path` failed with `error`."""
    reason = getattr(error, "strerror", None) or error
    return CnnlabError(f"cannot write {path}: {reason}. {fix}")


def git_commit():
    """The git commit of this code, '+changes' behind it where it was edited; None where it is not a checkout."""
    folder = Path(__file__).parent
    try:
        git = lambda *words: subprocess.run(
            ["git", "-C", folder, *words], capture_output=True, text=True, check=True
        ).stdout.strip()
        return git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", folder) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def _atomic_file(path):
    """A file that takes the name `path` when the block is left without an error."""
    part, whole = _partial_path(path), False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "w", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        yield file
        whole = True
    finally:
        try:
            file.close()  # on a full disk this fails, too
            if whole:
                os.replace(part, path)
        except OSError as error:
            raise cannot_write(path, error) from None


def _partial_path(path):
    if path.is_dir():
        raise CnnlabError(f"cannot write {path}: it is a folder. Name a file in it.")
    return path.with_name(path.name + ".part")


def _write_line(file, path, value, indent=None):
    try:
        file.write(json.dumps(value, indent=indent) + "\n")
        file.flush()
    except OSError as error:
        raise cannot_write(path, error) from None


def _list_records(path):
    names = (
        sorted(other.name for other in path.parent.glob("*.jsonl")) if path.parent.is_dir() else []
    )
    return (
        f"The folder has {', '.join(names)}."
        if names
        else f"There are no records in {path.parent}."
    )
