"""Lesson 09, mixed precision: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from cnnlab.check import Task

TASKS = {}


def random_bits(count):
    return "".join(map(str, torch.randint(2, (count,)).tolist()))


def random_gradients(count, middle=-24.0):
    """Of very different sizes, of both signs, and some of them zero."""
    sizes = torch.exp2(middle + 4 * torch.randn(count))
    return sizes * torch.randint(-1, 2, (count,))


# 09.1: the value of a pattern


def decode(pattern, exponent_bits):
    """The number that a pattern of bits means, such as "0011110000000000".

    The first bit is the sign, then come the exponent and the fraction, which has all other bits.
    The bias is 2 ** (exponent_bits - 1) - 1. Subnormal numbers occur; infinity and NaN ("not a
    number") do not. `int("0110", 2)` is 6.
    """
    fraction_bits = len(pattern) - 1 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1 if pattern[0] == "1" else 1
    exponent = int(pattern[1 : 1 + exponent_bits], 2)
    fraction = int(pattern[1 + exponent_bits :], 2) / 2**fraction_bits
    if exponent == 0:
        return sign * 2.0 ** (1 - bias) * fraction
    return sign * 2.0 ** (exponent - bias) * (1 + fraction)


def patterns():
    yield "0" + "10" + random_bits(3) + random_bits(10), 5
    yield "1" + "01" + random_bits(3) + random_bits(10), 5
    yield "0" + "0111" + random_bits(4) + random_bits(7), 8
    yield "1" + "00000" + "10" + random_bits(8), 5  # subnormal


def subnormal_as_normal(pattern, exponent_bits):
    if int(pattern[1 : 1 + exponent_bits], 2) > 0:
        return decode(pattern, exponent_bits)
    fraction = int(pattern[1 + exponent_bits :], 2) / 2 ** (len(pattern) - 1 - exponent_bits)
    bias = 2 ** (exponent_bits - 1) - 1
    return (-1) ** int(pattern[0]) * 2.0**-bias * (1 + fraction)


def without_bias(pattern, exponent_bits):
    return decode(pattern, exponent_bits) * 2.0 ** (2 ** (exponent_bits - 1) - 1)


def without_sign(pattern, exponent_bits):
    return abs(decode(pattern, exponent_bits))


def without_leading_one(pattern, exponent_bits):
    exponent = int(pattern[1 : 1 + exponent_bits], 2) - 2 ** (exponent_bits - 1) + 1
    fraction = int(pattern[1 + exponent_bits :], 2) / 2 ** (len(pattern) - 1 - exponent_bits)
    return (-1) ** int(pattern[0]) * 2.0**exponent * fraction


TASKS["09.1"] = Task(
    reference=decode,
    inputs=lambda: list(patterns()),
    hints=[
        "Cut the text into three parts: `pattern[0]`, the next `exponent_bits` characters, and the "
        "rest. Turn each part into an integer.",
        "The fraction is the last integer divided by 2 to the power of its number of bits, so it "
        "is at least 0 and less than 1.",
        "Two cases: if the integer of the exponent is 0, the power is 1 - bias and no 1 is added "
        "to the fraction. Otherwise subtract the bias from the integer, and add 1.",
    ],
    mistakes={
        subnormal_as_normal: "All bits of this exponent are 0, so the number is subnormal: there "
        "is no 1 before the fraction, and the power is 1 - bias.",
        without_bias: "Subtract the bias from the exponent.",
        without_sign: "The first bit is the sign: 1 means negative.",
        without_leading_one: "A normal number has a 1 before the fraction, which is not stored.",
    },
    rtol=1e-6,
    atol=0.0,
)


# 09.2: master weights


def master_step(weights, master, gradients, learning_rate):
    """A step of SGD with master weights. Change `weights` and `master` in place; return nothing.

    Three lists with a tensor for each layer: `weights` and `gradients` in 16 bits, `master` in
    fp32. Update `master`: subtract learning_rate * gradient, computed in fp32. Then round the new
    master weights into `weights`. `a.copy_(b)` copies the numbers of b into a, rounded to a's type.
    """
    for weight, exact, gradient in zip(weights, master, gradients, strict=True):
        exact -= learning_rate * gradient.float()
        weight.copy_(exact)


def random_weights():
    shapes = [(3, 4), (5,)]
    master = [torch.randn(shape) for shape in shapes]
    weights = [tensor.bfloat16() for tensor in master]
    gradients = [0.05 * torch.randn(shape).bfloat16() for shape in shapes]
    return weights, master, gradients, 0.01


def update_in_16_bits(weights, master, gradients, learning_rate):
    for weight, exact, gradient in zip(weights, master, gradients, strict=True):
        weight -= learning_rate * gradient
        exact.copy_(weight)


def start_from_the_rounded_weights(weights, master, gradients, learning_rate):
    for weight, exact, gradient in zip(weights, master, gradients, strict=True):
        exact.copy_(weight.float() - learning_rate * gradient.float())
        weight.copy_(exact)


def master_only(weights, master, gradients, learning_rate):
    for exact, gradient in zip(master, gradients, strict=True):
        exact -= learning_rate * gradient.float()


def wrong_direction(weights, master, gradients, learning_rate):
    master_step(weights, master, gradients, -learning_rate)


TASKS["09.2"] = Task(
    reference=master_step,
    inputs=lambda: [random_weights(), random_weights()],
    hints=[
        "Loop over the three lists at the same time, with `zip`. In each round change two tensors.",
        "Convert the gradient with `.float()` before you multiply it. `-=` changes a tensor in "
        "place.",
        "Update the master weight first. The other one then gets its rounded copy.",
    ],
    mistakes={
        update_in_16_bits: "The update was added to the 16-bit weights, where it is rounded away. "
        "Add it to `master`.",
        start_from_the_rounded_weights: "The update starts from the rounded weights, so earlier "
        "small updates are lost. Start from `master`.",
        master_only: "The 16-bit weights have not changed, so the next forward pass would use the "
        "old ones.",
        wrong_direction: "The step goes in the direction of the gradient. Subtract.",
    },
    rtol=1e-6,
    atol=1e-7,
)


# 09.3: gradients that become zero


def share_lost(gradients, scale):
    """The share of the gradients that are lost in fp16, if they are multiplied by `scale` first.

    `gradients` (n,) are in fp32. Some of them are zero; leave these out, because they cannot be
    lost. A gradient is lost if it is not zero in fp32, but zero in fp16. `tensor.half()` converts.
    """
    alive = gradients[gradients != 0]
    scaled = (alive * scale).half()
    return (scaled == 0).float().mean().item()


def zeros_counted_too(gradients, scale):
    return ((gradients * scale).half() == 0).float().mean().item()


def share_of_all(gradients, scale):
    lost = ((gradients * scale).half() == 0) & (gradients != 0)
    return lost.float().mean().item()


def scaled_too_late(gradients, scale):
    alive = gradients[gradients != 0]
    return (alive.half() * scale == 0).float().mean().item()


def share_kept(gradients, scale):
    return 1 - share_lost(gradients, scale)


TASKS["09.3"] = Task(
    reference=share_lost,
    inputs=lambda: [(random_gradients(400), 1.0), (random_gradients(400), 64.0)],
    hints=[
        "Three steps: choose the gradients that are not zero, convert them to fp16 after scaling, "
        "and find out what share of the result is zero.",
        "A comparison such as `tensor != 0` gives True or False for each number. It can select "
        "numbers of a tensor, as an index. `.float().mean()` of it is the share of True.",
    ],
    mistakes={
        zeros_counted_too: "Gradients that are zero in fp32 are counted, too. Leave them out.",
        share_of_all: "This is the share of all gradients. Divide by the number of those that are "
        "not zero in fp32.",
        scaled_too_late: "The scale comes too late: what is zero in fp16 stays zero. Multiply in "
        "fp32, then convert.",
        share_kept: "This is the share that is kept.",
    },
)


# 09.4: a training step with a scaled loss


def scaled_step(model, optimizer, loss, scale):
    """Backward pass and update with loss scaling. Return whether the update was made.

    Multiply the loss by `scale`, and compute the gradients. Divide the gradient of each parameter,
    `parameter.grad`, by `scale`. If all numbers in all gradients are finite, which means neither
    infinite nor NaN, call `optimizer.step()` and return True. Otherwise skip the update and return
    False. `tensor.isfinite()` is True or False for each number.
    """
    (loss * scale).backward()
    for parameter in model.parameters():
        parameter.grad /= scale
    finite = all(parameter.grad.isfinite().all() for parameter in model.parameters())
    if finite:
        optimizer.step()
    return finite


def run_scaled_step(function, images, labels, scale):
    """The function's result, and the weights of a small fp16 model afterwards."""
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(images), labels)
    taken = function(model, optimizer, loss, scale)
    if model.weight.grad is None and taken in (None, ...):
        return None  # not written yet
    return {"the update was made": taken, "weights": model.weight.detach()}


def never_unscaled(model, optimizer, loss, scale):
    (loss * scale).backward()
    finite = all(parameter.grad.isfinite().all() for parameter in model.parameters())
    if finite:
        optimizer.step()
    return finite


def never_skipped(model, optimizer, loss, scale):
    (loss * scale).backward()
    for parameter in model.parameters():
        parameter.grad /= scale
    optimizer.step()
    return all(parameter.grad.isfinite().all() for parameter in model.parameters())


def always_true(model, optimizer, loss, scale):
    scaled_step(model, optimizer, loss, scale)
    return True


def loss_divided(model, optimizer, loss, scale):
    (loss / scale).backward()
    for parameter in model.parameters():
        parameter.grad *= scale
    optimizer.step()
    return True


def random_batch(scale):
    return torch.randn(8, 6), torch.randint(4, (8,)), scale


TASKS["09.4"] = Task(
    reference=scaled_step,
    inputs=lambda: [random_batch(2.0**12), random_batch(2.0**40)],
    run=run_scaled_step,
    hints=[
        "Four parts: backward pass of the scaled loss, a loop over `model.parameters()` that "
        "divides, a test of all gradients, and an `if`.",
        "The gradient of a parameter is in its `.grad`, and `/=` changes it in place. "
        "`tensor.isfinite()` gives True or False for each number.",
        "`all(... for ... in ...)` is True if it is True for each parameter; inside it, "
        "`.isfinite().all()` says so for one gradient.",
    ],
    mistakes={
        never_unscaled: "The gradients are `scale` times too large. Divide them before the update.",
        never_skipped: "A gradient was infinite or NaN, and now the weights are, too. Skip the "
        "update in this case.",
        always_true: "The update was skipped. Return False then.",
        loss_divided: "The loss was divided, so the gradients got smaller and were lost in the "
        "backward pass. Multiply the loss, divide the gradients.",
    },
)


# 09.5: the next loss scale


def next_scale(scale, good_steps, finite, wait):
    """The loss scale of the next step, and the number of good steps in a row: (scale, good_steps).

    `finite`: whether the step that just ended had finite gradients. `good_steps`: the number of
    good steps before it. After a bad step, halve the scale and count from 0 again. If this was
    good step number `wait` in a row, double the scale and count from 0 again. Otherwise keep the
    scale and count one more.
    """
    if not finite:
        return scale / 2, 0
    if good_steps + 1 == wait:
        return scale * 2, 0
    return scale, good_steps + 1


def scales():
    scale = 2.0 ** int(torch.randint(8, 20, ()))
    yield scale, 2, True, 5
    yield scale, 4, True, 5
    yield scale, 3, False, 5
    yield scale, 4, False, 5


def counts_on_after_growth(scale, good_steps, finite, wait):
    new, _ = next_scale(scale, good_steps, finite, wait)
    return new, good_steps + 1 if finite else 0


def counts_on_after_overflow(scale, good_steps, finite, wait):
    if finite:
        return next_scale(scale, good_steps, finite, wait)
    return scale / 2, good_steps


def one_step_late(scale, good_steps, finite, wait):
    if finite and good_steps == wait:
        return scale * 2, 0
    return (scale, good_steps + 1) if finite else (scale / 2, 0)


def grows_in_each_good_step(scale, good_steps, finite, wait):
    return (scale * 2, good_steps + 1) if finite else (scale / 2, 0)


TASKS["09.5"] = Task(
    reference=next_scale,
    inputs=lambda: list(scales()),
    hints=[
        "Three cases, each with a `return` of two numbers: a bad step, the last good step before "
        "the scale grows, and any other good step.",
        "The step that just ended is not yet in `good_steps`: if it was good, there are now "
        "`good_steps + 1` in a row.",
    ],
    mistakes={
        counts_on_after_growth: "After doubling the scale, count from 0 again.",
        counts_on_after_overflow: "After a bad step, count from 0 again: the good steps must be in "
        "a row.",
        one_step_late: "The scale grows one step too late: `good_steps` does not contain the step "
        "that just ended.",
        grows_in_each_good_step: "The scale grows in each good step. Wait for `wait` of them.",
    },
)


# 09.6: which precision on which device


def choose_precision(device, capability, units):
    """The precision for training on a device: "bf16" or "fp16" if it has hardware for it.

    `device` is "cuda" (here always an NVIDIA GPU), "mps" (an Apple GPU) or "cpu". `capability` is
    the compute capability of an NVIDIA GPU, as text ("7.5"). `units` has the instruction sets of a
    CPU. Prefer bf16. Return "fp32" if the device would emulate both. Use the table above.
    """
    if device == "mps":
        return "fp16"
    if device == "cpu":
        return "bf16" if {"AMX BF16", "AVX-512 BF16", "BF16"} & set(units) else "fp32"
    if float(capability) >= 8:
        return "bf16"
    return "fp16" if float(capability) >= 7 else "fp32"


def devices():
    for capability in ("6.1", "7.0", "7.5", "8.0", "8.9", "9.0", "10.0", "12.0"):
        yield "cuda", capability, ()
    yield "mps", "", ()
    yield "cpu", "", ("AVX2",)
    yield "cpu", "", ("AVX2", "AVX-512")
    yield "cpu", "", ("AVX2", "AVX-512", "AVX-512 BF16")
    yield "cpu", "", ("AVX2", "AVX-512", "AMX BF16")
    yield "cpu", "", ("NEON", "BF16")


def bf16_on_all_gpus(device, capability, units):
    return "bf16" if device == "cuda" else choose_precision(device, capability, units)


def fp16_on_old_gpus(device, capability, units):
    found = choose_precision(device, capability, units)
    return "fp16" if device == "cuda" and found == "fp32" else found


def compares_text(device, capability, units):
    if device != "cuda" or capability < "7":
        return choose_precision(device, "6.0", units)
    return "bf16" if capability >= "8" else "fp16"


def any_avx_512(device, capability, units):
    if "AVX-512" in units:
        return "bf16"
    return choose_precision(device, capability, units)


TASKS["09.6"] = Task(
    reference=choose_precision,
    inputs=lambda: list(devices()),
    hints=[
        "Start with the three kinds of devices. Only one kind needs the capability, and only one "
        "kind needs the units.",
        "`float(capability)` is a number. It is at least 8 from Ampere on, and at least 7 for "
        "Volta and Turing.",
        'For a CPU, look for three names in `units`: "BF16", alone and after "AMX" or "AVX-512".',
    ],
    mistakes={
        fp16_on_old_gpus: "GPUs before Volta have no Tensor Cores. The table says what they have.",
        bf16_on_all_gpus: "Only GPUs from Ampere on compute bf16 in hardware.",
        compares_text: 'As text, "10.0" is less than "7.0". Compare numbers.',
        any_avx_512: "AVX-512 alone does not compute bf16. It takes the extension AVX-512 BF16.",
    },
)


# 09.7: bytes per parameter


def bytes_per_parameter(way, optimizer):
    """Bytes for each parameter: {"parameters": ..., "gradients": ..., "optimizer state": ...}.

    `way` is "fp32"; "pure bf16" (all in bf16); "master" (bf16 weights and gradients, and fp32
    master weights, which count as parameters, too); or "autocast" (as PyTorch stores them between
    two steps). `optimizer` is "adam" or "momentum" (SGD with momentum). The state is stored in the
    type of the weights that the optimizer updates.
    """
    computed = 2 if way in ("pure bf16", "master") else 4
    updated = 2 if way == "pure bf16" else 4
    copy = updated if way == "master" else 0
    numbers = 2 if optimizer == "adam" else 1
    return {
        "parameters": computed + copy,
        "gradients": computed,
        "optimizer state": numbers * updated,
    }


def ways():
    for way in ("fp32", "pure bf16", "master", "autocast"):
        yield way, "adam"
        yield way, "momentum"


def autocast_as_16_bits(way, optimizer):
    return bytes_per_parameter("pure bf16" if way == "autocast" else way, optimizer)


def master_weights_not_counted(way, optimizer):
    sizes = bytes_per_parameter(way, optimizer)
    return {**sizes, "parameters": 2} if way == "master" else sizes


def state_in_16_bits(way, optimizer):
    sizes = bytes_per_parameter(way, optimizer)
    state = bytes_per_parameter("pure bf16", optimizer)["optimizer state"]
    return {**sizes, "optimizer state": state} if way == "master" else sizes


def one_number_for_adam(way, optimizer):
    return bytes_per_parameter(way, "momentum")


TASKS["09.7"] = Task(
    reference=bytes_per_parameter,
    inputs=lambda: list(ways()),
    hints=[
        "fp32 takes 4 bytes, bf16 takes 2. Ask for each way: in which type are the weights that "
        "the forward pass reads, and in which type are those that the optimizer updates?",
        "A gradient has the type of the weight that it belongs to. With autocast, this is the type "
        "in which the model was created.",
        "Adam stores two numbers for each parameter, momentum one. Only in pure bf16 do they take "
        "2 bytes each.",
    ],
    mistakes={
        autocast_as_16_bits: "autocast does not change the model: its weights stay in fp32.",
        master_weights_not_counted: "The master weights are missing. There are two copies.",
        state_in_16_bits: "The optimizer updates the master weights, so its state is in fp32.",
        one_number_for_adam: "Adam stores two numbers for each parameter: averages of the gradient "
        "and of its square.",
    },
)


# 09.8: Amdahl's law with a faster part


def predict_speedup(parts, ratio):
    """The speedup of a step if its arithmetic gets `ratio` times faster, and nothing else does.

    `parts`: the seconds that each part of a step takes. One of them is called "arithmetic".
    """
    before = sum(parts.values())
    after = before - parts["arithmetic"] + parts["arithmetic"] / ratio
    return before / after


def random_parts():
    names = ("loader", "arithmetic", "memory", "launch")
    parts = dict(zip(names, (0.001 + 0.01 * torch.rand(4)).tolist(), strict=True))
    return parts, 2.0 + 6 * torch.rand(()).item()


def all_parts_faster(parts, ratio):
    return ratio


def arithmetic_removed(parts, ratio):
    return sum(parts.values()) / (sum(parts.values()) - parts["arithmetic"])


def times_instead_of_speedup(parts, ratio):
    return 1 / predict_speedup(parts, ratio)


def share_times_ratio(parts, ratio):
    share = parts["arithmetic"] / sum(parts.values())
    return 1 - share + share * ratio


TASKS["09.8"] = Task(
    reference=predict_speedup,
    inputs=lambda: [random_parts(), random_parts(), random_parts()],
    hints=[
        "A speedup is the time before divided by the time after. Compute both.",
        "Before: the sum of all parts. After: the same sum, with one part divided by the ratio.",
    ],
    mistakes={
        all_parts_faster: "Only the arithmetic gets faster, not the whole step.",
        arithmetic_removed: "This is the limit for arithmetic that takes no time. It still takes "
        "its time divided by the ratio.",
        times_instead_of_speedup: "This is the new time as a share of the old one. The speedup is "
        "its inverse.",
        share_times_ratio: "Speedups cannot be averaged with the shares of the old time. Add up "
        "the new times.",
    },
)


# 09.9: the smallest scale


def smallest_scale(gradients, most):
    """The smallest loss scale with which at most the share `most` of the gradients is lost in fp16.

    It is a power of two: 1.0, 2.0, 4.0, ... You can call `share_lost`.
    """
    scale = 1.0
    while share_lost(gradients, scale) > most:
        scale *= 2
    return scale


def largest_that_loses_more(gradients, most):
    return smallest_scale(gradients, most) / 2


def exponent_of_the_scale(gradients, most):
    scale = smallest_scale(gradients, most)
    return torch.tensor(scale).log2().item()


def share_that_is_kept(gradients, most):
    return smallest_scale(gradients, 1 - most)


TASKS["09.9"] = Task(
    reference=smallest_scale,
    inputs=lambda: [(random_gradients(500, middle), 0.013) for middle in (-20.0, -28.0, -36.0)],
    hints=[
        "Try one scale after the other, from 1.0 on.",
        "A `while` loop: as long as too many gradients are lost, double the scale.",
    ],
    mistakes={
        largest_that_loses_more: "With this scale, too many are still lost. The next one is right.",
        exponent_of_the_scale: "This is the exponent. Return the scale itself.",
        share_that_is_kept: "`most` is the share that may be lost, not the share to keep.",
    },
)


# 09.10: a broken training loop


def train_amp(model, optimizer, scaler, batches):
    """Train with fp16 autocast on the CPU. Return the loss of each step.

    The norm of all gradients together is limited to 1 before each update.
    """
    losses = []
    for images, labels in batches:
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_amp(function, batches, scale):
    """What the function returns, and the state of the training afterwards."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    autocast_in_backward = []

    def watch(_, inputs, outputs):
        outputs.register_hook(
            lambda _: autocast_in_backward.append(torch.is_autocast_enabled("cpu"))
        )

    model[0].register_forward_hook(watch)
    losses = function(model, optimizer, scaler, batches)
    if losses in (None, ...) and not autocast_in_backward:
        return None  # not written yet
    return {
        "losses": losses,
        "autocast is on in the backward pass": any(autocast_in_backward),
        "weights": model[0].weight.detach(),
        "loss scale": scaler.get_scale(),
    }


def amp_step(model, optimizer, scaler, images, labels):
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    return loss.item()


def clipped_while_scaled(model, optimizer, scaler, batches):
    losses = []
    for images, labels in batches:
        losses.append(amp_step(model, optimizer, scaler, images, labels))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses


def backward_inside_autocast(model, optimizer, scaler, batches):
    losses = []
    for images, labels in batches:
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def never_updated(model, optimizer, scaler, batches):
    losses = []
    for images, labels in batches:
        losses.append(amp_step(model, optimizer, scaler, images, labels))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        optimizer.zero_grad()
    return losses


def never_clipped(model, optimizer, scaler, batches):
    losses = []
    for images, labels in batches:
        losses.append(amp_step(model, optimizer, scaler, images, labels))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses


def random_batches():
    return [(5 * torch.randn(8, 6), torch.randint(4, (8,))) for _ in range(6)]


TASKS["09.10"] = Task(
    reference=train_amp,
    inputs=lambda: [(random_batches(), 2.0**12), (random_batches(), 2.0**18)],
    run=run_amp,
    hints=[
        "There are three mistakes. Compare the loop with the picture of mixed precision: which "
        "steps are missing, and which one is in the wrong place?",
        "The norm of gradients that are still scaled is too large. `GradScaler` has a method, "
        "with a _ at the end of its name, that divides them in place.",
        "In each round: forward pass and loss with autocast; the context ends; backward pass; "
        "divide; clip; step; let the scaler choose the next scale; clear.",
    ],
    mistakes={
        never_updated: "The scaler needs `update()` after each step. It chooses the next scale.",
        clipped_while_scaled: "The gradients are still multiplied by the scale when their norm is "
        "limited. Divide them before.",
        backward_inside_autocast: "autocast is on in the backward pass. End the context after the "
        "loss: each operation's backward pass uses the type of its forward pass anyway.",
        never_clipped: "The norm of the gradients is not limited.",
    },
)


# 09.11: stochastic rounding


def stochastic_round(values, noise):
    """Round fp32 numbers to bf16, up or down by chance, so that they are right on average.

    `values` (n,) in fp32. `noise` (n,) has random integers from 0 to 2**16 - 1, as torch.int32.
    View the values as integers, with `values.view(torch.int32)`, and add the noise. Set the last 16
    bits to 0 (`to_tf32` does it with 13). View the result as fp32 again, and convert it to bf16.
    """
    whole = values.view(torch.int32) + noise
    return (whole & -(2**16)).view(torch.float32).bfloat16()


def random_noise():
    return torch.randn(12), torch.randint(2**16, (12,), dtype=torch.int32)


def nearest(values, noise):
    return values.bfloat16()


def toward_zero(values, noise):
    return stochastic_round(values, torch.zeros_like(noise))


def bits_not_cleared(values, noise):
    return (values.view(torch.int32) + noise).view(torch.float32).bfloat16()


def integers_converted(values, noise):
    whole = values.view(torch.int32) + noise
    return (whole & -(2**16)).bfloat16()


TASKS["09.11"] = Task(
    reference=stochastic_round,
    inputs=lambda: [random_noise(), random_noise()],
    hints=[
        "bf16 has the first 16 bits of fp32. The noise reaches bit 16 of the sum more often, the "
        "larger the last 16 bits of the value are.",
        "`tensor.view(dtype)` reads the same bits as another type. The function `to_tf32` of this "
        "lesson does something similar.",
        "`& -(2**16)` keeps all bits of an integer except for the last 16.",
    ],
    mistakes={
        nearest: "This rounds to the nearest number. Use the noise.",
        toward_zero: "The noise is missing: the last 16 bits are just cut off.",
        bits_not_cleared: "Set the last 16 bits to 0 after adding the noise. Otherwise the "
        "conversion rounds again.",
        integers_converted: "The bits were converted as an integer. View them as fp32 first.",
    },
    rtol=1e-6,
)
