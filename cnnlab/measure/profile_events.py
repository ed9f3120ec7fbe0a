"""The events of torch.profiler as spans on a timeline: which operation ran where, and when."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.autograd import DeviceType

# In the names of operations and of GPU kernels:
ARITHMETIC = re.compile(
    r"conv(?!ert)|(?<![a-z])(add|b|baddb)?mm(?![a-z])|(?<![a-z])linear|gemm|cutlass|xmma|nvjet"
    r"|cijk_|winograd|wgrad|dgrad|fprop"
)
# Generated kernels, whose names also list what was fused into them:
FUSED_PREFIXES = ("triton_poi", "triton_per", "triton_red")
COLLECTIVES = re.compile("c10d|nccl|oneccl")  # a CPU may wait for other ranks in them
COPY = re.compile("HtoD|DtoH|HostToDevice|DeviceToHost|M2D|D2M|(cuda|hip)Memcpy")
# In the names of the events with which torch marks its own steps:
LOADER, OPTIMIZER, STEP = "enumerate(DataLoader)", "Optimizer.", "ProfilerStep"
OPERATION = re.compile(r"(?!autograd|torch::|_?c10d)\w.*::")  # others may wait for other ranks
GRAPH = "## Call CompiledFxGraph"  # its own time on a CPU is that of the generated kernels
AUTOGRAD = "autograd::engine::evaluate_function: "
RANGES = (GRAPH, "Torch-Compiled Region", "CompiledFunction", AUTOGRAD + "CompiledFunction")
PARTS = ("communication", "synchronize", "arithmetic", "copies", "memory")  # first counts most
LANES = ("labels", "loader", "CPU", "GPU", "communication")  # how their names begin, in order


class Span(NamedTuple):
    """An operation on the timeline, in seconds since the first step that is shown."""

    name: str
    start: float
    end: float
    category: str  # a key of `plots.profiling.CATEGORIES`


def is_arithmetic(name: str) -> bool:
    """Whether the operation or GPU kernel of that name is a convolution or a matrix product."""
    return bool(ARITHMETIC.search(name.lower())) and not name.startswith(FUSED_PREFIXES)


def readable_name(name: str) -> str:
    """The name of an operation or kernel without namespaces, templates and arguments."""
    if name.startswith(LOADER):
        return "next batch"
    if name.startswith(GRAPH):
        return "compiled graph"
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.split("[<(]", name)[0].strip()
    name = re.split("::|[#:] ?", name)[-1]
    return re.sub(r"Backward\d+$", " backward", name)


def sorted_events(profiler: Any) -> list[Any]:
    """The events of a finished `torch.profiler.profile`, without a loader's last, empty fetch."""
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    events = [event for event in events if getattr(event, "activity_type", "") != "overhead"]
    updates = _begin_with(events, OPTIMIZER + "step")
    if not updates:
        return events
    end = updates[-1].time_range.start
    return [e for e in events if e.time_range.start < end or not e.name.startswith(LOADER)]


def find_steps(events: Sequence[Any]) -> tuple[list[float], int]:
    """(when each step begins, in seconds; number of steps, 0 if unknown) of the events."""
    marks, updates, loads = (_begin_with(events, x) for x in (STEP, OPTIMIZER + "step", LOADER))
    starts = [event.time_range.start for event in marks or loads]
    if not starts:
        starts = [event.time_range.start for event in events[:1]] or [0.0]
        starts += [event.time_range.end for event in updates[:-1]]
    return [start / 1e6 for start in starts], len(marks) or len(updates) or len(loads)


def _begin_with(events, text):
    return [e for e in events if e.device_type == DeviceType.CPU and e.name.startswith(text)]


def make_lanes(events: Sequence[Any]) -> tuple[dict[str, list[Span]], list[tuple[str, float]]]:
    """({lane: spans}, [(part, seconds) of each GPU kernel or, without a GPU, CPU operation])."""
    lanes: dict[str, list[Span]] = defaultdict(list)
    owners: dict[int, Span] = {}  # by the numbers of the operations in them
    threads: dict[int, int] = {}
    on_device = [event for event in events if event.device_type != DeviceType.CPU]
    base = "CPU launches" if on_device else "CPU thread"
    leaves: list[tuple[str, float]] = []
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        if _is_label(event):
            label = _span(event, "label")
            if not lanes["labels"] or label.start >= lanes["labels"][-1].end:  # not in another
                lanes["labels"].append(label)
        if event.cpu_parent is not None:
            continue
        for span, members in _cpu_spans(event):
            lane = _own_category(event.name)
            if lane not in ("loader", "communication"):
                number = threads.setdefault(event.thread, len(threads) + 1)
                lane = base if number == 1 else f"{base} {number}"
                leaves += [] if on_device else _own_times(members)
            lanes[lane].append(span)
            owners.update((op.id, span) for op in members if not _launched_by(op))
    for event in on_device:
        if event.is_user_annotation:  # a range over kernels
            continue
        span = _device_span(event, owners.get(_launched_by(event)))
        if span.category == "communication":
            lanes["communication"].append(span)
            continue
        lanes[f"GPU stream {event.device_resource_id}"].append(span)
        leaves.append((_part(event.name), span.end - span.start))
    ordered = [lane for start in LANES for lane in lanes if lane.startswith(start)]
    return {lane: lanes[lane] for lane in ordered if lanes[lane]}, leaves


def _launched_by(event):
    """The id of the operation that launched a kernel or called the GPU's library, else 0."""
    return getattr(event, "linked_correlation_id", 0)


def _is_label(event):
    """Whether a program has marked this time with `record_function`."""
    ours = event.name.startswith((STEP, "nccl:")) or _own_category(event.name)
    return event.is_user_annotation and not ours


def _cpu_spans(event):
    """(span, the events in it) of each operation to show of an event that no other contains."""
    name, category = event.name, _own_category(event.name)
    of_python = getattr(event, "is_python_function", False)  # not in all versions of torch
    is_range = event.is_user_annotation or of_python or name.startswith(RANGES)
    if category is None and name.startswith(GRAPH):
        yield from _graph_spans(event)
    elif category is None and is_range:
        for child in event.cpu_children:
            yield from _cpu_spans(child)
    else:
        members = list(_subtree(event))
        parts = {_part(member.name) for member in members}
        yield _span(event, category or min(parts, key=PARTS.index)), members


def _graph_spans(event):
    """`_cpu_spans` of a compiled graph: generated kernels run between the operations it calls."""
    until, members = event.time_range.start, [event]
    for child in event.cpu_children:
        yield _span(event, "memory", until, child.time_range.start), members
        yield from _cpu_spans(child)
        until, members = child.time_range.end, []
    yield _span(event, "memory", until), members


def _subtree(event):
    yield event
    for child in event.cpu_children:
        yield from _subtree(child)


def _device_span(event, operation):
    """The span of a kernel or copy on a GPU, with the name of the operation that launched it."""
    category = _part(event.name)
    if operation is None or category == "copies":
        return _span(event, category)
    if operation.category == "optimizer" and category != "communication":
        category = "optimizer"
    return _span(event, category)._replace(name=operation.name)


def _span(event, category, start=None, end=None):
    start = event.time_range.start if start is None else start
    end = event.time_range.end if end is None else end
    return Span(readable_name(event.name), start / 1e6, end / 1e6, category)


def _own_category(name):
    """The category of an operation that its own name tells, else None."""
    if name.startswith(LOADER):
        return "loader"
    if name.startswith(OPTIMIZER):
        return "optimizer"
    return "communication" if name.startswith(("gloo:", "mpi:")) else None


def _part(name):
    """The category of a kernel, an operation, or a call of the GPU's library, by its name."""
    if COLLECTIVES.search(name):
        return "communication"
    if "Synchronize" in name:
        return "synchronize"
    if COPY.search(name):
        return "copies"
    return "arithmetic" if is_arithmetic(name) else "memory"


def _own_times(events):
    """(part, seconds) of each operation on the CPU, without those that it calls."""
    for event in events:
        seconds = event.self_cpu_time_total / 1e6
        if seconds and (event.name.startswith(GRAPH) or OPERATION.match(event.name)):
            yield "arithmetic" if is_arithmetic(event.name) else "memory", seconds
