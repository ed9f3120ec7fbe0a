"""Lesson 12, data parallel: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from cnnlab import all_reduce_seconds
from cnnlab.check import Task
from cnnlab.launch.task_ranks import call_in_ranks

TIMEOUT_S = 20  # Three ranks need about 0.5 s, and seconds on a busy machine.
TASKS = {}


def by_rank(call, world=2):
    """What `call()` returns in each rank."""
    return call_in_ranks(call, world, TIMEOUT_S)


def small_network():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def images_and_labels(count):
    return torch.randn(count, 6), torch.randint(3, (count,))


# 12.1: the mean of the gradients


def average_gradients(model):
    """Replace each gradient of the model by its mean over all ranks, in place.

    `model.parameters()` gives the parameters, and `parameter.grad` is the gradient of one. Use
    `dist.all_reduce` and `dist.get_world_size`. Returns nothing.
    """
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def gradients_after(function, model, images, labels, *arguments):
    """The gradients of a rank's images after the function; None if it has changed nothing."""
    F.cross_entropy(model(images), labels).backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    function(model, *arguments)
    after = [parameter.grad for parameter in model.parameters()]
    if all(map(torch.equal, before, after)):
        return None
    return {"gradients": after}


def run_equal_shares(function, model, images, labels):
    def call():
        rank, world = dist.get_rank(), dist.get_world_size()
        return gradients_after(function, model, images[rank::world], labels[rank::world])

    return by_rank(call)


def sum_of_the_gradients(model):
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)


def divided_only(model):
    for parameter in model.parameters():
        parameter.grad /= dist.get_world_size()


TASKS["12.1"] = Task(
    reference=average_gradients,
    inputs=lambda: [(small_network(), *images_and_labels(8))],
    run=run_equal_shares,
    hints=[
        "`model.parameters()` gives all parameters, in the same order in all ranks. The gradient "
        "of each is in its `.grad`.",
        "`dist.all_reduce(tensor)` adds up the tensors of all ranks. A mean is a sum, divided by "
        "the number of ranks.",
    ],
    mistakes={
        sum_of_the_gradients: "These are the sums over the ranks. The optimizer needs the means: "
        "divide by the number of ranks.",
        divided_only: "The gradients were divided, but not added up: no message was sent.",
    },
)


# 12.2: uneven shares


def average_uneven(model, count):
    """Replace each gradient by that of the mean loss over the images of all ranks, in place.

    The gradients of this rank are those of the mean loss over its own `count` images. `count`
    differs between the ranks, and a rank knows only its own. `dist.all_reduce` adds up tensors,
    also a tensor with a single number: `torch.tensor(float(count))`. Returns nothing.
    """
    total = torch.tensor(float(count))
    dist.all_reduce(total)
    for parameter in model.parameters():
        parameter.grad *= count / total
        dist.all_reduce(parameter.grad)


def run_uneven_shares(function, model, images, labels, first):
    """Rank 0 has the first images, rank 1 the others."""

    def call():
        mine = slice(0, first) if dist.get_rank() == 0 else slice(first, None)
        share, targets = images[mine], labels[mine]
        return gradients_after(function, model, share, targets, len(share))

    return by_rank(call)


def mean_of_the_ranks(model, count):
    average_gradients(model)


def sum_of_all_images(model, count):
    for parameter in model.parameters():
        parameter.grad *= count
        dist.all_reduce(parameter.grad)


def divided_by_own_count(model, count):
    for parameter in model.parameters():
        parameter.grad *= count
        dist.all_reduce(parameter.grad)
        parameter.grad /= count * dist.get_world_size()


TASKS["12.2"] = Task(
    reference=average_uneven,
    inputs=lambda: [(small_network(), *images_and_labels(8), first) for first in (6, 1)],
    run=run_uneven_shares,
    hints=[
        "A mean over `count` images, times `count`, is a sum. The sum over all ranks, divided by "
        "the number of all images, is the mean that you need.",
        "How many images do all ranks have together? Put your `count` into a tensor and let "
        "`dist.all_reduce` add up those of all ranks.",
        "For each parameter: multiply the gradient by your share of all images, then add up.",
    ],
    mistakes={
        mean_of_the_ranks: "This is the mean of the ranks' means, which DDP computes. An image in "
        "a small share then counts more than one in a large share.",
        sum_of_all_images: "These are sums over all images. Divide by the number of all images, "
        "which is the sum of `count` over the ranks.",
        divided_by_own_count: "Each rank has divided by its own count, so the ranks have different "
        "gradients now. All must divide by the number of all images.",
    },
)


# 12.3: the ring all-reduce


def pass_on(tensor):
    """Send `tensor` to the next rank, and return what the rank before has sent."""
    rank, world = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(tensor)
    sent = dist.isend(tensor.clone(), (rank + 1) % world)
    dist.recv(received, (rank - 1) % world)
    sent.wait()
    return received


def ring_all_reduce(tensor):
    """Replace `tensor` (n,) by its sum over all N ranks, in place. n is a multiple of N.

    `tensor.chunk(N)` gives the N chunks. They are views: if you change them in place, with `add_`
    and `copy_`, you change the tensor. `pass_on(chunk)` returns what this rank receives.
    Reduce-scatter, steps s = 0 to N - 2: pass on chunk (rank - s) % N, and add what you receive to
    chunk (rank - s - 1) % N. All-gather, N - 1 steps: first pass on your complete chunk, then
    always the chunk that you received in the step before; what you receive replaces the chunk with
    the same number. Returns nothing.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = tensor.chunk(world)
    for step in range(world - 1):
        received = pass_on(chunks[(rank - step) % world])
        chunks[(rank - step - 1) % world].add_(received)
    for step in range(world - 1):
        received = pass_on(chunks[(rank + 1 - step) % world])
        chunks[(rank - step) % world].copy_(received)


def run_ring(function, tensors):
    """The tensor of each rank afterwards, and the bytes that the rank has sent."""

    def call():
        sent, isend, send = [], dist.isend, dist.send

        def count(tensor, to, send_it):
            sent.append(tensor.nbytes)
            return send_it(tensor, to)

        dist.isend = lambda tensor, to: count(tensor, to, isend)
        dist.send = lambda tensor, to: count(tensor, to, send)
        tensor = tensors[dist.get_rank()].clone()
        function(tensor)
        if torch.equal(tensor, tensors[dist.get_rank()]):
            return None
        return {"tensor": tensor, "bytes sent": sum(sent)}

    return by_rank(call, len(tensors))


def reduce_scatter_only(tensor):
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = tensor.chunk(world)
    for step in range(world - 1):
        chunks[(rank - step - 1) % world].add_(pass_on(chunks[(rank - step) % world]))


def added_in_both_laps(tensor):
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = tensor.chunk(world)
    for step in range(2 * (world - 1)):
        chunks[(rank - step - 1) % world].add_(pass_on(chunks[(rank - step) % world]))


def whole_tensors(tensor):
    passed = tensor.clone()
    for _ in range(dist.get_world_size() - 1):
        passed = pass_on(passed)
        tensor += passed


def all_reduce_of_torch(tensor):
    dist.all_reduce(tensor)


def all_gather_with_the_first_chunk(tensor):
    reduce_scatter_only(tensor)
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = tensor.chunk(world)
    for step in range(world - 1):
        chunks[(rank - step - 1) % world].copy_(pass_on(chunks[(rank - step) % world]))


TASKS["12.3"] = Task(
    reference=ring_all_reduce,
    inputs=lambda: [(torch.randn(world, 4 * world),) for world in (2, 3)],
    run=run_ring,
    hints=[
        "Two loops of N - 1 steps each. `chunks = tensor.chunk(N)` gives views: if you change a "
        "chunk in place, the tensor changes.",
        "In the first loop, the docstring has both numbers. Which chunk of rank r is complete "
        "after its last step, s = N - 2?",
        "It is chunk (r + 1) % N. So the second loop passes on a chunk whose number starts at "
        "rank + 1 and falls by one in each step. What it receives replaces the chunk with the next "
        "lower number: `copy_`.",
    ],
    mistakes={
        reduce_scatter_only: "Each rank has the sum in one chunk only. The all-gather is missing.",
        added_in_both_laps: "In the all-gather, sums that are complete were added again. They "
        "must replace the chunk.",
        whole_tensors: "The sum is right, but each message has the whole tensor, so a rank sends "
        "more bytes than with chunks.",
        all_reduce_of_torch: "`dist.all_reduce` has computed this. Use only `pass_on`.",
        all_gather_with_the_first_chunk: "The all-gather starts with a chunk that is not complete. "
        "Which chunk did this rank add to in the last step?",
    },
)


# 12.4: buckets that overlap with the backward pass


def step_with_overlap(compute_s, full_at, sizes, n, latency_s, bytes_per_s):
    """The seconds of a step in which the all-reduces overlap with computing.

    Computing takes from 0 to `compute_s`. Bucket i has `sizes[i]` bytes, and is full at
    `full_at[i]` seconds. The network carries one all-reduce at a time, in this order. Each takes
    `cnnlab.all_reduce_seconds(bytes, n, latency_s, bytes_per_s)` for n ranks, and starts as soon as
    the bucket is full and the network is free. The step ends when computing and all all-reduces
    have ended.
    """
    free_at = 0.0
    for full, size in zip(full_at, sizes, strict=True):
        free_at = max(free_at, full) + all_reduce_seconds(size, n, latency_s, bytes_per_s)
    return max(compute_s, free_at)


def buckets():
    """A slow network, one that is idle between the buckets, and a fast one."""
    for n, latency_s, bytes_per_s in ((4, 0.001, 1e8), (2, 0.0, 1e9), (2, 0.0, 1e11)):
        full_at = torch.rand(4).sort().values.div(20).tolist()
        sizes = torch.randint(1_000_000, 5_000_000, (4,)).tolist()
        yield full_at[-1] + 0.0005, full_at, sizes, n, latency_s, bytes_per_s


def no_overlap(compute_s, full_at, sizes, n, latency_s, bytes_per_s):
    return compute_s + sum(all_reduce_seconds(size, n, latency_s, bytes_per_s) for size in sizes)


def all_at_once(compute_s, full_at, sizes, n, latency_s, bytes_per_s):
    times = [all_reduce_seconds(size, n, latency_s, bytes_per_s) for size in sizes]
    ends = [full + seconds for full, seconds in zip(full_at, times, strict=True)]
    return max(compute_s, *ends)


def network_always_busy(compute_s, full_at, sizes, n, latency_s, bytes_per_s):
    total = sum(all_reduce_seconds(size, n, latency_s, bytes_per_s) for size in sizes)
    return max(compute_s, full_at[0] + total)


def only_the_network(compute_s, full_at, sizes, n, latency_s, bytes_per_s):
    return step_with_overlap(0.0, full_at, sizes, n, latency_s, bytes_per_s)


TASKS["12.4"] = Task(
    reference=step_with_overlap,
    inputs=buckets,
    hints=[
        "Go through the buckets in their order, and keep one number: the time at which the network "
        "is free again.",
        "An all-reduce starts at the later one of two times. The next one can start when it ends.",
        "At the end, there are two times again: when computing ends, and when the network is free.",
    ],
    mistakes={
        no_overlap: "Nothing overlaps: all messages come after computing.",
        all_at_once: "The all-reduces overlap with each other. The network carries one at a time.",
        network_always_busy: "Between two all-reduces, the network may have to wait until the next "
        "bucket is full.",
        only_the_network: "If the messages are short, computing ends later than the last of them.",
    },
)


# 12.5: exposed communication, from a timeline


def exposed_seconds(computing, messages):
    """The seconds in which at least one message is on its way, and the rank computes nothing.

    `computing` and `messages` are lists of (start, end) in seconds. Messages may overlap with each
    other, and with computing. The spans of computing do not overlap with each other;
    `computing` may be empty.
    """
    edges = sorted({moment for span in [*computing, *messages] for moment in span})
    exposed = 0.0
    for start, end in pairwise(edges):
        sending = any(first <= start and end <= last for first, last in messages)
        busy = any(first <= start and end <= last for first, last in computing)
        if sending and not busy:
            exposed += end - start
    return exposed


def timelines():
    """The last message starts during computing, and two messages overlap."""
    for _ in range(3):
        a, b, c, d, e, f = (torch.rand(6).add(0.1).cumsum(0)).tolist()
        yield [(0.0, a), (a, c), (f + 1, f + 2)], [(b, d), (0.5 * (c + d), e), (f, f + 0.5)]
    yield [], [(0.0, 1.0), (0.5, 2.0), (3.0, 4.0)]


def all_messages(computing, messages):
    return sum(end - start for start, end in messages)


def messages_that_count_twice(computing, messages):
    return sum(exposed_seconds(computing, [message]) for message in messages)


def from_first_to_last(computing, messages):
    span = (min(start for start, _ in messages), max(end for _, end in messages))
    return exposed_seconds(computing, [span])


def all_idle_time(computing, messages):
    edges = [moment for span in [*computing, *messages] for moment in span]
    return max(edges) - min(edges) - all_messages([], computing)


TASKS["12.5"] = Task(
    reference=exposed_seconds,
    inputs=timelines,
    hints=[
        "Cut the time at all starts and ends. Within a piece, nothing changes: either a message is "
        "on its way or not, and either the rank computes or not.",
        "Sort all starts and ends of both lists. `itertools.pairwise` gives neighbors: the pieces.",
        "For each piece, ask whether any message contains it, and whether any span of computing "
        "does. `any(...)` with a generator does this in one line.",
    ],
    mistakes={
        all_messages: "This is the time of all messages. The part that overlaps with computing is "
        "hidden: it does not count.",
        messages_that_count_twice: "Where two messages overlap, the time counts once.",
        from_first_to_last: "Between two messages, there can be a time without any: it is not "
        "communication.",
        all_idle_time: "This is all of the time without computing. Some of it has no message.",
    },
)


# 12.6: the images of a rank


def rank_indices(count, rank, world, epoch, seed):
    """The numbers of the images that a rank gets in an epoch, as a list, in their order.

    Shuffle the numbers from 0 to count - 1 with `torch.randperm(count, generator=generator)`. The
    generator is `torch.Generator().manual_seed(seed + epoch)`, the same in all ranks. Then append
    the first of the shuffled numbers again, until the length is a multiple of `world` (count >=
    world). Rank r gets the numbers at the positions r, r + world, r + 2 world, ...
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    order += order[: -count % world]
    return order[rank::world]


def same_order_in_each_epoch(count, rank, world, epoch, seed):
    return rank_indices(count, rank, world, 0, seed)


def another_order_in_each_rank(count, rank, world, epoch, seed):
    return rank_indices(count, rank, world, epoch + rank, seed)


def without_repeats(count, rank, world, epoch, seed):
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).tolist()[rank::world]


def in_blocks(count, rank, world, epoch, seed):
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    order += order[: -count % world]
    share = len(order) // world
    return order[rank * share : (rank + 1) * share]


TASKS["12.6"] = Task(
    reference=rank_indices,
    inputs=lambda: [(11, 3, 4, 2, 7), (10, 1, 4, 0, 7), (12, 0, 3, 5, 1)],
    hints=[
        "`torch.Generator().manual_seed(number)` is a generator with this seed. `.tolist()` makes "
        "a list of a tensor.",
        "How many numbers are missing to a multiple of `world`? In Python, `-count % world`.",
        "A slice with a step takes every `world`-th item.",
    ],
    mistakes={
        same_order_in_each_epoch: "The order must change with the epoch.",
        another_order_in_each_rank: "The ranks have shuffled differently. Then some images are in "
        "two shares, and others in none.",
        without_repeats: "Some ranks would get one image fewer than others. They may take fewer "
        "steps, and the others would wait for them. Repeat the first images.",
        in_blocks: "The rank takes consecutive numbers. It should take every `world`-th one.",
    },
)


# 12.7: gradient accumulation


def accumulate_step(model, images, labels, parts):
    """Compute the gradients of the mean cross-entropy, in `parts` equal micro-batches.

    `model` is a DDP model, `images` and `labels` are this rank's share. The mean is over all images
    of all ranks. The gradients of the micro-batches add up in `parameter.grad`. DDP may send
    messages in the last micro-batch only. Returns nothing.
    """
    micro_batches = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
    for number, (part, targets) in enumerate(micro_batches, start=1):
        with nullcontext() if number == parts else model.no_sync():
            loss = F.cross_entropy(model(part), targets) / parts
            loss.backward()


def run_accumulation(function, network, images, labels, parts):
    """The gradients of each rank, and the number of all-reduces."""

    def call():
        rank, world = dist.get_rank(), dist.get_world_size()
        model, all_reduces = DistributedDataParallel(network), []

        def hook(state, bucket):
            all_reduces.append(bucket.index())
            return allreduce_hook(None, bucket)

        model.register_comm_hook(None, hook)
        function(model, images[rank::world], labels[rank::world], parts)
        gradients = [parameter.grad for parameter in network.parameters()]
        if gradients[0] is None:
            return None
        return {"all-reduces": len(all_reduces), "gradients": gradients}

    return by_rank(call)


def messages_in_each_part(model, images, labels, parts):
    for part, targets in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        (F.cross_entropy(model(part), targets) / parts).backward()


def no_messages(model, images, labels, parts):
    with model.no_sync():
        messages_in_each_part(model, images, labels, parts)


def sum_of_the_means(model, images, labels, parts):
    micro_batches = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
    for number, (part, targets) in enumerate(micro_batches, start=1):
        with nullcontext() if number == parts else model.no_sync():
            F.cross_entropy(model(part), targets).backward()


def last_part_only(model, images, labels, parts):
    part, targets = images.chunk(parts)[-1], labels.chunk(parts)[-1]
    F.cross_entropy(model(part), targets).backward()


TASKS["12.7"] = Task(
    reference=accumulate_step,
    inputs=lambda: [(small_network(), *images_and_labels(16), 4)],
    run=run_accumulation,
    hints=[
        "`images.chunk(parts)` cuts the images. `backward` adds to the gradients that are there.",
        "`with model.no_sync():` around forward and backward keeps DDP from sending. The last "
        "micro-batch needs `contextlib.nullcontext()`, which does nothing, or an if.",
        "Each loss is a mean over one micro-batch. The mean over all images is the mean of these: "
        "divide each loss by `parts`.",
    ],
    mistakes={
        messages_in_each_part: "DDP has sent messages in each micro-batch. `no_sync` must contain "
        "the forward pass too: in it, DDP decides whether to send.",
        no_messages: "DDP has sent nothing: the ranks have different gradients. The last "
        "micro-batch must not be in `no_sync`.",
        sum_of_the_means: "The losses of the micro-batches were added up. Their mean is needed.",
        last_part_only: "These are the gradients of the last micro-batch only.",
    },
)


# 12.8: a program with three bugs


def train_epochs(model, loader, optimizer, scaler, epochs, save):
    """Train the DDP model, clip gradients to norm 1, and save it once after each epoch.

    `loader` has a `DistributedSampler`. `save(state)` writes a file. Returns nothing.
    """
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            scaler.scale(F.cross_entropy(model(images), labels)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            save(model.module.state_dict())


def numbered_images():
    """The first number of an image says which one it is."""
    images, labels = images_and_labels(12)
    images[:, 0] = torch.arange(12) / 12
    yield images, labels


def run_training(function, images, labels):
    """Which images each rank has seen, the weights, and how many files it has written."""

    def call():
        torch.manual_seed(0)
        model, seen, files = DistributedDataParallel(small_network()), [], []

        def record(_, inputs):
            seen.append(inputs[0][:, 0].mul(12).round().int().tolist())

        model.register_forward_pre_hook(record)
        dataset = TensorDataset(images, labels)
        loader = DataLoader(dataset, 3, sampler=DistributedSampler(dataset))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        function(model, loader, optimizer, scaler, 2, files.append)
        if not seen:
            return None
        weights = [parameter.detach() for parameter in model.parameters()]
        return {"images of each step": seen, "weights": weights, "files written": len(files)}

    return by_rank(call)


def with_bugs(name, same_order=False, clip_scaled=False, all_save=False):
    """The program with some of its bugs."""

    def train(model, loader, optimizer, scaler, epochs, save):
        for epoch in range(epochs):
            if not same_order:
                loader.sampler.set_epoch(epoch)
            for images, labels in loader:
                scaler.scale(F.cross_entropy(model(images), labels)).backward()
                if not clip_scaled:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            if all_save or dist.get_rank() == 0:
                save(model.module.state_dict())

    train.__name__ = name
    return train


TASKS["12.8"] = Task(
    reference=train_epochs,
    inputs=numbered_images,
    run=run_training,
    hints=[
        "Three lines are missing or incomplete: one about the order of the images, one about the "
        "size of the gradients, one about who writes.",
        "`DistributedSampler` shuffles with seed + epoch. Who tells it the number of the epoch?",
        "After `scaler.scale(loss).backward()`, the gradients are 1024 times too large here. "
        "`scaler.unscale_` divides them (lesson 09). And which rank should write the file?",
    ],
    mistakes={
        with_bugs("all_three", True, True, True): "There are three bugs. Begin with the order: "
        "both epochs have the same one, because the sampler does not know the epoch.",
        with_bugs("no_set_epoch", same_order=True): "Both epochs have the same order of the "
        "images: the sampler does not know which epoch it is.",
        with_bugs("clipped_before_unscaling", clip_scaled=True): "The gradients were clipped while "
        "they still were multiplied by the scale of the scaler, so the steps are much too short.",
        with_bugs("all_ranks_save", all_save=True): "Each rank has written the file. With a real "
        "file, several processes would write to it at the same time.",
    },
)
