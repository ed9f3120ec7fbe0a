"""One convolution of a photo, with numba's threads. Arguments and files as in convolve_openmp.c.

python convolve_numba.py LAYER FOLDER HEIGHT WIDTH SIZE REPEATS THREADS...

LAYER is "omp" or "tbb". A process has one threading layer, so each layer needs its own process.
"""

import ctypes
import sys
import time
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numba
import numpy as np

CHUNK = 8  # rows that a thread takes at a time; numba's OpenMP layer ignores it


@numba.njit(parallel=True, cache=True)
def convolve(photo, kernel, widths, output):
    size = len(kernel)
    for y in numba.prange(len(output)):
        width = widths[y]
        output[y, :width] = 0
        for i in range(size):
            for j in range(size):
                for x in range(width):
                    output[y, x] += kernel[i, j] * photo[y + i, x + j]


def load_tbb():
    """Load TBB where pip has put it: the system does not look there."""
    try:
        installed = files("tbb") or []
    except PackageNotFoundError:
        return
    for file in installed:
        if file.name in ("libtbb.so.12", "libtbb.12.dylib", "tbb12.dll"):
            ctypes.CDLL(str(Path(file.locate()).resolve()))


def main(layer, folder, height, width, size, repeats, *counts):
    load_tbb()
    numba.config.THREADING_LAYER = layer
    folder, shape, size = Path(folder), (int(height), int(width)), int(size)
    photo = np.fromfile(folder / "photo.bin", np.float32).reshape(shape)
    kernel = np.fromfile(folder / "kernel.bin", np.float32).reshape(size, size)
    widths = np.fromfile(folder / "widths.bin", np.int32)
    output = np.zeros((shape[0] - size + 1, shape[1] - size + 1), np.float32)
    numba.set_parallel_chunksize(CHUNK)
    for repeat in range(int(repeats)):
        for threads in map(int, counts if repeat % 2 else reversed(counts)):
            numba.set_num_threads(threads)
            convolve(photo, kernel, widths, output)  # compiles, or starts threads: not timed
            start = time.perf_counter()
            convolve(photo, kernel, widths, output)
            print(threads, time.perf_counter() - start)
    output.tofile(folder / "output.bin")


if __name__ == "__main__":
    main(*sys.argv[1:])
