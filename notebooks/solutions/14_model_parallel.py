"""Lesson 14, model parallel: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

from itertools import combinations, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cnnlab.check import TIMEOUT, Task
from cnnlab.launch.task_ranks import call_in_ranks

TIMEOUT_S = 20  # Two ranks need about 0.3 s, and seconds on a busy machine.
TASKS = {}


def by_rank(call):
    """What `call()` returns in each of two ranks."""
    return call_in_ranks(call, 2, TIMEOUT_S)


# 14.1: a pipeline of two stages


def pipeline_step(stage, images, labels, shape):
    """Compute the loss and the gradients of one batch, in a pipeline of two ranks.

    Rank 0 has the first stage: it computes activations of `shape` from the images, sends them to
    rank 1, receives their gradient, and continues the backward pass with it. Rank 1 has the last
    stage: it receives the activations, computes the cross-entropy loss, calls backward, and sends
    the gradient of the activations to rank 0. Returns the loss in rank 1, None in rank 0.
    """
    if dist.get_rank() == 0:
        activations = stage(images)
        dist.send(activations.detach(), 1)
        gradient = torch.empty(shape)
        dist.recv(gradient, 1)
        activations.backward(gradient)
        return None
    activations = torch.empty(shape)
    dist.recv(activations, 0)
    activations.requires_grad_()
    loss = F.cross_entropy(stage(activations), labels)
    loss.backward()
    dist.send(activations.grad, 0)
    return loss.item()


def two_stages():
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    last = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    yield [first, last], images, labels, (8, 4, 4, 4)


def run_stages(function, stages, images, labels, shape):
    """The loss of each rank, and the gradients of its stage."""

    def call():
        stage = stages[dist.get_rank()]
        loss = function(stage, images, labels, shape)
        return {"loss": loss, "gradients": [p.grad for p in stage.parameters()]}

    return by_rank(call)


def backward_in_the_last_stage_only(stage, images, labels, shape):
    if dist.get_rank() == 0:
        dist.send(stage(images).detach(), 1)
        return None
    activations = torch.empty(shape)
    dist.recv(activations, 0)
    loss = F.cross_entropy(stage(activations), labels)
    loss.backward()
    return loss.item()


def backward_from_a_sum(stage, images, labels, shape):
    if dist.get_rank() == 0:
        activations = stage(images)
        dist.send(activations.detach(), 1)
        activations.sum().backward()
        return None
    return backward_in_the_last_stage_only(stage, images, labels, shape)


def no_gradient_of_the_activations(stage, images, labels, shape):
    if dist.get_rank() == 0:
        return pipeline_step(stage, images, labels, shape)
    activations = torch.empty(shape)
    dist.recv(activations, 0)
    loss = F.cross_entropy(stage(activations), labels)
    loss.backward()
    dist.send(activations.grad, 0)
    return loss.item()


def both_receive_first(stage, images, labels, shape):
    if dist.get_rank() == 0:
        gradient = torch.empty(shape)
        dist.recv(gradient, 1)
    return pipeline_step(stage, images, labels, shape)


TASKS["14.1"] = Task(
    reference=pipeline_step,
    inputs=two_stages,
    run=run_stages,
    hints=[
        "Write one branch for each rank: `dist.get_rank()` tells which one you are. Each message "
        "that one rank sends needs a matching receive in the other, in the same order: activations "
        "from rank 0 to rank 1, then their gradient from rank 1 to rank 0.",
        "A message has numbers only, no autograd graph. Rank 0 sends `activations.detach()`. "
        "Rank 1 receives into an empty tensor of `shape`, and calls `requires_grad_()` on it "
        "before the forward pass, so that backward computes its gradient too.",
        "In rank 0 there is no loss. A tensor's `backward` takes the gradient of the loss with "
        "respect to that tensor: the one that rank 1 has in `.grad` of what it received.",
    ],
    mistakes={
        backward_in_the_last_stage_only: "The first stage has no gradients: its rank must receive "
        "the gradient of the activations, and continue the backward pass with it.",
        backward_from_a_sum: "The first stage ran backward without the gradient from rank 1. "
        "`activations.sum().backward()` assumes that this gradient is 1 everywhere.",
        no_gradient_of_the_activations: "Rank 1 has no gradient to send: call "
        "`requires_grad_()` on the received activations, before the forward pass.",
        both_receive_first: TIMEOUT,
    },
)


# 14.2 and 14.3: a linear layer over two ranks


def column_parallel(inputs, weight, bias):
    """A linear layer whose outputs are divided among the ranks.

    `inputs` (batch, features) are the same in all ranks. `weight` (outputs / ranks, features) and
    `bias` (outputs / ranks,) are this rank's part, in the order of the ranks. Returns all outputs,
    (batch, outputs), in all ranks.
    """
    part = F.linear(inputs, weight, bias)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts, dim=1)


def row_parallel(inputs, weight, bias):
    """A linear layer whose input features are divided among the ranks.

    `inputs` (batch, features / ranks) and `weight` (outputs, features / ranks) are this rank's
    part. `bias` (outputs,) is the same in all ranks. Returns the outputs of the whole layer,
    (batch, outputs), in all ranks.
    """
    outputs = F.linear(inputs, weight)
    dist.all_reduce(outputs)
    return outputs + bias


def linear_layers():
    for batch, features, outputs in ((4, 6, 8), (3, 10, 4)):
        yield torch.randn(batch, features), torch.randn(outputs, features), torch.randn(outputs)


def run_columns(function, inputs, weight, bias):
    def call():
        rank = dist.get_rank()
        return function(inputs, weight.chunk(2)[rank], bias.chunk(2)[rank])

    return by_rank(call)


def run_rows(function, inputs, weight, bias):
    def call():
        rank = dist.get_rank()
        return function(inputs.chunk(2, dim=1)[rank], weight.chunk(2, dim=1)[rank], bias)

    return by_rank(call)


def own_columns(inputs, weight, bias):
    return F.linear(inputs, weight, bias)


def columns_added(inputs, weight, bias):
    part = F.linear(inputs, weight, bias)
    dist.all_reduce(part)
    return part


def columns_below_each_other(inputs, weight, bias):
    part = F.linear(inputs, weight, bias)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)


def own_rows(inputs, weight, bias):
    return F.linear(inputs, weight, bias)


def bias_in_each_rank(inputs, weight, bias):
    outputs = F.linear(inputs, weight, bias)
    dist.all_reduce(outputs)
    return outputs


def mean_of_the_rows(inputs, weight, bias):
    outputs = F.linear(inputs, weight)
    dist.all_reduce(outputs)
    return outputs / dist.get_world_size() + bias


TASKS["14.2"] = Task(
    reference=column_parallel,
    inputs=linear_layers,
    run=run_columns,
    hints=[
        "Each rank can compute its own outputs alone: it has all inputs, and the rows of the "
        "weight that belong to these outputs. Which collective brings all outputs to all ranks?",
        "`dist.all_gather(tensors, tensor)` fills a list with one tensor from each rank. Make the "
        "list first: empty tensors of the same shape as your part.",
        "Join the parts along the dimension of the outputs, which is the second one.",
    ],
    mistakes={
        own_columns: "These are the outputs of this rank only. Gather those of the other ranks.",
        columns_added: "The outputs of the ranks were added. They are different outputs: put them "
        "next to each other.",
        columns_below_each_other: "The parts were joined along the batch. Use dim=1, the outputs.",
    },
)

TASKS["14.3"] = Task(
    reference=row_parallel,
    inputs=linear_layers,
    run=run_rows,
    hints=[
        "An output is a sum over all input features. Each rank has some of the features, so it "
        "can compute a part of each sum. Which collective adds up what the ranks have?",
        "How many times is the bias in the sum if every rank adds it before the all-reduce?",
        "`F.linear(inputs, weight)` without the bias, then `dist.all_reduce`, then add the bias.",
    ],
    mistakes={
        own_rows: "This sum has the features of one rank only. Add those of the other ranks.",
        bias_in_each_rank: "The bias was added by each rank, so it counts twice. Add it once, "
        "after the all-reduce.",
        mean_of_the_rows: "The outputs were averaged. They are parts of one sum: only add them.",
    },
)


# 14.4: the first stage of ZeRO


def zero1_step(parameters, gradients, momentum, learning_rate):
    """A step of SGD with momentum 0.9, in which each rank updates its shard of the parameters.

    All ranks have the same `parameters` (n,), and `gradients` (n,) of their own images. `momentum`
    (n / ranks,) is this rank's shard of the optimizer state. First average the gradients over the
    ranks. Then, in your shard: momentum becomes 0.9 * momentum + gradient, and the parameters
    become parameters - learning_rate * momentum. At last, gather all shards. Changes `parameters`
    and `momentum` in place, and returns nothing.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.all_reduce(gradients)
    shard = parameters.chunk(world)[rank]  # a view
    momentum.mul_(0.9).add_(gradients.chunk(world)[rank] / world)
    shard -= learning_rate * momentum
    dist.all_gather(list(parameters.chunk(world)), shard.clone())


def flat_parameters():
    yield torch.randn(8), torch.randn(3, 2, 8), 0.1


def run_three_steps(function, parameters, gradients, learning_rate):
    """Each rank's parameters and momentum after three steps. `gradients`: (step, rank, n)."""

    def call():
        after = parameters.clone()
        momentum = torch.zeros(len(parameters) // 2)
        for step in gradients:
            function(after, step[dist.get_rank()].clone(), momentum, learning_rate)
        if torch.equal(after, parameters):
            return None
        return {"parameters": after, "momentum": momentum}

    return by_rank(call)


def own_gradients(parameters, gradients, momentum, learning_rate):
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = parameters.chunk(world)[rank]
    momentum.mul_(0.9).add_(gradients.chunk(world)[rank])
    shard -= learning_rate * momentum
    dist.all_gather(list(parameters.chunk(world)), shard.clone())


def added_gradients(parameters, gradients, momentum, learning_rate):
    zero1_step(parameters, gradients * dist.get_world_size(), momentum, learning_rate)


def no_gathering(parameters, gradients, momentum, learning_rate):
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.all_reduce(gradients)
    momentum.mul_(0.9).add_(gradients.chunk(world)[rank] / world)
    parameters.chunk(world)[rank].sub_(learning_rate * momentum)


def no_momentum(parameters, gradients, momentum, learning_rate):
    zero1_step(parameters, gradients, torch.zeros_like(momentum), learning_rate)


TASKS["14.4"] = Task(
    reference=zero1_step,
    inputs=flat_parameters,
    run=run_three_steps,
    hints=[
        "`dist.all_reduce` adds up over the ranks. What is missing for a mean?",
        "`parameters.chunk(world)[rank]` is a view: an in-place operation on it changes the "
        "parameters. The same shard of the gradients is all that the optimizer needs.",
        "After the update each rank has one new shard and one old. `dist.all_gather` fills a list "
        "of tensors; the chunks of the parameters can be that list. Send a `clone()` of yours.",
    ],
    mistakes={
        own_gradients: "Each rank used the gradients of its own images only. Average over the "
        "ranks first.",
        added_gradients: "The gradients were added, not averaged. Divide by the number of ranks.",
        no_gathering: "Only this rank's shard has changed. The other shard must come from the "
        "other rank: gather the shards at the end.",
        no_momentum: "The momentum is lost between the steps. Change the tensor `momentum` in "
        "place, with `mul_` and `add_`.",
    },
)


# 14.5: memory of ZeRO


def bytes_per_rank(parameters, ranks, stage):
    """The memory of one rank in mixed-precision training with Adam, by the formula of ZeRO.

    Parameters and gradients are fp16: 2 bytes each. The optimizer state is fp32: a copy of the
    parameters, the momentum and the variance, 4 bytes each. Stage 1 divides the optimizer state
    among the ranks, stage 2 the gradients too, stage 3 the parameters too; stage 0 divides
    nothing. Returns bytes: {"parameters": ..., "gradients": ..., "optimizer state": ...}.
    Source: Rajbhandari et al., "ZeRO" (2019), figure 1.
    """
    memory = {"optimizer state": 12 * parameters, "gradients": 2 * parameters}
    memory["parameters"] = 2 * parameters
    divided = list(memory)[:stage]
    return {name: size / ranks if name in divided else size for name, size in memory.items()}


def models():
    for stage in range(4):
        yield 7_500_000_000, 64, stage  # the example in the paper
    for stage in range(4):
        yield torch.randint(1, 100, ()).item() * 1_000_000, 8, stage


def all_divided(parameters, ranks, stage):
    share = ranks if stage else 1
    return {
        "parameters": 2 * parameters / share,
        "gradients": 2 * parameters / share,
        "optimizer state": 12 * parameters / share,
    }


def without_fp32_copy(parameters, ranks, stage):
    memory = bytes_per_rank(parameters, ranks, stage)
    return {**memory, "optimizer state": memory["optimizer state"] * 8 / 12}


def all_in_fp32(parameters, ranks, stage):
    memory = bytes_per_rank(parameters, ranks, stage)
    factors = {"parameters": 2, "gradients": 2, "optimizer state": 8 / 12}
    return {name: size * factors[name] for name, size in memory.items()}


def parameters_first(parameters, ranks, stage):
    memory = {"parameters": 2 * parameters, "gradients": 2 * parameters}
    memory["optimizer state"] = 12 * parameters
    divided = list(memory)[:stage]
    return {name: size / ranks if name in divided else size for name, size in memory.items()}


TASKS["14.5"] = Task(
    reference=bytes_per_rank,
    inputs=models,
    hints=[
        "Start with stage 0, where each rank has everything: 2 + 2 + 12 = 16 bytes per parameter.",
        "Then decide for each of the three parts from which stage on it is divided by the number "
        "of ranks. The largest part comes first.",
    ],
    mistakes={
        all_divided: "Stage 1 divides the optimizer state only, stage 2 also the gradients, and "
        "stage 3 also the parameters.",
        without_fp32_copy: "The optimizer state has three numbers for each parameter: momentum, "
        "variance, and the fp32 copy of the parameter itself.",
        all_in_fp32: "In mixed precision, parameters and gradients are 2 bytes each, and the "
        "optimizer state includes an fp32 copy of the parameters.",
        parameters_first: "Stage 1 divides the largest part, the optimizer state.",
    },
)


# 14.6: the bubble


def bubble_fraction(busy):
    """The share of the ranks' time that is idle, from the first start to the last end.

    `busy`: for each stage, a list of (start, end) in seconds, when it computed.
    """
    first = min(start for spans in busy for start, _ in spans)
    last = max(end for spans in busy for _, end in spans)
    computing = sum(end - start for spans in busy for start, end in spans)
    return 1 - computing / (len(busy) * (last - first))


def forward_pipeline(seconds, micro_batches, start):
    """When each stage is busy. `seconds`: of one micro-batch in each stage."""
    ready = [start] * micro_batches  # when a micro-batch leaves the stage before
    busy = []
    for duration in seconds:
        spans = []
        free = start
        for batch in range(micro_batches):
            begin = max(free, ready[batch])
            free = ready[batch] = begin + duration
            spans.append((begin, free))
        busy.append(spans)
    return busy


def timelines():
    yield (forward_pipeline([1.0] * 3, 6, 0.0),)
    for stages in (2, 4):
        seconds = (0.1 + torch.rand(stages)).tolist()
        yield (forward_pipeline(seconds, 5, 10.0),)


def bubble_of_equal_stages(busy):
    stages, micro_batches = len(busy), len(busy[0])
    return (stages - 1) / (micro_batches + stages - 1)


def idle_per_computing(busy):
    bubble = bubble_fraction(busy)
    return bubble / (1 - bubble)


def clock_starts_at_zero(busy):
    last = max(end for spans in busy for _, end in spans)
    computing = sum(end - start for spans in busy for start, end in spans)
    return 1 - computing / (len(busy) * last)


def share_that_computes(busy):
    return 1 - bubble_fraction(busy)


TASKS["14.6"] = Task(
    reference=bubble_fraction,
    inputs=timelines,
    hints=[
        "The stages together have (number of stages) x (length of the timeline) seconds. Which "
        "part of them is spent computing?",
        "Add up end - start over all spans of all stages. The timeline is as long as the latest "
        "end minus the earliest start, which is not 0.",
    ],
    mistakes={
        bubble_of_equal_stages: "(S - 1) / (M + S - 1) holds only if all stages take the same "
        "time. Add up the measured spans instead.",
        idle_per_computing: "This is idle time divided by computing time. Divide by all of the "
        "time, computing and idle.",
        clock_starts_at_zero: "The clock does not start at 0: subtract the earliest start.",
        share_that_computes: "This is the share that computes. The bubble is the rest.",
    },
)


# 14.7: the schedule of GPipe


def gpipe_schedule(stages, micro_batches):
    """The schedule of GPipe as a table: what each stage does at each tick of a clock.

    The forward pass (F) and the backward pass (B) of one micro-batch in one stage each take one
    tick. First come all forward passes, then all backward passes, each kind in the order of the
    micro-batches. The next stage can start one tick later. The table has a row for each stage, and
    in it an entry for each tick: "F0" for the forward pass of micro-batch 0, "B0" for its backward
    pass, "" if the stage is idle.
    """
    ticks = stages + micro_batches - 1
    table = [[""] * (2 * ticks) for _ in range(stages)]
    for stage in range(stages):
        for batch in range(micro_batches):
            table[stage][stage + batch] = f"F{batch}"
            table[stage][ticks + (stages - 1 - stage) + batch] = f"B{batch}"
    return table


def one_micro_batch_after_the_other(stages, micro_batches):
    table = [[""] * (2 * stages * micro_batches) for _ in range(stages)]
    for stage in range(stages):
        for batch in range(micro_batches):
            table[stage][batch * stages + stage] = f"F{batch}"
            table[stage][(micro_batches + batch) * stages + stages - 1 - stage] = f"B{batch}"
    return table


def backward_from_the_first_stage(stages, micro_batches):
    ticks = stages + micro_batches - 1
    table = [[""] * (2 * ticks) for _ in range(stages)]
    for stage in range(stages):
        for batch in range(micro_batches):
            table[stage][stage + batch] = f"F{batch}"
            table[stage][ticks + stage + batch] = f"B{batch}"
    return table


def last_micro_batch_first(stages, micro_batches):
    table = gpipe_schedule(stages, micro_batches)
    last = micro_batches - 1
    new = {f"B{batch}": f"B{last - batch}" for batch in range(micro_batches)}
    return [[new.get(entry, entry) for entry in row] for row in table]


def one_row(stages, micro_batches):
    ticks = stages + micro_batches - 1
    table = [[""] * (2 * ticks)] * stages
    for stage in range(stages):
        for batch in range(micro_batches):
            table[stage][stage + batch] = f"F{batch}"
            table[stage][ticks + (stages - 1 - stage) + batch] = f"B{batch}"
    return table


TASKS["14.7"] = Task(
    reference=gpipe_schedule,
    inputs=lambda: [(2, 2), (3, 5), (4, 8)],
    hints=[
        "Draw it on paper for 2 stages and 3 micro-batches. When does stage 1 start micro-batch 0? "
        "When is the last forward pass over?",
        "Start from a table of empty strings with `stages` rows. The forward passes take "
        "stages + micro_batches - 1 ticks, the backward passes as many again.",
        "Stage s computes F of micro-batch m at tick s + m. The backward passes are the mirror "
        "image: the last stage is the first to start.",
    ],
    mistakes={
        one_micro_batch_after_the_other: "A stage waits until a micro-batch has left the last "
        "stage. It can start the next one as soon as it has passed one on.",
        backward_from_the_first_stage: "The backward pass starts in the last stage, which has the "
        "loss, and goes back to stage 0.",
        last_micro_batch_first: "The backward passes must be in the order of the micro-batches "
        "too: B0 first.",
        one_row: "All rows are the same list. `[row] * stages` repeats a reference: make a new "
        "list for each stage.",
    },
)


# 14.8: balanced stages


def balanced_cut(seconds, stages):
    """Cut a list of layers into stages so that the slowest stage takes as little time as possible.

    `seconds`: of each layer, as measured. Returns the numbers of the layers with which the second
    and later stages begin: (3, 5) cuts 8 layers into 0-2, 3-4 and 5-7.
    """

    def slowest(cuts):
        edges = [0, *cuts, len(seconds)]
        return max(sum(seconds[start:end]) for start, end in pairwise(edges))

    return min(combinations(range(1, len(seconds)), stages - 1), key=slowest)


def layers():
    for count, stages in ((6, 2), (8, 3), (10, 4)):
        seconds = (1 + 3 * torch.rand(count)) / torch.arange(1, count + 1)
        yield seconds.tolist(), stages


def run_cut(function, seconds, stages):
    """How good the cut is: there may be several best ones."""
    cuts = function(seconds, stages)
    if not isinstance(cuts, (list, tuple)):
        return cuts
    edges = [0, *cuts, len(seconds)]
    times = [sum(seconds[start:end]) for start, end in pairwise(edges)]
    return {"number of stages": len(times), "seconds of the slowest": max(times)}


def last_stage_forgotten(seconds, stages):
    """The broken program that the lesson shows."""

    def slowest(cuts):
        edges = [0, *cuts]
        return max(sum(seconds[start:end]) for start, end in pairwise(edges))

    return min(combinations(range(1, len(seconds)), stages - 1), key=slowest)


def equal_numbers_of_layers(seconds, stages):
    return [len(seconds) * stage // stages for stage in range(1, stages)]


def one_cut_too_many(seconds, stages):
    return balanced_cut(seconds, stages + 1)


def fastest_instead_of_slowest(seconds, stages):
    def fastest(cuts):
        edges = [0, *cuts, len(seconds)]
        return min(sum(seconds[start:end]) for start, end in pairwise(edges))

    return min(combinations(range(1, len(seconds)), stages - 1), key=fastest)


TASKS["14.8"] = Task(
    reference=balanced_cut,
    inputs=layers,
    run=run_cut,
    hints=[
        "Print the seconds of each stage for the cuts that the program returns. Is each layer in "
        "a stage?",
        "The first edge is 0. The last edge must be the number of layers, `len(seconds)`.",
    ],
    mistakes={
        last_stage_forgotten: "One stage is much slower than the program believes. Does `slowest` "
        "see all stages?",
        equal_numbers_of_layers: "Equal numbers of layers do not take equal time. Add up seconds.",
        one_cut_too_many: "Three stages need two cuts: stages - 1.",
        fastest_instead_of_slowest: "This minimizes the fastest stage. All others wait for the "
        "slowest one.",
    },
)


# 14.9: a convolution over two ranks


def conv_by_channels(images, weight, bias):
    """A 3x3 convolution with padding 1 whose output channels are divided among the ranks.

    All ranks have the images (N, inputs, H, W) and the whole layer: `weight` (outputs, inputs, 3,
    3) and `bias` (outputs,). Each computes its own share of the output channels, in the order of
    the ranks. Returns all channels, (N, outputs, H, W), in all ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    part = F.conv2d(images, weight.chunk(world)[rank], bias.chunk(world)[rank], padding=1)
    parts = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(parts, part)
    return torch.cat(parts, dim=1)


def convolutions():
    yield torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3), torch.randn(6)


def run_conv(function, images, weight, bias):
    """The outputs of each rank, and the floating-point operations that it needed."""

    def call():
        with FlopCounterMode(display=False) as counter:
            outputs = function(images, weight, bias)
        if not isinstance(outputs, torch.Tensor):
            return outputs
        return {"outputs": outputs, "FLOPs": counter.get_total_flops()}

    return by_rank(call)


def whole_convolution(images, weight, bias):
    return F.conv2d(images, weight, bias, padding=1)


def own_channels(images, weight, bias):
    rank, world = dist.get_rank(), dist.get_world_size()
    return F.conv2d(images, weight.chunk(world)[rank], bias.chunk(world)[rank], padding=1)


def channels_as_images(images, weight, bias):
    part = own_channels(images, weight, bias)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)


def split_by_input_channels(images, weight, bias):
    rank, world = dist.get_rank(), dist.get_world_size()
    return F.conv2d(images, weight.chunk(world, dim=1)[rank], bias, padding=1)


TASKS["14.9"] = Task(
    reference=conv_by_channels,
    inputs=convolutions,
    run=run_conv,
    hints=[
        "An output channel needs all input channels, its own filter and its own bias, and no other "
        "output channel. Which dimension of the weight are the output channels?",
        "`weight.chunk(world)[rank]` is the share of a rank. Do the same with the bias.",
        "Gather the parts as in the column-parallel linear layer. Channels are dimension 1 of the "
        "outputs.",
    ],
    mistakes={
        whole_convolution: "The result is right, but each rank computed all of the channels: twice "
        "the operations. Use this rank's share of weight and bias only.",
        own_channels: "These are the channels of this rank only. Gather those of the other ranks.",
        channels_as_images: "The parts were joined along the images. Use dim=1, the channels.",
        split_by_input_channels: "The weight was divided along its input channels. The output "
        "channels are dimension 0.",
    },
)


# 14.10: GPipe in two ranks


def gpipe_step(stage, images, labels, shape, micro_batches):
    """The loss and the gradients of one batch in a pipeline of two ranks, with micro-batches.

    Like `pipeline_step`, but the batch is cut into micro-batches. First come the forward passes of
    all of them, then the backward passes, in the same order. `shape` is that of the activations of
    one micro-batch. Returns the loss of the whole batch in rank 1, None in rank 0.
    """
    kept = []
    for part, target in zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
        if dist.get_rank() == 0:
            kept.append(stage(part))
            dist.send(kept[-1].detach(), 1)
        else:
            activations = torch.empty(shape)
            dist.recv(activations, 0)
            activations.requires_grad_()
            kept.append((activations, F.cross_entropy(stage(activations), target) / micro_batches))
    if dist.get_rank() == 0:
        for activations in kept:
            gradient = torch.empty(shape)
            dist.recv(gradient, 1)
            activations.backward(gradient)
        return None
    for activations, loss in kept:
        loss.backward()
        dist.send(activations.grad, 0)
    return sum(loss.item() for _, loss in kept)


def two_stages_and_micro_batches():
    for stages, images, labels, shape in two_stages():
        yield stages, images, labels, (2, *shape[1:]), 4


def run_micro_batches(function, stages, images, labels, shape, micro_batches):
    """As `run_stages`, with the order of the forward (F) and backward (B) passes."""

    def call():
        stage = stages[dist.get_rank()]
        passes = []

        def record(_, inputs, outputs):
            passes.append("F")
            outputs.register_hook(lambda _: passes.append("B"))

        stage.register_forward_hook(record)
        loss = function(stage, images, labels, shape, micro_batches)
        if not passes:
            return None
        gradients = [p.grad for p in stage.parameters()]
        return {"loss": loss, "passes": "".join(passes), "gradients": gradients}

    return by_rank(call)


def sum_of_the_losses(stage, images, labels, shape, micro_batches):
    if dist.get_rank() == 0:
        return gpipe_step(stage, images, labels, shape, micro_batches)
    kept = []
    for target in labels.chunk(micro_batches):
        activations = torch.empty(shape)
        dist.recv(activations, 0)
        activations.requires_grad_()
        kept.append((activations, F.cross_entropy(stage(activations), target)))
    for activations, loss in kept:
        loss.backward()
        dist.send(activations.grad, 0)
    return sum(loss.item() for _, loss in kept)


def one_step_for_each_micro_batch(stage, images, labels, shape, micro_batches):
    losses = []
    for part, target in zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
        losses.append(pipeline_step(stage, part, target, shape))
    if dist.get_rank() == 0:
        return None
    for parameter in stage.parameters():
        parameter.grad /= micro_batches
    return sum(losses) / micro_batches


def whole_batch_at_once(stage, images, labels, shape, micro_batches):
    return pipeline_step(stage, images, labels, (len(images), *shape[1:]))


TASKS["14.10"] = Task(
    reference=gpipe_step,
    inputs=two_stages_and_micro_batches,
    run=run_micro_batches,
    hints=[
        "`images.chunk(micro_batches)` and `labels.chunk(micro_batches)` are the micro-batches. "
        "Two loops in each rank: the first one runs the forward passes and keeps in a list what "
        "the backward passes need, the second one runs these.",
        "Rank 0 keeps the activations of each micro-batch. Rank 1 keeps the activations that it "
        "has received, because it must send their gradient, and the loss.",
        "Gradients of several backward passes add up. The loss of a batch is the mean of those of "
        "its equal parts: divide each by their number before the backward pass.",
    ],
    mistakes={
        sum_of_the_losses: "The losses of the micro-batches were added up. The loss of the batch "
        "is their mean: divide each loss before its backward pass.",
        one_step_for_each_micro_batch: "Each micro-batch has left the pipeline before the next one "
        "enters it, so one rank always waits. Run all forward passes first.",
        whole_batch_at_once: "The batch went through the pipeline as a whole: cut it with "
        "`chunk(micro_batches)`.",
    },
)


# 14.11: the schedule 1F1B


def order_1f1b(stage, stages, micro_batches):
    """The passes of one stage (from 0) under 1F1B, in their order: ["F0", "F1", "B0", ...].

    A stage keeps the activations of a micro-batch from its forward pass (F) to its backward pass
    (B). Stage s may keep those of `stages - s` micro-batches at the same time. It runs the next
    forward pass whenever it may, and otherwise the next backward pass.
    """
    order = []
    forward = backward = 0
    while backward < micro_batches:
        if forward < micro_batches and forward - backward < stages - stage:
            order.append(f"F{forward}")
            forward += 1
        else:
            order.append(f"B{backward}")
            backward += 1
    return order


def all_forward_first(stage, stages, micro_batches):
    return [f"{kind}{batch}" for kind in "FB" for batch in range(micro_batches)]


def same_limit_in_all_stages(stage, stages, micro_batches):
    return order_1f1b(0, stages, micro_batches)


def limit_of_one(stage, stages, micro_batches):
    return order_1f1b(stages - 1, stages, micro_batches)


def backward_before_forward(stage, stages, micro_batches):
    return order_1f1b(stage + 1, stages, micro_batches)


def forward_beyond_the_last(stage, stages, micro_batches):
    order = order_1f1b(stage, stages, micro_batches + stages)
    return order[: 2 * micro_batches]


TASKS["14.11"] = Task(
    reference=order_1f1b,
    inputs=lambda: [(2, 3, 4), (0, 3, 4), (1, 3, 4), (1, 4, 8), (0, 4, 2)],
    hints=[
        "Count the forward and the backward passes so far. How many micro-batches does the stage "
        "keep activations of?",
        "Loop until the last backward pass. In each round choose one pass: forward, if a "
        "micro-batch is left and the stage may keep one more.",
    ],
    mistakes={
        all_forward_first: "This is the order of GPipe: the stage keeps the activations of all "
        "micro-batches.",
        same_limit_in_all_stages: "The limit depends on the stage: the last one may keep the "
        "activations of one micro-batch only.",
        limit_of_one: "Only the last stage alternates from the start. The others would wait for "
        "it: they may keep more than one micro-batch.",
        backward_before_forward: "The limit is one too small: the last stage could not run any "
        "forward pass.",
        forward_beyond_the_last: "The stage runs forward passes of micro-batches that do not "
        "exist. After the last forward pass only backward passes are left.",
    },
)
