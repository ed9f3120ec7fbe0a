"""Lesson 10, operator fusion: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

import re
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnnlab.check import Task

TASKS = {}


# 10.1: bytes of a chain


def traffic(numbers, extras):
    """Return the bytes that a chain of operations moves, as a pair: (one by one, fused)."""
    operations = len(extras)
    one_by_one = 2 * operations + sum(extras)
    fused = 2 + sum(extras)
    return 4 * numbers * one_by_one, 4 * numbers * fused


def counts_reads_only(numbers, extras):
    return 4 * numbers * (len(extras) + sum(extras)), 4 * numbers * (1 + sum(extras))


def counts_numbers(numbers, extras):
    return tuple(moved // 4 for moved in traffic(numbers, extras))


def forgets_the_extras(numbers, extras):
    return traffic(numbers, [0] * len(extras))


def fused_without_extras(numbers, extras):
    return traffic(numbers, extras)[0], 8 * numbers


TASKS["10.1"] = Task(
    reference=traffic,
    inputs=lambda: [
        (1000, [0, 0, 0]),
        (int(torch.randint(100, 999, ())), torch.randint(3, (4,)).tolist()),
        (int(torch.randint(100, 999, ())), [0] * 11 + [1]),
    ],
    hints=[
        "Count tensors first, then multiply by the bytes of a tensor.",
        "One by one, each operation reads one result and its extras, and writes one result.",
        "Fused, the chain reads its input and all extras once, and writes the last result once.",
    ],
    mistakes={
        counts_reads_only: "Each result must also be written.",
        counts_numbers: "These are numbers. Each has 4 bytes.",
        forgets_the_extras: "The extras are read, too, in both cases.",
        fused_without_extras: "The fused chain must read the extras as well: they come from "
        "memory, not from an operation of the chain.",
    },
)


# 10.2: fuse by chunks


def place(tensor):
    """Where a tensor is in memory."""
    return tensor.data_ptr(), tensor.numel()


class Cache:
    """A simulated cache that keeps the last result, if it has at most `size` numbers."""

    def __init__(self, size):
        self.size = size
        self.kept = None
        self.moved = 0  # bytes between the cache and the memory

    def apply(self, operation, source, *, out=None):
        if place(source) != self.kept:
            self.moved += source.nbytes
        result = operation(source, out=out)
        if self.kept is not None and place(result) != self.kept:
            self.write_back()
        self.kept = place(result)
        if result.numel() > self.size:
            self.write_back()
        return result

    def write_back(self):
        if self.kept is not None:
            self.moved += 4 * self.kept[1]
        self.kept = None


def in_chunks(x, operations, out, size):
    """Apply all operations to `x`, chunk by chunk. Write the result into `out`, and return it.

    `x` and `out` are different tensors with one dimension. A chunk has `size` numbers; the last one
    may be shorter. `operation(source, out=target)` reads `source` and writes `target`, which may be
    the same tensor. Finish a chunk before you begin with the next one. Do not change `x`.
    """
    for source, target in zip(x.split(size), out.split(size), strict=True):
        for operation in operations:
            operation(source, out=target)
            source = target
    return out


def run_in_chunks(function, x, numbers, size):
    """The result of adding all numbers in turn, with a ReLU at the end, and the bytes moved."""
    cache = Cache(size)
    plain = [partial(torch.add, other=number) for number in numbers]
    plain.append(partial(torch.clamp_min, min=0.0))
    operations = [partial(cache.apply, operation) for operation in plain]
    result = function(x, operations, torch.zeros_like(x), size)
    if not cache.moved:
        return result
    cache.write_back()
    return {"result": result, "bytes to and from memory": cache.moved}


def each_operation_in_chunks(x, operations, out, size):
    for number, operation in enumerate(operations):
        source = out if number else x
        in_chunks(source, [operation], out, size)
    return out


def always_reads_x(x, operations, out, size):
    for source, target in zip(x.split(size), out.split(size), strict=True):
        for operation in operations:
            operation(source, out=target)
    return out


def overwrites_x(x, operations, out, size):
    for source in x.split(size):
        for operation in operations:
            operation(source, out=source)
    return out.copy_(x)


TASKS["10.2"] = Task(
    reference=in_chunks,
    inputs=lambda: [
        (torch.randn(12), [1.0, -0.5], 4),
        (torch.randn(37), torch.randn(5).tolist(), 8),
    ],
    run=run_in_chunks,
    hints=[
        "Two loops. Which one must be outside, so that a chunk stays in the cache: the one over "
        "the chunks, or the one over the operations?",
        "`x.split(size)` returns the chunks as views: no number is copied, and writing into a "
        "view writes into the tensor. `zip` goes through the chunks of x and out together.",
        "The first operation reads the chunk of x and writes the chunk of out. All later ones "
        "read and write the chunk of out.",
    ],
    mistakes={
        each_operation_in_chunks: "The result is right, but each operation goes through the whole "
        "tensor before the next one begins. Apply all operations to a chunk of `size` numbers "
        "first.",
        always_reads_x: "Each operation reads x again. Only the first one must; the next one "
        "needs the result of the operation before it.",
        overwrites_x: "You changed x. Write into the chunks of `out`.",
    },
)


# 10.3: read generated code


def kernel_traffic(code, numbers):
    """Return the bytes that a generated kernel moves, if each tensor has `numbers` numbers."""
    names = set(re.findall(r"\b(?:in|out|in_out)_ptr\d+", code))
    moved = [2 if name.startswith("in_out") else 1 for name in names]
    return 4 * numbers * sum(moved)


def counts_every_appearance(code, numbers):
    names = re.findall(r"\b(?:in|out|in_out)_ptr\d+", code)
    moved = [2 if name.startswith("in_out") else 1 for name in names]
    return 4 * numbers * sum(moved)


def in_out_counts_once(code, numbers):
    return 4 * numbers * len(set(re.findall(r"\b(?:in|out|in_out)_ptr\d+", code)))


def reads_only_the_first_name(code, numbers):
    return 4 * numbers * len(set(re.findall(r"(in|out|in_out)_ptr\d+", code)))


def cpp_kernel(names):
    """A kernel as TorchInductor writes it for a CPU, with these tensors."""
    lines = [f'extern "C" void kernel({", ".join("float* " + name for name in names)})', "{"]
    lines.append("    for(int64_t x0=0L; x0<1024L; x0+=16L)")
    for number, name in enumerate(names):
        if name.startswith("in"):
            lines.append(f"        auto tmp{number} = Vectorized<float>::loadu({name} + x0, 16);")
        if "out" in name:
            lines.append(f"        tmp0.store({name} + x0);")
    return "\n".join([*lines, "}"])


def triton_kernel(names):
    """A kernel as TorchInductor writes it for a GPU, with these tensors."""
    lines = [f"def triton_poi_fused_add_0({', '.join(names)}, xnumel, XBLOCK : tl.constexpr):"]
    for number, name in enumerate(names):
        if name.startswith("in"):
            lines.append(f"    tmp{number} = tl.load({name} + (x0), None)")
        if "out" in name:
            lines.append(f"    tl.store({name} + (x0), tmp0, None)")
    return "\n".join(lines)


TASKS["10.3"] = Task(
    reference=kernel_traffic,
    inputs=lambda: [
        (cpp_kernel(["in_ptr0", "out_ptr0"]), 1000),
        (triton_kernel(["in_ptr0", "in_ptr1", "out_ptr0"]), int(torch.randint(9, 99, ()))),
        (cpp_kernel(["in_out_ptr0", "in_ptr0", "out_ptr0", "out_ptr1"]), 100),
        (triton_kernel(["in_out_ptr0", "in_ptr0"]), int(torch.randint(9, 99, ()))),
    ],
    hints=[
        "Find all names with `re.findall`. Put them into a set, so that each counts once.",
        r"In a regular expression, \b is the beginning of a word, \d+ is a number, and (?:a|b) is "
        "a or b without a group of its own.",
        "Then add up 1 for each name, or 2 if it begins with in_out, and multiply by 4 bytes and "
        "by `numbers`.",
    ],
    mistakes={
        counts_every_appearance: "A name appears in the first line of the kernel and again where "
        "it is used. Count each name once.",
        in_out_counts_once: "A tensor that is called in_out_ptr is read and written.",
        reads_only_the_first_name: "`re.findall` with a group (...) returns only the group. Use "
        "(?:...).",
    },
)


# 10.4: remove a graph break


def limit(x):
    """Subtract the mean from `x`. If any absolute value is then above 1, divide by the largest.

    The compiled function must be one graph.
    """
    x = x - x.mean()
    largest = x.abs().max()
    return x / largest.clamp(min=1)


def run_compiled(function, small, large):
    """The results of both inputs, and into how many graphs torch.compile divides the function."""
    from torch._dynamo.testing import CompileCounter  # here, because it takes seconds

    results = [function(x) for x in (small, large)]
    if any(result is None or result is ... for result in results):
        return None
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(function, backend=graphs)
    for x in (small, large):
        compiled(x)
    torch._dynamo.reset()
    return {"small": results[0], "large": results[1], "graphs": graphs.frame_count}


def limit_with_if(x):
    x = x - x.mean()
    largest = x.abs().max()
    if largest > 1:
        x = x / largest
    return x


def always_divides(x):
    x = x - x.mean()
    return x / x.abs().max()


def clamps_values(x):
    return (x - x.mean()).clamp(-1, 1)


TASKS["10.4"] = Task(
    reference=limit,
    inputs=lambda: [(0.1 * torch.randn(8), 5 * torch.randn(8)), (torch.rand(3), 9 * torch.rand(3))],
    run=run_compiled,
    hints=[
        "Which line needs to know a number in the tensor before Python can go on?",
        "Let the device choose. Both cases are a division: by the largest value, or by 1.",
        "`torch.where(condition, a, b)` chooses without Python. Here, `clamp` or `torch.maximum` "
        "is even shorter.",
    ],
    mistakes={
        limit_with_if: "Python needs the number, for example for an `if`, so the graph must end "
        "before it.",
        always_divides: "This is one graph, but it also divides when all values are small enough.",
        clamps_values: "This limits each value on its own. Divide all of them by the same number.",
    },
)


# 10.5: batch norm into a convolution


def fold(weight, bias, norm):
    """Return (weight, bias) of a convolution that computes what a convolution and `norm` compute.

    `weight` (outputs, inputs, height, width) and `bias` (outputs,) are those of the convolution.
    `norm` is the nn.BatchNorm2d after it, in eval mode. It computes, in each channel,
    (y - running_mean) / sqrt(running_var + eps) * weight + bias, with its own weight and bias.
    """
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    new_weight = weight * factor[:, None, None, None]
    new_bias = (bias - norm.running_mean) * factor + norm.bias
    return new_weight, new_bias


def without_eps(weight, bias, norm):
    factor = norm.weight / torch.sqrt(norm.running_var)
    return weight * factor[:, None, None, None], (bias - norm.running_mean) * factor + norm.bias


def bias_not_scaled(weight, bias, norm):
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * factor[:, None, None, None], bias - norm.running_mean * factor + norm.bias


def last_dimension_scaled(weight, bias, norm):
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * factor, (bias - norm.running_mean) * factor + norm.bias


def variance_not_its_root(weight, bias, norm):
    factor = norm.weight / (norm.running_var + norm.eps)
    return weight * factor[:, None, None, None], (bias - norm.running_mean) * factor + norm.bias


def random_norm(kind, channels):
    """A batch norm in eval mode, as after training."""
    norm = kind(channels, eps=0.05).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 2)
    return norm


TASKS["10.5"] = Task(
    reference=fold,
    inputs=lambda: [
        (torch.randn(3, 3, 3, 3), torch.randn(3), random_norm(nn.BatchNorm2d, 3)),
        (torch.randn(4, 2, 1, 1), torch.zeros(4), random_norm(nn.BatchNorm2d, 4)),
    ],
    hints=[
        "Put y = conv(x) + bias into the formula of the norm, and sort: what is multiplied by "
        "conv(x), and what is added?",
        "In each output channel, conv(x) is multiplied by weight / sqrt(running_var + eps) of the "
        "norm. A convolution is linear, so this factor can be multiplied into its weights.",
        "The weights of an output channel are `weight[channel]`, so the factor needs the shape "
        "(outputs, 1, 1, 1). The new bias is what the norm computes for the old bias.",
    ],
    mistakes={
        without_eps: "Add `norm.eps` to the variance before you take the root.",
        bias_not_scaled: "The norm multiplies the old bias by the factor, too.",
        last_dimension_scaled: "The factor belongs to the output channel, which is the first "
        "dimension of the weight. Give it the shape (outputs, 1, 1, 1).",
        variance_not_its_root: "The norm divides by the root of the variance.",
    },
)


# 10.6: break-even


def break_even(compile_s, eager_s, compiled_s):
    """Return the smallest number of steps after which compiling has paid."""
    if compiled_s >= eager_s:
        return np.inf
    return int(np.ceil(compile_s / (eager_s - compiled_s)))


def never_infinite(compile_s, eager_s, compiled_s):
    return np.ceil(compile_s / (eager_s - compiled_s))


def rounded_down(compile_s, eager_s, compiled_s):
    return np.inf if compiled_s >= eager_s else compile_s // (eager_s - compiled_s)


def not_rounded(compile_s, eager_s, compiled_s):
    return np.inf if compiled_s >= eager_s else compile_s / (eager_s - compiled_s)


def until_as_long_as_compiling(compile_s, eager_s, compiled_s):
    return np.inf if compiled_s >= eager_s else np.ceil(compile_s / eager_s)


TASKS["10.6"] = Task(
    reference=break_even,
    inputs=lambda: [
        (20.0, 0.11, 0.05),
        (20.0, 0.1, 0.2),
        (float(5 + 20 * torch.rand(())), 0.3, 0.217),
    ],
    hints=[
        "Each compiled step saves the same time. How many steps save `compile_s`?",
        "If a compiled step is not faster, return `np.inf`. Otherwise, divide and round up.",
    ],
    mistakes={
        never_infinite: "If a compiled step is slower, it never pays. A negative number of steps "
        "makes no sense.",
        rounded_down: "Round up: before this step, the compiled run is still behind.",
        not_rounded: "Round up to a whole number of steps.",
        until_as_long_as_compiling: "A compiled step also takes time. Only the difference of the "
        "two steps is saved.",
    },
)


# 10.7: pool before ReLU


class Moved(TorchDispatchMode):
    """Adds up the bytes that operations read and write."""

    bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [value for value in (*args, *outputs) if isinstance(value, torch.Tensor)]
        self.bytes += sum(tensor.nbytes for tensor in tensors)
        return output


def activate_and_pool(x):
    """Return ReLU and 2x2 max-pooling of `x`, with fewer bytes moved."""
    return F.relu(F.max_pool2d(x, 2))


def run_pooling(function, x):
    with Moved() as moved:
        result = function(x)
    if result is None or result is ...:
        return result
    return {"values": result, "bytes": moved.bytes}


def relu_first(x):
    return F.max_pool2d(F.relu(x), 2)


def relu_in_place(x):
    return F.max_pool2d(F.relu_(x), 2)


def averages(x):
    return F.relu(F.avg_pool2d(x, 2))


TASKS["10.7"] = Task(
    reference=activate_and_pool,
    inputs=lambda: [(torch.randn(2, 3, 4, 4),), (torch.randn(1, 2, 8, 6),)],
    run=run_pooling,
    hints=[
        "ReLU never changes the order of two numbers: the largest one stays the largest.",
        "How many numbers does ReLU read if it comes after the pooling?",
    ],
    mistakes={
        relu_first: "The values are right, but ReLU reads and writes four times as many numbers "
        "as necessary.",
        relu_in_place: "In place, ReLU still reads and writes all numbers, and it changes x.",
        averages: "Max-pooling, not the average.",
    },
)


# 10.8: avoid recompilations


def run_batches(compiled, batches):
    """Return [compiled(batch, number) for all batches], with one compilation in total.

    Batch `number` (0, 1, 2, ...) has the shape (rows, 4). The rows differ, and are at least 2.
    `compiled` computes each row on its own. It accepts `number` as a Python number or as a tensor.
    """
    outputs = []
    for number, batch in enumerate(batches):
        torch._dynamo.mark_dynamic(batch, 0)
        outputs.append(compiled(batch, torch.tensor(number)))
    return outputs


def decay(batch, number):
    return torch.relu(batch) - 0.1 * number


def count_compilations(function, batches):
    from torch._dynamo.testing import CompileCounter  # here, because it takes seconds

    torch._dynamo.reset()
    counter = CompileCounter()
    outputs = function(torch.compile(decay, backend=counter), batches)
    torch._dynamo.reset()
    if not counter.frame_count:
        return outputs
    return {"outputs": outputs, "compilations": counter.frame_count}


def as_it_comes(compiled, batches):
    return [compiled(batch, number) for number, batch in enumerate(batches)]


def only_tensors(compiled, batches):
    return [compiled(batch, torch.tensor(number)) for number, batch in enumerate(batches)]


def drops_the_other_shapes(compiled, batches):
    same = [batch for batch in batches if batch.shape == batches[0].shape]
    return only_tensors(compiled, same)


TASKS["10.8"] = Task(
    reference=run_batches,
    inputs=lambda: [
        ([torch.randn(rows, 4) for rows in (8, 8, 5, 3)],),
        ([torch.randn(rows, 4) for rows in (6, 9, 6, 2)],),
    ],
    run=count_compilations,
    hints=[
        "Two guards fail: one compares the number of rows, the other one compares `number`.",
        "`number` is a Python number, so its value is part of the compiled code. The value of a "
        "tensor is not.",
        "For the rows, there are two ways: `torch._dynamo.mark_dynamic(tensor, dimension)` before "
        "the call, or fill all batches with zeros up to the same number of rows, and cut the "
        "results.",
    ],
    mistakes={
        as_it_comes: "Both the rows and the number cause compilations.",
        only_tensors: "One of the two causes is gone. The other one still compiles again: the "
        "rows, or the number.",
        drops_the_other_shapes: "One compilation, but some of the batches are missing.",
    },
)
