"""How the replicas of a model stay equal: DDP and its hooks, the ring by hand, averaging, shared parameters; a slow network."""

import os
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext
from multiprocessing.util import get_temp_dir

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from .scaling import all_reduce_s

FAR = 2**40         # the count of steps of a rank that has none left to do: nobody waits for it


def replicated(model, recipe, device, clock):
    """One copy in each rank (DDP); gradients are averaged over all ranks, bucket by bucket, while backward goes on."""
    bucket_mb = 2**20 if recipe.compression == "powersgd" else recipe.bucket_mb      # gloo takes PowerSGD in one bucket only
    model = nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, bucket_cap_mb=bucket_mb)
    hook, state = {"none": (default_hooks.allreduce_hook, None), "fp16": (default_hooks.fp16_compress_hook, None),
                   "bf16": (default_hooks.bf16_compress_hook, None),
                   "powersgd": (powerSGD_hook.powerSGD_hook, powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2))}[recipe.compression]

    def timed(state, bucket):
        began = time.perf_counter()
        return hook(state, bucket).then(lambda sent: clock.communicated(began) or sent.value())

    if device.type == "cpu":
        model.register_comm_hook(state, timed)
    elif recipe.compression != "none":
        model.register_comm_hook(state, hook)
    return model


def exchanging(model, really):
    """Where not `really`: a context in which backward adds up gradients but sends none (DDP's `no_sync`)."""
    return nullcontext() if really or not hasattr(model, "no_sync") else model.no_sync()


def attach(optimizer, model, recipe, world, clock):
    """For the strategies beside DDP: what the ranks do just before or after each step of the optimizer.

    Returns the `SharedParameters` of strategy async, else None.
    """
    if world == 1 or recipe.strategy in (None, "ddp"):
        return None
    if recipe.strategy == "ring":
        optimizer.register_step_pre_hook(lambda *_: average_gradients(model, recipe, clock))
    elif recipe.strategy == "local-sgd":
        averager = PeriodicModelAverager(recipe.sync_every, warmup_steps=recipe.sync_every - 1)     # after every so many steps
        optimizer.register_step_post_hook(lambda *_: clock.communicating(averager.average_parameters, model.parameters()))
    else:
        shared = SharedParameters(model, recipe.staleness, network(recipe))
        optimizer.register_step_post_hook(lambda *_: clock.communicating(shared.exchange, model))
        return shared


def average_gradients(model, recipe, clock):
    """Each gradient becomes its mean over all ranks, after backward, in one ring all-reduce of all of them."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).cpu()       # gloo carries it: NCCL's sends would wait for each other
    link = network(recipe)
    clock.communicating(ring_all_reduce, flat, link and link.carry)
    for gradient, mean in zip(gradients, (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def ring_all_reduce(tensor, carried=None):
    """The sum over all ranks, in place; each sends 2 (N - 1) messages of 1/N of the tensor to the next: Patarasuk and Yuan (2009).

    First every chunk travels once around and is added to (reduce-scatter), then the sums travel around (all-gather).
    `carried(bytes)` is called after each message.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = tensor.tensor_split(world)
    for step in range(2 * (world - 1)):
        incoming = torch.empty_like(chunks[(rank - step - 1) % world])
        sent = dist.isend(chunks[(rank - step) % world], (rank + 1) % world)
        dist.recv(incoming, (rank - 1) % world)
        sent.wait()
        if carried:
            carried(incoming.nbytes)
        mine = chunks[(rank - step - 1) % world]
        mine.copy_(mine + incoming if step < world - 1 else incoming)


class SharedParameters:
    """Asynchronous updates: one set of parameters, in memory that all ranks of this machine map, and nobody waits.

    A rank computes its gradients from a copy, which others' updates leave stale; it adds its own update and takes a new
    copy. `staleness`: how many steps it may be ahead of the slowest rank before it waits (Ho et al., "Stale
    Synchronous Parallel", 2013); 0 is synchronous, None without bound. Fast ranks take over batches of slow ones.
    """

    def __init__(self, model, staleness, link=None):
        self.rank, self.world, self.bound = dist.get_rank(), dist.get_world_size(), FAR if staleness is None else staleness
        self.link = link
        self.copy = _flat(model)
        backend = dist.group.WORLD._get_backend(torch.device("cuda" if dist.get_backend() == "nccl" else "cpu"))
        self.timeout = backend.options._timeout.total_seconds()
        path = [tempfile.mkstemp(prefix="cnnlab-", dir=get_temp_dir())[1] if self.rank == 0 else None]     # removed even if we are killed here
        dist.broadcast_object_list(path)
        numbers = 8 * (3 + 2 * self.world)
        self.file = open(path[0], "r+b")
        if self.rank == 0:
            self.file.truncate(numbers + self.copy.nbytes)
        dist.barrier()
        memory = torch.from_file(path[0], shared=True, size=numbers + self.copy.nbytes, dtype=torch.uint8)
        counts = memory[:numbers].view(torch.int64)
        self.dealt, self.updates, self.steps, self.read = counts[0:1], counts[1:2], counts[3:3 + self.world], counts[3 + self.world:]
        self.parameters = memory[numbers:].view(self.copy.dtype)
        self.seen, self.stale, self.own = 0, 0, 0
        if self.rank == 0:
            self.parameters.copy_(self.copy)
        dist.barrier()
        if self.rank == 0:
            os.unlink(path[0])           # the memory lives as long as it is mapped, and no longer

    def deal(self, tickets):
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
        self.steps[self.rank] = self.read[self.rank] = FAR
        dist.barrier()

    def exchange(self, model):
        """Add what the optimizer has just changed to the shared parameters, then take a copy of them."""
        self._wait_for(self.read)             # with bound 0: until all have taken the copy that my update would change
        with self._locked():
            self.parameters += (_flat(model) - self.copy) / self.world
            self.stale += int(self.updates) - self.seen
            self.own += 1
            self.updates += 1
            self.steps[self.rank] += 1
        if self.link:
            self.link.carry(2 * self.copy.nbytes)      # there and back, on a link of this rank's own
        self._wait_for(self.steps)
        self.take(model)
        self.read[self.rank] += 1

    def take(self, model):
        """The model's parameters become those that are shared."""
        with self._locked():
            self.copy, self.seen = self.parameters.clone(), int(self.updates)
        parameters = [parameter.data for parameter in model.parameters()]
        for parameter, part in zip(parameters, self.copy.split([parameter.numel() for parameter in parameters])):
            parameter.copy_(part.view_as(parameter))

    def total(self):
        """How many parts of batches all ranks together have trained on."""
        return int(self.updates)

    def _wait_for(self, counts):
        end = time.monotonic() + self.timeout
        while int(self.steps[self.rank]) - int(counts.min()) > self.bound:
            if time.monotonic() > end:
                raise TimeoutError(f"Timed out after {self.timeout:g} s, as gloo would, waiting for the slowest rank.")
            time.sleep(0.0002)

    @contextmanager
    def _locked(self):
        import fcntl                               # POSIX only; machine.missing_for says so elsewhere
        fcntl.flock(self.file, fcntl.LOCK_EX)      # the system frees it when its holder is killed
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)


def averaged(model):
    """(For evaluation:) every parameter becomes its mean over the ranks, every buffer, such as a running mean, rank 0's."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)
        parameter.data /= dist.get_world_size()
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    return model


def straggling(model, recipe):
    """The last rank sleeps in each training step: slower than the others, on purpose."""
    late = recipe.straggler_ms / 1000
    if late and dist.get_rank() == dist.get_world_size() - 1:
        model.register_forward_pre_hook(lambda module, _: time.sleep(late) if module.training else None)


class Network:
    """A link that is slow on purpose, SIMULATED: one message at a time, each as late as the alpha-beta model says."""

    def __init__(self, latency_s, bytes_per_s):
        self.latency_s, self.bytes_per_s, self.free, self.lock = latency_s, bytes_per_s, 0.0, threading.Lock()

    def carry(self, bytes):
        """Sleep as long as one message of so many bytes would take."""
        self.hold(self.latency_s + bytes / self.bytes_per_s)

    def hold(self, seconds):
        with self.lock:                           # messages queue up: those before this one go first
            self.free = max(self.free, time.perf_counter()) + seconds
            wait = self.free - time.perf_counter()
        time.sleep(max(0.0, wait))


def network(recipe):
    """The recipe's `Network`, or None where it asks for none."""
    if not recipe.latency_ms and not recipe.bandwidth_mbit:
        return None
    return Network(recipe.latency_ms / 1000, (recipe.bandwidth_mbit or float("inf")) * 1e6 / 8)


def slow_down(link):
    """Every all-reduce of this process, whoever asks for it, then takes as long as on that network, were it a ring."""
    at_once = dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        work, arrived = at_once(tensor, op, group, async_op=True), torch.futures.Future()
        seconds = all_reduce_s(tensor.nbytes, dist.get_world_size(group), link.latency_s, link.bytes_per_s)

        def deliver():
            try:
                work.wait()
                link.hold(seconds)
                arrived.set_result([tensor])
            except Exception as error:            # a peer is gone: those who wait must hear of it
                arrived.set_exception(error)

        threading.Thread(target=deliver, daemon=True).start()
        return _Late(arrived) if async_op else arrived.wait() and None

    dist.all_reduce = all_reduce


class _Late:
    """What an asynchronous collective returns."""

    def __init__(self, future):
        self.get_future, self.wait = lambda: future, future.wait


def _flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).cpu()
