"""How the replicas of a model stay equal: DDP and its hooks, the ring by hand, averaging, shared parameters; a slow network."""

import os
import tempfile
import time
from contextlib import contextmanager
from multiprocessing.util import get_temp_dir

import torch
import torch.distributed as dist

NO_STEPS_LEFT = 2**40  # the count of steps of a rank that has none left to do: nobody waits for it


class SharedParameters:
    """Asynchronous updates: one set of parameters, in memory that all ranks of this machine map, and nobody waits.

    A rank computes its gradients from a copy, which others' updates leave stale; it adds its own update and takes a new
    copy. `staleness`: how many steps it may be ahead of the slowest rank before it waits (Ho et al., "Stale
    Synchronous Parallel", 2013); 0 is synchronous, None without bound. Fast ranks take over batches of slow ones.
    """

    def __init__(self, model, staleness, link=None):
        self.rank, self.world, self.bound = (
            dist.get_rank(),
            dist.get_world_size(),
            NO_STEPS_LEFT if staleness is None else staleness,
        )
        self.link = link
        self.copy = _flatten_parameters(model)
        backend = dist.group.WORLD._get_backend(
            torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        )
        self.timeout = backend.options._timeout.total_seconds()
        path = [
            tempfile.mkstemp(prefix="cnnlab-", dir=get_temp_dir())[1] if self.rank == 0 else None
        ]  # removed even if we are killed here
        dist.broadcast_object_list(path)
        numbers = 8 * (3 + 2 * self.world)
        self.file = open(path[0], "r+b")
        if self.rank == 0:
            self.file.truncate(numbers + self.copy.nbytes)
        dist.barrier()
        memory = torch.from_file(
            path[0], shared=True, size=numbers + self.copy.nbytes, dtype=torch.uint8
        )
        counts = memory[:numbers].view(torch.int64)
        self.dealt, self.updates, self.steps, self.read = (
            counts[0:1],
            counts[1:2],
            counts[3 : 3 + self.world],
            counts[3 + self.world :],
        )
        self.parameters = memory[numbers:].view(self.copy.dtype)
        self.seen, self.stale, self.own = 0, 0, 0
        if self.rank == 0:
            self.parameters.copy_(self.copy)
        dist.barrier()
        if self.rank == 0:
            os.unlink(path[0])  # the memory lives as long as it is mapped, and no longer

    def claim_batches(self, tickets):
        """Yield numbers below `tickets`, each to one rank only, whichever asks first; then wait for all ranks."""
        self.steps[self.rank] = self.read[self.rank] = 0
        if self.rank == 0:
            self.dealt.zero_()
        dist.barrier()
        while True:
            with self._locked():
                ticket = int(self.dealt)
                self.dealt += 1
            if ticket >= tickets:
                break
            yield ticket
        self.steps[self.rank] = self.read[self.rank] = NO_STEPS_LEFT
        dist.barrier()

    def push_pull(self, model):
        """Add what the optimizer has just changed to the shared parameters, then take a copy of them."""
        self._wait_for(
            self.read
        )  # with bound 0: until all have taken the copy that my update would change
        with self._locked():
            self.parameters += (_flatten_parameters(model) - self.copy) / self.world
            self.stale += int(self.updates) - self.seen
            self.own += 1
            self.updates += 1
            self.steps[self.rank] += 1
        if self.link:
            self.link.transfer(2 * self.copy.nbytes)  # there and back, on a link of this rank's own
        self._wait_for(self.steps)
        self.pull(model)
        self.read[self.rank] += 1

    def pull(self, model):
        """The model's parameters become those that are shared."""
        with self._locked():
            self.copy, self.seen = self.parameters.clone(), int(self.updates)
        parameters = [parameter.data for parameter in model.parameters()]
        for parameter, part in zip(
            parameters, self.copy.split([parameter.numel() for parameter in parameters])
        ):
            parameter.copy_(part.view_as(parameter))

    def total(self):
        """How many parts of batches all ranks together have trained on."""
        return int(self.updates)

    def _wait_for(self, counts):
        end = time.monotonic() + self.timeout
        while int(self.steps[self.rank]) - int(counts.min()) > self.bound:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"Timed out after {self.timeout:g} s, as gloo would, waiting for the slowest rank."
                )
            time.sleep(0.0002)

    @contextmanager
    def _locked(self):
        import fcntl  # POSIX only; machine.missing_for says so elsewhere

        fcntl.flock(self.file, fcntl.LOCK_EX)  # the system frees it when its holder is killed
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)


def _flatten_parameters(model):
    return torch.cat(
        [parameter.detach().reshape(-1) for parameter in model.parameters()]
    ).cpu()
