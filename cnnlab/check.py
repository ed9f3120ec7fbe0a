"""Tasks: compare a function that the learner writes with the reference, and print what differs.

The tasks are defined in notebooks/solutions/NUMBER_*.py, one file a lesson:
TASKS = {"12.1": Task(...), ...}.
"""

import ast
import copy
import inspect
import linecache
import re
import runpy
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cnnlab.recipe import CnnlabError
from cnnlab.values import difference, format_value

TIMEOUT = "did not finish"  # part of the error when ranks wait for each other
INDENT = "\n  "

_hints_printed: Counter[str] = Counter()


def build(task_id: str, function: Callable) -> Callable:
    """Test the learner's function, print the result, and return the function if it is right.

    Otherwise return the reference, so that the lesson continues. Raises `CnnlabError` if there is
    no such task.
    """
    task = _find_task(task_id)
    solved, lines = _examine(task, function)
    print(f"Task {task_id}: {'solved.' if solved else 'not yet.'}", *lines, sep=INDENT)
    if solved:
        return function
    print(f'Stuck? check.hint("{task_id}") prints a hint, check.solution("{task_id}") a solution.')
    print("Until your function is right, the lesson uses that solution.")
    vars(task.reference)["is_reference"] = True  # A second `build` must not accept it.
    return task.reference


def hint(task_id: str) -> None:
    """Print the next hint for a task. After the last one, print it again."""
    hints = _find_task(task_id).hints
    number = min(_hints_printed[task_id] + 1, len(hints))
    _hints_printed[task_id] = number
    print(f"Hint {number} of {len(hints)}: {hints[number - 1]}")


def solution(task_id: str) -> None:
    """Print the source of a task's reference, after the imports and constants that it uses."""
    reference = _find_task(task_id).reference
    print(*_definitions_for(reference), inspect.getsource(reference), sep="\n")


def _definitions_for(function: Callable) -> Iterator[str]:
    """The imports and assignments at the top of the function's file whose names it uses."""
    nodes = ast.walk(ast.parse(inspect.getsource(function)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    text = Path(inspect.getfile(function)).read_text(encoding="utf-8")
    for statement in ast.parse(text).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            names = [alias for alias in statement.names if (alias.asname or alias.name) in used]
            statement.names = names
            if names:
                yield ast.unparse(statement)
        elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) in used:
            yield str(ast.get_source_segment(text, statement))


def _find_task(task_id: str) -> "Task":
    lesson = task_id.partition(".")[0]
    repository = Path(__file__).parents[1]
    for folder in (Path.cwd(), *Path.cwd().parents, repository / "notebooks"):
        for path in folder.glob(f"solutions/{lesson}_*.py"):
            tasks = runpy.run_path(str(path))["TASKS"]
            if task_id not in tasks:
                raise CnnlabError(f"There is no task {task_id!r}. Choose from {', '.join(tasks)}.")
            return tasks[task_id]
    fix = "Keep the folder 'solutions' next to the notebooks."
    raise CnnlabError(f"There is no task {task_id!r}: no file solutions/{lesson}_*.py. {fix}")


def _examine(task: "Task", function: Callable) -> tuple[bool, list[str]]:
    """Whether the function is right for all inputs, and what to print."""
    name = task.reference.__name__
    if hasattr(function, "is_reference"):
        return False, [f"This {name} is the solution. Run the cell with yours, then this one."]
    signature = inspect.signature(task.run or task.reference)
    names = [parameter for parameter in signature.parameters if parameter != "function"]
    for values in _seeded(lambda: list(task.inputs())):
        arguments = dict(zip(names, values, strict=True))
        call = f"{name} for {format_value(arguments)}"
        got = _outcome(task, function, arguments)
        if _is_missing(arguments, got):
            return False, [f"{name} is not written yet."]
        expected = _outcome(task, task.reference, arguments)
        if isinstance(expected, Exception):
            return False, ["This machine cannot check it:", _describe(expected, task.reference)]
        if isinstance(got, Exception):
            return False, [call, _describe(got, function), *_explain(task, arguments, got)]
        if expected["result"] is None:  # The function only changes its arguments.
            got["result"] = None
        if lines := difference(expected, got, task.rtol, task.atol):
            return False, [call, *lines, *_explain(task, arguments, got)]
    part = next(name for name in expected if expected[name] is not None)
    lines = [call, f"{part}: expected {format_value(expected[part])}"]
    return True, [*lines, f"{part}: got      {format_value(got[part])}"]


def _outcome(task: "Task", function: Callable, arguments: dict[str, Any]) -> Any:
    """What the function returns, and its arguments afterwards; or the error that it raises."""
    arguments = copy.deepcopy(arguments)
    run = partial(task.run, function) if task.run else function
    try:
        result = _seeded(lambda: run(*arguments.values()))
    except Exception as error:  # a wrong answer, printed like any other
        return error
    return _name_parts(result, arguments)


def _seeded(call: Callable[[], Any]) -> Any:
    """call(), with torch's random numbers seeded, and their state restored afterwards."""
    import torch  # Here, because it takes seconds.

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return call()


def _name_parts(result: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"result": result, **{f"{name} afterwards": arguments[name] for name in arguments}}


def _is_missing(arguments: dict[str, Any], got: Any) -> bool:
    """Whether the function is still a stub: it returns nothing and changes no argument."""
    if isinstance(got, Exception):
        return "NotImplementedError" in _error_text(got)
    return _is_empty(got["result"]) and _equal(_name_parts(got["result"], arguments), got)


def _is_empty(result: Any) -> bool:
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (list, tuple)) and result:
        return all(map(_is_empty, result))
    return result is None or result is ...


def _explain(task: "Task", arguments: dict[str, Any], got: Any) -> list[str]:
    """The message for the typical mistake that has the same outcome as the learner's function."""
    if isinstance(got, Exception) and TIMEOUT in str(got):
        return ["Here a rank waits for a message that the other rank has not sent."]
    for mistake, message in task.mistakes.items():
        if message != TIMEOUT and _equal(_outcome(task, mistake, arguments), got):
            return [message]
    return []


def _equal(outcome: Any, other: Any) -> bool:
    if isinstance(outcome, Exception) or isinstance(other, Exception):
        return _error_text(outcome) == _error_text(other)
    return not difference(outcome, other, 1e-5, 1e-6)


def _describe(error: Exception, function: Callable) -> str:
    """The error, and the line of the learner's code that raised it."""
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    name = getattr(function, "__name__", "")
    message = f"rank {error.rank}: " if hasattr(error, "rank") else ""
    message += _error_text(error)
    # The error of a rank has the traceback, or the stack of a rank that waits, as text.
    text = getattr(error, "traceback", "") or "".join(traceback.format_exception(error))
    frames = re.findall(r'File "(.+?)", line (\d+),? in (\S+)', text)
    numbers = [int(number) for path, number, where in frames if path == file or where == name]
    if not numbers:
        return message
    # The traceback of an error ends with the last call, the stack of a rank begins with it.
    number = numbers[-1] if "Traceback" in text else numbers[0]
    source = linecache.getline(file, number).strip()
    return f"{message}{INDENT}in line {number} of your cell: {source}"


def _error_text(error: Any) -> str:
    """The error in one line, without the rank."""
    text = error.error if hasattr(error, "rank") else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A function that the learner writes, and what is needed to check it and to help.

    A result is wrong if abs(got - expected) > atol + rtol * abs(expected).
    """

    reference: Callable  # a solution
    inputs: Callable[[], Iterable[tuple]]  # its arguments, random: torch is seeded
    run: Callable | None = None  # run(function, *arguments) -> what to compare: from ranks, say
    hints: list[str]  # from the idea to almost the code
    # Wrong solutions, and what to tell a learner whose function has the same outcome. Use TIMEOUT
    # for one in which ranks wait for each other.
    mistakes: dict[Callable, str]
    rtol: float = 1e-4
    atol: float = 1e-5
