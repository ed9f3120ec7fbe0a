"""Lesson 07, the GPU: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnnlab.check import Task

LAUNCH = 0.0001  # seconds that the host of a `Device` needs to launch a kernel or record an event
TASKS = {}


def random_seconds(count, shortest=0.01):
    return (shortest + 4 * shortest * torch.rand(count)).tolist()


# 07.1: time with events


class Device:
    """A simulated GPU with one stream, which still works on earlier kernels at the start."""

    def __init__(self):
        self.now = 0.0
        self.idle_from = 0.05

    def launch(self, seconds):
        self.now += LAUNCH
        self.idle_from = max(self.idle_from, self.now) + seconds

    def synchronize(self):
        self.now = max(self.now, self.idle_from)


class Event:
    """An event of a `Device`, as torch.Event."""

    def __init__(self, device):
        self.device = device
        self.reached = None

    def record(self):
        self.device.launch(0.0)
        self.reached = self.device.idle_from

    def elapsed_time(self, end):
        if self.reached is None or end.reached is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        if max(self.reached, end.reached) > self.device.now:
            raise RuntimeError("The device has not reached both events yet.")
        return 1000 * (end.reached - self.reached)


def seconds_by_events(calls, make_event, synchronize):
    """The seconds that the device works on each call. The calls only launch work.

    `event = make_event()` makes an event. `event.record()` puts it into the stream.
    `start.elapsed_time(end)` returns the milliseconds between two events that the device has
    reached. Do not wait between the calls: synchronize once, after everything is launched.
    """
    pairs = []
    for call in calls:
        start, end = make_event(), make_event()
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairs]


def run_on_device(function, seconds):
    device = Device()
    calls = [partial(device.launch, each) for each in seconds]
    return function(calls, partial(Event, device), device.synchronize)


def does_not_wait(calls, make_event, synchronize):
    return seconds_by_events(calls, make_event, int)  # int() does nothing


def waits_after_each_call(calls, make_event, synchronize):
    seconds = []
    for call in calls:
        seconds += seconds_by_events([call], make_event, synchronize)
    return seconds


def in_milliseconds(calls, make_event, synchronize):
    return [1000 * each for each in seconds_by_events(calls, make_event, synchronize)]


def since_the_first_event(calls, make_event, synchronize):
    seconds = seconds_by_events(calls, make_event, synchronize)
    return [sum(seconds[: number + 1]) for number in range(len(seconds))]


TASKS["07.1"] = Task(
    reference=seconds_by_events,
    inputs=lambda: [(random_seconds(4),), (random_seconds(6),)],
    run=run_on_device,
    hints=[
        "Each call needs two events of its own: one that the device reaches just before the "
        "call's work, and one just after it.",
        "First a loop that only fills the stream, and keeps the pairs of events in a list. "
        "Nothing may be read from an event in this loop.",
        "In the loop: record the first event, call, record the second one. After the loop: "
        "synchronize, then read the elapsed time of each pair, and divide it by 1000.",
    ],
    mistakes={
        does_not_wait: "An event can be read only when the device has reached it. Synchronize "
        "after the loop.",
        waits_after_each_call: "These times also contain launches: after a synchronization, the "
        "device is idle, and the first event does not wait for the kernel. Synchronize once, at "
        "the end.",
        in_milliseconds: "`elapsed_time` returns milliseconds. Return seconds.",
        since_the_first_event: "These are the times since the first event. Record a new pair of "
        "events for each call.",
    },
    atol=1e-7,
)


# 07.2: hidden synchronization


class Reads(TorchDispatchMode):
    """Counts how often Python reads a number from a tensor."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.name() in ("aten::_local_scalar_dense", "aten::equal")
        return operation(*args, **(kwargs or {}))


def train_and_report(model, optimizer, batches):
    """Train one step on each batch. Return (mean loss, lowest loss), as Python numbers.

    Read numbers from the device at the end only, and at most two of them. `torch.stack(tensors)`
    makes one tensor of a list of tensors.
    """
    losses = []
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    on_device = torch.stack(losses)
    return on_device.mean().item(), on_device.min().item()


def run_training(function, count):
    """The result, the trained weights, and how often the function reads a number."""
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(count)]
    with Reads() as reads:
        result = function(model, optimizer, batches)
    if result is None or result is ...:
        return result
    number = "at most 2" if reads.count <= 2 else str(reads.count)
    weights = model.weight.detach()
    return {"(mean, lowest)": result, "weights": weights, "numbers read": number}


def as_in_the_lesson(model, optimizer, batches):
    total, lowest = 0.0, float("inf")
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        lowest = min(lowest, loss.detach())
    return total / len(batches), float(lowest)


def still_compares_in_python(model, optimizer, batches):
    total, lowest = 0.0, float("inf")
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        lowest = min(lowest, loss.detach())
    return float(total / len(batches)), float(lowest)


def reads_all_losses_at_the_end(model, optimizer, batches):
    losses = []
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    numbers = [float(loss) for loss in losses]
    return sum(numbers) / len(numbers), min(numbers)


def no_training(model, optimizer, batches):
    losses = [F.cross_entropy(model(images), labels).detach() for images, labels in batches]
    return torch.stack(losses).mean().item(), torch.stack(losses).min().item()


TASKS["07.2"] = Task(
    reference=train_and_report,
    inputs=lambda: [(5,), (8,)],
    run=run_training,
    hints=[
        "Two lines of the loop need a number in Python. One has `.item()`. The other one decides "
        "which of two values is smaller.",
        "Keep the losses on the device: put `loss.detach()` into a list. (`detach` frees the "
        "graph of the step, which would keep its activations in memory.)",
        "After the loop, `torch.stack` makes one tensor of the list. Compute its mean and its "
        "minimum on the device, with `.mean()` and `.min()`. Read each of them once.",
    ],
    mistakes={
        as_in_the_lesson: "There are two reads in each step: `.item()`, and the comparison in "
        "`min`, which calls `bool(loss < lowest)`.",
        still_compares_in_python: "`min` of Python compares in Python, so it reads the result of "
        "each comparison. Let the device find the minimum.",
        reads_all_losses_at_the_end: "You read each loss on its own. Compute mean and minimum on "
        "the device, and read only these two.",
        no_training: "The numbers are read rarely, but the weights are not trained.",
    },
)


# 07.3: two stages that work at the same time


def pipelined_seconds(first, second):
    """The seconds until two stages, which work at the same time, have both finished.

    `first[i]` and `second[i]` are the seconds that item i needs in each stage. Both stages take one
    item after the other. The second stage starts item i when the first stage has finished item i,
    and the second stage itself has finished item i - 1.
    """
    first_done = second_done = 0.0
    for in_first, in_second in zip(first, second, strict=True):
        first_done += in_first
        second_done = max(first_done, second_done) + in_second
    return second_done


def one_after_the_other(first, second):
    return sum(first) + sum(second)


def longer_stage(first, second):
    return max(sum(first), sum(second))


def longer_one_of_each_item(first, second):
    return sum(max(pair) for pair in zip(first, second, strict=True))


def never_waits_for_an_item(first, second):
    return first[0] + sum(second)


TASKS["07.3"] = Task(
    reference=pipelined_seconds,
    inputs=lambda: [
        ([1.0, 4.0, 1.0], [3.0, 1.0, 2.0]),
        (random_seconds(6), random_seconds(6)),
        (random_seconds(8, 0.02), random_seconds(8)),
    ],
    hints=[
        "Keep two numbers: when the first stage has finished its latest item, and when the second "
        "stage has.",
        "The first stage never waits: add the seconds of each item to its number.",
        "The second stage starts at the later one of two times: when the item arrives, and when "
        "it has finished the item before.",
    ],
    mistakes={
        one_after_the_other: "This is the time without overlap. Both stages work at the same time.",
        longer_stage: "The second stage cannot start before the first item has arrived, and it "
        "may have to wait for later items, too.",
        longer_one_of_each_item: "The stages do not wait for each other after each item. The first "
        "one goes on with the next item.",
        never_waits_for_an_item: "The second stage may be faster than the first one. Then it "
        "waits for the next item.",
    },
)


# 07.4: bytes to the device


def load_images(pixels, move, mean, std):
    """Images for the network on the device: float32, (pixels / 255 - mean) / std.

    `pixels` (images, channels, height, width) are uint8, on the CPU. `move(tensor)` copies a tensor
    to the device and returns the copy. `mean` and `std` (channels, 1, 1) are on the device already.
    Move as few bytes as possible.
    """
    images = move(pixels).float() / 255
    return (images - mean) / std


def run_load(function, pixels, mean, std):
    moved = []

    def move(tensor):
        moved.append(tensor.nbytes)
        return tensor.clone()

    images = function(pixels, move, mean, std)
    if images is None or images is ...:
        return images
    return {"images": images, "bytes moved": sum(moved)}


def moves_floats(pixels, move, mean, std):
    return move((pixels.float() / 255 - mean) / std)


def moves_nothing(pixels, move, mean, std):
    return (pixels.float() / 255 - mean) / std


def does_not_divide(pixels, move, mean, std):
    return (move(pixels).float() - mean) / std


def divides_bytes(pixels, move, mean, std):
    return ((move(pixels) // 255).float() - mean) / std


def random_pixels(images, channels, size):
    pixels = torch.randint(256, (images, channels, size, size), dtype=torch.uint8)
    mean, std = torch.rand(2, channels, 1, 1)
    return pixels, mean, 0.2 + std


TASKS["07.4"] = Task(
    reference=load_images,
    inputs=lambda: [random_pixels(2, 3, 4), random_pixels(3, 1, 6)],
    run=run_load,
    hints=[
        "A uint8 pixel has one byte, a float32 number four. Which of the two should be moved?",
        "Move first. Everything after that happens on the device: `.float()`, the division by "
        "255, the mean and the standard deviation.",
    ],
    mistakes={
        moves_floats: "You moved float32 numbers, four times as many bytes. Move the pixels.",
        moves_nothing: "The numbers are right, but nothing has been moved to the device.",
        does_not_divide: "Pixels go from 0 to 255, and mean and std belong to numbers from 0 to 1.",
        divides_bytes: "Make float32 numbers before you divide. In uint8, nearly all results are "
        "0.",
    },
)


# 07.5: memory of activations


def saved_bytes(forward, exclude):
    """The bytes that autograd saves during `forward()` for the backward pass.

    `with torch.autograd.graph.saved_tensors_hooks(pack, unpack):` calls `pack(tensor)` for each
    tensor that autograd saves, and saves what `pack` returns; `unpack` gets this back. Here, both
    return the tensor. `tensor.untyped_storage()` is its memory, with `.nbytes()`. Several tensors
    may share a storage, which counts once. Those of the tensors in `exclude` do not count.
    """
    storages = set()

    def pack(tensor):
        storages.add(tensor.untyped_storage())
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        forward()
    for tensor in exclude:
        storages.discard(tensor.untyped_storage())
    return sum(storage.nbytes() for storage in storages)


def run_forward(function, network, images):
    exclude = [*network.parameters(), images]
    return function(lambda: network(images).square().sum(), exclude)


def list_saved(forward):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        forward()
    return saved


def counts_each_save(forward, exclude):
    without = {tensor.untyped_storage() for tensor in exclude}
    storages = [tensor.untyped_storage() for tensor in list_saved(forward)]
    return sum(storage.nbytes() for storage in storages if storage not in without)


def counts_parameters_too(forward, exclude):
    return saved_bytes(forward, [])


def counts_numbers(forward, exclude):
    return saved_bytes(forward, exclude) // 4


def random_network():
    inputs, hidden, outputs = torch.randint(3, 20, (3,)).tolist()
    network = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return network, torch.randn(8, inputs)


TASKS["07.5"] = Task(
    reference=saved_bytes,
    inputs=lambda: [random_network(), random_network()],
    run=run_forward,
    hints=[
        "Let `pack` note what it gets before it returns it. A set keeps each storage once.",
        "Define `pack` and `unpack` inside your function, so that `pack` can add to a set of this "
        "function. Call `forward()` inside the `with` block.",
        "After the block, remove the storages of the excluded tensors from the set, for example "
        "with `discard`. Then add up the bytes of the others.",
    ],
    mistakes={
        counts_each_save: "The output of ReLU is saved twice, by ReLU and by the next layer, but "
        "there is only one storage. Count it once.",
        counts_parameters_too: "Autograd also saves references to weights and images. They exist "
        "anyway: exclude them.",
        counts_numbers: "This is the number of float32 numbers. Each has 4 bytes.",
    },
)


# 07.6: a batch size


def choose_batch(rates):
    """The smallest batch size that reaches at least 90% of the highest images/s.

    `rates` is {batch size: images/s}, with None for a batch that did not fit into memory.
    """
    fitting = {batch: rate for batch, rate in rates.items() if rate is not None}
    best = max(fitting.values())
    return min(batch for batch, rate in fitting.items() if rate >= 0.9 * best)


def fastest_batch(rates):
    return max(rates, key=lambda batch: rates[batch] or 0)


def largest_fast_batch(rates):
    best = max(rate or 0 for rate in rates.values())
    return max(batch for batch, rate in rates.items() if (rate or 0) >= 0.9 * best)


def close_to_the_largest_batch(rates):
    fitting = {batch: rate for batch, rate in rates.items() if rate is not None}
    last = fitting[max(fitting)]
    return min(batch for batch, rate in fitting.items() if rate >= 0.9 * last)


def random_rates(fixed, limit):
    """Images/s that rise, and fall for the largest batches that fit."""
    each = 1e-4 * (1 + torch.rand(1).item())
    batches = [2**power for power in range(11)]
    rates = {batch: batch / (fixed + batch * each) for batch in batches}
    fallen = {limit // 2: 0.93 * rates[limit // 2], limit: 0.7 * rates[limit]}
    return {**rates, **fallen, **{batch: None for batch in batches if batch > limit}}


TASKS["07.6"] = Task(
    reference=choose_batch,
    inputs=lambda: [(random_rates(0.002, 1024),), (random_rates(0.001, 256),)],
    hints=[
        "First leave out the batches that do not fit, then find the best rate.",
        "Among the batches with at least 0.9 times this rate, take the smallest one.",
    ],
    mistakes={
        fastest_batch: "This is the fastest one. A smaller batch may be nearly as fast.",
        largest_fast_batch: "This is the largest one within 10% of the best. Take the smallest.",
        close_to_the_largest_batch: "You compared with the largest batch. Compare with the best "
        "rate.",
    },
)


# 07.7: launch-bound or not


def read_trace(launches, kernels):
    """Read a trace of one stream: (idle share of the GPU, "launch-bound" or "GPU-bound").

    `kernels[i]` is (start, end) of kernel i, and `launches[i]` of the call that launched it. The
    idle share is the time without a kernel, divided by the time from the start of the first kernel
    to the end of the last one. Kernel i is late if launch i ends when kernel i - 1 has already
    ended: until then, the GPU has nothing to do. The step is "launch-bound" if more than half of
    the kernels after the first one are late.
    """
    idle, late = 0.0, 0
    for number in range(1, len(kernels)):
        before_ended = kernels[number - 1][1]
        idle += kernels[number][0] - before_ended
        late += launches[number][1] >= before_ended
    share = idle / (kernels[-1][1] - kernels[0][0])
    return share, "launch-bound" if late > (len(kernels) - 1) / 2 else "GPU-bound"


def from_the_start_of_the_trace(launches, kernels):
    _, verdict = read_trace(launches, kernels)
    busy = sum(end - start for start, end in kernels)
    return 1 - busy / (kernels[-1][1] - launches[0][0]), verdict


def busy_share(launches, kernels):
    share, verdict = read_trace(launches, kernels)
    return 1 - share, verdict


def from_the_share_only(launches, kernels):
    share, _ = read_trace(launches, kernels)
    return share, "launch-bound" if share > 0.5 else "GPU-bound"


def longer_of_the_two(launches, kernels):
    share, _ = read_trace(launches, kernels)
    launching, running = (sum(end - start for start, end in spans) for spans in (launches, kernels))
    return share, "launch-bound" if launching > running else "GPU-bound"


def random_trace(launch_s, kernel_s, slow=-1):
    """A trace of 8 kernels. The launch with the number `slow` takes very long."""
    launches, kernels, now, idle_from = [], [], 0.0, 0.0
    for number in range(8):
        seconds = launch_s * (0.9 + 0.2 * torch.rand(1).item())
        seconds += 20 * kernel_s if number == slow else 0
        launches.append((now, now + seconds))
        start = max(now + seconds, idle_from)
        idle_from = start + kernel_s * (0.9 + 0.2 * torch.rand(1).item())
        kernels.append((start, idle_from))
        now += seconds
    return launches, kernels


TASKS["07.7"] = Task(
    reference=read_trace,
    inputs=lambda: [
        random_trace(2e-5, 5e-6),
        random_trace(5e-6, 5e-5),
        random_trace(1e-5, 7e-6),
        random_trace(1e-6, 2e-5, slow=4),
    ],
    hints=[
        "Go through the kernels from the second one on. You need the end of the kernel before.",
        "The gap before a kernel is its start minus the end of the kernel before. Add up the gaps, "
        "and count the late kernels in the same loop.",
        "A kernel is late if its launch does not end before the previous kernel ends.",
    ],
    mistakes={
        from_the_start_of_the_trace: "You started at the first launch. Start when the first "
        "kernel starts.",
        busy_share: "This is the share in which a kernel runs. Return the idle share.",
        longer_of_the_two: "You compared the total times. In this trace, a single launch takes "
        "most of the time, and nearly all kernels are in time. Count the late kernels.",
        from_the_share_only: "A large idle share can also come from one slow launch, and a small "
        "one from many short waits. Count the late kernels.",
    },
)


# 07.8: does the GPU pay?


def gpu_speedup(flops, moved, cpu_rate, gpu_rate, link, launch):
    """The speedup of one operation that is moved from the CPU to the GPU.

    It computes `flops` FLOPs, at `cpu_rate` or `gpu_rate` FLOP/s. On the GPU, `moved` bytes go over
    the link, there and back together, at `link` bytes/s, and the launch takes `launch` seconds.
    Nothing overlaps.
    """
    on_gpu = launch + moved / link + flops / gpu_rate
    return flops / cpu_rate / on_gpu


def without_the_copies(flops, moved, cpu_rate, gpu_rate, link, launch):
    return gpu_speedup(flops, 0, cpu_rate, gpu_rate, link, launch)


def without_the_launch(flops, moved, cpu_rate, gpu_rate, link, launch):
    return gpu_speedup(flops, moved, cpu_rate, gpu_rate, link, 0.0)


def slowdown(flops, moved, cpu_rate, gpu_rate, link, launch):
    return 1 / gpu_speedup(flops, moved, cpu_rate, gpu_rate, link, launch)


def copies_there_and_back_again(flops, moved, cpu_rate, gpu_rate, link, launch):
    return gpu_speedup(flops, 2 * moved, cpu_rate, gpu_rate, link, launch)


def random_operation(size):
    """A matrix product."""
    cpu_rate, gpu_rate = (1e11, 1e13) * (1 + torch.rand(2)).double().numpy()
    return 2 * size**3, 3 * 4 * size**2, float(cpu_rate), float(gpu_rate), 2e10, 1e-5


TASKS["07.8"] = Task(
    reference=gpu_speedup,
    inputs=lambda: [random_operation(64), random_operation(1024), random_operation(4096)],
    hints=[
        "Compute the seconds on each of the two devices first.",
        "The GPU needs three times that add up: the launch, the copies, and the computation.",
    ],
    mistakes={
        without_the_copies: "The data must get to the GPU and back.",
        without_the_launch: "Add the launch, which counts if the operation is small.",
        slowdown: "A speedup is the old time divided by the new time.",
        copies_there_and_back_again: "`moved` already contains both directions.",
    },
)


# 07.9: a race between two streams


class Stream:
    """A simulated stream. Two buffers: batch i is in buffer i % 2."""

    def __init__(self, log, seconds):
        self.log = log
        self.seconds = seconds
        self.free_from = 0.0

    def _launch(self, name, batch):
        start = self.free_from
        self.free_from = start + self.seconds
        self.log.append((name, batch, start, self.free_from))

    def copy(self, batch):
        self._launch("copy", batch)

    def train(self, batch):
        self._launch("train", batch)

    def wait_stream(self, other):
        self.free_from = max(self.free_from, other.free_from)


def prefetch(batches, copy_stream, compute_stream):
    """Launch the copies and the training steps of `batches` batches, so that they overlap.

    There are two buffers: `copy_stream.copy(i)` writes batch i into buffer i % 2, and
    `compute_stream.train(i)` reads it there. `a.wait_stream(b)`: what is launched in stream a
    from now on starts after everything that has been launched in stream b so far.
    """
    copy_stream.copy(0)
    for number in range(batches):
        compute_stream.wait_stream(copy_stream)
        copy_stream.wait_stream(compute_stream)
        if number + 1 < batches:
            copy_stream.copy(number + 1)
        compute_stream.train(number)


def run_prefetch(function, batches, copy_s, train_s):
    """The batches that were trained with wrong images, and the seconds of everything."""
    log = []
    function(batches, Stream(log, copy_s), Stream(log, train_s))
    if not log:
        return None
    copies = {batch: (start, end) for name, batch, start, end in log if name == "copy"}
    trained = {batch: (start, end) for name, batch, start, end in log if name == "train"}
    wrong = []
    for batch, (start, end) in sorted(trained.items()):
        arrives = copies.get(batch, (0, float("inf")))[1]
        overwritten = copies.get(batch + 2, (float("inf"), 0))[0]
        if arrives > start + 1e-9 or overwritten < end - 1e-9:
            wrong.append(batch)
    seconds = max(end for _, _, _, end in log)
    return {"trained": sorted(trained), "with wrong images": wrong, "seconds": seconds}


def without_waiting(batches, copy_stream, compute_stream):
    copy_stream.copy(0)
    for number in range(batches):
        if number + 1 < batches:
            copy_stream.copy(number + 1)
        compute_stream.train(number)


def only_training_waits(batches, copy_stream, compute_stream):
    copy_stream.copy(0)
    for number in range(batches):
        compute_stream.wait_stream(copy_stream)
        if number + 1 < batches:
            copy_stream.copy(number + 1)
        compute_stream.train(number)


def training_waits_for_the_next_copy(batches, copy_stream, compute_stream):
    copy_stream.copy(0)
    for number in range(batches):
        if number + 1 < batches:
            copy_stream.wait_stream(compute_stream)
            copy_stream.copy(number + 1)
        compute_stream.wait_stream(copy_stream)
        compute_stream.train(number)


TASKS["07.9"] = Task(
    reference=prefetch,
    inputs=lambda: [(5, 0.01, 0.03), (5, 0.03, 0.02), (6, *random_seconds(2))],
    run=run_prefetch,
    hints=[
        "Two things can go wrong: a step starts before its batch has arrived, or a copy "
        "overwrites a batch that a step still reads. Each needs one `wait_stream`.",
        "`wait_stream` waits for everything that is in the other stream at this moment. So it "
        "matters where in the loop you call it.",
        "At the start of a round, batch number i is the last copy in the copy stream, and step "
        "i - 1 the last one in the compute stream. This is the moment to let both streams wait "
        "for each other, before you launch the next copy.",
    ],
    mistakes={
        without_waiting: "The streams do not wait for each other: steps read batches that have not "
        "arrived.",
        only_training_waits: "A copy overwrites a buffer while a step still reads it. The copy of "
        "batch i + 1 must wait for step i - 1.",
        training_waits_for_the_next_copy: "The images are right, but step i waits for the copy of "
        "batch i + 1, so nothing overlaps. Let it wait before this copy is launched.",
    },
)
