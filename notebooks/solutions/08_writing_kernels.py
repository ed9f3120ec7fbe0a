"""Lesson 08, writing kernels: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`. The CUDA
and Triton kernels run in the simulators of notebooks/programs, which need no extra package.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

from cnnlab.check import Task

sys.path.insert(0, str(Path(__file__).parents[1] / "programs"))
from run_kernels import build_opencl, output_shape
from simulate_cuda import cuda, simulate
from simulate_triton import simulate_triton, tl

TILE = (4 + 6, 32 + 6)  # rows and columns of the photo for a block of 4 x 32 pixels, 7 x 7 weights
TASKS = {}


def random_array(*shape):
    return torch.rand(shape).numpy()


def simulated(function, photo, weights, blocks, threads):
    """The output of a CUDA kernel, or None if it wrote nothing."""
    output = np.full(output_shape(photo, weights), np.nan, np.float32)
    simulate(function, blocks, threads, photo, weights, output)
    return None if np.isnan(output).all() else output


# 08.1: blocks for an image


def count_blocks(width, height, threads):
    """How many blocks cover an image of width x height pixels: (across, down).

    `threads` is (across, down) of one block. Each pixel needs a thread.
    """
    across, down = threads
    return -(-width // across), -(-height // down)


def rounded_down(width, height, threads):
    return width // threads[0], height // threads[1]


def always_one_more(width, height, threads):
    return width // threads[0] + 1, height // threads[1] + 1


def threads_swapped(width, height, threads):
    return count_blocks(width, height, threads[::-1])


def total_blocks(width, height, threads):
    return math.prod(count_blocks(width, height, threads))


TASKS["08.1"] = Task(
    reference=count_blocks,
    inputs=lambda: [(70, 33, (32, 4)), (640, 427, (16, 16)), (64, 8, (32, 8)), (5, 3, (32, 8))],
    hints=[
        "How many blocks of 32 pixels cover a row of 64 pixels? And a row of 65?",
        "Divide, and round up to an integer, in each direction. In Python, -(-a // b) is a / b, "
        "rounded up.",
    ],
    mistakes={
        rounded_down: "The pixels at the right or at the bottom have no thread. Round up.",
        always_one_more: "If the block divides the image evenly, this is one block too many.",
        threads_swapped: "`threads` and the result are (across, down). Across is for the width.",
        total_blocks: "Return two numbers, the blocks across and down, not their product.",
    },
)


# 08.2: a convolution in CUDA


def conv_kernel(photo, weights, output):
    """One thread of a convolution without padding. It computes at most one pixel of `output`.

    Pixel (y, x) is the sum of weights[i, j] * photo[y + i, x + j] over i and j. `x, y =
    cuda.grid(2)` is the place of this thread in the grid. The grid may be larger than the output.
    """
    x, y = cuda.grid(2)
    if y < output.shape[0] and x < output.shape[1]:
        total = np.float32(0)
        for i in range(weights.shape[0]):
            for j in range(weights.shape[1]):
                total += weights[i, j] * photo[y + i, x + j]
        output[y, x] = total


def no_bounds_check(photo, weights, output):
    x, y = cuda.grid(2)
    total = np.float32(0)
    for i in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            total += weights[i, j] * photo[y + i, x + j]
    output[y, x] = total


def x_and_y_swapped(photo, weights, output):
    y, x = cuda.grid(2)
    if y < output.shape[0] and x < output.shape[1]:
        total = np.float32(0)
        for i in range(weights.shape[0]):
            for j in range(weights.shape[1]):
                total += weights[i, j] * photo[y + i, x + j]
        output[y, x] = total


def place_in_the_block(photo, weights, output):
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    total = np.float32(0)
    for i in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            total += weights[i, j] * photo[y + i, x + j]
    output[y, x] = total


def flipped_weights(photo, weights, output):
    x, y = cuda.grid(2)
    if y < output.shape[0] and x < output.shape[1]:
        total = np.float32(0)
        for i in range(weights.shape[0]):
            for j in range(weights.shape[1]):
                flipped = weights[weights.shape[0] - 1 - i, weights.shape[1] - 1 - j]
                total += flipped * photo[y + i, x + j]
        output[y, x] = total


TASKS["08.2"] = Task(
    reference=conv_kernel,
    inputs=lambda: [(random_array(7, 23), random_array(3, 3), (2, 2), (16, 4))],
    run=simulated,
    hints=[
        "Each thread does what lesson 04's loops did for one pixel: two loops over the weights. "
        "There are no loops over x and y, because each pixel has a thread of its own.",
        "First find your pixel with `cuda.grid(2)`. Then do nothing if it is outside: compare y "
        "and x with the two numbers of `output.shape`.",
        "Start with `total = np.float32(0)`, add up the products in two loops, and store the total "
        "at [y, x] of the output, all inside the `if`.",
    ],
    mistakes={
        no_bounds_check: "The grid is larger than the output, because blocks are whole. Threads "
        "outside must do nothing.",
        x_and_y_swapped: "`cuda.grid(2)` gives x first: the place across. Some pixels got no "
        "thread.",
        place_in_the_block: "`threadIdx` is the place within a block. All blocks computed the same "
        "pixels. Use the place in the grid.",
        flipped_weights: "The weights are flipped. As in lesson 01, weights[i, j] belongs to "
        "photo[y + i, x + j].",
    },
)


# 08.3: memory transactions


def count_sectors(addresses):
    """How many sectors of 32 bytes one instruction of a warp moves.

    `addresses`: the first byte of the 4-byte number that each thread reads. Each is a multiple of
    4. Sectors begin at multiples of 32. Threads that read the same sector share it.
    """
    return len({address // 32 for address in addresses})


def warps():
    threads = torch.arange(32)
    start = 4 * int(torch.randint(1, 8, ()))
    yield ((start + 4 * threads).tolist(),)
    yield ((640 * 4 * threads).tolist(),)
    yield ((8 * threads).tolist(),)
    yield ([start] * 32,)
    yield ((4 * torch.randint(0, 1000, (32,))).tolist(),)


def bytes_by_sector_size(addresses):
    return len(addresses) * 4 // 32


def from_first_to_last(addresses):
    return max(addresses) // 32 - min(addresses) // 32 + 1


def one_for_each_thread(addresses):
    return len(addresses)


def cache_lines(addresses):
    return len({address // 128 for address in addresses})


TASKS["08.3"] = Task(
    reference=count_sectors,
    inputs=warps,
    hints=[
        "Which sector contains address 100? Sector 0 has the bytes 0 to 31, sector 1 the bytes 32 "
        "to 63.",
        "Compute the number of the sector of each address. Then count how many different numbers "
        "there are; a set keeps each of them once.",
    ],
    mistakes={
        bytes_by_sector_size: "This is the number of sectors if the addresses follow each other "
        "and begin at a sector. Look at the addresses.",
        from_first_to_last: "Sectors between two addresses that no thread reads are not moved.",
        one_for_each_thread: "Threads that read from the same sector share one transaction.",
        cache_lines: "This counts lines of 128 bytes. A sector has 32.",
    },
)


# 08.4: the tile of a block


def tiled_kernel(photo, weights, output):
    """As `conv_kernel`. The threads of a block load their tile of the photo together."""
    tile = cuda.shared.array(TILE, np.float32)
    x, y = cuda.grid(2)
    left, top = x - cuda.threadIdx.x, y - cuda.threadIdx.y
    for i in range(cuda.threadIdx.y, TILE[0], cuda.blockDim.y):
        for j in range(cuda.threadIdx.x, TILE[1], cuda.blockDim.x):
            tile[i, j] = photo[min(top + i, photo.shape[0] - 1), min(left + j, photo.shape[1] - 1)]
    cuda.syncthreads()
    if y < output.shape[0] and x < output.shape[1]:
        total = np.float32(0)
        for i in range(weights.shape[0]):
            for j in range(weights.shape[1]):
                total += weights[i, j] * tile[cuda.threadIdx.y + i, cuda.threadIdx.x + j]
        output[y, x] = total


def no_barrier(photo, weights, output):
    """The broken program that the lesson shows."""
    tile = cuda.shared.array(TILE, np.float32)
    x, y = cuda.grid(2)
    left, top = x - cuda.threadIdx.x, y - cuda.threadIdx.y
    for i in range(cuda.threadIdx.y, TILE[0], cuda.blockDim.y):
        for j in range(cuda.threadIdx.x, TILE[1], cuda.blockDim.x):
            tile[i, j] = photo[min(top + i, photo.shape[0] - 1), min(left + j, photo.shape[1] - 1)]
    if y < output.shape[0] and x < output.shape[1]:
        total = np.float32(0)
        for i in range(weights.shape[0]):
            for j in range(weights.shape[1]):
                total += weights[i, j] * tile[cuda.threadIdx.y + i, cuda.threadIdx.x + j]
        output[y, x] = total


def barrier_for_some(photo, weights, output):
    tile = cuda.shared.array(TILE, np.float32)
    x, y = cuda.grid(2)
    left, top = x - cuda.threadIdx.x, y - cuda.threadIdx.y
    for i in range(cuda.threadIdx.y, TILE[0], cuda.blockDim.y):
        for j in range(cuda.threadIdx.x, TILE[1], cuda.blockDim.x):
            tile[i, j] = photo[min(top + i, photo.shape[0] - 1), min(left + j, photo.shape[1] - 1)]
    if y < output.shape[0] and x < output.shape[1]:
        cuda.syncthreads()
        total = np.float32(0)
        for i in range(weights.shape[0]):
            for j in range(weights.shape[1]):
                total += weights[i, j] * tile[cuda.threadIdx.y + i, cuda.threadIdx.x + j]
        output[y, x] = total


def tile_not_used(photo, weights, output):
    conv_kernel(photo, weights, output)


def run_tiled(function, photo, weights):
    """The output, and how often threads read the photo."""
    output = np.full(output_shape(photo, weights), np.nan, np.float32)
    blocks = count_blocks(*output.shape[::-1], (32, 4))
    traffic = simulate(function, blocks, (32, 4), photo, weights, output)
    if np.isnan(output).all():
        return None
    return {"output": output, "reads of the photo": traffic["photo"].accesses}


TASKS["08.4"] = Task(
    reference=tiled_kernel,
    inputs=lambda: [(random_array(9, 43), random_array(7, 7))],
    run=run_tiled,
    hints=[
        "Thread 0 loads a few elements of the tile, then it uses elements that other threads load. "
        "How does it know that they are there?",
        "All threads must have loaded their elements before any of them reads the tile. Which call "
        "is a barrier for the threads of a block?",
        "The barrier is one line, `cuda` followed by `.syncthreads()`. All threads of the block "
        "must reach it, even those that have no pixel.",
    ],
    mistakes={
        no_barrier: "The threads use the tile before the others have filled it. Between the two, "
        "all must wait for each other.",
        barrier_for_some: "The threads without a pixel never reach the barrier, and on a GPU the "
        "others may wait indefinitely. Put it where all threads reach it.",
        tile_not_used: "The output is right, but each thread reads all its pixels from global "
        "memory. Use the tile.",
    },
)


# 08.5: an OpenCL kernel whose neighbors are far apart

SOURCE = """__kernel void convolve(
        __global const float *photo, __global const float *weights, __global float *output,
        int size, int height, int width) {
            int x = get_global_id(0), y = get_global_id(1);
            if (y >= height || x >= width) return;
            float total = 0;
            for (int i = 0; i < size; i++)
                for (int j = 0; j < size; j++)
                    total += weights[i * size + j] * photo[(y + i) * (width + size - 1) + x + j];
            output[y * width + x] = total; }"""
BY_COLUMNS = SOURCE.replace("x = get_global_id(0), y =", "y = get_global_id(0), x =")


def opencl_convolve(height, width):
    """The source of a kernel, and its global size. The output has height x width pixels.

    The global size is how many work-items there are in direction 0 and in direction 1.
    """
    return SOURCE, (width, height)


def by_columns(height, width):
    """The broken program that the lesson shows."""
    return BY_COLUMNS, (height, width)


def only_the_size_swapped(height, width):
    return BY_COLUMNS, (width, height)


def only_the_numbers_swapped(height, width):
    return SOURCE, (height, width)


def run_opencl(function, photo, weights):
    """The output, and how far apart in it the pixels of two neighboring work-items are."""
    answer = function(*output_shape(photo, weights))
    if not isinstance(answer, tuple):
        return answer
    source, global_size = answer
    launch, fetch = build_opencl(source, photo, weights)
    launch((2, 1))  # two neighboring work-items
    first, second = np.flatnonzero(~np.isnan(fetch()))
    launch(global_size)
    return {"output": fetch().copy(), "distance of two neighbors": int(second - first)}


TASKS["08.5"] = Task(
    reference=opencl_convolve,
    inputs=lambda: [(random_array(12, 21), random_array(3, 3))],
    run=run_opencl,
    hints=[
        "Two neighboring work-items have the same number in direction 1, and numbers in direction "
        "0 that differ by one. Which two pixels do they compute? How far apart are these?",
        "x must come from direction 0, because x is what differs between neighbors in a row.",
        "Then direction 0 has as many work-items as there are pixels in a row. Change the global "
        "size too.",
    ],
    mistakes={
        by_columns: "The output is right, but neighboring work-items compute pixels that are a "
        "whole row apart. Let them go along a row.",
        only_the_size_swapped: "Now there are not enough work-items in one direction, and some "
        "pixels are not computed. Change the numbers x and y in the kernel, too.",
        only_the_numbers_swapped: "Now there are not enough work-items in one direction, and some "
        "pixels are missing. Change the global size, too.",
    },
)


# 08.6: a block of pixels in Triton


def triton_convolve(photo, weights, output, height, width, size, block: tl.constexpr):
    """One program of a convolution. It computes `block` neighboring pixels of one output row.

    Program (n, y) has row y, and the pixels from n * block on. `photo`, `weights` and `output` are
    pointers to the first element. The output has height x width pixels, the weights size x size,
    and a row of the photo width + size - 1 pixels.
    """
    y = tl.program_id(1)
    x = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    for i in range(size):
        for j in range(size):
            address = photo + (y + i) * (width + size - 1) + x + j
            total += tl.load(weights + i * size + j) * tl.load(address, mask=x < width)
    tl.store(output + y * width + x, total, mask=x < width)


def no_mask(photo, weights, output, height, width, size, block: tl.constexpr):
    y = tl.program_id(1)
    x = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    for i in range(size):
        for j in range(size):
            address = photo + (y + i) * (width + size - 1) + x + j
            total += tl.load(weights + i * size + j) * tl.load(address)
    tl.store(output + y * width + x, total)


def only_the_load_masked(photo, weights, output, height, width, size, block: tl.constexpr):
    y = tl.program_id(1)
    x = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(output + y * width + x, x)


def row_of_the_output(photo, weights, output, height, width, size, block: tl.constexpr):
    y = tl.program_id(1)
    x = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    for i in range(size):
        for j in range(size):
            pixels = tl.load(photo + (y + i) * width + x + j, mask=x < width)
            total += tl.load(weights + i * size + j) * pixels
    tl.store(output + y * width + x, total, mask=x < width)


def one_block_in_each_row(photo, weights, output, height, width, size, block: tl.constexpr):
    y = tl.program_id(1)
    x = tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    for i in range(size):
        for j in range(size):
            address = photo + (y + i) * (width + size - 1) + x + j
            total += tl.load(weights + i * size + j) * tl.load(address, mask=x < width)
    tl.store(output + y * width + x, total, mask=x < width)


def run_triton(function, photo, weights, block):
    height, width = output_shape(photo, weights)
    output = np.full((height, width), np.nan, np.float32)
    grid = (math.ceil(width / block), height)
    simulate_triton(function, grid, photo, weights, output, height, width, len(weights), block)
    return None if np.isnan(output).all() else output


TASKS["08.6"] = Task(
    reference=triton_convolve,
    inputs=lambda: [
        (random_array(6, 25), random_array(3, 3), 16),
        (random_array(9, 9), random_array(5, 5), 8),
    ],
    run=run_triton,
    hints=[
        "The row y is `tl.program_id(1)`. The columns are `block` numbers at once: those of "
        "`tl.arange(0, block)`, shifted by the pixels of the programs to the left.",
        "Start with `tl.zeros((block,), tl.float32)`. In two loops over i and j, load one weight "
        "and `block` pixels, and add the product. Pixel (r, c) of the photo is at "
        "photo + r * (width + size - 1) + c.",
        "The last program of a row has columns beyond the width. Pass the mask x < width to the "
        "load of the pixels and to the store.",
    ],
    mistakes={
        no_mask: "The last program of a row reads beyond its end. Mask the load of the pixels "
        "and the store.",
        only_the_load_masked: "The last program of a row writes beyond its end. The store needs a "
        "mask, too.",
        row_of_the_output: "A row of the photo is longer than a row of the output: it has "
        "width + size - 1 pixels.",
        one_block_in_each_row: "All programs of a row compute the same pixels. Shift x by the "
        "pixels of the programs to the left.",
    },
)


# 08.7: autotuning


def autotune(cache, problem, configurations, seconds):
    """The fastest configuration for a problem. Measure only if the problem is not in `cache`.

    `cache` is {problem: its fastest configuration}: add what you find. `seconds(configuration)`
    measures one. It raises RuntimeError if the device cannot run it; then skip this one.
    """
    if problem not in cache:
        measured = {}
        for configuration in configurations:
            try:
                measured[configuration] = seconds(configuration)
            except RuntimeError:
                continue
        cache[problem] = min(measured, key=measured.get)
    return cache[problem]


def random_problems():
    yield [(64, 64), (128, 64), (64, 64)], (1 + torch.rand(2, 5)).tolist()


def run_autotune(function, problems, times):
    """The choice for each problem, and the measurements. Configuration 32 is not possible."""
    cache, measured, choices = {}, [], []
    configurations = [8, 16, 32, 64, 128]

    def seconds(configuration):
        measured.append((problem, configuration))
        if configuration == 32:
            raise RuntimeError("too many resources requested for launch")
        return times[problems.index(problem)][configurations.index(configuration)]

    for problem in problems:
        choices.append(function(cache, problem, configurations, seconds))
    if not measured:
        return None
    return {"choices": choices, "measurements": len(measured)}


def measures_each_time(cache, problem, configurations, seconds):
    return autotune({}, problem, configurations, seconds)


def same_for_all_problems(cache, problem, configurations, seconds):
    return autotune(cache, "any", configurations, seconds)


def slowest(cache, problem, configurations, seconds):
    return autotune(cache, problem, configurations, lambda number: -seconds(number))


def fails_if_one_fails(cache, problem, configurations, seconds):
    return min(configurations, key=seconds)


TASKS["08.7"] = Task(
    reference=autotune,
    inputs=random_problems,
    run=run_autotune,
    hints=[
        "Look into the cache first. Only if the problem is not there, measure all configurations.",
        "Collect {configuration: seconds} in a loop. The call of `seconds` is inside `try`; on a "
        "RuntimeError, continue with the next configuration.",
        "`min(d, key=d.get)` is the key of a dictionary d with the smallest value. Store it in the "
        "cache before you return it.",
    ],
    mistakes={
        measures_each_time: "The same problem was measured again. Store the result in the cache, "
        "and look there first.",
        same_for_all_problems: "Another problem may have another fastest configuration. Use the "
        "problem as the key of the cache.",
        slowest: "This is the slowest configuration.",
        fails_if_one_fails: "One configuration is not possible on this device. Catch the "
        "RuntimeError and go on with the others.",
    },
)


# 08.8: occupancy


def occupancy(threads, registers, shared, sm):
    """How many blocks an SM can hold at the same time, and its occupancy: (blocks, share).

    A block has `threads` threads with `registers` registers each, and uses `shared` bytes of shared
    memory. `sm` has the limits of one SM: its "threads", "blocks", "registers", and "shared" bytes.
    The occupancy is the share of the SM's threads that are used.
    """
    limits = [sm["blocks"], sm["threads"] // threads, sm["registers"] // (threads * registers)]
    if shared:
        limits.append(sm["shared"] // shared)
    blocks = min(limits)
    return blocks, blocks * threads / sm["threads"]


H100 = {"threads": 2048, "blocks": 32, "registers": 65536, "shared": 228 * 1024}


def blocks_of_threads():
    for threads, registers, shared in (
        (128, 32, 0),
        (256, 80, 0),
        (128, 40, 48 * 1024),
        (32, 32, 1024),
        (1024, 40, 8192),
    ):
        yield threads, registers, shared, H100


def registers_of_one_thread(threads, registers, shared, sm):
    limits = [sm["blocks"], sm["threads"] // threads, sm["registers"] // registers]
    blocks = min([*limits, sm["shared"] // max(shared, 1)])
    return blocks, blocks * threads / sm["threads"]


def without_shared_memory(threads, registers, shared, sm):
    return occupancy(threads, registers, 0, sm)


def fractions_of_blocks(threads, registers, shared, sm):
    limits = [sm["blocks"], sm["threads"] / threads, sm["registers"] / (threads * registers)]
    blocks = min([*limits, sm["shared"] / max(shared, 1)])
    return blocks, blocks * threads / sm["threads"]


def no_limit_of_blocks(threads, registers, shared, sm):
    return occupancy(threads, registers, shared, {**sm, "blocks": 1000})


TASKS["08.8"] = Task(
    reference=occupancy,
    inputs=blocks_of_threads,
    hints=[
        "There are four limits. How many blocks does each of them allow? The smallest one counts.",
        "A block needs threads * registers registers. Only whole blocks run, so use `//`. A kernel "
        "without shared memory has no limit from it.",
        "The share: threads of all these blocks, divided by the threads of the SM.",
    ],
    mistakes={
        registers_of_one_thread: "`registers` is for one thread. A block needs that many for each "
        "of its threads.",
        without_shared_memory: "The shared memory of an SM is divided among its blocks, too.",
        fractions_of_blocks: "Only whole blocks run on an SM. Round down.",
        no_limit_of_blocks: "An SM also has a limit for the number of blocks.",
    },
)


# 08.9: what the blocks read


def photo_bytes(height, width, size, threads):
    """Bytes of the photo that all blocks together read: (without a tile, with a tile).

    The output has height x width pixels, the weights size x size, a block (across, down) threads,
    one for each pixel. A number has 4 bytes. With a tile, each block reads the whole tile, even a
    block at the edge of the image.
    """
    across, down = count_blocks(width, height, threads)
    tile = (threads[0] + size - 1) * (threads[1] + size - 1)
    return 4 * height * width * size**2, 4 * across * down * tile


def random_images():
    for size, threads in ((3, (32, 4)), (7, (32, 8)), (5, (16, 16))):
        height, width = torch.randint(20, 200, (2,)).tolist()
        yield height, width, size, threads


def tile_without_halo(height, width, size, threads):
    across, down = count_blocks(width, height, threads)
    tile = threads[0] * threads[1]
    return 4 * height * width * size**2, 4 * across * down * tile


def numbers_instead_of_bytes(height, width, size, threads):
    return tuple(number // 4 for number in photo_bytes(height, width, size, threads))


def whole_blocks_only(height, width, size, threads):
    tile = (threads[0] + size - 1) * (threads[1] + size - 1)
    blocks = (width // threads[0]) * (height // threads[1])
    return 4 * height * width * size**2, 4 * blocks * tile


def each_pixel_once(height, width, size, threads):
    return 4 * height * width, photo_bytes(height, width, size, threads)[1]


TASKS["08.9"] = Task(
    reference=photo_bytes,
    inputs=random_images,
    hints=[
        "Without a tile, each thread reads as many pixels as there are weights. With a tile, count "
        "blocks, not threads.",
        "The tile is larger than the block: it also has the halo, size - 1 rows and columns more.",
        "Round the number of blocks up in each direction, as in the first task.",
    ],
    mistakes={
        tile_without_halo: "The tile needs the halo too: size - 1 more rows and columns.",
        numbers_instead_of_bytes: "These are numbers. Each of them has 4 bytes.",
        whole_blocks_only: "The blocks at the edge are missing. Round up.",
        each_pixel_once: "Without a tile, each thread reads size x size pixels of its own.",
    },
)


# 08.10: a fused kernel


def bias_relu(x, bias, output, channels, pixels, block: tl.constexpr):
    """One program of a fused kernel: output = ReLU(x + bias of its channel).

    `x` and `output` have channels x pixels numbers, the channels one after the other; `bias` has a
    number for each channel. Program n computes the `block` numbers from n * block on. A block may
    contain numbers of several channels, and the last one reaches beyond the end. `tl.maximum(a, b)`
    is the larger one of two numbers.
    """
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < channels * pixels
    channel = place // pixels
    total = tl.load(x + place, mask=inside) + tl.load(bias + channel, mask=inside)
    tl.store(output + place, tl.maximum(total, 0.0), mask=inside)


def run_bias_relu(function, x, bias, block):
    channels, pixels = x.shape
    output = np.full(x.shape, np.nan, np.float32)
    grid = (math.ceil(x.size / block), 1)
    simulate_triton(function, grid, x, bias, output, channels, pixels, block)
    return None if np.isnan(output).all() else output


def bias_of_the_pixel(x, bias, output, channels, pixels, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < channels * pixels
    total = tl.load(x + place, mask=inside) + tl.load(bias + place % channels, mask=inside)
    tl.store(output + place, tl.maximum(total, 0.0), mask=inside)


def relu_first(x, bias, output, channels, pixels, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < channels * pixels
    numbers = tl.maximum(tl.load(x + place, mask=inside), 0.0)
    tl.store(output + place, numbers + tl.load(bias + place // pixels, mask=inside), mask=inside)


def unmasked(x, bias, output, channels, pixels, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.load(x + place) + tl.load(bias + place // pixels)
    tl.store(output + place, tl.maximum(total, 0.0))


def without_relu(x, bias, output, channels, pixels, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < channels * pixels
    total = tl.load(x + place, mask=inside) + tl.load(bias + place // pixels, mask=inside)
    tl.store(output + place, total, mask=inside)


TASKS["08.10"] = Task(
    reference=bias_relu,
    inputs=lambda: [(random_array(3, 21) - 0.5, random_array(3) - 0.5, 16)],
    run=run_bias_relu,
    hints=[
        "The places in x of this program are `block` numbers at once, as the columns in task 08.6. "
        "The last program has places beyond the end: mask them.",
        "Which channel has place 25, if a channel has 21 pixels? An integer division gives the "
        "channels of all places. Use them as offsets for `bias`.",
        "Load twice with the mask, add, take the maximum with 0.0, and store once with the mask.",
    ],
    mistakes={
        bias_of_the_pixel: "The channel of a place is not a remainder. The first `pixels` places "
        "belong to channel 0.",
        relu_first: "ReLU comes after the bias.",
        unmasked: "The last program goes beyond the end of x. All loads and the store need a mask.",
        without_relu: "The ReLU is missing.",
    },
)
