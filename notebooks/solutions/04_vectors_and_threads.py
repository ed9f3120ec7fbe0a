"""The tasks of lesson 04: vectors and threads."""

import contextlib
import copy
import queue
import threading
import time

import numpy as np
import torch

from cnnlab.check import Task

TASKS = {}


def finish(call, seconds=10):
    """What call() returns, or an error if it does not end: the lesson must not stop there."""
    outcomes = []

    def work():
        try:
            outcomes.append(call())
        except Exception as error:  # raised below, in the thread of the check
            outcomes.append(error)

    # The threads that a daemon thread starts are daemons, too: none of them keeps Python running.
    caller = threading.Thread(target=work, daemon=True)
    caller.start()
    caller.join(seconds)
    if not outcomes:
        raise TimeoutError(f"a thread still waits after {seconds} s, for a lock, an item or a join")
    if isinstance(outcomes[0], Exception):
        raise outcomes[0]
    return outcomes[0]


# 04.1: a convolution without a Python loop over pixels


def by_numpy(photo, kernel):
    """Convolve a gray photo (height, width) with a square kernel, without padding.

    Pixel (y, x) of the output is the sum of kernel[i, j] * photo[y + i, x + j] over i and j. With
    a kernel of (size, size), the output has (height - size + 1, width - size + 1) pixels.
    """
    size = len(kernel)
    height, width = photo.shape[0] - size + 1, photo.shape[1] - size + 1
    output = np.zeros((height, width), photo.dtype)
    for i in range(size):
        for j in range(size):
            output += kernel[i, j] * photo[i : i + height, j : j + width]
    return output


class CountedReads(np.ndarray):
    """An array that counts how often it is indexed."""

    reads = 0

    def __getitem__(self, where):
        CountedReads.reads += 1
        return np.asarray(super().__getitem__(where))


def run_convolution(function, photo, kernel):
    """The output, and whether the function reads the photo pixel by pixel."""
    CountedReads.reads = 0
    output = function(photo.view(CountedReads), kernel)
    if output is None or output is ...:
        return output
    one_by_one = CountedReads.reads > 2 * kernel.size
    return {"output": np.asarray(output), "reads pixel by pixel": one_by_one}


def photos():
    for height, width, size in ((8, 9, 3), (12, 7, 5)):
        yield torch.rand(height, width).numpy(), torch.rand(size, size).numpy()


def loop_over_pixels(photo, kernel):
    size = len(kernel)
    output = np.zeros((photo.shape[0] - size + 1, photo.shape[1] - size + 1), photo.dtype)
    for y in range(output.shape[0]):
        for x in range(output.shape[1]):
            output[y, x] = (photo[y : y + size, x : x + size] * kernel).sum()
    return output


def flipped_kernel(photo, kernel):
    return by_numpy(photo, kernel[::-1, ::-1])


def only_the_last_product(photo, kernel):
    size = len(kernel)
    return np.asarray(kernel[-1, -1] * photo[size - 1 :, size - 1 :])


def one_row_and_column_short(photo, kernel):
    return by_numpy(photo, kernel)[:-1, :-1]


TASKS["04.1"] = Task(
    reference=by_numpy,
    inputs=photos,
    run=run_convolution,
    hints=[
        "Change the order of the loops. The outer loops go over the numbers of the kernel. What "
        "one of these numbers does to all pixels is one NumPy expression.",
        "The number kernel[i, j] is multiplied by a part of the photo that is as large as the "
        "output and starts in row i and column j.",
        "Start with `np.zeros` of the output's shape and the photo's dtype, and add up "
        "`kernel[i, j] * photo[i : i + ..., j : j + ...]`.",
    ],
    mistakes={
        loop_over_pixels: "The output is right, but Python still loops over the pixels. Loop over "
        "the numbers of the kernel, and let NumPy loop over the pixels.",
        flipped_kernel: "The kernel is flipped. As in most neural network libraries, kernel[0, 0] "
        "belongs to the top left pixel.",
        only_the_last_product: "This is the product for the last number of the kernel only: add "
        "up the products for all of them.",
        one_row_and_column_short: "The last row and the last column are missing.",
    },
)


# 04.2: rows for each worker


def split_rows(rows, workers):
    """Split rows 0 to rows - 1 among the workers: [(first, end), ...], a pair for each worker.

    A worker gets the rows from `first` to `end - 1`. Parts follow each other, their sizes differ
    by at most one, and the larger parts come first.
    """
    size, rest = divmod(rows, workers)
    parts = []
    first = 0
    for worker in range(workers):
        end = first + size + (worker < rest)
        parts.append((first, end))
        first = end
    return parts


def without_the_rest(rows, workers):
    size = rows // workers
    return [(worker * size, (worker + 1) * size) for worker in range(workers)]


def rest_for_the_last(rows, workers):
    parts = without_the_rest(rows, workers)
    return [*parts[:-1], (parts[-1][0], rows)]


def rounded_up(rows, workers):
    size = -(-rows // workers)
    edges = [min(rows, worker * size) for worker in range(workers + 1)]
    return list(zip(edges, edges[1:], strict=False))


def last_row_included(rows, workers):
    return [(first, end - 1) for first, end in split_rows(rows, workers)]


TASKS["04.2"] = Task(
    reference=split_rows,
    inputs=lambda: [(10, 3), (419, 4), (12, 4), (3, 5)],
    hints=[
        "`divmod(rows, workers)` gives the size of a part and the number of rows that are left.",
        "If 2 rows are left, the first 2 workers get one row more than the others. Each part "
        "starts where the one before it ends.",
    ],
    mistakes={
        without_the_rest: "Nobody computes the last rows: the number of rows is not a multiple of "
        "the number of workers.",
        rest_for_the_last: "The last worker gets all rows that are left. With many workers, it can "
        "have almost twice the work of the others, and they all wait for it.",
        rounded_up: "If each part is rounded up, the last workers get too few rows, or none.",
        last_row_included: "`end` is the first row that does not belong to the part, as in "
        "`range(first, end)`.",
    },
)


# 04.3: fork and join


def fork_join(function, parts):
    """Call function(part) for each part, each in its own thread, all at the same time.

    Wait until all threads have finished. Return the results as a list, in the order of the parts.
    """
    results = [None] * len(parts)

    def work(number):
        results[number] = function(parts[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def run_fork_join(function, parts):
    """Each call waits for the others, so that calls one after the other are noticed."""
    gate = threading.Barrier(len(parts), timeout=0.7)
    finished = []

    def square(part):
        try:
            gate.wait()
            time.sleep(0.05 * part)
        except threading.BrokenBarrierError:
            pass
        finished.append(part)
        return part * part

    results = finish(lambda: function(square, parts))
    count = len(finished)
    if not isinstance(results, list) and count == 0:
        return results
    return {
        "results": copy.copy(results),  # as it is now: a thread may still write
        "finished when it returns": count,
        "all at the same time": not gate.broken,
    }


def one_after_the_other(function, parts):
    results = []
    for part in parts:
        thread = threading.Thread(target=lambda part=part: results.append(function(part)))
        thread.start()
        thread.join()
    return results


def without_join(function, parts):
    results = [None] * len(parts)

    def work(number):
        results[number] = function(parts[number])

    for number in range(len(parts)):
        threading.Thread(target=work, args=(number,)).start()
    return results


def in_the_order_of_completion(function, parts):
    results = []

    def work(part):
        results.append(function(part))

    fork_join(work, parts)
    return results


TASKS["04.3"] = Task(
    reference=fork_join,
    inputs=lambda: [([3, 1, 2],)],
    run=run_fork_join,
    hints=[
        "`threading.Thread(target=work, args=(number,))` makes a thread that will call "
        "work(number). `start()` starts it, and `join()` waits until it has finished.",
        "A thread cannot return anything. Make a list with a place for each result. Write an inner "
        "function work(number) that computes one part and stores the result in its place.",
        "Use two loops: the first one starts all threads, the second one joins them.",
    ],
    mistakes={
        one_after_the_other: "Only one part is computed at a time. Start all threads before you "
        "join the first one. And pass the function itself as the target: `target=work`, not "
        "`target=work(number)`.",
        without_join: "The function returns before the threads have finished: join them.",
        in_the_order_of_completion: "The results come in the order in which the threads finish. "
        "Store each result in the place of its part.",
    },
)


# 04.4: a race


def add_part(numbers, total, lock):
    """Add the numbers to total["sum"], while other threads add theirs to the same total.

    `lock` is the same object in all threads. Update the total only once.
    """
    own = 0
    for number in numbers:
        own += number
    with lock:
        total["sum"] += own


class SlowTotal(dict):
    """A dictionary in which threads that read without a lock all read the same value."""

    def __init__(self, threads):
        super().__init__(sum=0)
        self.gate = threading.Barrier(threads, timeout=0.7)
        self.updates = 0

    def meet(self):
        with contextlib.suppress(threading.BrokenBarrierError):  # The others wait for a lock.
            self.gate.wait()

    def __getitem__(self, name):
        self.meet()
        value = super().__getitem__(name)
        self.meet()
        return value

    def __setitem__(self, name, value):
        self.updates += 1
        super().__setitem__(name, value)


def run_add_part(function, numbers, threads):
    """The total after several threads have added the same numbers, and the number of updates."""
    total = SlowTotal(threads)
    lock = threading.Lock()

    def call(_):
        try:
            return function(numbers, total, lock)
        except Exception as error:  # raised below
            return error

    returned = finish(lambda: fork_join(call, range(threads)))
    for value in returned:
        if isinstance(value, Exception):
            raise value
    if total.updates == 0:
        return returned
    return {"total": dict(total)["sum"], "updates": total.updates}


def without_a_lock(numbers, total, lock):
    for number in numbers:
        total["sum"] = total["sum"] + number


def lock_for_each_number(numbers, total, lock):
    for number in numbers:
        with lock:
            total["sum"] += number


def own_sum_without_a_lock(numbers, total, lock):
    total["sum"] += sum(numbers)


TASKS["04.4"] = Task(
    reference=add_part,
    inputs=lambda: [([3, 1, 4], 3)],
    run=run_add_part,
    hints=[
        "Two threads can read the same old total. Then both write, and one addition is lost. A "
        "thread that reads, adds and writes inside `with lock:` has the total to itself.",
        "A lock for each number is right, but slow, because the threads wait for each other all "
        "the time. Which part of the work does not need the shared total?",
        "Add up the numbers in a local variable. After the loop, take the lock and add this "
        "variable to the total.",
    ],
    mistakes={
        without_a_lock: "Updates are lost: all threads read the same old total, and each of them "
        "overwrites what the others have written.",
        own_sum_without_a_lock: "There are fewer updates, but updates are still lost: a thread "
        "can read the total before another one has written it.",
        lock_for_each_number: "The total is right, but it is updated for each number, so the "
        "threads wait for each other all the time. Add up the numbers first, without the lock.",
    },
)


# 04.5: the time of a schedule


def makespan(costs, workers, chunk):
    """When the last worker finishes, if a free worker always takes the next `chunk` tasks.

    `costs` is the time of each task. All workers start at time 0. If several workers are free, the
    one with the lowest number takes the chunk.
    """
    finished = [0] * workers
    for first in range(0, len(costs), chunk):
        free = finished.index(min(finished))
        finished[free] += sum(costs[first : first + chunk])
    return max(finished)


def schedules():
    yield [9, 1, 1, 1, 5, 2, 4, 6], 2, 1
    for workers, chunk in ((2, 1), (3, 4), (4, 3), (2, 10)):
        yield torch.randint(1, 20, (20,)).tolist(), workers, chunk


def one_task_at_a_time(costs, workers, chunk):
    return makespan(costs, workers, 1)


def round_robin(costs, workers, chunk):
    finished = [0] * workers
    for number, first in enumerate(range(0, len(costs), chunk)):
        finished[number % workers] += sum(costs[first : first + chunk])
    return max(finished)


def perfect_balance(costs, workers, chunk):
    return sum(costs) / workers


def first_worker_to_finish(costs, workers, chunk):
    finished = [0] * workers
    for first in range(0, len(costs), chunk):
        finished[finished.index(min(finished))] += sum(costs[first : first + chunk])
    return min(finished)


TASKS["04.5"] = Task(
    reference=makespan,
    inputs=schedules,
    hints=[
        "Keep a list with the time at which each worker becomes free. At the start, it is 0 for "
        "all of them.",
        "For each chunk, find the worker that is free first, and add the costs of the chunk to its "
        "time. `times.index(min(times))` finds it.",
    ],
    mistakes={
        round_robin: "The workers take turns, even if the next one is still busy. The worker that "
        "is free first must take the next chunk.",
        one_task_at_a_time: "A free worker takes `chunk` tasks at once, not one.",
        perfect_balance: "This is the time with perfect balance. A chunk cannot be divided.",
        first_worker_to_finish: "The loop ends when the last worker finishes, not the first one.",
    },
)


# 04.6: memory-bound or compute-bound


def find_limits(table, peak, bandwidth):
    """{name: "memory" or "compute"}: which of them limits the speed of each operation.

    `table` is {name: (FLOP, bytes moved, bytes of its arrays)}. `peak` is in FLOP/s. `bandwidth`
    is a list of (bytes of the arrays, bytes/s), measured with arrays of growing size. Use the
    first entry whose arrays are at least as large as those of the operation, or the last entry.
    An operation is limited by memory if moving its bytes takes longer than computing its FLOP.
    """
    limits = {}
    for name, (flop, moved, size) in table.items():
        fitting = [rate for arrays, rate in bandwidth if arrays >= size]
        rate = fitting[0] if fitting else bandwidth[-1][1]
        limits[name] = "memory" if moved / rate > flop / peak else "compute"
    return limits


def tables():
    bandwidth = [(1e5, 400e9), (1e7, 100e9), (1e9, 20e9)]
    names = "abcdef"
    yield (
        {
            "small sum": (1e5, 8e5, 8e5),
            "polynomial of a large array": (1e9, 8e8, 8e8),
            "convolution in a cache": (2e7, 5e6, 9e4),
            "convolution in many passes": (1e10, 2e9, 3e6),
            "matrix product": (1e10, 1e7, 1e8),
            "many operations on large arrays": (8e9, 8e8, 4e9),
        },
        200e9,
        bandwidth,
    )
    for _ in range(2):
        numbers = 10 ** (4 + 5 * torch.rand(len(names), 3))
        yield dict(zip(names, map(tuple, numbers.tolist()), strict=True)), 100e9, bandwidth


def always_the_largest_arrays(table, peak, bandwidth):
    return find_limits(table, peak, bandwidth[-1:])


def the_other_way_around(table, peak, bandwidth):
    other = {"memory": "compute", "compute": "memory"}
    return {name: other[limit] for name, limit in find_limits(table, peak, bandwidth).items()}


def size_of_the_traffic(table, peak, bandwidth):
    changed = {name: (flop, moved, moved) for name, (flop, moved, _) in table.items()}
    return find_limits(changed, peak, bandwidth)


def fewer_flop_than_bytes(table, peak, bandwidth):
    return {
        name: "memory" if flop < moved else "compute" for name, (flop, moved, _) in table.items()
    }


TASKS["04.6"] = Task(
    reference=find_limits,
    inputs=tables,
    hints=[
        "For each operation, compute two times: FLOP divided by FLOP/s, and bytes moved divided "
        "by bytes/s. The larger one is the limit.",
        "Which bytes/s? That depends on the third number, the size of the arrays: go through "
        "`bandwidth` and take the first entry that is large enough.",
    ],
    mistakes={
        always_the_largest_arrays: "You used the bandwidth of the main memory for all operations. "
        "Small arrays stay in a cache, which is faster.",
        the_other_way_around: "The two limits are swapped: the limit is what takes longer.",
        size_of_the_traffic: "Choose the bandwidth by the size of the arrays, not by the bytes "
        "moved. An operation can read the same small array many times.",
        fewer_flop_than_bytes: "Compare times, not numbers: divide by FLOP/s and bytes/s.",
    },
)


# 04.7: how many threads


def threads_per_rank(physical, allowed, ranks):
    """How many threads each rank should start, so that there is no oversubscription.

    `physical` is the number of physical cores of the machine. `allowed` is the number of logical
    cores that the program may use. `ranks` processes compute at the same time, all with equally
    many threads. All threads together must not be more than the physical cores, nor more than the
    allowed cores. But each rank has at least one thread.
    """
    return max(1, min(physical, allowed) // ranks)


def all_logical_cores(physical, allowed, ranks):
    return max(1, allowed // ranks)


def all_physical_cores(physical, allowed, ranks):
    return max(1, physical // ranks)


def everything_for_each_rank(physical, allowed, ranks):
    return min(physical, allowed)


def possibly_none(physical, allowed, ranks):
    return min(physical, allowed) // ranks


TASKS["04.7"] = Task(
    reference=threads_per_rank,
    inputs=lambda: [(8, 16, 3), (32, 6, 2), (4, 8, 8), (1, 1, 1), (64, 128, 4)],
    hints=[
        "First find how many threads may compute at the same time in all ranks together.",
        "This is the smaller one of two numbers. Divide it among the ranks, and round down.",
    ],
    mistakes={
        everything_for_each_rank: "Each rank starts a thread on every core. Together, the ranks "
        "have several threads per core.",
        all_logical_cores: "Two logical cores of one physical core share its arithmetic units. "
        "Count the physical cores.",
        all_physical_cores: "The program may not use all cores of the machine: see `allowed`.",
        possibly_none: "With more ranks than cores, this gives 0 threads. A rank needs one.",
    },
)


# 04.8: false sharing


def counter_offsets(threads, size, line):
    """Where the counters of the threads begin, in bytes from the start of an array.

    A counter has `size` bytes. The array starts at the beginning of a cache line of `line` bytes.
    No two counters may be in the same cache line. Use as little memory as possible.
    """
    lines = -(-size // line)
    return [thread * lines * line for thread in range(threads)]


def side_by_side(threads, size, line):
    return [thread * size for thread in range(threads)]


def one_line_each(threads, size, line):
    return [thread * line for thread in range(threads)]


def one_line_between(threads, size, line):
    return [thread * (size + line) for thread in range(threads)]


TASKS["04.8"] = Task(
    reference=counter_offsets,
    inputs=lambda: [(4, 8, 64), (3, 72, 64), (2, 64, 64), (3, 8, 128)],
    hints=[
        "How many cache lines does one counter need? A counter of 72 bytes needs two lines of 64.",
        "Round size / line up. Each counter begins that many lines after the one before it.",
    ],
    mistakes={
        side_by_side: "Several counters are in the same cache line.",
        one_line_each: "This works for small counters only. A counter that is larger than a cache "
        "line reaches into the next one.",
        one_line_between: "The counters are far enough apart, but this wastes memory, and most of "
        "them do not begin at a cache line.",
    },
)


# 04.9: a work queue


def run_dynamic(function, items, workers):
    """Call function(item) for each item in `workers` threads. A free thread takes the next item.

    Return the results as a list, in the order of the items.
    """
    waiting = queue.SimpleQueue()
    for pair in enumerate(items):
        waiting.put(pair)
    results = [None] * len(items)

    def work(_):
        while True:
            try:
                number, item = waiting.get_nowait()
            except queue.Empty:
                return
            results[number] = function(item)

    fork_join(work, range(workers))
    return results


def run_queue(function, items, workers):
    """Item 0 takes until all others are done, if other threads can take them."""
    others = threading.Semaphore(0)
    threads = set()
    waited = []

    def square(item):
        threads.add(threading.current_thread())
        if item == 0:
            waited.append(sum(others.acquire(timeout=0.5) for _ in items[1:]))
        else:
            others.release()
        return item * item

    results = finish(lambda: function(square, items, workers))
    if not isinstance(results, list) and not threads:
        return results
    return {
        "results": results,
        "items done while item 0 took long": waited[0] if waited else None,
        "threads": len(threads),
    }


def fixed_parts(function, items, workers):
    parts = [items[first:end] for first, end in split_rows(len(items), workers)]
    done = fork_join(lambda part: [function(item) for item in part], parts)
    return [result for part in done for result in part]


def a_thread_for_each_item(function, items, workers):
    return fork_join(function, items)


def no_threads(function, items, workers):
    return [function(item) for item in items]


def results_appended(function, items, workers):
    results = []
    run_dynamic(lambda item: results.append(function(item)), items, workers)
    return results


TASKS["04.9"] = Task(
    reference=run_dynamic,
    inputs=lambda: [([0, 1, 2, 3, 4, 5], 2)],
    run=run_queue,
    hints=[
        "Put all items into a `queue.SimpleQueue`, each with its number: `enumerate(items)` gives "
        "pairs. Each thread is a loop that takes one item and computes it, until the queue is "
        "empty.",
        "`get_nowait()` takes the next item, or raises `queue.Empty`. Then the thread returns.",
        "You have already written what starts and joins the threads: `fork_join`. Its parts can be "
        "the numbers of the workers, which the threads ignore.",
    ],
    mistakes={
        fixed_parts: "Each thread has its items from the start, which is a static schedule. "
        "Nobody takes the items of a thread that is late.",
        a_thread_for_each_item: "There is a thread for each item. Start `workers` threads only.",
        no_threads: "One thread computes all items.",
        results_appended: "The results come in the order in which the items are finished. Store "
        "each result in the place of its item.",
    },
)
