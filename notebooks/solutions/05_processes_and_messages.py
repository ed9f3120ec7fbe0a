"""Lesson 05, processes and messages: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

import sys
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cnnlab import record
from cnnlab.check import TIMEOUT, Task
from cnnlab.launch.task_ranks import call_in_ranks

PROGRAMS = str(Path(record.NOTEBOOKS) / "programs")
if PROGRAMS not in sys.path:
    sys.path.insert(0, PROGRAMS)

from smoothing import smooth  # noqa: E402

TIMEOUT_S = 8  # Three ranks need about 0.5 s, and seconds on a busy machine.
TASKS = {}


def by_rank(call, world):
    """What `call()` returns in each of `world` ranks."""
    return call_in_ranks(call, world, TIMEOUT_S)


# 05.1: the rows of a rank


def rows_needed(rank, world, rows):
    """The rows of the image that a rank needs: (first row, row after the last one).

    Of an image of `rows` rows, rows - 2 are computed: all but the first and the last one. Computed
    row i (from 0) needs rows i, i + 1 and i + 2 of the image. Rank r of `world` ranks computes the
    rows from r * (rows - 2) // world up to, but without, (r + 1) * (rows - 2) // world.
    """
    computed = rows - 2
    first = rank * computed // world
    last = (rank + 1) * computed // world
    return first, last + 2


def rows_without_halo(rank, world, rows):
    first, last = rows_needed(rank, world, rows)
    return first, last - 2


def one_halo_row_only(rank, world, rows):
    first, last = rows_needed(rank, world, rows)
    return first, last - 1


def all_rows_divided(rank, world, rows):
    return rank * rows // world, (rank + 1) * rows // world + 2


def remainder_forgotten(rank, world, rows):
    share = (rows - 2) // world
    return rank * share, (rank + 1) * share + 2


TASKS["05.1"] = Task(
    reference=rows_needed,
    inputs=lambda: [(2, 3, 13), (0, 1, 10), (0, 2, 11), (1, 3, 427)],
    hints=[
        "First find the rows that the rank computes, with the formula in the docstring. Then ask "
        "which rows of the image its first and its last computed row need.",
        "The last computed row has number last - 1, so it needs rows last - 1, last and last + 1 "
        "of the image. Which number comes after these?",
    ],
    mistakes={
        rows_without_halo: "The halo is missing: the last computed row needs two more rows below.",
        one_halo_row_only: "One row is missing at the end. Return the row after the last one.",
        all_rows_divided: "The first and the last row of the image are not computed. Divide the "
        "other ones, which are rows - 2, among the ranks.",
        remainder_forgotten: "If the rows cannot be divided evenly, nobody computes the last ones. "
        "Multiply first, then divide.",
    },
)


# 05.2: bytes that a pool sends


def pool_bytes(rows, columns, workers):
    """Bytes of the numbers that a pool sends for one step: (to the workers, back).

    The image (rows, columns) has 4 bytes per pixel. Each worker gets the rows that it needs, with
    its halo, and sends back the rows that it has computed.
    """
    to_workers = (rows - 2 + 2 * workers) * columns * 4
    back = (rows - 2) * columns * 4
    return to_workers, back


def halo_not_counted(rows, columns, workers):
    return rows * columns * 4, (rows - 2) * columns * 4


def pixels_instead_of_bytes(rows, columns, workers):
    to_workers, back = pool_bytes(rows, columns, workers)
    return to_workers // 4, back // 4


def whole_image_for_each(rows, columns, workers):
    return workers * rows * columns * 4, (rows - 2) * columns * 4


TASKS["05.2"] = Task(
    reference=pool_bytes,
    inputs=lambda: [(427, 640, 1), (427, 640, 2), (1708, 2560, 8)],
    hints=[
        "All workers together compute rows - 2 rows. How many rows does each of them need in "
        "addition?",
        "A worker that computes n rows gets n + 2. Add that up over the workers. A row has as "
        "many bytes as 4 times its columns.",
    ],
    mistakes={
        halo_not_counted: "Neighboring parts overlap: each worker gets two rows more than it "
        "computes.",
        pixels_instead_of_bytes: "These are pixels. Each of them has 4 bytes.",
        whole_image_for_each: "A worker gets only its part of the image, not the whole image.",
    },
)


# 05.3: shared memory


def smooth_shared(name, shape, first, last):
    """Smooth one part of an image that is in the shared memory block `name`. Return nothing.

    The block has two float32 images of `shape`, before and after the step. This worker needs the
    rows from `first` up to, but without, `last` of the first image. Write the rows that it
    computes (all of these but the first and the last one) into the second image.
    """
    block = shared_memory.SharedMemory(name=name)
    before, after = torch.from_numpy(np.ndarray((2, *shape), np.float32, block.buf))
    after[first + 1 : last - 1] = smooth(before[first:last])
    del before, after
    block.close()


def shared_images():
    yield torch.rand(12, 8), 0, 7
    yield torch.rand(12, 8), 5, 12


def run_shared(function, image, first, last):
    """The second image in the block after the call."""
    block = shared_memory.SharedMemory(create=True, size=2 * image.nbytes)
    try:
        images = np.ndarray((2, *image.shape), np.float32, block.buf)
        images[0], images[1] = image.numpy(), 0
        returned = function(block.name, tuple(image.shape), first, last)
        before, after = torch.from_numpy(images.copy())
        del images
    finally:
        block.close()
        block.unlink()
    if not after.any() and torch.equal(before, image):
        return returned
    return {"first image": before, "second image": after}


def open_images(name, shape):
    block = shared_memory.SharedMemory(name=name)
    return block, torch.from_numpy(np.ndarray((2, *shape), np.float32, block.buf))


def result_returned(name, shape, first, last):
    block, images = open_images(name, shape)
    result = smooth(images[0, first:last])
    del images
    block.close()
    return result


def written_one_row_too_early(name, shape, first, last):
    block, images = open_images(name, shape)
    images[1, first : last - 2] = smooth(images[0, first:last])
    del images
    block.close()


def written_into_the_first_image(name, shape, first, last):
    block, images = open_images(name, shape)
    images[0, first + 1 : last - 1] = smooth(images[0, first:last])
    del images
    block.close()


def whole_image_smoothed(name, shape, first, last):
    block, images = open_images(name, shape)
    images[1, 1:-1] = smooth(images[0])
    del images
    block.close()


TASKS["05.3"] = Task(
    reference=smooth_shared,
    inputs=shared_images,
    run=run_shared,
    hints=[
        "The block exists already. `shared_memory.SharedMemory(name=name)` opens it, and its "
        "`.buf` can be the memory of a NumPy array: nothing is copied.",
        "`np.ndarray((2, *shape), np.float32, block.buf)` is both images. `torch.from_numpy` gives "
        "a tensor with the same memory. An assignment to a slice of it writes into the block.",
        "`smooth` returns two rows fewer than it gets. Its first row is row first + 1 of the "
        "image. Delete all tensors of the block before `block.close()`.",
    ],
    mistakes={
        result_returned: "The result was returned, so it would be sent as a pickle. Write it into "
        "the second image of the block.",
        written_one_row_too_early: "The rows are one row too high. The first row that `smooth` "
        "returns is row first + 1 of the image.",
        written_into_the_first_image: "The first image was changed. Other workers still read it: "
        "write into the second one.",
        whole_image_smoothed: "This worker computed all rows. Compute only those of its part.",
    },
)


# 05.4: halo exchange


def exchange_halos(part):
    """Fill the halo rows of `part` with the neighbors' rows, in place.

    `part` (rows + 2, columns) has the rows of this rank; its first and its last row are the halo.
    The first one becomes the last own row of the rank above (rank - 1). The last one becomes the
    first own row of the rank below (rank + 1). At the edge of the image, there is no neighbor, and
    the halo stays as it is.
    """
    rank, requests = dist.get_rank(), []
    if rank > 0:
        requests.append(dist.isend(part[1], rank - 1))
        requests.append(dist.irecv(part[0], rank - 1))
    if rank < dist.get_world_size() - 1:
        requests.append(dist.isend(part[-2], rank + 1))
        requests.append(dist.irecv(part[-1], rank + 1))
    for request in requests:
        request.wait()


def parts_of_three_ranks():
    yield (torch.randn(3, 5, 4),)
    yield (torch.randn(3, 4, 6),)


def run_exchange(function, parts):
    """Each rank's part after the exchange; None if no part has changed."""

    def call():
        part = parts[dist.get_rank()].clone()
        function(part)
        return None if torch.equal(part, parts[dist.get_rank()]) else part

    return by_rank(call, 3)


def exchange_rows(part, to_above, to_below):
    """Send these rows of the part up and down, and receive the halo."""
    rank, requests = dist.get_rank(), []
    if rank > 0:
        requests.append(dist.isend(part[to_above].clone(), rank - 1))
        requests.append(dist.irecv(part[0], rank - 1))
    if rank < dist.get_world_size() - 1:
        requests.append(dist.isend(part[to_below].clone(), rank + 1))
        requests.append(dist.irecv(part[-1], rank + 1))
    for request in requests:
        request.wait()


def halo_rows_sent(part):
    exchange_rows(part, 0, -1)


def opposite_edges_sent(part):
    exchange_rows(part, -2, 1)


def downward_only(part):
    rank = dist.get_rank()
    if rank > 0:
        dist.recv(part[0], rank - 1)
    if rank < dist.get_world_size() - 1:
        dist.send(part[-2], rank + 1)


def first_and_last_rank_are_neighbors(part):
    rank, world = dist.get_rank(), dist.get_world_size()
    above, below = (rank - 1) % world, (rank + 1) % world
    requests = [dist.isend(part[-2].clone(), below), dist.irecv(part[0], above)]
    requests += [dist.isend(part[1].clone(), above), dist.irecv(part[-1], below)]
    for request in requests:
        request.wait()


def everybody_receives_first(part):
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        dist.recv(part[0], rank - 1)
    if rank < world - 1:
        dist.recv(part[-1], rank + 1)
    if rank > 0:
        dist.send(part[1], rank - 1)
    if rank < world - 1:
        dist.send(part[-2], rank + 1)


TASKS["05.4"] = Task(
    reference=exchange_halos,
    inputs=parts_of_three_ranks,
    run=run_exchange,
    hints=[
        "A rank has up to two neighbors: one above if its rank is greater than 0, and one below if "
        "it is not the last rank. With each of them it exchanges one row in each direction.",
        "The rank above gets your first own row, which is part[1]. Your halo part[0] receives its "
        "last own row. Below, the same with part[-2] and part[-1].",
        "If two neighbors both wait in `recv` (or both in `send`), neither continues. `dist.isend` "
        "and `dist.irecv` return at once: start all messages, put what they return into a list, "
        "and then call `wait()` on each item.",
    ],
    mistakes={
        halo_rows_sent: "You sent your halo rows, which are copies of the neighbors' old rows. "
        "Send your own rows next to them.",
        opposite_edges_sent: "The two rows are swapped: the rank above needs your first own row, "
        "and the rank below needs your last one.",
        downward_only: "Rows went down only. Each rank also needs the row of the rank below.",
        first_and_last_rank_are_neighbors: "The first and the last rank are not neighbors. Their "
        "outer halo rows belong to the edge of the image and must stay.",
        everybody_receives_first: TIMEOUT,
    },
)


# 05.5: all-reduce by hand


def sum_over_ranks(tensor):
    """Replace `tensor` with the sum of the tensors of all ranks, in place and in all ranks.

    Rank 0 receives the tensors of the other ranks, one after the other, and adds them to its own.
    Then it sends the sum to each of them.
    """
    others = range(1, dist.get_world_size())
    if dist.get_rank() == 0:
        for other in others:
            received = torch.empty_like(tensor)
            dist.recv(received, other)
            tensor += received
        for other in others:
            dist.send(tensor, other)
    else:
        dist.send(tensor, 0)
        dist.recv(tensor, 0)


def tensors_of_three_ranks():
    yield (torch.randn(3, 5),)


def run_sum(function, tensors):
    """Each rank's tensor afterwards; None if it has not changed."""

    def call():
        tensor = tensors[dist.get_rank()].clone()
        function(tensor)
        return None if torch.equal(tensor, tensors[dist.get_rank()]) else tensor

    return by_rank(call, 3)


def only_rank_0_has_the_sum(tensor):
    if dist.get_rank() == 0:
        for other in range(1, dist.get_world_size()):
            received = torch.empty_like(tensor)
            dist.recv(received, other)
            tensor += received
    else:
        dist.send(tensor, 0)


def received_over_the_own_tensor(tensor):
    others = range(1, dist.get_world_size())
    if dist.get_rank() == 0:
        for other in others:
            dist.recv(tensor, other)
        for other in others:
            dist.send(tensor, other)
    else:
        dist.send(tensor, 0)
        dist.recv(tensor, 0)


def sum_in_a_new_tensor(tensor):
    others = range(1, dist.get_world_size())
    if dist.get_rank() == 0:
        total = tensor.clone()
        for other in others:
            received = torch.empty_like(tensor)
            dist.recv(received, other)
            total = total + received
        for other in others:
            dist.send(total, other)
    else:
        dist.send(tensor, 0)
        dist.recv(tensor, 0)


def mean_of_the_ranks(tensor):
    dist.all_reduce(tensor)
    tensor /= dist.get_world_size()


TASKS["05.5"] = Task(
    reference=sum_over_ranks,
    inputs=tensors_of_three_ranks,
    run=run_sum,
    hints=[
        "Write one branch for rank 0 and one for the other ranks. Each message needs a send in one "
        "branch and a recv in the other, in the same order.",
        "Rank 0 receives into a new tensor, `torch.empty_like(tensor)`, and adds this to its own "
        "tensor with `+=`. The other ranks can receive the sum into `tensor` itself.",
    ],
    mistakes={
        only_rank_0_has_the_sum: "Only rank 0 has the sum. Send it to the other ranks.",
        received_over_the_own_tensor: "`recv` overwrites its tensor. Receive into another one, and "
        "add it.",
        sum_in_a_new_tensor: "Rank 0's tensor has not changed: `tensor = tensor + other` makes a "
        "new tensor. `tensor += other` changes it in place.",
        mean_of_the_ranks: "This is the mean. The task asks for the sum.",
    },
)


# 05.6: Amdahl and Gustafson


def two_laws(serial_s, parallel_s, n):
    """The speedup of n ranks by Amdahl's and by Gustafson's law.

    One rank needs `serial_s` seconds for the part that only one rank can do, and `parallel_s`
    seconds for the rest, which n ranks do in 1/n of the time. Amdahl: one rank's time divided by
    that of n ranks, for this image. Gustafson: the same for a larger image, for which one rank
    needs `serial_s` seconds for the serial part and n * parallel_s seconds for the rest.
    """
    same_work = (serial_s + parallel_s) / (serial_s + parallel_s / n)
    larger_work = (serial_s + n * parallel_s) / (serial_s + parallel_s)
    return same_work, larger_work


def serial_part_divided_too(serial_s, parallel_s, n):
    return float(n), float(n)


def amdahl_for_both(serial_s, parallel_s, n):
    same_work, _ = two_laws(serial_s, parallel_s, n)
    return same_work, same_work


def laws_exchanged(serial_s, parallel_s, n):
    same_work, larger_work = two_laws(serial_s, parallel_s, n)
    return larger_work, same_work


TASKS["05.6"] = Task(
    reference=two_laws,
    inputs=lambda: [(1.0, 3.0, 2), (0.05, 0.2, 8), (1.0, 99.0, 1024)],
    hints=[
        "Write down four times: one rank and n ranks, first for the same image, then for the "
        "larger one. A speedup is the time of one rank divided by that of n ranks.",
        "For the larger image, n ranks need the time that one rank needs for the original image. "
        "How much time does one rank need for the larger image?",
    ],
    mistakes={
        serial_part_divided_too: "The serial part does not get faster: only one rank can do it.",
        amdahl_for_both: "The second value is for a larger image. One rank needs more time for "
        "its parallel part: n * parallel_s.",
        laws_exchanged: "The order is wrong: first Amdahl (the same work), then Gustafson.",
    },
)


# 05.7: repair the image of a weak scaling measurement


def tall_image(image, n):
    """An image with which each of n ranks computes as many rows as one rank with `image`.

    Of an image of `rows` rows, rows - 2 are computed: all but the first and the last one. The new
    image has the computed rows n times, between the first and the last row.
    """
    return torch.cat([image[:1], image[1:-1].repeat(n, 1), image[-1:]])


def images_and_counts():
    for rows, n in ((5, 1), (5, 3), (12, 4)):
        yield torch.randn(rows, 4), n


def run_tall(function, image, n):
    tall = function(image, n)
    if not isinstance(tall, torch.Tensor):
        return tall
    return {"rows that each rank computes": (len(tall) - 2) / n, "image": tall}


def copies_below_each_other(image, n):
    """The broken program that the lesson shows."""
    return image.repeat(n, 1)


def edges_missing(image, n):
    return image[1:-1].repeat(n, 1)


def next_to_each_other(image, n):
    return image.repeat(1, n)


TASKS["05.7"] = Task(
    reference=tall_image,
    inputs=images_and_counts,
    run=run_tall,
    hints=[
        "Count for an image of 5 rows: one rank computes 3 of them. Three copies have 15 rows. How "
        "many of these are computed, and how many by each of three ranks?",
        "The n ranks must compute n * (rows - 2) rows together, and the image needs one more row "
        "at the top and one at the bottom.",
        "Repeat only the inner rows, `image[1:-1]`, and join the first and the last row to them "
        "with `torch.cat`.",
    ],
    mistakes={
        copies_below_each_other: "n copies have more rows to compute than n times one image: the "
        "outer rows of a copy in the middle are computed too.",
        edges_missing: "The first and the last row are missing. These are not computed, but the "
        "rows next to them need them.",
        next_to_each_other: "This image is wider. The ranks divide the rows, so it must be taller.",
    },
)


# 05.8: the serial share from two times


def serial_share(one_s, many_s, n):
    """The serial share with which Amdahl's law gives exactly these two times.

    One rank needs `one_s` seconds, n ranks need `many_s` seconds for the same work. Source: Karp
    and Flatt, "Measuring parallel processor performance" (1990).
    """
    return (n * many_s / one_s - 1) / (n - 1)


def times_of_two_counts():
    for serial, n in ((0.25, 2), (0.1, 4), (0.0, 8), (0.02, 1024)):
        one = 0.1 + torch.rand(()).item()
        yield one, one * (serial + (1 - serial) / n), n


def missing_speedup(one_s, many_s, n):
    return 1 - one_s / many_s / n


def time_of_many_per_one(one_s, many_s, n):
    return many_s / one_s


def difference_to_the_ideal(one_s, many_s, n):
    return many_s / one_s - 1 / n


TASKS["05.8"] = Task(
    reference=serial_share,
    inputs=times_of_two_counts,
    hints=[
        "Amdahl's law for the time: many_s = one_s * (s + (1 - s) / n). Solve it for s.",
        "Divide by one_s and multiply by n: n * many_s / one_s = n * s + 1 - s.",
    ],
    mistakes={
        missing_speedup: "This is 1 - efficiency, not the serial share. Solve Amdahl's law for the "
        "share.",
        time_of_many_per_one: "This is the inverse of the speedup. It contains the serial and the "
        "parallel part.",
        difference_to_the_ideal: "Almost: many_s / one_s - 1 / n is s * (1 - 1 / n), not s.",
    },
)


# 05.9: repair a deadlock


def pass_on(tensor):
    """Send `tensor` to the next rank and return that of the rank before: a ring of all ranks.

    The last rank sends to rank 0.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(tensor)
    request = dist.isend(tensor, (rank + 1) % world)
    dist.recv(received, (rank - 1) % world)
    request.wait()
    return received


def run_ring(function, tensors):
    def call():
        return function(tensors[dist.get_rank()].clone())

    return by_rank(call, 3)


def receive_before_send(tensor):
    """The broken program that the lesson shows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(tensor)
    dist.recv(received, (rank - 1) % world)
    dist.send(tensor, (rank + 1) % world)
    return received


def own_tensor_returned(tensor):
    pass_on(tensor)
    return tensor


def passed_backward(tensor):
    rank, world = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(tensor)
    request = dist.isend(tensor, (rank - 1) % world)
    dist.recv(received, (rank + 1) % world)
    request.wait()
    return received


def nothing_received(tensor):
    pass_on(tensor)
    return torch.zeros_like(tensor)


TASKS["05.9"] = Task(
    reference=pass_on,
    inputs=tensors_of_three_ranks,
    run=run_ring,
    hints=[
        "Can any rank get past its `recv`? Draw an arrow from each rank to the rank that it waits "
        "for. If the arrows form a circle, this is a deadlock.",
        "Two ways out: start the send with `dist.isend`, which returns at once, before you "
        "receive, and call `wait()` on what it returned. Or let the ranks with even numbers send "
        "first, and those with odd numbers receive first.",
    ],
    mistakes={
        receive_before_send: TIMEOUT,
        own_tensor_returned: "You returned your own tensor. Return the received one.",
        passed_backward: "The tensors went in the opposite direction: send to rank + 1.",
        nothing_received: "The returned tensor has only zeros. Did you receive into it?",
    },
)


# 05.10: broadcast as a tree


def broadcast_tree(tensor):
    """Copy rank 0's `tensor` into that of all ranks, in place, as a tree.

    In round 0, rank 0 sends to rank 1. In round 1, ranks 0 and 1 send to ranks 2 and 3. In each
    round, all ranks that have the data send them to one more rank each: rank r to r + 2 ** round.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    have = 1  # So many ranks have the data.
    while have < world:
        if rank < have and rank + have < world:
            dist.send(tensor, rank + have)
        elif have <= rank < 2 * have:
            dist.recv(tensor, rank - have)
        have *= 2


def tensors_of_four_ranks():
    yield (torch.randn(4, 3),)


def run_broadcast(function, tensors):
    """Each rank's tensor afterwards, and the number of messages that it has sent."""
    messages = []
    send = dist.send

    def call():
        def counting_send(tensor, dst):
            messages.append(dst)
            return send(tensor, dst)

        dist.send = counting_send
        tensor = tensors[dist.get_rank()].clone()
        function(tensor)
        dist.send = send
        if not messages and torch.equal(tensor, tensors[dist.get_rank()]):
            return None
        return {"tensor": tensor, "sends to ranks": messages}

    return by_rank(call, 4)


def rank_0_sends_everything(tensor):
    if dist.get_rank() == 0:
        for other in range(1, dist.get_world_size()):
            dist.send(tensor, other)
    else:
        dist.recv(tensor, 0)


def one_after_the_other(tensor):
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        dist.recv(tensor, rank - 1)
    if rank < world - 1:
        dist.send(tensor, rank + 1)


def first_round_only(tensor):
    if dist.get_rank() == 0:
        dist.send(tensor, 1)
    elif dist.get_rank() == 1:
        dist.recv(tensor, 0)


TASKS["05.10"] = Task(
    reference=broadcast_tree,
    inputs=tensors_of_four_ranks,
    run=run_broadcast,
    hints=[
        "Count the ranks that have the data: 1, 2, 4, ... In each round, these send, and as many "
        "other ranks receive.",
        "Loop with `have = 1`, doubling it. A rank below `have` sends to its own number plus "
        "`have`, if there is such a rank. Which ranks receive in this round, and from whom?",
        "Ranks from `have` up to, but without, 2 * have receive, from their number minus `have`.",
    ],
    mistakes={
        rank_0_sends_everything: "The result is right, but rank 0 sends all messages, one after "
        "the other. In a tree, ranks that have the data send them too.",
        one_after_the_other: "The result is right, but this is a chain, which takes one round for "
        "each rank. In a tree, rank 0 sends again in the next round.",
        first_round_only: "Only ranks 0 and 1 have the data. More rounds must follow.",
    },
)
