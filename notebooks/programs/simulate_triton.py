"""A small simulator of Triton kernels, which checks each address.

Triton has an interpreter too (TRITON_INTERPRET=1). It reads and writes memory out of bounds as a
GPU does: you get wrong numbers, or Python crashes. This one raises an error, and it runs on
systems for which there is no Triton. It has only what lesson 08 needs. Its time says nothing.
"""

import itertools
import math

import numpy as np
from simulate_cuda import names_of


class Pointer:
    """Addresses in an array, in numbers, as in Triton: pointer + offsets."""

    def __init__(self, name, numbers, offsets=0):
        self.name, self.numbers, self.offsets = name, numbers, offsets

    def __add__(self, offsets):
        return Pointer(self.name, self.numbers, self.offsets + offsets)

    __radd__ = __add__


class Constexpr:
    """Marks a parameter that is known when the kernel is compiled."""


Constexpr.__name__ = "constexpr"  # Triton looks for this name.


class Language:
    """What a kernel sees as `triton.language`."""

    constexpr = Constexpr
    float32, int32 = np.float32, np.int32
    maximum, minimum, where = staticmethod(np.maximum), staticmethod(np.minimum), np.where

    def __init__(self):
        self.program = (0, 0)

    def program_id(self, axis):
        return self.program[axis]

    def arange(self, start, end):
        if (end - start) & (end - start - 1):
            raise ValueError(f"arange's length must be a power of two, not {end - start}")
        return np.arange(start, end)

    def zeros(self, shape, dtype):
        return np.zeros(shape, dtype)

    def load(self, pointer, mask=None, other=math.nan):
        offsets, inside = self._check("reads", pointer, mask)
        loaded = pointer.numbers[np.where(inside, offsets, 0)]
        values = np.where(inside, loaded, np.float32(other))
        return values if values.ndim else values[()]

    def store(self, pointer, value, mask=None):
        offsets, inside = self._check("writes", pointer, mask)
        pointer.numbers[offsets[inside]] = np.broadcast_to(value, offsets.shape)[inside]

    def _check(self, verb, pointer, mask):
        offsets = np.asarray(pointer.offsets)
        inside = np.broadcast_to(True if mask is None else mask, offsets.shape)
        size = pointer.numbers.size
        bad = offsets[inside & ((offsets < 0) | (offsets >= size))]
        if bad.size:
            where = f"element {bad.flat[0]} of {pointer.name}, which has {size}"
            raise IndexError(f"program {self.program} {verb} {where}")
        return offsets, inside


tl = Language()


def simulate_triton(kernel, grid, *arguments):
    """Run a kernel for all programs of the grid (two numbers). NumPy arrays become pointers."""
    language = Language()
    values = [
        Pointer(name, value.reshape(-1)) if isinstance(value, np.ndarray) else value
        for name, value in zip(names_of(kernel, arguments), arguments, strict=True)
    ]
    before = kernel.__globals__.get("tl", tl)
    kernel.__globals__["tl"] = language
    try:
        for language.program in itertools.product(range(grid[0]), range(grid[1])):
            kernel(*values)
    finally:
        kernel.__globals__["tl"] = before
