"""Runs on disk: JSON lines, first a header that says what ran where, then the run's events."""

import json
import os
import re
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cnnlab.events import Event, Failed, Finished, Started, from_dict, to_dict
from cnnlab.recipe import CnnlabError, Recipe

FORMAT = 2
WRITE_FIX = "Free some space, or choose a folder that you can write to."
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
RECORDED = NOTEBOOKS / "recorded"


def save(path: str | Path, events: Iterable[Event], machine: dict[str, Any]) -> Iterator[Event]:
    """Write the events of a run to `path` while passing them through.

    `machine` is `Machine.to_dict()`. The file takes its final name when the run is over, so that a
    record is complete or absent. An interrupted run leaves `path.part`, which `load` also reads.
    Raises `CnnlabError` if the file cannot be written.
    """
    path = expand_home(path)
    part = _part_path(path)
    with write_errors(path):
        part.write_text("")
    header_written = False
    pending: list[dict] = []  # a run can fail and restart before its first rank starts
    for event in events:
        pending.append(to_dict(event))
        if isinstance(event, Started) and not header_written:
            pending.insert(0, _header(event.recipe, machine))
            header_written = True
        if header_written:
            with write_errors(path), open(part, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(value) + "\n" for value in pending)
            pending.clear()
        yield event
    with write_errors(path):
        os.replace(part, path)


def load(path: str | Path) -> "Record":
    """The `Record` at `path`.

    A torn last line is dropped and named in `Record.truncated`. Raises `CnnlabError` if the file is
    missing, damaged, or not a record.
    """
    path = expand_home(path)
    values, truncated = _read_lines(path)
    try:
        header = values[0]
        if header["cnnlab"] != FORMAT:
            raise CnnlabError(f"it has format {header['cnnlab']}; this version reads {FORMAT}.")
        recipe = Recipe.from_dict(header["recipe"])
        events = [from_dict(value) for value in values[1:]]
        types = [type(event) for event in events]
        if types.count(Finished) < recipe.ranks and Failed not in types:
            truncated = truncated or "the end of the run is missing"
        rest = {name: header[name] for name in ("machine", "versions", "commit", "date")}
        return Record(recipe=recipe, events=events, truncated=truncated, **rest)
    except CnnlabError as error:
        raise CnnlabError(f"the record {path} cannot be used: {error}") from None
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise CnnlabError(
            f"{path} is damaged or not a cnnlab record ({type(error).__name__}: {error})."
        ) from None


def replay(path: str | Path, tempo: float | None = None) -> Iterator[Event]:
    """The events of a recorded run, as `launcher.run` yields them. Warns if it is truncated.

    `tempo`: None for no pauses, 1 for the speed of the run, 10 for ten times that speed.
    """
    record = load(path)
    if record.truncated:
        warnings.warn(
            f"{path} is truncated: {record.truncated}. Replaying the {len(record.events)} events.",
            stacklevel=2,
        )
    clock = 0.0
    for event in record.events:
        seconds = getattr(event, "seconds", clock)
        if tempo and seconds > clock:
            time.sleep((seconds - clock) / tempo)
        clock = max(clock, seconds)
        yield event


def recorded_ladders(folder: Path = RECORDED) -> dict[str, dict]:
    """The ladders of other machines that ship with the lessons: {name: `ladder_result(...)`}."""
    paths = sorted(folder.glob("ladder-*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def file_name(kind: str, machine: dict[str, Any]) -> str:
    """Name of a file about a machine, such as "ladder-nvidia-h200.json"."""
    gpus = machine["gpus"]
    name = gpus[0] if gpus else f"{machine['name']} {machine['cores']} cores"
    slug = re.sub(r"\W+", "-", name.lower()).strip("-")
    return f"{kind}-{slug}.json"


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON. An existing file is replaced only by a complete one."""
    path = expand_home(path)
    part = _part_path(path)
    text = json.dumps(value, indent=1) + "\n"
    with write_errors(path):
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def check_writable(path: str | Path) -> None:
    """Raise `CnnlabError` before the work, rather than after it, if `path` cannot be written."""
    part = _part_path(path)
    with write_errors(path):
        part.write_text(" " * 65536)  # on a full disk, opening succeeds and writing fails
        part.unlink()


def expand_home(path: str | Path) -> Path:
    """The path with ~ expanded. Raises `CnnlabError` if the user has no home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise CnnlabError(f"{path} cannot be used: there is no home folder. Set HOME.") from None


@contextmanager
def write_errors(path: str | Path, fix: str = WRITE_FIX) -> Iterator[None]:
    """A context in which an `OSError` becomes a `CnnlabError` about writing `path`."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, fix) from None


def cannot_write(path: str | Path, error: BaseException, fix: str = WRITE_FIX) -> CnnlabError:
    """The error to raise after writing `path` failed with `error`."""
    reason = getattr(error, "strerror", None) or error
    return CnnlabError(f"cannot write {path}: {reason}. {fix}")


def git_commit() -> str | None:
    """Git commit of this code, with "+changes" if it was edited; None outside a checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        edited = _git("status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+changes" if edited else commit


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()


def _part_path(path: str | Path) -> Path:
    """`path.part` in a folder that exists."""
    path = expand_home(path)
    if path.is_dir():
        raise CnnlabError(f"cannot write {path}: it is a folder. Choose a file name in it.")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".part")


def _header(recipe: Recipe, machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "cnnlab": FORMAT,
        "recipe": recipe.to_dict(),
        "machine": machine,
        "versions": machine["versions"],
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _read_lines(path: Path) -> tuple[list, str | None]:
    """(JSON value of each line, description of a torn last line or None)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        found = ", ".join(sorted(file.name for file in path.parent.glob("*.jsonl"))) or "no records"
        raise CnnlabError(f"there is no record {path}. The folder has {found}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CnnlabError(f"the record {path} cannot be read: {error}.") from None
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError:
            if number == len(lines) and number > 1:
                return values, f"the last line ({number}) is torn"
            reason = f"the record {path} is damaged in line {number}: it is not JSON."
            raise CnnlabError(f"{reason} Record it again.") from None
    return values, None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A loaded run. `truncated` says what is missing at its end; None if it is complete."""

    recipe: Recipe
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    date: str
    events: list[Event]
    truncated: str | None
