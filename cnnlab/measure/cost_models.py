"""Cost models: what communication, waiting and pipelines add to the time of a training step."""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

# The rows of an all-reduce's costs: the first two in seconds per message, the others in seconds per
# byte. They add up, except that a row is 0 if the other kind of links works as long meanwhile.
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
    inside, between = 2 * (devices - 1) * (per_node > 1), 2 * (devices - 1) * (nodes > 1)
    latencies = _slower(inside * cluster.node_latency, between * cluster.network_latency)
    inside, between = inside / devices, between / devices
    per_byte = _slower(inside / cluster.node_bandwidth, between / cluster.network_bandwidth)
    return np.stack([*latencies, *per_byte])


def tree(devices: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Costs of two binary trees, each of which reduces and broadcasts half of the bytes.

    Latency grows with log2(n), and the bandwidth is that of a ring: Sanders, Speck and Träff,
    "Two-tree algorithms for full bandwidth broadcast, reduction and scan" (2009), as in NCCL.
    """
    per_node, nodes = cluster.split(devices)
    node_s = 2 * np.ceil(np.log2(per_node)) * cluster.node_latency
    network_s = 2 * np.ceil(np.log2(nodes)) * cluster.network_latency
    return np.stack([node_s, network_s, *ring(devices, cluster)[2:]])


def hierarchical(devices: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Costs of a reduce-scatter in each node, rings between the nodes, an all-gather in each node.

    The three phases follow one another. The devices of a node share its network.
    """
    per_node, nodes = cluster.split(devices)
    inside, between = 2 * (per_node - 1), 2 * (nodes - 1)
    latencies = [inside * cluster.node_latency, between * cluster.network_latency]
    node_s_per_byte = inside / per_node / cluster.node_bandwidth
    return np.stack([*latencies, node_s_per_byte, between / nodes / cluster.network_bandwidth])


ALGORITHMS = {"ring": ring, "tree": tree, "hierarchical": hierarchical}


def expected_maximum(samples: np.ndarray) -> np.ndarray:
    """Expected largest of so many standard normal values: 0 of 1, 0.56 of 2, 3.2 of 1,000.

    The quantile (n - 0.375) / (n + 0.25), within 0.03: G. Blom, "Statistical estimates and
    transformed beta-variables" (1958). For large n it approaches sqrt(2 ln n) from below.
    """
    return ndtri((samples - 0.375) / (samples + 0.25))


def pipeline_seconds(stage_seconds: np.ndarray, micro_batches: int) -> float:
    """Seconds of a pipelined step: one micro-batch passes all stages, the others the slowest.

    `stage_seconds`: forward and backward of one micro-batch in each stage. With n equal stages the
    bubble is (n - 1) / (micro_batches + n - 1): Huang et al., "GPipe" (2019).
    """
    return float(np.sum(stage_seconds) + (micro_batches - 1) * np.max(stage_seconds))


def _slower(node: np.ndarray, network: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both costs, with 0 for the lower: both kinds of links work at the same time."""
    return np.where(node > network, node, 0), np.where(node > network, 0, network)
