"""Asynchronous SGD: ranks update shared parameters without waiting for each other."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import get_temp_dir

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cnnlab.parallel.simulated_network import SimulatedLink

NO_STEPS_LEFT = 2**40  # the step count of a rank that has finished: no rank waits for it


class SharedParameters:
    """One set of parameters in memory that all ranks of this machine share.

    A rank computes gradients from a copy, which goes stale as others update the parameters; it adds
    its own update and takes a new copy. `staleness` is the number of steps that a rank may be ahead
    of the slowest before it waits (Ho et al., "More Effective Distributed ML via a Stale
    Synchronous Parallel Parameter Server", 2013): 0 is synchronous, None unbounded.
    """

    def __init__(
        self, model: nn.Module, staleness: int | None, link: SimulatedLink | None = None
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.bound = NO_STEPS_LEFT if staleness is None else staleness
        self.link = link
        self.timeout = _collective_timeout_s()
        self.copy = _flatten_parameters(model)  # as this rank last pulled them
        self.copied_at = 0  # the number of updates in the copy
        self.own = 0  # updates by this rank
        self.stale = 0  # updates by others that this rank's copies lacked
        self._map_memory()

    def _map_memory(self) -> None:
        """Map one file into the memory of all ranks: counters, then the parameters."""
        path = [""]
        if self.rank == 0:  # in a folder that the launcher deletes, even if the ranks are killed
            path = [tempfile.mkstemp(prefix="cnnlab-", dir=get_temp_dir())[1]]
        dist.broadcast_object_list(path)
        counter_bytes = 8 * (2 + 2 * self.world)
        size = counter_bytes + self.copy.nbytes
        self.file = open(path[0], "r+b")  # noqa: SIM115, also the lock of all ranks
        memory = torch.from_file(path[0], shared=True, size=size, dtype=torch.uint8)
        counters = memory[:counter_bytes].view(torch.int64)
        self.claimed, self.updates = counters[0:1], counters[1:2]  # by all ranks
        self.steps, self.pulls = counters[2:].split(self.world)  # of each rank, this epoch
        self.parameters = memory[counter_bytes:].view(self.copy.dtype)
        if self.rank == 0:
            self.parameters.copy_(self.copy)
        dist.barrier()
        if self.rank == 0:
            os.unlink(path[0])  # the memory exists until no rank maps it

    def claim_batches(self, count: int) -> Iterator[int]:
        """Yield the numbers below `count`, each in one rank only; then wait for all ranks."""
        self.steps[self.rank] = self.pulls[self.rank] = 0
        if self.rank == 0:
            self.claimed.zero_()
        dist.barrier()
        while True:
            with self._locked():
                number = int(self.claimed)
                self.claimed += 1
            if number >= count:
                break
            yield number
        self.steps[self.rank] = self.pulls[self.rank] = NO_STEPS_LEFT
        dist.barrier()

    def push_pull(self, model: nn.Module) -> None:
        """Add the optimizer's last update to the shared parameters, then copy them to the model."""
        self._wait_for(self.pulls)  # bound 0: no rank may still need the parameters as they are
        with self._locked():
            self.parameters += (_flatten_parameters(model) - self.copy) / self.world
            self.stale += int(self.updates) - self.copied_at
            self.own += 1
            self.updates += 1
            self.steps[self.rank] += 1
        if self.link is not None:
            self.link.transfer(2 * self.copy.nbytes)  # both ways, on this rank's own link
        self._wait_for(self.steps)
        self.pull(model)
        self.pulls[self.rank] += 1

    def pull(self, model: nn.Module) -> None:
        """Copy the shared parameters to the model."""
        with self._locked():
            self.copy, self.copied_at = self.parameters.clone(), int(self.updates)
        sizes = [parameter.numel() for parameter in model.parameters()]
        for parameter, values in zip(model.parameters(), self.copy.split(sizes), strict=True):
            parameter.data.copy_(values.view_as(parameter))

    def mean_staleness(self) -> float:
        """Mean number of other ranks' updates between this rank's pull and its next push."""
        return self.stale / max(1, self.own)

    def _wait_for(self, counts: Tensor) -> None:
        """Wait until this rank's steps are at most `bound` ahead of the slowest rank's count."""
        deadline = time.monotonic() + self.timeout
        while int(self.steps[self.rank]) - int(counts.min()) > self.bound:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"Timed out after {self.timeout:g} s, like gloo, waiting for the slowest rank."
                )
            time.sleep(0.0002)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl  # POSIX only: machine.missing_for rejects strategy='async' elsewhere

        fcntl.flock(self.file, fcntl.LOCK_EX)  # released by the system if this rank is killed
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)


def _collective_timeout_s() -> float:
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    backend = dist.distributed_c10d._get_default_group()._get_backend(device)
    return backend.options._timeout.total_seconds()


def _flatten_parameters(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).cpu()
