"""How speedup ought to grow with the number of workers: the laws that measured points are held against. How the replicas of a model stay equal: DDP and its hooks, the ring by hand, averaging, shared parameters; a slow network."""

import threading
import time

import torch
import torch.distributed as dist


def all_reduce_seconds(bytes, ranks, latency_s=0.0, bytes_per_s=float("inf")):
    """Seconds of a ring all-reduce by the alpha-beta model: every message costs a latency, and its bytes over the bandwidth.

    T = 2 (N - 1) (alpha + bytes / (N beta)): Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication" (2005).
    """
    return 2 * (ranks - 1) * (latency_s + bytes / ranks / bytes_per_s)


def simulate_straggler(model, recipe):
    """The last rank sleeps in each training step: slower than the others, on purpose."""
    late = recipe.straggler_ms / 1000
    if late and dist.get_rank() == dist.get_world_size() - 1:
        model.register_forward_pre_hook(
            lambda module, _: time.sleep(late) if module.training else None
        )


class SimulatedLink:
    """A link that is slow on purpose, SIMULATED: one message at a time, each as late as the alpha-beta model says."""

    def __init__(self, latency_s, bytes_per_s):
        self.latency_s, self.bytes_per_s, self.free, self.lock = (
            latency_s,
            bytes_per_s,
            0.0,
            threading.Lock(),
        )

    def transfer(self, bytes):
        """Sleep as long as one message of so many bytes would take."""
        self.occupy(self.latency_s + bytes / self.bytes_per_s)

    def occupy(self, seconds):
        with self.lock:  # messages queue up: those before this one go first
            self.free = max(self.free, time.perf_counter()) + seconds
            wait = self.free - time.perf_counter()
        time.sleep(max(0.0, wait))


def make_link(recipe):
    """The recipe's `SimulatedLink`, or None where it asks for none."""
    if not recipe.latency_ms and not recipe.bandwidth_mbit:
        return None
    return SimulatedLink(
        recipe.latency_ms / 1000, (recipe.bandwidth_mbit or float("inf")) * 1e6 / 8
    )


def simulate_network(link):
    """Every all-reduce of this process, whoever asks for it, then takes as long as on that network, were it a ring."""
    at_once = dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        work, arrived = at_once(tensor, op, group, async_op=True), torch.futures.Future()
        seconds = all_reduce_seconds(
            tensor.nbytes, dist.get_world_size(group), link.latency_s, link.bytes_per_s
        )

        def deliver():
            try:
                work.wait()
                link.occupy(seconds)
                arrived.set_result([tensor])
            except Exception as error:  # a peer is gone: those who wait must hear of it
                arrived.set_exception(error)

        threading.Thread(target=deliver, daemon=True).start()
        return DelayedWork(arrived) if async_op else arrived.wait() and None

    dist.all_reduce = all_reduce


class DelayedWork:
    """What an asynchronous collective returns."""

    def __init__(self, future):
        self.get_future, self.wait = lambda: future, future.wait
