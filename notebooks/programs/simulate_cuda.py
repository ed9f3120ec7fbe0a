"""A small simulator of CUDA kernels that counts memory transactions and finds races.

numba has a simulator too (NUMBA_ENABLE_CUDASIM=1). It only runs a kernel. This one also counts what
a GPU would read and write, and stops at an access that is out of bounds or part of a race. It runs
one thread at a time, up to the next `syncthreads()`. Its time says nothing about a GPU.
"""

import inspect
import itertools
import threading
from collections import namedtuple
from dataclasses import dataclass

import numpy as np

SECTOR = 32  # bytes that a GPU moves at least
WARP = 32  # threads
Index = namedtuple("Index", "x y")


class RaceError(Exception):
    """Two threads use the same element of shared memory, with no barrier in between."""


class BarrierError(Exception):
    """Some threads of a block wait in `syncthreads()`, and the others never get there."""


@dataclass
class Traffic:
    """The traffic between the threads and one array in global memory."""

    accesses: int = 0  # of single threads
    sectors: int = 0  # of 32 bytes that all warps together moved


class GlobalArray:
    """An array in global memory. Each access is checked and recorded."""

    def __init__(self, name, array, block):
        self.name, self.array, self.block = name, array, block
        self.shape = array.shape

    def __getitem__(self, index):
        self._record("reads", index)
        return self.array[index]

    def __setitem__(self, index, value):
        self._record("writes", index)
        self.array[index] = value

    def _record(self, verb, index):
        thread = current.thread
        index = index if isinstance(index, tuple) else (index,)
        inside = [0 <= i < side for i, side in zip(index, self.shape, strict=True)]
        if not all(inside):
            where = f"{self.name}{list(map(int, index))}"
            raise IndexError(f"{thread.name} {verb} {where}, but its shape is {self.shape}")
        address = int(np.ravel_multi_index(index, self.shape)) * self.array.itemsize
        # The n-th access of the threads of a warp is one instruction.
        count = thread.accesses.get((self.name, verb), 0)
        thread.accesses[self.name, verb] = count + 1
        instruction = (thread.number // WARP, self.name, verb, count)
        self.block.sectors.setdefault(instruction, []).append(address // SECTOR)


class SharedArray:
    """An array in the shared memory of a block. Finds races."""

    def __init__(self, shape, dtype, block):
        self.array, self.block = np.zeros(shape, dtype), block
        self.writer = {}  # index: (thread, number of barriers before the write)
        self.readers = {}

    def __getitem__(self, index):
        thread, barriers = current.thread, self.block.barriers
        if index not in self.writer:
            text = f"{thread.name} reads element {index} of shared memory before it is written"
            raise RaceError(text)
        writer, when = self.writer[index]
        if writer is not thread and when == barriers:
            raise RaceError(f"{thread.name} reads what {writer.name} writes, without a barrier")
        self.readers.setdefault((index, barriers), set()).add(thread)
        return self.array[index]

    def __setitem__(self, index, value):
        thread, barriers = current.thread, self.block.barriers
        others = self.readers.get((index, barriers), set()) - {thread}
        writer, when = self.writer.get(index, (thread, barriers))
        if others or (writer is not thread and when == barriers):
            text = f"{thread.name} overwrites element {index} of shared memory without a barrier"
            raise RaceError(text)
        self.writer[index] = (thread, barriers)
        self.array[index] = value


class CudaThread(threading.Thread):
    """A thread of a block. It runs while it has `turn`, until a barrier or its end."""

    def __init__(self, block, number, kernel, arguments):
        super().__init__(daemon=True)
        self.block, self.number = block, number
        self.index = Index(number % block.shape.x, number // block.shape.x)
        self.name = f"thread {tuple(self.index)} of block {tuple(block.index)}"
        self.turn, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.accesses, self.shared_arrays = {}, 0
        self.error, self.finished = None, False
        self.kernel, self.arguments = kernel, arguments

    def run(self):
        self.turn.acquire()
        current.thread = self
        try:
            if not self.block.stopped:
                self.kernel(*self.arguments)
        except Exception as error:  # raised again in the thread that simulates
            self.error = error
        self.finished = True
        self.paused.release()

    def proceed(self):
        """Let the thread run until a barrier or its end."""
        self.turn.release()
        self.paused.acquire()

    def wait(self):
        self.paused.release()
        self.turn.acquire()
        if self.block.stopped:
            raise BarrierError


class Block:
    """The threads of one block, and their shared memory."""

    def __init__(self, index, shape, grid):
        self.index, self.shape, self.grid = index, shape, grid
        self.barriers, self.shared, self.sectors = 0, [], {}
        self.stopped = False

    def run(self, kernel, arrays):
        arguments = [
            GlobalArray(name, value, self) if isinstance(value, np.ndarray) else value
            for name, value in arrays.items()
        ]
        count = self.shape.x * self.shape.y
        threads = [CudaThread(self, number, kernel, arguments) for number in range(count)]
        for thread in threads:
            thread.start()
        try:
            self._run_in_turn(threads)
        finally:
            self.stopped = True
            for thread in threads:
                if not thread.finished:
                    thread.proceed()

    def _run_in_turn(self, threads):
        waiting = threads
        while waiting:
            for thread in waiting:
                thread.proceed()
                if thread.error:
                    raise thread.error
            waiting = [thread for thread in waiting if not thread.finished]
            self.barriers += 1
            if 0 < len(waiting) < len(threads):
                text = (
                    f"only {len(waiting)} of {len(threads)} threads of a block are in syncthreads"
                )
                raise BarrierError(text)


class Shared:
    """`cuda.shared` in a kernel."""

    def array(self, shape, dtype):
        thread = current.thread
        arrays = thread.block.shared
        if thread.shared_arrays == len(arrays):
            arrays.append(SharedArray(shape, dtype, thread.block))
        thread.shared_arrays += 1
        return arrays[thread.shared_arrays - 1]


class Cuda:
    """What a kernel sees as numba's module `cuda`."""

    shared = Shared()
    threadIdx = property(lambda self: current.thread.index)  # noqa: N815
    blockIdx = property(lambda self: current.thread.block.index)  # noqa: N815
    blockDim = property(lambda self: current.thread.block.shape)  # noqa: N815
    gridDim = property(lambda self: current.thread.block.grid)  # noqa: N815

    def grid(self, dimensions):
        thread, block = current.thread, current.thread.block
        x = block.index.x * block.shape.x + thread.index.x
        y = block.index.y * block.shape.y + thread.index.y
        return (x, y) if dimensions == 2 else x

    def syncthreads(self):
        current.thread.wait()


current = threading.local()  # current.thread is the `CudaThread` that runs
cuda = Cuda()


def names_of(kernel, arguments):
    """The names of a kernel's parameters, one for each argument."""
    names = list(inspect.signature(kernel).parameters)
    return names if len(names) == len(arguments) else range(len(arguments))


def simulate(kernel, blocks, threads, *arguments):
    """Run a kernel, which changes its arrays in place. Returns {name of an array: `Traffic`}.

    `blocks` and `threads` are (across, down). Raises IndexError, `RaceError` or `BarrierError`.
    """
    arrays = dict(zip(names_of(kernel, arguments), arguments, strict=True))
    traffic = {name: Traffic() for name, value in arrays.items() if isinstance(value, np.ndarray)}
    before = kernel.__globals__.get("cuda", cuda)
    kernel.__globals__["cuda"] = cuda
    try:
        for y, x in itertools.product(range(blocks[1]), range(blocks[0])):
            block = Block(Index(x, y), Index(*threads), Index(*blocks))
            block.run(kernel, arrays)
            for (_, name, _, _), sectors in block.sectors.items():
                traffic[name].accesses += len(sectors)
                traffic[name].sectors += len(set(sectors))
    finally:
        kernel.__globals__["cuda"] = before
    return traffic
