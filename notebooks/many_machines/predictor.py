"""The predictor: how fast data-parallel training would be on a cluster that is described on paper.

A spec is a JSON object. `FIELDS` lists its fields, and `DEFAULTS` those that may be left out:

    {"model": {"parameters": 25.6e6, "bytes_per_parameter": 4},
     "device": {"images_per_s": 360, "batch": 128},
     "node": {"devices": 8, "bandwidth_gbps": 1200, "latency_us": 5},
     "network": {"bandwidth_gbps": 100, "latency_us": 5},
     "devices": [1, 8, 64, 512]}
"""

import difflib
from typing import Any

import numpy as np
from many_machines.cost_models import ALGORITHMS, COST_ROWS, Cluster, expected_maximum

from cnnlab.recipe import CnnlabError

MIB = 2**20
GBIT = 1e9 / 8  # bytes
BACKWARD_FRACTION = 2 / 3

POSITIVE = "a number above 0 (1e-30 to 1e30)"
NOT_NEGATIVE = "a number of at least 0 (up to 1e30)"
FRACTION = "a number above 0 and up to 1"
COUNT = "an integer from 1 to 1,000,000,000"
FLAG = "true or false"
TEXT = "a text"
ALGORITHM = "'ring', 'tree' or 'hierarchical'"
COUNTS = "a list that is not empty; each entry is an integer from 1 to 1,000,000,000"
LAYERS = "a list with the parameters and the backward_share of each layer, the first layer first"

FIELDS = {
    "model.name": TEXT,
    "model.parameters": POSITIVE,
    "model.bytes_per_parameter": POSITIVE,  # of a gradient, as it is sent
    "model.layers": LAYERS,
    "device.images_per_s": POSITIVE,  # of one device that trains alone
    "device.batch": POSITIVE,  # images per device and micro-batch
    "node.devices": COUNT,
    "node.bandwidth_gbps": POSITIVE,  # Gbit/s that a device can send inside its node
    "node.latency_us": NOT_NEGATIVE,
    "network.bandwidth_gbps": POSITIVE,  # Gbit/s that a node can send
    "network.latency_us": NOT_NEGATIVE,
    "network.efficiency": FRACTION,
    "overlap": FLAG,
    "accumulate": COUNT,  # micro-batches per step
    "bucket_mb": POSITIVE,  # MiB of gradients per all-reduce
    "jitter": NOT_NEGATIVE,  # standard deviation of a device's step time, as a fraction of it
    "stack_efficiency": FRACTION,
    "algorithm": ALGORITHM,
    "devices": COUNTS,
}
SECTIONS = ("model", "device", "node", "network")
RANGES = {POSITIVE: (1e-30, 1e30), NOT_NEGATIVE: (0, 1e30), FRACTION: (1e-30, 1)}

# {field that may be left out: (its value then, where that comes from)}. One set for all clusters,
# chosen for today's stacks, which overlap NCCL's all-reduces with backward. What it misses in
# published tables is listed in tests/benchmarks/README.md.
DEFAULTS: dict[str, tuple[Any, str]] = {
    "model.name": ("", "has no effect"),
    "model.layers": (None, "gradients become ready at a constant rate during backward"),
    "network.efficiency": (0.8, "assumed: the part of the line rate that an all-reduce can use"),
    "overlap": (True, "PyTorch DDP reduces gradient buckets during backward"),
    "accumulate": (1, "an all-reduce for each micro-batch"),
    "bucket_mb": (25.0, "PyTorch DDP's bucket_cap_mb"),
    "jitter": (
        0.02,
        "estimated from published tables: how efficiency falls with more devices while "
        "communication is hidden. A step lasts as long as the slowest device: the expected maximum "
        "of normal times (Blom, 1958)",
    ),
    "stack_efficiency": (
        0.98,
        "estimated from published tables: what overlapping NCCL stacks keep with more than one "
        "device, before jitter. Older or untuned stacks keep less",
    ),
    "algorithm": ("fastest", "chosen for each number of devices, as NCCL does"),
}
BACKWARD_ORIGIN = "forward computes one output of a layer, backward two gradients"


def predict(spec: dict[str, Any]) -> dict[str, Any]:
    """Predict the throughput of a cluster: {"predictions": [...], "assumptions": {...}}.

    `spec`: see the top of this file. Each prediction has `devices`, `images_per_s`, `speedup` over
    one device, `efficiency` (speedup / devices), `step_s` and its three parts: `compute_s` (divided
    by the stack's efficiency for more than one device), `exposed_communication_s` (what backward
    does not hide) and `jitter_s` (waiting for the slowest device). `bound_by` names what is busy
    longest. Each assumption has a `value` and an `origin`.

    Raises `CnnlabError` for a field that is missing, unknown, or not allowed.
    """
    values, assumptions = check_spec(spec)
    counts = values["devices"]
    devices = np.array(counts, float)
    micro_batch_s = values["device.batch"] / values["device.images_per_s"]
    alone_s = micro_batch_s * values["accumulate"]
    compute_s = alone_s / np.where(devices > 1, values["stack_efficiency"], 1.0)
    exposed_s, busy_s = _communication(values, devices, BACKWARD_FRACTION * micro_batch_s)
    jitter_s = values["jitter"] * compute_s * [expected_maximum(count) for count in counts]
    step_s = compute_s + exposed_s + jitter_s
    columns = {
        "images_per_s": values["device.images_per_s"] * devices * alone_s / step_s,
        "speedup": devices * alone_s / step_s,
        "efficiency": alone_s / step_s,
        "step_s": step_s,
        "compute_s": compute_s,
        "exposed_communication_s": exposed_s,
        "jitter_s": jitter_s,
    }
    resources = np.array(["compute", "jitter", *COST_ROWS])
    bounds = resources[np.argmax([compute_s, jitter_s, *busy_s], axis=0)].tolist()
    rows = zip(counts, *(column.tolist() for column in columns.values()), bounds, strict=True)
    names = ("devices", *columns, "bound_by")
    predictions = [dict(zip(names, row, strict=True)) for row in rows]
    return {"predictions": predictions, "assumptions": assumptions}


def check_spec(spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """({field: value}, {field that may be left out: its value and origin}) of a valid spec."""
    given = _flatten(spec)
    _check_names(given)
    for name, allowed in FIELDS.items():
        if name in given:
            _check(name, given[name], allowed)
        elif name not in DEFAULTS:
            raise CnnlabError(f"the spec has no {name}. Add it: {allowed}.")
    if "model.layers" in given:
        _check_layers(given["model.layers"], given["model.parameters"])
    values = {name: value for name, (value, _) in DEFAULTS.items()} | given
    assumptions = {}
    for name, (_, origin) in DEFAULTS.items():
        given_origin = "given in the spec" if name in given else origin
        assumptions[name] = {"value": values[name], "origin": given_origin}
    assumptions["backward_fraction"] = {"value": BACKWARD_FRACTION, "origin": BACKWARD_ORIGIN}
    return values, assumptions


def _communication(values, devices, backward_s):
    """(seconds that backward does not hide, busy seconds of each of `COST_ROWS`) per step."""
    cluster = Cluster(
        devices_per_node=values["node.devices"],
        node_bandwidth=values["node.bandwidth_gbps"] * GBIT,
        node_latency=values["node.latency_us"] * 1e-6,
        network_bandwidth=values["network.bandwidth_gbps"] * values["network.efficiency"] * GBIT,
        network_latency=values["network.latency_us"] * 1e-6,
    )
    names = [name for name in ALGORITHMS if values["algorithm"] in (name, "fastest")]
    costs = np.stack([ALGORITHMS[name](devices, cluster) for name in names])
    per_message, per_byte = costs[:, :2].sum(axis=1), costs[:, 2:].sum(axis=1)
    buckets = _remaining_buckets(values)
    exposed_s = np.zeros_like(per_byte)
    for ready, messages, bytes in buckets:  # the step waits for the last one
        end_s = ready * backward_s + messages * per_message + bytes * per_byte
        exposed_s = np.maximum(exposed_s, end_s - backward_s)
    _, messages, bytes = buckets[0]
    busy_s = costs * np.reshape([messages, messages, bytes, bytes], (4, 1))
    fastest, each = exposed_s.argmin(axis=0), np.arange(len(devices))
    return exposed_s[fastest, each], busy_s[fastest, :, each].T


def _remaining_buckets(values: dict[str, Any]) -> list[tuple[float, float, float]]:
    """(fraction of backward after which a bucket is ready, messages and bytes from it on).

    The buckets are reduced one after the other. None ends before it is ready and, after that, all
    that remain have been sent.
    """
    limit = values["bucket_mb"] * MIB
    total = values["model.parameters"] * values["model.bytes_per_parameter"]
    count = np.ceil(total / limit)
    # Of equal buckets, either the first or the last one decides.
    buckets = [(1 / count, count, total), (1.0, 1, total / count)]
    if values["model.layers"]:
        buckets = _layer_buckets(values, limit)
    return buckets if values["overlap"] else [(1.0, *buckets[0][1:])]


def _layer_buckets(values, limit):
    """As `_remaining_buckets`. A bucket takes layers, the last one first, until it is full."""
    layers = values["model.layers"]
    all_shares = sum(layer["backward_share"] for layer in layers)
    ready, sizes = [0.0], [0.0]
    done = 0.0
    for layer in reversed(layers):
        done += layer["backward_share"] / all_shares
        if layer["parameters"]:
            if sizes[-1] >= limit:
                ready.append(done)
                sizes.append(0.0)
            ready[-1] = done
            sizes[-1] += layer["parameters"] * values["model.bytes_per_parameter"]
    return [(ready[i], len(ready) - i, sum(sizes[i:])) for i in range(len(ready))]


def _flatten(spec: Any) -> dict[str, Any]:
    """{"model.parameters": ..., "devices": ...}"""
    if not isinstance(spec, dict):
        raise CnnlabError(f"a spec is a JSON object, not {type(spec).__name__}.")
    flat = {}
    for name, value in spec.items():
        if name in SECTIONS and not isinstance(value, dict):
            raise CnnlabError(f"{name}={value!r} is not allowed. Use an object.")
        if name in SECTIONS:
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def _check_names(given: dict[str, Any]) -> None:
    for name in given:
        if name not in FIELDS:
            close = difflib.get_close_matches(name, [*FIELDS, *SECTIONS], n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Use {', '.join(FIELDS)}."
            raise CnnlabError(f"a spec has no field {name!r}. {hint}")


def _check(name: str, value: Any, allowed: str) -> None:
    if not _is_allowed(value, allowed):
        raise CnnlabError(f"{name}={value!r} is not allowed. Use {allowed}.")
    if allowed == COUNTS:
        for index, count in enumerate(value):
            _check(f"{name}[{index}]", count, COUNT)


def _is_allowed(value: Any, allowed: str) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if allowed in RANGES:
        low, high = RANGES[allowed]
        return (is_integer or isinstance(value, float)) and low <= value <= high
    if allowed == COUNT:
        return is_integer and 1 <= value <= 10**9
    if allowed == FLAG:
        return isinstance(value, bool)
    if allowed == ALGORITHM:
        return value in list(ALGORITHMS)
    return isinstance(value, str if allowed == TEXT else list) and value != []


def _check_layers(layers: list[Any], parameters: float) -> None:
    for index, layer in enumerate(layers):
        if not isinstance(layer, dict) or set(layer) != {"parameters", "backward_share"}:
            fix = 'Use {"parameters": ..., "backward_share": ...}'
            raise CnnlabError(f"model.layers[{index}]={layer!r} is not allowed. {fix}.")
        for key, value in layer.items():
            _check(f"model.layers[{index}].{key}", value, NOT_NEGATIVE)
    for key, total in (("parameters", parameters), ("backward_share", 1.0)):
        found = sum(layer[key] for layer in layers)
        if abs(found - total) > 0.02 * total:
            raise CnnlabError(
                f"the {key} of model.layers add up to {found:g}, not to {total:g}. "
                "Describe all layers of the model."
            )
