"""Lesson 11, the whole program as one: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

from types import SimpleNamespace

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cnnlab.check import Task

TASKS = {}


# 11.1: record an operation


def record_operation(graph, operation, inputs):
    """Append an operation to the graph, and return the name of its result.

    The graph is a list of tuples (name, operation, list of inputs). The results are called t0, t1,
    t2, ... in this order. If an input has an attribute `name` (see `hasattr` or `getattr`), record
    this name. Otherwise it is a number: record it as it is.
    """
    name = f"t{len(graph)}"
    graph.append((name, operation, [getattr(value, "name", value) for value in inputs]))
    return name


def graphs_and_inputs():
    number = float(torch.randint(2, 9, ()))
    x, t0 = SimpleNamespace(name="x"), SimpleNamespace(name="t0")
    yield [], "mul", [x, number]
    yield [("t0", "mul", ["x", number])], "add", [t0, x]


def record_the_objects(graph, operation, inputs):
    graph.append((f"t{len(graph)}", operation, list(inputs)))
    return graph[-1][0]


def record_from_one(graph, operation, inputs):
    graph.append((f"t{len(graph) + 1}", operation, [getattr(v, "name", v) for v in inputs]))
    return graph[-1][0]


def name_after_recording(graph, operation, inputs):
    name = record_operation(graph, operation, inputs)
    return f"t{int(name[1:]) + 1}"


TASKS["11.1"] = Task(
    reference=record_operation,
    inputs=graphs_and_inputs,
    hints=[
        "How many operations are in the graph already? This gives the name of the new result.",
        "`getattr(value, 'name', value)` is the name of an object that has one, and otherwise the "
        "object itself.",
        "Make the name first. Then append a tuple of three items: the name, the operation, and a "
        "list with the name, or the number, of each input. Return the name.",
    ],
    mistakes={
        record_the_objects: "The graph contains the inputs themselves. Record their names, so that "
        "the program can run with other tensors.",
        record_from_one: "The first result is called t1. Start with t0.",
        name_after_recording: "You return the name of the next result. The graph gets longer when "
        "you append, so make the name before.",
    },
)


# 11.2: execute a graph


def execute(graph, values):
    """Run the program, and return the result of its last operation.

    The graph is a list of tuples (name, operation, list of inputs). An input is a number, or the
    name of a tensor. `values` is {name: tensor} for the inputs of the program, and must not change.
    An operation is the name of a function of torch: getattr(torch, "mul") is torch.mul.
    """
    known = dict(values)
    for name, operation, inputs in graph:
        arguments = [known[value] if isinstance(value, str) else value for value in inputs]
        known[name] = getattr(torch, operation)(*arguments)
    return known[graph[-1][0]]


def programs_and_values():
    x, y = torch.randn(2, 3)
    yield [("t0", "mul", ["x", 3.0]), ("t1", "relu", ["t0"])], {"x": x}
    graph = [("t0", "mul", ["x", "y"]), ("t1", "exp", ["x"]), ("t2", "sub", ["t0", "t1"])]
    yield graph, {"x": x, "y": y}


def execute_in_a_chain(graph, values):
    result = next(iter(values.values()))
    for _, operation, inputs in graph:
        result = getattr(torch, operation)(result, *inputs[1:])
    return result


def execute_and_change_the_values(graph, values):
    for name, operation, inputs in graph:
        arguments = [values[value] if isinstance(value, str) else value for value in inputs]
        values[name] = getattr(torch, operation)(*arguments)
    return values[graph[-1][0]]


def execute_and_return_the_first(graph, values):
    return execute(graph[:1], values)


TASKS["11.2"] = Task(
    reference=execute,
    inputs=programs_and_values,
    hints=[
        "Keep a dictionary of all values that are known so far: the inputs, and each new result.",
        "An input of an operation is a string, which you look up, or a number, which you use.",
        "Copy `values` first. In the loop, make the list of arguments, get the function with "
        "`getattr(torch, operation)`, call it, and store the result under its name.",
    ],
    mistakes={
        execute_in_a_chain: "Each operation gets the result of the one before. Look up the inputs "
        "that the graph names.",
        execute_and_change_the_values: "The dictionary `values` has changed. Work with a copy.",
        execute_and_return_the_first: "This is the result of the first operation. The result of "
        "the program is that of the last one.",
    },
)


# 11.3: dead-code elimination


def remove_dead_code(graph):
    """Return the graph without operations that the last one does not need, even indirectly.

    Return a new list of the same tuples (name, operation, list of inputs), in the same order.
    `reversed(graph)` begins with the last operation.
    """
    needed = {graph[-1][0]}
    kept = []
    for name, operation, inputs in reversed(graph):
        if name in needed:
            needed.update(inputs)
            kept.append((name, operation, inputs))
    return kept[::-1]


def random_graph(operations):
    """A graph in which each operation has two inputs among x and the results before it."""
    graph = []
    for number in range(operations):
        names = ["x", *(name for name, _, _ in graph)]
        picks = torch.randint(len(names), (2,)).tolist()
        operation = ("add", "mul")[int(torch.randint(2, ()))]
        graph.append((f"t{number}", operation, [names[pick] for pick in picks]))
    return graph


def graphs_with_dead_code():
    dead = [("t1", "sum", ["x"]), ("t2", "gt", ["t1", 0.0])]
    yield ([("t0", "exp", ["x"]), *dead, ("t3", "mul", ["t0", 2.0])],)
    for _ in range(3):
        yield (random_graph(8),)


def remove_unused_results(graph):
    used = {value for _, _, inputs in graph for value in inputs} | {graph[-1][0]}
    return [entry for entry in graph if entry[0] in used]


def remove_and_reverse(graph):
    return remove_dead_code(graph)[::-1]


def keep_direct_inputs(graph):
    needed = {graph[-1][0], *graph[-1][2]}
    return [entry for entry in graph if entry[0] in needed]


TASKS["11.3"] = Task(
    reference=remove_dead_code,
    inputs=graphs_with_dead_code,
    hints=[
        "Go through the graph from the last operation to the first.",
        "Keep a set of the names that are needed. At the start, it has the last result only.",
        "If the name of an operation is in the set, keep the operation, and add its inputs to the "
        "set. (Numbers in the set do no harm.) At the end, restore the order.",
    ],
    mistakes={
        remove_unused_results: "An operation remains whose result is used only by one that you "
        "have removed. It is dead, too.",
        remove_and_reverse: "The operations are right, but in the wrong order.",
        keep_direct_inputs: "You keep what the last operation uses directly. Those operations need "
        "inputs, too.",
    },
)


# 11.4: gradient clipping without a Python branch (repair)


def clip_gradient(gradient, limit):
    """Scale a gradient that is longer than `limit` to this length. Return a shorter one unchanged.

    The length is gradient.norm(). Do not branch on values in Python: it must be one graph.
    """
    norm = gradient.norm()
    return torch.where(norm > limit, gradient * (limit / norm), gradient)


def gradients_and_limits():
    gradient = torch.randn(6)
    yield gradient, 0.5 * gradient.norm().item()
    yield gradient, 2.0 * gradient.norm().item()
    yield torch.zeros(6), 1.0


def run_as_one_graph(function, gradient, limit):
    """What the function returns when it is compiled into one graph, without a C++ compiler."""
    function(gradient, limit)  # Without the compiler, its errors are easier to read.
    torch.compiler.reset()
    return torch.compile(function, backend="eager", fullgraph=True)(gradient, limit)


def clip_with_a_branch(gradient, limit):
    norm = gradient.norm()
    if norm > limit:
        return gradient * (limit / norm)
    return gradient


def clip_each_number(gradient, limit):
    return gradient.clamp(-limit, limit)


def scale_always(gradient, limit):
    return gradient * (limit / gradient.norm())


TASKS["11.4"] = Task(
    reference=clip_gradient,
    inputs=gradients_and_limits,
    run=run_as_one_graph,
    hints=[
        "Compute both results, and let the tensor `norm > limit` choose between them.",
        "`torch.where(condition, a, b)` takes a where the condition is true, and b elsewhere. The "
        "condition can be a single value.",
        "The first choice is the gradient times limit / norm, the second one the gradient itself.",
    ],
    mistakes={
        clip_with_a_branch: "Python needs the value of norm > limit to choose a branch, and a "
        "graph has no values. Let the program choose.",
        clip_each_number: "This limits each number. The length of the gradient must be limited, "
        "and its direction must stay.",
        scale_always: "All gradients get the length `limit`, also shorter ones.",
    },
)


# 11.5: SGD with momentum as a pure function


def update(params, momenta, grads):
    """Return new (params, momenta) after a step of SGD with momentum 0.9 and learning rate 0.05.

    All are dictionaries {name: tensor} with the same names. First, momentum = 0.9 * momentum +
    gradient, then parameter = parameter - 0.05 * momentum. Change nothing in place. Use arithmetic
    only, so that the function works with PyTorch and with JAX.
    """
    new_momenta = {name: 0.9 * momenta[name] + grads[name] for name in params}
    new_params = {name: params[name] - 0.05 * new_momenta[name] for name in params}
    return new_params, new_momenta


def states():
    shapes = {"weight": (2, 3), "bias": (3,)}
    yield tuple({name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3))


def update_in_place(params, momenta, grads):
    for name in params:
        momenta[name].mul_(0.9).add_(grads[name])
        params[name].sub_(0.05 * momenta[name])
    return params, momenta


def update_with_old_momenta(params, momenta, grads):
    new_params = {name: params[name] - 0.05 * momenta[name] for name in params}
    return new_params, update(params, momenta, grads)[1]


def update_without_momenta(params, momenta, grads):
    return {name: params[name] - 0.05 * grads[name] for name in params}, momenta


TASKS["11.5"] = Task(
    reference=update,
    inputs=states,
    hints=[
        "Make two new dictionaries, first that of the momenta.",
        "The new parameters use the new momenta.",
        "A dictionary comprehension over the names of `params` makes each of them. Write "
        "a - b, not a -= b, because the latter changes a tensor in place.",
    ],
    mistakes={
        update_in_place: "The tensors that came in have changed. Compute new ones: a compiler can "
        "only see what goes in and what comes out.",
        update_with_old_momenta: "The parameters use the old momenta. Update the momenta first.",
        update_without_momenta: "The gradients go directly into the parameters. Add them to 0.9 "
        "times the momenta first.",
    },
)


# 11.6: what does a trace return? (predict)


def replay_trace(example, x):
    """Return what a trace of `double_until_large`, recorded with `example`, returns for `x`.

    The tracer traces with values, as torch.jit.trace does. The sum of `example` is positive.
    """
    factor = 1
    while (example * factor).sum() < 100:
        factor *= 2
    return x * factor


def examples_and_inputs():
    yield torch.rand(3) + 1, 10 * torch.rand(3) + 10
    yield 100 * torch.rand(3) + 40, torch.rand(3)


def call_again(example, x):
    return replay_trace(x, x)


def return_the_recorded_tensor(example, x):
    return replay_trace(example, example)


def double_once(example, x):
    return x * 2


TASKS["11.6"] = Task(
    reference=replay_trace,
    inputs=examples_and_inputs,
    hints=[
        "The trace has no `while`. It has as many multiplications as the loop had iterations.",
        "How often is `example` doubled? `x` is doubled as often, whatever its sum is.",
        "Count the doublings of `example` in a loop, and multiply `x` by the same power of two.",
    ],
    mistakes={
        call_again: "This is what the Python function returns. A trace does not test the condition "
        "again.",
        return_the_recorded_tensor: "This is the result for the example. The trace uses x.",
        double_once: "The body of the loop is recorded once for each iteration.",
    },
)


# 11.7: common-subexpression elimination


def merge_equal(graph):
    """Return a new graph without repeated operations (common-subexpression elimination).

    If an earlier operation is the same and has the same inputs, drop the later one, and replace its
    name in all inputs after it. Never drop "bernoulli", which draws random numbers. The last
    operation is never a repetition. A key of a dictionary can be a tuple, but not a list.
    """
    kept, first, renamed = [], {}, {}
    for name, operation, inputs in graph:
        inputs = [renamed.get(value, value) for value in inputs]
        key = (operation, *inputs)
        if key in first and operation != "bernoulli":
            renamed[name] = first[key]
        else:
            first[key] = name
            kept.append((name, operation, inputs))
    return kept


def graphs_with_repetitions():
    number = float(torch.randint(2, 9, ()))
    half = [("t0", "mul", ["x", number]), ("t1", "mul", ["x", number])]
    yield ([*half, ("t2", "exp", ["t0"]), ("t3", "exp", ["t1"]), ("t4", "add", ["t2", "t3"])],)
    masks = [("t0", "bernoulli", ["x"]), ("t1", "bernoulli", ["x"])]
    yield ([*masks, ("t2", "add", ["t0", "t1"])],)


def merge_neighbors_only(graph):
    kept, first, renamed = [], {}, {}
    for name, operation, inputs in graph:
        key = (operation, *inputs)
        if key in first and operation != "bernoulli":
            renamed[name] = first[key]
        else:
            first[key] = name
            kept.append((name, operation, [renamed.get(value, value) for value in inputs]))
    return kept


def merge_without_renaming(graph):
    kept, seen = [], set()
    for name, operation, inputs in graph:
        key = (operation, *inputs)
        if key not in seen or operation == "bernoulli":
            kept.append((name, operation, inputs))
        seen.add(key)
    return kept


def merge_random_numbers(graph):
    renamed = [(name, operation.upper(), inputs) for name, operation, inputs in graph]
    return [(name, operation.lower(), inputs) for name, operation, inputs in merge_equal(renamed)]


TASKS["11.7"] = Task(
    reference=merge_equal,
    inputs=graphs_with_repetitions,
    hints=[
        "Remember each operation together with its inputs, and the name of its first result.",
        "When you drop an operation, remember which name replaces its result, and rename the "
        "inputs of all later operations.",
        "Rename the inputs first, then look the operation up: two operations can become equal only "
        "by the renaming.",
    ],
    mistakes={
        merge_neighbors_only: "exp(t0) and exp(t1) are equal, because t0 and t1 are. Rename the "
        "inputs before you compare.",
        merge_without_renaming: "An operation uses a result that you have dropped. Use the "
        "earlier result instead.",
        merge_random_numbers: "Two calls of bernoulli give two different masks. An operation can "
        "be merged only if it always gives the same result.",
    },
)


# 11.8: padding to buckets


def bucket_costs(sizes, bucket):
    """Return (number of compilations, share of padding), if batches are padded to full buckets.

    `sizes`: the number of images in each batch. Each is padded to the next multiple of `bucket`;
    -(-a // b) is a / b, rounded up. Each new padded size is compiled once. The share is the number
    of padding images divided by the number of all images that are computed.
    """
    padded = [-(-size // bucket) * bucket for size in sizes]
    return len(set(padded)), 1 - sum(sizes) / sum(padded)


def batches_and_buckets():
    sizes = (torch.randint(1, 64, (12,)) + 1).tolist()
    yield [*sizes, sizes[0]], 1
    yield [*sizes, 64], 16


def compile_each_batch(sizes, bucket):
    return len(sizes), bucket_costs(sizes, bucket)[1]


def pad_full_buckets(sizes, bucket):
    padded = [(size // bucket + 1) * bucket for size in sizes]
    return len(set(padded)), 1 - sum(sizes) / sum(padded)


def share_of_real_images(sizes, bucket):
    programs, share = bucket_costs(sizes, bucket)
    return programs, share / (1 - share)


TASKS["11.8"] = Task(
    reference=bucket_costs,
    inputs=batches_and_buckets,
    hints=[
        "First make a list of the padded sizes. A size that is a multiple already stays.",
        "`-(-size // bucket)` is the number of buckets that a batch needs. A set of the "
        "padded sizes has each size once.",
        "With p = the sum of the padded sizes and r = that of the sizes, the share is (p - r) / p.",
    ],
    mistakes={
        compile_each_batch: "A size that has been compiled before is not compiled again.",
        pad_full_buckets: "A batch whose size is a multiple of the bucket already needs no "
        "padding.",
        share_of_real_images: "Divide by all images that are computed, including the padding.",
    },
)


# 11.9: a hidden side effect (repair)


def running_mean(state, x):
    """Return (mean of all tensors so far, new state), as a pure function.

    `state` is {"mean": tensor, "count": tensor} before x. It must not change.
    """
    count = state["count"] + 1
    mean = state["mean"] + (x - state["mean"]) / count
    return mean, {"mean": mean, "count": count}


def sequences():
    yield (torch.randn(4, 3),)


def run_compiled(function, values):
    """The results of a program that is traced in the first call only, like one of jax.jit."""
    state = {"mean": torch.zeros(3), "count": torch.zeros(())}
    program = make_fx(function)(dict(state), values[0])
    means = []
    for x in values:
        result = program(dict(state), x)
        mean, state = result if isinstance(result, (list, tuple)) else (result, state)
        means.append(mean)
    return means


def change_the_state(state, x):
    state["count"] = state["count"] + 1
    state["mean"] = state["mean"] + (x - state["mean"]) / state["count"]
    return state["mean"]


def divide_by_the_old_count(state, x):
    mean = state["mean"] + (x - state["mean"]) / state["count"]
    return mean, {"mean": mean, "count": state["count"] + 1}


TASKS["11.9"] = Task(
    reference=running_mean,
    inputs=sequences,
    run=run_compiled,
    hints=[
        "The compiled program knows only what comes in and what goes out. What happens to the "
        "dictionary during tracing is lost.",
        "Compute `count` and `mean` as new variables.",
        "Return a pair: the mean, and a new dictionary with the new mean and the new count.",
    ],
    mistakes={
        change_the_state: "Python changed the dictionary while the function was traced. The "
        "compiled program does not contain this, so the count is 1 in each call.",
        divide_by_the_old_count: "You divide by the number of tensors before x. Count x first.",
    },
)


# 11.10: a mean over shards


def sharded_mean(losses, valid, devices):
    """Return (list of the rows of each device, mean loss of the valid rows) of a batch.

    Each device has equally many consecutive rows, as a tuple (first, end), without row `end`.
    `losses` and `valid` have a number for each row: `valid` is 1 for an image, and 0 for padding,
    which must not count. A device can only add up its own rows; then an all-reduce adds up the
    sums of all devices.
    """
    size = len(losses) // devices
    rows = [(size * device, size * (device + 1)) for device in range(devices)]
    sums = [(losses[first:end] * valid[first:end]).sum() for first, end in rows]
    counts = [valid[first:end].sum() for first, end in rows]
    return rows, sum(sums) / sum(counts)


def padded_batches():
    for devices, padding in ((2, 0), (4, 3)):
        valid = torch.ones(16)
        valid[16 - padding :] = 0
        yield torch.rand(16) + torch.arange(16.0), valid, devices


def mean_of_means(losses, valid, devices):
    shards = zip(losses.chunk(devices), valid.chunk(devices), strict=True)
    means = [(loss * real).sum() / real.sum() for loss, real in shards]
    return sharded_mean(losses, valid, devices)[0], sum(means) / devices


def count_the_padding(losses, valid, devices):
    return sharded_mean(losses, valid, devices)[0], (losses * valid).mean()


def include_the_padding(losses, valid, devices):
    return sharded_mean(losses, valid, devices)[0], losses.mean()


TASKS["11.10"] = Task(
    reference=sharded_mean,
    inputs=padded_batches,
    hints=[
        "A device has len(losses) // devices rows. Device 0 has the first ones.",
        "The devices do not have equally many valid rows, so do not average their means.",
        "Each device computes two numbers: the sum of its valid losses, and the number of its "
        "valid rows. Add up both over the devices, then divide.",
    ],
    mistakes={
        mean_of_means: "This is the mean of the devices' means. A device with little more than "
        "padding then counts as much as a full one.",
        count_the_padding: "The sum is right, but you divide by all rows, including the padding.",
        include_the_padding: "The losses of the padding count. Multiply by `valid` first.",
    },
)
