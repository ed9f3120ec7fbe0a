"""Compile and start the programs of lesson 04, and read what they print."""

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from cnnlab import machine

PROGRAMS = Path(__file__).parent


def write_input(photo, kernel, widths):
    """A temporary folder with the input of the convolution programs.

    `widths`: how many pixels to compute in each row of the output.
    """
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    for name, array in (("photo", photo), ("kernel", kernel), ("widths", widths)):
        array.tofile(Path(folder.name, f"{name}.bin"))
    Path(folder.name, "sizes.txt").write_text(" ".join(map(str, (*photo.shape, len(kernel)))))
    return folder


def read_output(folder):
    """The output of the convolution program that ran last."""
    height, width, size = map(int, Path(folder.name, "sizes.txt").read_text().split())
    output = np.fromfile(Path(folder.name, "output.bin"), np.float32)
    return output.reshape(height - size + 1, width - size + 1)


def compile_c(name, folder, *flags):
    """Compile NAME_openmp.c. Returns the command that starts it, or None after saying why not."""
    compiler = machine.describe().compiler
    if not compiler:
        print(f"{name}_openmp.c: not measured, because there is no C compiler (g++ or clang++).")
        return None
    program = str(Path(folder.name, "_".join([name, *flags])))
    command = [compiler, "-x", "c", "-O3", "-march=native", "-fopenmp", *flags]
    command += [str(PROGRAMS / f"{name}_openmp.c"), "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return [program]
    reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
    print(f"{name}_openmp.c: not measured, because {compiler} cannot build it: {reason.strip()}")
    return None


def run_convolution(command, folder, counts, repeats, **settings):
    """{n: seconds of each call with n threads}, or {} after printing why the program failed.

    `settings` are environment variables.
    """
    sizes = Path(folder.name, "sizes.txt").read_text().split()
    arguments = [folder.name, *sizes, str(repeats), *map(str, counts)]
    numba = {"NUMBA_NUM_THREADS": str(max(counts)), "NUMBA_CACHE_DIR": tempfile.gettempdir()}
    env = {**os.environ, **numba, **settings}
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        print("not available:", (done.stderr.strip().splitlines() or ["no reason given"])[-1])
        return {}
    seconds = {n: [] for n in counts}
    for line in done.stdout.splitlines():
        threads, value = line.split()
        seconds[int(threads)].append(float(value))
    return seconds
