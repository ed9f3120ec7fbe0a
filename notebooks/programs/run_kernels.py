"""Run the kernels of lesson 08 with numba, OpenCL and Triton, or say in a sentence why not.

Each function returns (run, fetch), or None: `run()` computes and waits until the device has
finished, `fetch()` returns the output as an array.
"""

import numpy as np
import torch

EXTRA = 'pip install "cnnlab[tour]"'


def output_shape(photo, weights):
    """Height and width of a convolution without padding."""
    return photo.shape[0] - len(weights) + 1, photo.shape[1] - len(weights) + 1


def explain_failure(name, error):
    """Print one sentence about a library that is missing or does not work here."""
    if isinstance(error, ModuleNotFoundError):
        print(f"{name} is missing: {EXTRA}. The lesson continues without it.")
    else:
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        print(
            f"{name} does not work here ({type(error).__name__}: {reason}). The lesson continues."
        )


def cuda_runner(kernel, blocks, threads, photo, weights):
    """A CUDA kernel, compiled by numba: on a GPU, or in numba's simulator."""
    try:
        from numba import cuda

        kernel.__globals__["cuda"] = cuda
        compiled = cuda.jit(kernel)
        inputs = [cuda.to_device(np.ascontiguousarray(array)) for array in (photo, weights)]
        output = cuda.device_array(output_shape(photo, weights), np.float32)

        def run():
            compiled[blocks, threads](*inputs, output)
            cuda.synchronize()

        run()
        return run, output.copy_to_host
    except Exception as error:  # no package, driver, or compiler; another version
        explain_failure("numba", error)
        return None


def triton_runner(kernel, grid, photo, weights, device, block, **options):
    """A Triton kernel: compiled on a GPU, otherwise in Triton's interpreter."""
    try:
        import triton
        import triton.language as tl

        kernel.__globals__["tl"] = tl
        compiled = triton.jit(kernel)
        on_gpu = device if device == "cuda" else "cpu"
        inputs = [
            torch.from_numpy(np.ascontiguousarray(array)).to(on_gpu) for array in (photo, weights)
        ]
        height, width = output_shape(photo, weights)
        output = torch.empty(height, width, device=on_gpu)

        def run():
            compiled[grid](*inputs, output, height, width, len(weights), block=block, **options)
            if on_gpu == "cuda":
                torch.cuda.synchronize()

        run()
        return run, lambda: output.cpu().numpy()
    except Exception as error:
        explain_failure("Triton", error)
        return None


def opencl_device():
    """A GPU if OpenCL has one, otherwise the CPU. Raises an error if there is neither."""
    import pyopencl as cl

    devices = [device for platform in cl.get_platforms() for device in platform.get_devices()]
    if not devices:
        raise RuntimeError("no OpenCL driver is installed")
    return min(devices, key=lambda device: not device.type & cl.device_type.GPU)


def build_opencl(source, photo, weights):
    """Compile the kernel `convolve`, and copy its arrays to the device.

    Returns launch(global size, work-group size or None) and fetch(). Raises RuntimeError.
    """
    import pyopencl as cl

    flags = cl.mem_flags
    queue = cl.CommandQueue(cl.Context([opencl_device()]))
    copy = flags.READ_ONLY | flags.COPY_HOST_PTR
    inputs = [
        cl.Buffer(queue.context, copy, hostbuf=np.ascontiguousarray(array))
        for array in (photo, weights)
    ]
    shape = output_shape(photo, weights)
    output = np.full(shape, np.nan, np.float32)
    target = cl.Buffer(queue.context, flags.READ_WRITE | flags.COPY_HOST_PTR, hostbuf=output)
    try:
        kernel = cl.Kernel(cl.Program(queue.context, source).build(), "convolve")
    except cl.Error as error:
        raise RuntimeError(f"OpenCL does not compile: {error}") from error
    sizes = [np.int32(number) for number in (len(weights), *shape)]

    def launch(global_size, local_size=None):
        try:
            kernel(queue, global_size, local_size, *inputs, target, *sizes)
            queue.finish()
        except cl.Error as error:
            raise RuntimeError(str(error)) from error

    def fetch():
        cl.enqueue_copy(queue, output, target).wait()
        return output

    return launch, fetch


def opencl_runner(source, global_size, photo, weights, local_size=None):
    """An OpenCL kernel, on a GPU if OpenCL has one, otherwise on the CPU."""
    try:
        launch, fetch = build_opencl(source, photo, weights)
        launch(global_size, local_size)
        return lambda: launch(global_size, local_size), fetch
    except Exception as error:
        explain_failure("OpenCL", error)
        return None


def name_opencl_device():
    """The name of the device that OpenCL uses, with its number of compute units."""
    device = opencl_device()
    return f"{device.name.strip()}, {device.max_compute_units} compute units"
