"""Cost models: what communication, waiting and pipelines add to the time of a training step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

# The rows of an all-reduce cost: two in seconds per message, two in seconds per byte. A message of
# B bytes takes the sum of the first two, and B times the sum of the others.
COST_ROWS = ("node latency", "network latency", "node bandwidth", "network bandwidth")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices. Links inside a node are fast, the network between nodes is slow.

    Bandwidths are in bytes/s: that of a device inside its node, and that of a node's network.
    Latencies are in seconds per message.
    """

    devices_per_node: int
    node_bandwidth: float
    node_latency: float
    network_bandwidth: float
    network_latency: float

    def split(self, devices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(devices in a node, nodes) of that many devices, which fill node after node."""
        per_node = np.minimum(devices, self.devices_per_node)
        return per_node, np.ceil(devices / self.devices_per_node)


def ring(devices: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Costs of one ring through all devices, an array of shape (4, number of device counts).

    2 (n - 1) steps, each with 1/n of the bytes and as fast as the slowest link: Patarasuk and Yuan,
    "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
    """
    per_node, nodes = cluster.split(devices)
    steps = 2 * (devices - 1)
    node_s = (per_node > 1) * steps * cluster.node_latency
    network_s = (nodes > 1) * steps * cluster.network_latency
    return np.stack([*_slower(node_s, network_s), *_slowest_link(devices, cluster)])


def tree(devices: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Costs of two binary trees, each of which reduces and broadcasts half of the bytes.

    Latency grows with log2(n), and the bandwidth is that of a ring: Sanders, Speck and Träff,
    "Two-tree algorithms for full bandwidth broadcast, reduction and scan" (2009), as in NCCL.
    """
    per_node, nodes = cluster.split(devices)
    node_s = 2 * np.ceil(np.log2(per_node)) * cluster.node_latency
    network_s = 2 * np.ceil(np.log2(nodes)) * cluster.network_latency
    return np.stack([node_s, network_s, *_slowest_link(devices, cluster)])


def hierarchical(devices: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Costs of a reduce-scatter in each node, rings between the nodes, an all-gather in each node.

    The devices of a node share its network, each for its own part of the bytes, and the three
    phases follow one another.
    """
    per_node, nodes = cluster.split(devices)
    node_steps, network_steps = 2 * (per_node - 1), 2 * (nodes - 1)
    node_s, network_s = node_steps * cluster.node_latency, network_steps * cluster.network_latency
    node_s_per_byte = node_steps / per_node / cluster.node_bandwidth
    network_s_per_byte = network_steps / nodes / cluster.network_bandwidth
    return np.stack([node_s, network_s, node_s_per_byte, network_s_per_byte])


AllReduce = Callable[[np.ndarray, Cluster], np.ndarray]
ALGORITHMS: dict[str, AllReduce] = {"ring": ring, "tree": tree, "hierarchical": hierarchical}


def expected_maximum(samples: int) -> float:
    """Expected largest of `samples` standard normal values: 0 of 1, 0.56 of 2, 3.2 of 1,000.

    The quantile (n - 0.375) / (n + 0.25), within 0.03: G. Blom, "Statistical estimates and
    transformed beta-variables" (1958). For large n it approaches sqrt(2 ln n) from below.
    """
    return NormalDist().inv_cdf((samples - 0.375) / (samples + 0.25))


def pipeline_seconds(stage_seconds: Sequence[float], micro_batches: int) -> float:
    """Seconds of a pipelined step: one micro-batch passes all stages, the others the slowest.

    `stage_seconds`: forward and backward of one micro-batch in each stage. With n equal stages the
    bubble is (n - 1) / (micro_batches + n - 1): Huang et al., "GPipe" (2019).
    """
    return sum(stage_seconds) + (micro_batches - 1) * max(stage_seconds)


def loader_wait_seconds(load_s: float, workers: int, compute_s: float) -> float:
    """Seconds per step without data, if loading a batch takes `load_s` in one of the workers.

    Without workers the training process loads, and computes nothing meanwhile.
    """
    return max(0.0, load_s / workers - compute_s) if workers else load_s


def local_sgd_seconds(step_s: float, all_reduce_s: float, period: int) -> float:
    """Mean seconds per step if parameters are averaged, unoverlapped, every `period` steps."""
    return step_s + all_reduce_s / period


def _slower(node: np.ndarray, network: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both costs, with 0 for the lower: both kinds of links work at the same time."""
    return np.where(node > network, node, 0), np.where(node > network, 0, network)


def _slowest_link(devices: np.ndarray, cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    """Seconds per byte if each link carries 2 (n - 1) / n times the bytes."""
    per_node, nodes = cluster.split(devices)
    traffic = 2 * (devices - 1) / devices
    node = (per_node > 1) * traffic / cluster.node_bandwidth
    return _slower(node, (nodes > 1) * traffic / cluster.network_bandwidth)
