"""A slow network and a slow rank, simulated: what parallel training costs on other machines."""

import threading
import time
from types import SimpleNamespace

import torch.distributed as dist
from torch import nn
from torch.futures import Future

from cnnlab.recipe import Recipe


def all_reduce_seconds(
    bytes: int, ranks: int, latency_s: float = 0.0, bytes_per_s: float = float("inf")
) -> float:
    """Seconds of a ring all-reduce in the alpha-beta model: a latency and a bandwidth per message.

    T = 2 (N - 1) (alpha + bytes / (N beta)): Thakur, Rabenseifner and Gropp, "Optimization of
    Collective Communication Operations in MPICH" (2005).
    """
    return 2 * (ranks - 1) * (latency_s + bytes / ranks / bytes_per_s)


def simulate_straggler(model: nn.Module, recipe: Recipe) -> None:
    """Make the last rank sleep for `recipe.straggler_ms` in each training step."""
    delay_s = recipe.straggler_ms / 1000

    def sleep(module: nn.Module, inputs: tuple) -> None:
        if module.training:
            time.sleep(delay_s)

    if delay_s and dist.get_rank() == dist.get_world_size() - 1:
        model.register_forward_pre_hook(sleep)


class SimulatedLink:
    """A slow link that carries one message at a time. Its delays follow the alpha-beta model."""

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.free_at = 0.0
        self.lock = threading.Lock()

    def transfer(self, bytes: int) -> None:
        """Sleep as long as a message of this size would take."""
        self.occupy(self.latency_s + bytes / self.bytes_per_s)

    def occupy(self, seconds: float) -> None:
        """Wait until all earlier messages have passed, then sleep for so many seconds."""
        with self.lock:
            self.free_at = max(self.free_at, time.perf_counter()) + seconds
            wait_s = self.free_at - time.perf_counter()
        time.sleep(max(0.0, wait_s))


def make_link(recipe: Recipe) -> SimulatedLink | None:
    """The recipe's simulated link; None if the recipe simulates no network."""
    if not recipe.latency_ms and not recipe.bandwidth_mbit:
        return None
    bandwidth_mbit = recipe.bandwidth_mbit or float("inf")
    return SimulatedLink(recipe.latency_ms / 1000, bandwidth_mbit * 1e6 / 8)


def simulate_network(link: SimulatedLink) -> None:
    """Delay `dist.all_reduce`, which DDP calls too, to the time of a ring over such links."""
    fast_all_reduce = dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        work = fast_all_reduce(tensor, op, group, async_op=True)
        delayed: Future = Future()
        world = dist.get_world_size(group)
        seconds = all_reduce_seconds(tensor.nbytes, world, link.latency_s, link.bytes_per_s)

        def deliver():
            try:
                work.wait()
                link.occupy(seconds)
                delayed.set_result([tensor])
            except Exception as error:  # a peer is gone: raise this in the waiting thread
                delayed.set_exception(error)

        threading.Thread(target=deliver, daemon=True).start()
        if async_op:
            # The part of `dist.Work` that DDP uses.
            return SimpleNamespace(wait=delayed.wait, get_future=lambda: delayed)
        delayed.wait()

    dist.all_reduce = all_reduce
