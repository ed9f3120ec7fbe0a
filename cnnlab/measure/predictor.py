"""The predictor: how fast training would be on a cluster that is described on paper."""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np

from cnnlab.measure import cost_models
from cnnlab.recipe import CnnlabError, suggest

MIB = 2**20
GBIT = 1e9 / 8  # bytes
BACKWARD_FRACTION = 2 / 3

# What a field may be: in words, its type, and the range of a number.
POSITIVE = ("a number above 0 (1e-30 to 1e30)", Real, 1e-30, 1e30)
NOT_NEGATIVE = ("a number from 0 to 1e30", Real, 0, 1e30)
FACTOR = ("a number from 1 to 1e30", Real, 1, 1e30)
FRACTION = ("a number above 0 and up to 1", Real, 1e-30, 1)
COUNT = ("an integer from 1 to 1,000,000,000", Integral, 1, 10**9)
WORKERS = ("an integer from 0 to 1,000,000", Integral, 0, 10**6)
FLAG = ("true or false", bool)
TEXT = ("a text", str)
ALGORITHM = ("'ring', 'tree', 'hierarchical' or 'fastest'", (*cost_models.ALGORITHMS, "fastest"))
COUNTS = ("a list of integers from 1 to 1,000,000,000, at least one", list)
STAGES = ("a list of numbers above 0, at least one", list)
LAYERS = ('a list of {"parameters": ..., "backward_share": ...}, the first layer first', list)

REQUIRED = {
    "model.parameters": POSITIVE,
    "model.bytes_per_parameter": POSITIVE,  # of a gradient
    "device.images_per_s": POSITIVE,  # of one device that trains the whole model alone
    "device.batch": POSITIVE,  # images per micro-batch of one replica of the model
    "node.devices": COUNT,
    "node.bandwidth_gbps": POSITIVE,  # Gbit/s that a device can send inside its node
    "node.latency_us": NOT_NEGATIVE,
    "network.bandwidth_gbps": POSITIVE,  # Gbit/s that a node can send
    "network.latency_us": NOT_NEGATIVE,
    "devices": COUNTS,
}

# {field that may be left out: (what is allowed, its default, where that comes from)}. One set for
# all clusters, chosen for today's stacks, which overlap NCCL's all-reduces with the backward pass.
OPTIONAL: dict[str, tuple[tuple, Any, str]] = {
    "model.name": (TEXT, "", "has no effect"),
    "model.layers": (LAYERS, [], "gradients become ready at a constant rate during backward"),
    "network.efficiency": (FRACTION, 0.9, "assumed: what an all-reduce can use of the line rate"),
    "overlap": (FLAG, True, "PyTorch DDP reduces gradient buckets during backward"),
    # The part of the communication during backward that does not slow it down.
    "overlap_efficiency": (FRACTION, 0.7, "backward slows down by 19 to 40%: arXiv 2507.03114"),
    "accumulate": (COUNT, 1, "an all-reduce for each micro-batch"),  # micro-batches per step
    "bucket_mb": (POSITIVE, 25.0, "PyTorch DDP's bucket_cap_mb, in MiB"),
    "compression": (FRACTION, 1.0, "gradients are sent as they are"),  # bytes sent, as a ratio
    "sync_every": (COUNT, 1, "synchronous: one all-reduce per step"),  # above 1: local SGD
    "algorithm": (ALGORITHM, "fastest", "chosen for each number of devices, as NCCL does"),
    # The standard deviation of a device's step time, as a fraction of it.
    "jitter": (NOT_NEGATIVE, 0.02, "estimated from published tables of overlapping NCCL stacks"),
    "straggler": (FACTOR, 1.0, "no device is slower"),  # step time of one device, as a ratio
    "stack_efficiency": (FRACTION, 0.98, "estimated from the same tables; older stacks keep less"),
    "loader.seconds_per_batch": (NOT_NEGATIVE, 0.0, "data is always ready"),  # in one worker
    "loader.workers": (WORKERS, 0, "PyTorch DataLoader's num_workers"),  # of a replica
    "stages": (STAGES, [1.0], "no pipeline"),  # seconds of each stage; only their ratios count
}
BACKWARD_ORIGIN = "forward computes one output of a layer, backward two gradients"


def predict(spec: dict[str, Any]) -> dict[str, Any]:
    """Predict the throughput of a cluster: {"predictions": [...], "assumptions": {...}}.

    `spec` has the fields of `REQUIRED` and `OPTIONAL`. A prediction has `devices`, `images_per_s`,
    `speedup` over one device, `efficiency` (speedup / devices), `step_s` and its four parts:
    `compute_s` (divided by the stack's efficiency for more than one device),
    `exposed_communication_s` (what backward does not hide), `jitter_s` (waiting for the slowest
    device) and `idle_s` (waiting for data or, in a pipeline, for other stages). `bound_by` names
    what is busy longest. Activations that stages send to each other are not counted.

    Raises `CnnlabError` for a field that is missing, unknown, or not allowed.
    """
    values, assumptions = check_spec(spec)
    devices = np.array(values["devices"], float)
    alone_s = values["accumulate"] * values["device.batch"] / values["device.images_per_s"]
    ideal_s = alone_s / len(values["stages"])
    parts, busy = _step_parts(values, devices, ideal_s)
    step_s = sum(parts.values())
    columns = {
        "devices": np.array(values["devices"]),
        "images_per_s": values["device.images_per_s"] * devices * ideal_s / step_s,
        "speedup": devices * ideal_s / step_s,
        "efficiency": ideal_s / step_s,
        "step_s": step_s,
        **parts,
        "bound_by": np.array(list(busy))[np.argmax(list(busy.values()), axis=0)],
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    predictions = [dict(zip(columns, row, strict=True)) for row in rows]
    return {"predictions": predictions, "assumptions": assumptions}


def _step_parts(
    values: dict[str, Any], devices: np.ndarray, ideal_s: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """({part of a step: seconds}, {what may bound a step: its busy seconds})."""
    slowdown = np.where(devices > 1, 1 / values["stack_efficiency"], 1.0)
    stages = np.array(values["stages"], float)
    batch_s = values["device.batch"] / values["device.images_per_s"]
    stage_s = batch_s * stages / stages.sum()
    pass_s = slowdown * cost_models.pipeline_seconds(stage_s, values["accumulate"])
    compute_s = slowdown * ideal_s

    backward_s = BACKWARD_FRACTION * stage_s.max()  # of the last micro-batch
    exposed_s, busy_s = _communication(values, devices / len(stages), backward_s)
    # Between two synchronizations of local SGD, the slow and fast steps of a device average out.
    noise = values["jitter"] * cost_models.expected_maximum(devices) / np.sqrt(values["sync_every"])
    jitter_s = pass_s * np.maximum(noise, (devices > 1) * (values["straggler"] - 1))
    load_s = values["accumulate"] * values["loader.seconds_per_batch"]
    load_s /= max(1, values["loader.workers"])
    hidden_s = (values["loader.workers"] > 0) * (pass_s + exposed_s + jitter_s)
    parts = {
        "compute_s": compute_s,
        "exposed_communication_s": exposed_s,
        "jitter_s": jitter_s,
        "idle_s": pass_s - compute_s + np.maximum(0.0, load_s - hidden_s),
    }
    busy = {"compute": compute_s, "jitter": jitter_s, "pipeline bubble": pass_s - compute_s}
    busy["loader"] = np.full_like(devices, load_s)
    return parts, busy | dict(zip(cost_models.COST_ROWS, busy_s, strict=True))


def _communication(
    values: dict[str, Any], replicas: np.ndarray, backward_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """(seconds per step that backward does not hide, busy seconds of each of `COST_ROWS`)."""
    stages, per_node = len(values["stages"]), values["node.devices"]
    network_gbps = values["network.bandwidth_gbps"] * values["network.efficiency"]
    cluster = cost_models.Cluster(  # of replicas, each of which uses the links of all its stages
        devices_per_node=max(1, per_node // stages),
        node_bandwidth=stages * values["node.bandwidth_gbps"] * GBIT,
        node_latency=values["node.latency_us"] * 1e-6,
        network_bandwidth=max(1, stages / per_node) * network_gbps * GBIT,
        network_latency=values["network.latency_us"] * 1e-6,
    )
    algorithms = cost_models.ALGORITHMS
    names = algorithms if values["algorithm"] == "fastest" else [values["algorithm"]]
    costs = np.stack([algorithms[name](replicas, cluster) for name in names])
    messages, buckets = _buckets(values)
    bytes = values["model.parameters"] * values["model.bytes_per_parameter"]
    sent = bytes * values["compression"]
    costs *= np.reshape([messages, messages, sent, sent], (4, 1))
    fastest = costs.sum(axis=1).argmin(axis=0)
    busy_s = costs[fastest, :, np.arange(len(replicas))].T / values["sync_every"]
    latency_s, transfer_s = busy_s[:2].sum(axis=0), busy_s[2:].sum(axis=0)
    if not values["overlap"] or values["sync_every"] > 1:  # local SGD averages after a step
        return latency_s + transfer_s, busy_s
    late_s = np.zeros_like(replicas)  # the step waits for the last bucket
    for ready, messages_left, bytes_left in buckets:
        end_s = ready * backward_s + messages_left * latency_s + bytes_left * transfer_s
        late_s = np.maximum(late_s, end_s - backward_s)
    hidden_s = latency_s + transfer_s - late_s
    return late_s + (1 - values["overlap_efficiency"]) * hidden_s, busy_s


def _buckets(values: dict[str, Any]) -> tuple[int, list[tuple[float, float, float]]]:
    """(number of gradient buckets, [(fraction of backward after which a bucket is ready, fraction
    of the messages and of the bytes that are sent from it on)]).

    A bucket takes layers, the last one first, until it is full. Buckets follow one another.
    """
    limit = values["bucket_mb"] * MIB
    layers, bytes_per_parameter = values["model.layers"], values["model.bytes_per_parameter"]
    if not layers:
        count = math.ceil(values["model.parameters"] * bytes_per_parameter / limit)
        # Of equal buckets, either the first or the last one decides.
        return count, [(1 / count, 1.0, 1.0), (1.0, 1 / count, 1 / count)]
    ready, sizes, done = [0.0], [0.0], 0.0
    for layer in reversed(layers):
        done += layer["backward_share"]
        if layer["parameters"]:
            if sizes[-1] >= limit:
                ready.append(0.0)
                sizes.append(0.0)
            ready[-1] = done
            sizes[-1] += layer["parameters"] * bytes_per_parameter
    count = len(sizes)
    bytes_left = np.cumsum(sizes[::-1])[::-1] / sum(sizes)
    return count, [(ready[i] / done, 1 - i / count, bytes_left[i]) for i in range(count)]


def check_spec(spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """({field: value}, {field that may be left out: its value and origin}) of a valid spec."""
    if not isinstance(spec, dict):
        raise CnnlabError(f"a spec is a JSON object, not {type(spec).__name__}.")
    allowed = REQUIRED | {name: field[0] for name, field in OPTIONAL.items()}
    sections = {name.partition(".")[0] for name in allowed if "." in name}
    given: dict[str, Any] = {}
    for name, value in spec.items():
        if name not in sections:
            given[name] = value
        elif isinstance(value, dict):
            given |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            raise CnnlabError(f"{name}={value!r} is not allowed. Use an object.")
    for name in [*given, *REQUIRED]:
        if name not in allowed:
            hint = suggest(name, allowed) or f" Use {', '.join(allowed)}."
            raise CnnlabError(f"a spec has no field {name!r}.{hint}")
        if name not in given:
            raise CnnlabError(f"the spec has no {name}. Add it: {allowed[name][0]}.")
        _check(name, given[name], *allowed[name])
    values = {name: default for name, (_, default, _) in OPTIONAL.items()} | given
    _check_lists(values)
    assumptions = {"backward_fraction": {"value": BACKWARD_FRACTION, "origin": BACKWARD_ORIGIN}}
    for name, (_, _, origin) in OPTIONAL.items():
        origin = "given in the spec" if name in given else origin
        assumptions[name] = {"value": values[name], "origin": origin}
    return values, assumptions


def _check(name: str, value: Any, text: str, kind: Any, low: float = 0, high: float = 0) -> None:
    if isinstance(kind, tuple):
        valid = value in kind
    else:
        valid = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if not valid or value == [] or (high and not low <= value <= high):
        raise CnnlabError(f"{name}={value!r} is not allowed. Use {text}.")


def _check_lists(values: dict[str, Any]) -> None:
    for index, seconds in enumerate(values["stages"]):
        _check(f"stages[{index}]", seconds, *POSITIVE)
    for index, count in enumerate(values["devices"]):
        _check(f"devices[{index}]", count, *COUNT)
        if count % len(values["stages"]):
            fix = f"a multiple of the {len(values['stages'])} stages"
            raise CnnlabError(f"devices[{index}]={count} is not allowed. Use {fix}.")
    totals = {"parameters": values["model.parameters"], "backward_share": 1.0}
    for index, layer in enumerate(values["model.layers"]):
        if not isinstance(layer, dict) or set(layer) != set(totals):
            fix = 'Use {"parameters": ..., "backward_share": ...}'
            raise CnnlabError(f"model.layers[{index}]={layer!r} is not allowed. {fix}.")
        for key, value in layer.items():
            _check(f"model.layers[{index}].{key}", value, *NOT_NEGATIVE)
    for key, total in totals.items() if values["model.layers"] else ():
        found = sum(layer[key] for layer in values["model.layers"])
        if abs(found - total) > 0.02 * total:
            fix = "Describe all layers of the model."
            raise CnnlabError(
                f"the {key} of model.layers add up to {found:g}, not {total:g}. {fix}"
            )
