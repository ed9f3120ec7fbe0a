"""Lesson 06, feeding the model: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

import queue
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import sklearn.datasets
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils import worker as torch_worker

from cnnlab import Measurement, Recipe, speedup
from cnnlab.check import Task

TASKS = {}


# 06.1: a JPEG file as an array


def load_photo(path, size=64):
    """Decode a JPEG file and scale it to size x size pixels: a uint8 array (size, size, 3)."""
    with Image.open(path) as file:
        picture = file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.array(picture)


PHOTOGRAPHS = Path(sklearn.datasets.__file__).parent / "images"


def photographs():
    yield PHOTOGRAPHS / "china.jpg", 32
    yield PHOTOGRAPHS / "flower.jpg", 20


def channels_first(path, size=64):
    return load_photo(path, size).transpose(2, 0, 1)


def floats(path, size=64):
    return load_photo(path, size).astype(np.float32) / 255


def cropped_instead_of_scaled(path, size=64):
    with Image.open(path) as file:
        return np.array(file.convert("RGB").crop((0, 0, size, size)))


def default_filter(path, size=64):
    with Image.open(path) as file:
        return np.array(file.convert("RGB").resize((size, size)))


def a_picture(path, size=64):
    with Image.open(path) as file:
        return file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)


TASKS["06.1"] = Task(
    reference=load_photo,
    inputs=photographs,
    hints=[
        "Four steps: open the file, decode it to RGB, scale it, make an array. The text above the "
        "task has the call for each of them.",
        "Open the file in a `with` statement, which closes it afterwards. Inside, chain the two "
        "methods: `file.convert(...).resize(...)`.",
    ],
    mistakes={
        channels_first: "The channels must come last here, as Pillow stores them. The axes are "
        "changed later, for the whole batch.",
        floats: "These are floats between 0 and 1. Keep the bytes: they are four times smaller.",
        cropped_instead_of_scaled: "This cuts out a corner. `resize` scales the whole picture.",
        default_filter: "The pixels differ a little: choose the bilinear filter in `resize`.",
        a_picture: "This is still a Pillow image. `np.array(picture)` copies its pixels.",
    },
)


# 06.2: a batch of bytes


def collate(samples):
    """From a list of samples: (uint8 tensor (N, 3, size, size), int64 tensor (N,) of labels).

    A sample is (uint8 array (size, size, 3), label).
    """
    pixels, labels = zip(*samples, strict=True)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return images.contiguous(), torch.tensor(labels)


def samples():
    for count, size in ((3, 4), (5, 6)):
        pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8).numpy()
        yield ([(image, number % 2) for number, image in enumerate(pixels)],)


def run_collate(function, samples):
    outcome = function(samples)
    if outcome is None or outcome is ...:
        return outcome
    images, labels = outcome
    return {"images": images, "labels": labels, "contiguous": images.is_contiguous()}


def reshaped(samples):
    images, labels = collate(samples)
    pixels = np.stack([image for image, _ in samples])
    return torch.from_numpy(pixels).reshape(images.shape), labels


def float_batch(samples):
    images, labels = collate(samples)
    return images.float(), labels


def not_contiguous(samples):
    pixels = np.stack([image for image, _ in samples])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), collate(samples)[1]


def channels_still_last(samples):
    images, labels = collate(samples)
    return images.permute(0, 2, 3, 1).contiguous(), labels


TASKS["06.2"] = Task(
    reference=collate,
    inputs=samples,
    run=run_collate,
    hints=[
        "First make a list of the arrays and a list of the labels. `np.stack(arrays)` makes one "
        "array with a new first axis, (N, size, size, 3). Then make tensors of both lists.",
        "`permute` changes the order of the axes: the new axis 1 is the old axis 3. The numbers "
        "stay where they are in memory, so call `.contiguous()` to copy them into the new order.",
    ],
    mistakes={
        reshaped: "`reshape` keeps the order of the numbers, so pixels and channels are mixed up. "
        "`permute` exchanges axes.",
        float_batch: "The images are floats. Keep the bytes: the batch must be uint8.",
        not_contiguous: "The numbers are still in the old order in memory. Call `.contiguous()`.",
        channels_still_last: "The channels are still the last axis. PyTorch wants (N, 3, H, W).",
    },
)


# 06.3: crop, mirror and normalize a whole batch


def prepare(images, tops, lefts, mirrors, size):
    """Crop each image at its own place, mirror some, normalize all: float32 (N, 3, size, size).

    images (N, 3, H, W) uint8; tops, lefts (N,) int64; mirrors (N,) bool; all on one device.
    """
    places = torch.arange(size, device=images.device)
    rows = tops[:, None] + places
    columns = lefts[:, None] + places
    columns = torch.where(mirrors[:, None], columns.flip(1), columns)
    numbers = torch.arange(len(images), device=images.device)
    crops = images[numbers[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return (crops.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def images_and_choices():
    for count, side, size in ((8, 9, 6), (12, 12, 12)):
        images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
        tops, lefts = torch.randint(0, side - size + 1, (2, count))
        yield images, tops, lefts, torch.arange(count) % 3 == 0, size


class CountOperations(TorchDispatchMode):
    """Counts tensor operations."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **(options or {}))


def run_prepare(function, images, tops, lefts, mirrors, size):
    with CountOperations() as operations:
        prepared = function(images, tops, lefts, mirrors, size)
    if prepared is None or prepared is ...:
        return prepared
    return {"images": prepared, "at most 40 tensor operations": operations.count <= 40}


def image_by_image(images, tops, lefts, mirrors, size):
    prepared = []
    for image, top, left, mirror in zip(images, tops, lefts, mirrors, strict=True):
        crop = image[:, top : top + size, left : left + size]
        crop = crop.flip(2) if mirror else crop
        prepared.append((crop.float() / 255 - 0.5) / 0.25)
    return torch.stack(prepared)


def same_place_for_all(images, tops, lefts, mirrors, size):
    return prepare(images, torch.full_like(tops, tops[0]), lefts * 0 + lefts[0], mirrors, size)


def never_mirrored(images, tops, lefts, mirrors, size):
    return prepare(images, tops, lefts, torch.zeros_like(mirrors), size)


def upside_down(images, tops, lefts, mirrors, size):
    flipped = prepare(images, tops, lefts, torch.zeros_like(mirrors), size)
    return torch.where(mirrors[:, None, None, None], flipped.flip(2), flipped)


def not_normalized(images, tops, lefts, mirrors, size):
    return (prepare(images, tops, lefts, mirrors, size) * 0.25 + 0.5) * 255


def bytes_overflow(images, tops, lefts, mirrors, size):
    crops = not_normalized(images, tops, lefts, mirrors, size).round().to(torch.uint8)
    return (crops - 128) / 64


TASKS["06.3"] = Task(
    reference=prepare,
    inputs=images_and_choices,
    run=run_prepare,
    hints=[
        "For each image, make a list of the rows and a list of the columns that it keeps, as "
        "tensors (N, size): `tops[:, None]` is a column of numbers, so adding 0, 1, ..., size - 1 "
        "to it gives a row of numbers for each image.",
        "A mirrored image takes the same columns in the opposite order: `columns.flip(1)`. "
        "`torch.where(condition, a, b)` chooses for each image.",
        "Index with three tensors that broadcast to (N, size, size): the number of the image, its "
        "rows as (N, size, 1), its columns as (N, 1, size), and `:` for the channels. PyTorch then "
        "puts the channels last: `permute` them. Convert to float before you subtract.",
    ],
    mistakes={
        image_by_image: "The values are right, but this takes several operations for each image. "
        "Use operations on the whole batch.",
        same_place_for_all: "All images are cropped at the same place. Each has its own.",
        never_mirrored: "No image is mirrored.",
        upside_down: "Some images are upside down: mirroring reverses the columns, not the rows.",
        not_normalized: "The crops are right, but not normalized.",
        bytes_overflow: "A uint8 cannot be negative: 0 - 128 is 128. Convert to float first.",
    },
)


# 06.4: a thread that loads ahead


def prefetch(batches, ahead=2):
    """Yield the same batches in the same order, loaded by a background thread.

    At most `ahead` loaded batches wait in the queue. An error of the loader is raised here.
    """
    ready = queue.Queue(maxsize=ahead)

    def load():
        try:
            for batch in batches:
                ready.put(("batch", batch))
            ready.put(("end", None))
        except Exception as error:
            ready.put(("error", error))

    threading.Thread(target=load, daemon=True).start()
    while True:
        kind, value = ready.get()
        if kind == "end":
            return
        if kind == "error":
            raise value
        yield value


class Loader:
    """Yields 0, 1, ..., and raises an error if it `fails`. Counts the batches that it began."""

    def __init__(self, count, fails):
        self.count = count
        self.fails = fails
        self.begun = 0

    def __iter__(self):
        for number in range(self.count):
            self.begun += 1
            yield number
        if self.fails:
            raise OSError("file damaged")


def run_prefetch(function, count, fails, ahead):
    """In a thread, so that a learner's generator that hangs does not block the notebook."""
    loader = Loader(count, fails)
    prefetched = function(loader, ahead)
    if prefetched is None or prefetched is ...:
        return prefetched
    outcome = {"batches": [], "loads ahead": False, "stops when the queue is full": True}
    outcome["end"] = "none: training waits indefinitely"
    thread = threading.Thread(
        target=consume, args=(prefetched, loader, ahead, outcome), daemon=True
    )
    thread.start()
    thread.join(3)
    return dict(outcome)


def consume(prefetched, loader, ahead, outcome):
    try:
        for batch in prefetched:
            outcome["batches"].append(batch)
            if batch == 0:  # Training takes long. What does the loader do meanwhile?
                deadline = time.monotonic() + 1
                while loader.begun <= ahead and time.monotonic() < deadline:
                    time.sleep(0.001)
                outcome["loads ahead"] = loader.begun > ahead
                time.sleep(0.05)
                # One was taken, `ahead` are in the queue, and the thread holds one more.
                outcome["stops when the queue is full"] = loader.begun <= ahead + 2
        outcome["end"] = "all batches"
    except Exception as error:
        outcome["end"] = f"{type(error).__name__}: {error}"


def no_thread(batches, ahead=2):
    yield from batches


def whole_epoch_first(batches, ahead=2):
    yield from list(batches)


def error_is_lost(batches, ahead=2):
    ready, end = queue.Queue(maxsize=ahead), object()

    def load():
        try:
            for batch in batches:
                ready.put(batch)
        except Exception:  # as if the thread died; without its traceback in the tests
            return
        ready.put(end)

    threading.Thread(target=load, daemon=True).start()
    while (batch := ready.get()) is not end:
        yield batch


def error_ends_the_epoch(batches, ahead=2):
    try:
        yield from prefetch(batches, ahead)
    except OSError:
        return


def no_end(batches, ahead=2):
    yield from prefetch(batches, ahead)
    queue.Queue().get()


TASKS["06.4"] = Task(
    reference=prefetch,
    inputs=lambda: [(6, False, 2), (3, True, 1)],
    run=run_prefetch,
    hints=[
        "Define a function inside `prefetch` that loops over the batches and puts each into the "
        "queue, and start a `threading.Thread` with it. (`daemon=True`: the thread does not keep "
        "Python from ending.) `put` waits while the queue is full, `get` while it is empty.",
        "The thread must also say that the batches have ended, and that there was an error. Put "
        'pairs into the queue, such as `("batch", batch)`, and let the other side look at the '
        "first item.",
        "In the thread, wrap the loop in `try` and `except Exception as error`, and put the error "
        "into the queue. On the other side, a loop without an end: get a pair, and yield the "
        "value, return, or raise.",
    ],
    mistakes={
        no_thread: "Nothing is loaded while the training computes. Load in a thread.",
        whole_epoch_first: "All batches are loaded long before the training needs them, which "
        "takes the memory of a whole epoch. Only `ahead` of them may wait: limit the queue.",
        error_is_lost: "The loader raised an error in the thread, and the training waits "
        "indefinitely for the next batch. Send the error through the queue.",
        error_ends_the_epoch: "The loader's error ended the epoch without a message. Raise it in "
        "the generator.",
        no_end: "The batches have ended, but the training still waits. Put a pair that means the "
        "end into the queue.",
    },
)


# 06.5: the share of waiting


def waiting_share(spans, skip):
    """The share of the time that training waits for data, without the first `skip` steps.

    spans: [phase, begin, end] in the order of time. Each step begins with the phase "waiting".
    """
    step, waiting, total = 0, 0.0, 0.0
    for phase, begin, end in spans:
        if phase == "waiting":
            step += 1
        if step > skip:
            total += end - begin
            if phase == "waiting":
                waiting += end - begin
    return waiting / total


def random_spans():
    for steps, skip in ((3, 0), (6, 2)):
        now, spans = 100.0, []
        for _ in range(steps):
            for phase in ("waiting", "forward", "backward", "update"):
                seconds = 0.1 + torch.rand(()).item()
                spans.append([phase, now, now + seconds])
                now += seconds
        yield spans, skip


def with_the_first_steps(spans, skip):
    return waiting_share(spans, 0)


def share_of_computing(spans, skip):
    share = waiting_share(spans, skip)
    return share / (1 - share)


def share_of_the_spans(spans, skip):
    return 0.25


def skips_spans(spans, skip):
    return waiting_share(spans[skip:], 0)


TASKS["06.5"] = Task(
    reference=waiting_share,
    inputs=random_spans,
    hints=[
        "A span lasts `end - begin` seconds. Add up all of them, and those of the phase "
        '"waiting". The share is the quotient of the two sums.',
        "A step has several spans. Count the steps: a new one begins with each span whose phase is "
        '"waiting". Add up only spans of steps after the first `skip`.',
    ],
    mistakes={
        with_the_first_steps: "This includes the first `skip` steps, while the workers start.",
        share_of_computing: "This is waiting divided by computing. Divide by the time of both.",
        share_of_the_spans: "This counts the spans. Add up their seconds.",
        skips_spans: "This leaves out `skip` spans. A step has several spans.",
    },
)


# 06.6: the time of a step


def step_time(load, compute, workers, cores):
    """Expected seconds per step: the largest of the three limits, if there are workers.

    load, compute: seconds of one core for loading a batch, and for training on it.
    """
    if workers == 0:
        return load + compute
    return max(load / workers, compute, (load + compute) / cores)


def times_and_counts():
    yield 0.09, 0.02, 0, 4
    yield 0.09, 0.02, 6, 2
    for workers, cores in ((1, 4), (3, 8), (8, 8), (2, 2), (6, 2), (2, 1)):
        load, compute = (0.01 + 0.09 * torch.rand(2)).tolist()
        yield load, compute, workers, cores
    yield 0.02, 0.05, 1, 8
    yield 0.3, 0.05, 7, 64


def without_the_cores(load, compute, workers, cores):
    return step_time(load, compute, workers, 1000)


def no_overlap(load, compute, workers, cores):
    return load / max(1, workers) + compute


def training_needs_no_core(load, compute, workers, cores):
    if workers == 0:
        return load + compute
    return max(load / min(workers, cores), compute)


TASKS["06.6"] = Task(
    reference=step_time,
    inputs=times_and_counts,
    hints=[
        "Without workers, one process does both, one after the other. With workers, loading and "
        "training happen at the same time, so the slowest part sets the pace: `max(...)`.",
        "The third limit is the number of cores. All processes together do load + compute seconds "
        "of work for each step. How long does this take if all cores are busy all the time?",
    ],
    mistakes={
        without_the_cores: "This is right with many cores. With few, workers and training share "
        "them: the third limit.",
        no_overlap: "With workers, loading and training overlap: they do not add up.",
        training_needs_no_core: "The training needs a core, too. Count the work of both.",
    },
)


# 06.7: how many workers


def workers_needed(load, compute, cores):
    """The smallest number of workers whose expected step is as short as with any number.

    A step that is at most 0.1% longer than the shortest one counts as equally short.
    """
    times = [step_time(load, compute, workers, cores) for workers in range(100)]
    return next(n for n, seconds in enumerate(times) if seconds <= 1.001 * min(times))


def one_worker_per_core(load, compute, cores):
    return cores


def quotient(load, compute, cores):
    return max(1, -int(-load // compute))


def first_minimum(load, compute, cores):
    times = [step_time(load, compute, workers, cores) for workers in range(100)]
    return len(times) - 1 - int(np.argmin(times[::-1]))


TASKS["06.7"] = Task(
    reference=workers_needed,
    inputs=lambda: [
        (0.030, 0.010, 8),
        (0.025, 0.010, 8),
        (0.030, 0.010, 2),
        (0.002, 0.010, 4),
        (0.030, 0.010, 1),
        (0.300, 0.010, 16),
    ],
    hints=[
        "Use your `step_time`. Compute it for 0, 1, 2, ... workers, up to many more than you "
        "expect. The smallest of these times is the goal.",
        "Then go through them again, from 0 workers on, and return the first number whose time is "
        "at most 1.001 times the smallest.",
    ],
    mistakes={
        one_worker_per_core: "This ignores how long loading and training take.",
        quotient: "load / compute, rounded up, is the number of workers that keeps up with the "
        "training if there are enough cores. With one core, no worker helps.",
        first_minimum: "More workers than necessary: return the smallest number of them.",
    },
)


# 06.8 (repair): all workers draw the same random numbers


def random_box(dataset, width):
    """(left, top, right, bottom) of a random square of `dataset.size` pixels.

    The picture is `width` pixels wide and high. The numbers differ from worker to worker, and from
    epoch to epoch.
    """
    size = dataset.size
    left, top = torch.randint(0, width - size + 1, (2,)).tolist()
    return left, top, left + size, top + size


def run_random_box(function, size, width):
    """Two workers in two epochs: each gets a copy of the data set, and seeds as in a DataLoader."""
    boxes = []
    for seed in (1000, 2000, 1001, 2001):  # epoch 1 and 2 of worker 0, then of worker 1
        dataset = SimpleNamespace(size=size, random=np.random.default_rng(0))
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        info = torch_worker.WorkerInfo(id=seed % 2, num_workers=2, seed=seed, dataset=dataset)
        with mock.patch.object(torch_worker, "_worker_info", info):
            boxes += [function(dataset, width) for _ in range(8)]
    if boxes[0] is None or boxes[0] is ...:
        return boxes[0]
    inside = all(left >= 0 and right <= width for left, _, right, _ in boxes)
    inside &= all(top >= 0 and bottom <= width for _, top, _, bottom in boxes)
    squares = all(r - left == b - top == size for left, top, r, b in boxes)
    different = len({tuple(map(int, box)) for box in boxes})
    return {"different boxes": different, "inside": inside, "right size": squares}


def copied_generator(dataset, width):
    left, top = dataset.random.integers(0, width - dataset.size + 1, 2)
    return left, top, left + dataset.size, top + dataset.size


def seeded_by_the_worker(dataset, width):
    if not hasattr(dataset, "own"):
        dataset.own = np.random.default_rng(torch.utils.data.get_worker_info().id)
    left, top = dataset.own.integers(0, width - dataset.size + 1, 2)
    return left, top, left + dataset.size, top + dataset.size


def seeded_for_each_image(dataset, width):
    generator = torch.Generator().manual_seed(torch.initial_seed())
    left, top = torch.randint(0, width - dataset.size + 1, (2,), generator=generator).tolist()
    return left, top, left + dataset.size, top + dataset.size


TASKS["06.8"] = Task(
    reference=random_box,
    inputs=lambda: [(64, 1_000_000)],
    run=run_random_box,
    hints=[
        "Each worker gets a copy of the data set, with the generator in the same state. Which "
        "random numbers does a `DataLoader` seed for you, differently in each worker and epoch?",
        "It seeds PyTorch's own generator. Draw the two numbers with `torch.randint`, without an "
        "argument `generator`. Its upper limit is exclusive, as before.",
    ],
    mistakes={
        copied_generator: "The boxes repeat: all workers draw the same numbers, in each epoch. "
        "Each worker has a copy of `dataset.random`.",
        seeded_by_the_worker: "Workers differ now, but each epoch repeats the boxes of the epoch "
        "before. The number of a worker is the same in all epochs.",
        seeded_for_each_image: "A worker draws the same box for all its images: the generator is "
        "seeded again in each call.",
    },
)


# 06.9 (beat a time): decode fewer pixels


def load_small(path, size=64):
    """As `load_photo`, but decoded at the smallest scale that has at least size x size pixels."""
    with Image.open(path) as file:
        file.draft("RGB", (size, size))
        picture = file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.array(picture)


def draft_too_late(path, size=64):
    with Image.open(path) as file:
        picture = file.convert("RGB")
        file.draft("RGB", (size, size))
        return np.array(picture.resize((size, size), Image.Resampling.BILINEAR))


def draft_of_half_the_size(path, size=64):
    with Image.open(path) as file:
        file.draft("RGB", (size // 2, size // 2))
        return np.array(file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def without_scaling(path, size=64):
    with Image.open(path) as file:
        file.draft("RGB", (size, size))
        return np.array(file.convert("RGB"))


TASKS["06.9"] = Task(
    reference=load_small,
    inputs=lambda: [(PHOTOGRAPHS / "china.jpg", 64), (PHOTOGRAPHS / "flower.jpg", 64)],
    hints=[
        "Start from your `load_photo`. One line is new: it tells the decoder the size before it "
        "decodes. `draft` has two arguments: the mode and the size, as a pair.",
        "`Image.open` reads only the header of the file. The decoder runs in `convert`. So `draft` "
        "must come between the two.",
    ],
    mistakes={
        draft_too_late: "All pixels are decoded, as in `load_photo`: `draft` comes too late, or "
        "not at all.",
        draft_of_half_the_size: "Too few pixels are decoded, so the picture is blurred: ask for "
        "size x size.",
        without_scaling: "The decoder can only halve the size once, twice or three times. Scale "
        "the rest of the way with `resize`.",
    },
)


# 06.10: the recommendation


def recommend(measured):
    """The smallest number of workers that is not significantly slower than the fastest one.

    measured: {workers: Measurement}. The fastest one has the highest median of images/s.
    """
    fastest = max(measured, key=lambda n: measured[n].quartiles[1])
    for workers in sorted(measured):
        gain = speedup(measured[fastest], measured[workers])
        if workers == fastest or not gain.significant:
            return workers


def random_measurements():
    for medians in ((100, 160, 240, 243, 200), (200, 120, 90), (100, 150, 152, 151)):
        measured = {}
        for workers, median in zip((0, 1, 2, 4, 8), medians, strict=False):
            rates = tuple((median * (1 + 0.01 * torch.randn(5))).tolist())
            measured[workers] = Measurement(name=str(workers), recipe=Recipe(), images_per_s=rates)
        yield (measured,)


def the_fastest(measured):
    return max(measured, key=lambda n: measured[n].quartiles[1])


def better_than_none(measured):
    return next((n for n in sorted(measured) if measured[n].quartiles[1] > 105), 0)


def the_most_workers(measured):
    return max(measured)


TASKS["06.10"] = Task(
    reference=recommend,
    inputs=random_measurements,
    hints=[
        "Find the fastest number first: `max(measured, key=...)`, where the key is the median, "
        "`measured[n].quartiles[1]`.",
        "Then go through the numbers from the smallest on. `speedup(a, b)` compares two "
        "measurements, and its `.significant` is False if both may be equally fast. Of two equal "
        "measurements, you need no comparison.",
    ],
    mistakes={
        the_fastest: "The fastest number may be only a little faster, by chance. A smaller number "
        "without a significant difference costs less.",
        better_than_none: "This number is better than no workers, but a larger one is "
        "significantly faster.",
        the_most_workers: "More workers are not always faster, and they cost memory.",
    },
)
