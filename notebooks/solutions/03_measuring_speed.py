"""Lesson 03, measuring speed: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

import numpy as np
import torch
from scipy import stats

from cnnlab.check import Task

LAUNCH = 0.0001  # seconds that the host needs to launch work on a `Device`
FIRST = 20  # The first call of a `Program` takes this many times as long.
TASKS = {}


class Device:
    """A simulated GPU, which works asynchronously: only launching and waiting take host time."""

    def __init__(self):
        self.now = 0.0
        self.idle_from = 0.0
        self.launched = []

    def launch(self, name, seconds):
        self.now += LAUNCH
        self.idle_from = max(self.idle_from, self.now) + seconds
        self.launched.append(name)

    def synchronize(self):
        self.now = max(self.now, self.idle_from)

    def clock(self):
        return self.now


class Program:
    """Launches work on a device. Call number n takes seconds[n], the first one much longer."""

    def __init__(self, device, name, seconds):
        self.device = device
        self.name = name
        self.seconds = seconds
        self.calls = 0

    def __call__(self):
        seconds = self.seconds[self.calls % len(self.seconds)]
        self.device.launch(self.name, seconds if self.calls else FIRST * seconds)
        self.calls += 1


def random_seconds(count):
    return (0.01 + 0.04 * torch.rand(count)).tolist()


def random_rates(count, mean=100.0, spread=0.1):
    return (mean * torch.exp(spread * torch.randn(count))).tolist()


# 03.1: a timer


def time_calls(call, synchronize, clock, warmup, repeats):
    """Make `warmup` calls of `call`, then time `repeats` more calls. Return a list of seconds.

    `synchronize()` waits until the device has finished. `clock()` returns the time in seconds. Read
    the clock before each timed call, when the device is idle, and again when it has finished.
    """
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = clock()
        call()
        synchronize()
        seconds.append(clock() - start)
    return seconds


def run_on_device(function, seconds, warmup, repeats):
    device = Device()
    program = Program(device, "program", seconds)
    return function(program, device.synchronize, device.clock, warmup, repeats)


def never_synchronize(call, synchronize, clock, warmup, repeats):
    return time_calls(call, int, clock, warmup, repeats)  # int() does nothing


def synchronize_only_after(call, synchronize, clock, warmup, repeats):
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        start = clock()
        call()
        synchronize()
        seconds.append(clock() - start)
    return seconds


def no_warmup(call, synchronize, clock, warmup, repeats):
    return time_calls(call, synchronize, clock, 0, repeats)


def times_of_the_warmup_too(call, synchronize, clock, warmup, repeats):
    return time_calls(call, synchronize, clock, 0, warmup + repeats)


def mean_of_all_calls(call, synchronize, clock, warmup, repeats):
    seconds = time_calls(call, synchronize, clock, warmup, repeats)
    return sum(seconds) / repeats


TASKS["03.1"] = Task(
    reference=time_calls,
    inputs=lambda: [(random_seconds(6), 2, 4), (random_seconds(8), 3, 5)],
    run=run_on_device,
    hints=[
        "Two loops: the first one calls without a clock, the second one fills a list. One timed "
        "call has a start and an end, and the device must be idle at both.",
        "At the start the device may still work on earlier calls, such as the warm-up. At the end "
        "it still works on the call that you time. So wait twice in each round.",
        "The body of the second loop, in this order: wait, read the clock, call, wait, read the "
        "clock again and append the difference.",
    ],
    mistakes={
        never_synchronize: "These are the times of the launches. Wait for the device before you "
        "stop the clock.",
        synchronize_only_after: "The first time is too long: the device still worked on the "
        "warm-up when the clock started. Wait before you start it.",
        no_warmup: "The first time contains what only a first call does. Make `warmup` calls "
        "before the timed ones.",
        times_of_the_warmup_too: "The list contains the times of the warm-up. Do not time it.",
        mean_of_all_calls: "This is one number. Return the list: one number does not show "
        "the spread.",
    },
    atol=1e-9,
)


# 03.2: interleaved measurements


def measure_in_turn(programs, repeats):
    """Call the programs in the order A B B A A B B A ... Return {name: list of its results}.

    `programs`: {name: a function without arguments that measures once and returns the result}.
    Each of the `repeats` rounds calls each program once. The rounds 2, 4, 6, ... call them in
    reverse order.
    """
    results = {name: [] for name in programs}
    for number in range(repeats):
        order = list(programs)
        if number % 2 == 1:
            order.reverse()
        for name in order:
            results[name].append(programs[name]())
    return results


def run_programs(function, names, repeats):
    """What the function returns. The result of a program is the number of programs before it."""
    called = []

    def make(name):
        def program():
            called.append(name)
            return len(called) - 1

        return program

    return function({name: make(name) for name in names}, repeats)


def one_after_the_other(programs, repeats):
    return {name: [program() for _ in range(repeats)] for name, program in programs.items()}


def always_the_same_order(programs, repeats):
    results = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            results[name].append(program())
    return results


def first_round_reversed(programs, repeats):
    backwards = dict(reversed(programs.items()))
    results = measure_in_turn(backwards, repeats)
    return {name: results[name] for name in programs}


def reversed_from_then_on(programs, repeats):
    results = {name: [] for name in programs}
    for number in range(repeats):
        for name in list(programs) if number == 0 else reversed(programs):
            results[name].append(programs[name]())
    return results


TASKS["03.2"] = Task(
    reference=measure_in_turn,
    inputs=lambda: [(["A", "B"], 4), (["A", "B", "C"], 3)],
    run=run_programs,
    hints=[
        "The outer loop is over the rounds, the inner one over the programs. Start with an empty "
        "list for each name.",
        "`list(programs)` is the list of names. In rounds 1, 3, 5, ... (counted from 0) reverse "
        "it before the inner loop.",
        "`number % 2` tells whether a round is odd, and `programs[name]()` measures once.",
    ],
    mistakes={
        one_after_the_other: "All runs of A come before those of B. Let the rounds be the outer "
        "loop.",
        always_the_same_order: "A is first in every round. Reverse the order in every second one.",
        first_round_reversed: "The first round starts with the first program.",
        reversed_from_then_on: "Only every second round is reversed, not all after the first one.",
    },
)


# 03.3: a speedup with its interval


def speedup_interval(a, b):
    """The speedup of B over A, and its 95% confidence interval: (speedup, low, high).

    `a` and `b` are images/s, n of each; a[i] and b[i] are a pair. Take the logarithm of b[i] / a[i]
    of each pair. Their mean is m, their standard deviation s: `.std(ddof=1)`. The interval is
    m - t s / sqrt(n) to m + t s / sqrt(n). t is the 97.5% quantile of Student's t distribution
    with n - 1 degrees of freedom: `stats.t.ppf(0.975, n - 1)`. Return exp of the three numbers.
    """
    logs = np.log(b) - np.log(a)
    n = len(logs)
    margin = stats.t.ppf(0.975, n - 1) * logs.std(ddof=1) / np.sqrt(n)
    return tuple(np.exp([logs.mean(), logs.mean() - margin, logs.mean() + margin]).tolist())


def as_if_unpaired(a, b):
    log_a, log_b = np.log(a), np.log(b)
    mean = log_b.mean() - log_a.mean()
    error = np.sqrt((log_a.var(ddof=1) + log_b.var(ddof=1)) / len(a))
    margin = stats.t.ppf(0.975, len(a) - 1) * error
    return tuple(np.exp([mean, mean - margin, mean + margin]))


def speedup_of_a(a, b):
    return speedup_interval(b, a)


def spread_of_single_pairs(a, b):
    logs = np.log(b) - np.log(a)
    margin = stats.t.ppf(0.975, len(a) - 1) * logs.std(ddof=1)
    return tuple(np.exp([logs.mean(), logs.mean() - margin, logs.mean() + margin]))


def normal_distribution(a, b):
    logs = np.log(b) - np.log(a)
    margin = 1.96 * logs.std(ddof=1) / np.sqrt(len(a))
    return tuple(np.exp([logs.mean(), logs.mean() - margin, logs.mean() + margin]))


def population_deviation(a, b):
    logs = np.log(b) - np.log(a)
    margin = stats.t.ppf(0.975, len(a) - 1) * logs.std() / np.sqrt(len(a))
    return tuple(np.exp([logs.mean(), logs.mean() - margin, logs.mean() + margin]))


def still_logarithms(a, b):
    return tuple(np.log(speedup_interval(a, b)))


def pairs_that_meet_the_same_conditions(count):
    conditions = torch.exp(0.3 * torch.randn(count))
    a = conditions * torch.tensor(random_rates(count, spread=0.02))
    b = conditions * torch.tensor(random_rates(count, mean=120.0, spread=0.02))
    return a.tolist(), b.tolist()


TASKS["03.3"] = Task(
    reference=speedup_interval,
    inputs=lambda: [
        pairs_that_meet_the_same_conditions(5),
        pairs_that_meet_the_same_conditions(8),
    ],
    hints=[
        "log(b / a) = log(b) - log(a), and NumPy subtracts two arrays number by number. What is "
        "left is one number for each pair.",
        "`.mean()` and `.std(ddof=1)` of these numbers are m and s. Half of the width of the "
        "interval is t * s / sqrt(n).",
        "Return np.exp of m, of m minus this half, and of m plus it.",
    ],
    mistakes={
        as_if_unpaired: "The interval is too wide: it contains how the conditions changed from "
        "pair to pair. Subtract within each pair first.",
        speedup_of_a: "This is the speedup of A over B. It is the other way around.",
        spread_of_single_pairs: "This interval is for a single pair. That of a mean of n pairs is "
        "sqrt(n) times narrower.",
        normal_distribution: "1.96 is right if you know s exactly. You estimate it from a few "
        "pairs, so use Student's t.",
        population_deviation: "NumPy's `std` divides by n unless you ask for n - 1.",
        still_logarithms: "These are logarithms. Undo them with `np.exp`.",
    },
)


# 03.4: the FLOPs and the bytes of a convolution


def conv_cost(images, inputs, outputs, side, kernel):
    """The cost of a convolution without bias: (FLOPs, bytes).

    Input (images, inputs, side, side), weight (outputs, inputs, kernel, kernel), output (images,
    outputs, side, side). An output value takes a multiplication and an addition for each weight of
    its kernel. The input, the weight and the output are moved once each, at 4 bytes per number.
    """
    pixels = images * side * side
    weights = outputs * inputs * kernel * kernel
    flops = 2 * pixels * weights
    return flops, 4 * (pixels * inputs + weights + pixels * outputs)


def one_flop_per_weight(images, inputs, outputs, side, kernel):
    flops, moved = conv_cost(images, inputs, outputs, side, kernel)
    return flops // 2, moved


def one_input_channel(images, inputs, outputs, side, kernel):
    flops, moved = conv_cost(images, inputs, outputs, side, kernel)
    return flops // inputs, moved


def numbers_instead_of_bytes(images, inputs, outputs, side, kernel):
    flops, moved = conv_cost(images, inputs, outputs, side, kernel)
    return flops, moved // 4


def weights_for_each_image(images, inputs, outputs, side, kernel):
    flops, moved = conv_cost(1, inputs, outputs, side, kernel)
    return images * flops, images * moved


def no_output_bytes(images, inputs, outputs, side, kernel):
    flops, moved = conv_cost(images, inputs, outputs, side, kernel)
    return flops, moved - 4 * images * outputs * side * side


TASKS["03.4"] = Task(
    reference=conv_cost,
    inputs=lambda: [
        (64, 3, 16, 32, 3),
        (*torch.randint(2, 20, (3,)).tolist(), 8, 5),
    ],
    hints=[
        "Count the numbers first: those of the input, of the weights, and of the output.",
        "One output value needs all weights of one kernel: inputs x kernel x kernel of them, with "
        "two FLOPs each.",
        "FLOPs: the number of output values, times twice the weights of a kernel. Bytes: 4 times "
        "the sum of the three counts.",
    ],
    mistakes={
        one_flop_per_weight: "A weight costs a multiplication and an addition: two FLOPs.",
        one_input_channel: "A kernel has weights for each of the input channels.",
        numbers_instead_of_bytes: "You counted numbers. Each of them has 4 bytes.",
        weights_for_each_image: "All images use the same weights, which are moved once.",
        no_output_bytes: "The output must be written to memory, too.",
    },
)


# 03.5: the roofline


def roofline_limit(flops, moved, peak, bandwidth):
    """The largest FLOP/s that the roofline allows, and what sets the limit: "compute" or "memory".

    An operation computes `flops` FLOPs and moves `moved` bytes. The machine computes at most `peak`
    FLOP/s and moves at most `bandwidth` bytes/s, both at the same time. Return (limit, name).
    """
    memory_roof = flops / moved * bandwidth
    return (peak, "compute") if peak <= memory_roof else (memory_roof, "memory")


def larger_limit(flops, moved, peak, bandwidth):
    memory_roof = flops / moved * bandwidth
    return (peak, "compute") if peak > memory_roof else (memory_roof, "memory")


def one_after_another(flops, moved, peak, bandwidth):
    seconds = flops / peak + moved / bandwidth
    _, bound = roofline_limit(flops, moved, peak, bandwidth)
    return flops / seconds, bound


def inverted_intensity(flops, moved, peak, bandwidth):
    memory_roof = moved / flops * bandwidth
    return (peak, "compute") if peak <= memory_roof else (memory_roof, "memory")


def names_swapped(flops, moved, peak, bandwidth):
    limit, bound = roofline_limit(flops, moved, peak, bandwidth)
    return limit, "memory" if bound == "compute" else "compute"


TASKS["03.5"] = Task(
    reference=roofline_limit,
    inputs=lambda: [
        (1e6 + 1e6 * torch.rand(1).item(), 1e6, 1e11, 1e10),
        (5e7 + 4e7 * torch.rand(1).item(), 1e6, 1e11, 1e10),
    ],
    hints=[
        "There are two limits. One is the peak. What is the other one, if memory delivers "
        "`bandwidth` bytes each second, and each byte brings flops / moved FLOPs?",
        "No program can be above either limit, so the lower one counts.",
    ],
    mistakes={
        larger_limit: "This is the higher of the two limits. A program must respect both.",
        one_after_another: "You added up the times. Here the machine computes and moves data at "
        "the same time, so the longer of the two counts.",
        inverted_intensity: "The intensity is FLOPs per byte, not bytes per FLOP.",
        names_swapped: "The number is right. But if the peak is the lower limit, computing is what "
        "limits the operation.",
    },
)


# 03.6: a trace


def self_seconds(spans):
    """The self time of each operation, without the calls inside it: {name: seconds}.

    `spans` is the trace of one thread: a list of (name, start, end) of each call, in seconds. It is
    sorted by start, and an outer call comes before the calls inside it. Two calls are nested or do
    not overlap. Add up the calls with the same name.
    """
    seconds = {}
    open_calls = []  # the calls that contain this one, the outermost first
    for name, start, end in spans:
        while open_calls and open_calls[-1][1] <= start:
            open_calls.pop()
        if open_calls:
            seconds[open_calls[-1][0]] -= end - start
        seconds[name] = seconds.get(name, 0.0) + end - start
        open_calls.append((name, end))
    return seconds


def total_seconds(spans):
    seconds = {}
    for name, start, end in spans:
        seconds[name] = seconds.get(name, 0.0) + end - start
    return seconds


def minus_everything_inside(spans):
    seconds = total_seconds(spans)
    for name, start, end in spans:
        for other, begin, stop in spans:
            if start <= begin and stop <= end and other != name:
                seconds[name] -= stop - begin
    return seconds


def minus_from_the_outermost(spans):
    seconds = total_seconds(spans)
    outer, until = None, 0.0
    for name, start, end in spans:
        if start >= until:
            outer, until = name, end
        else:
            seconds[outer] -= end - start
    return seconds


def random_trace():
    """Two layers and an optimizer: calls inside calls, some at the very start of their parent."""
    a, b, c, d, e, f, g = random_seconds(7)
    layer = [("layer", 0, a + b + c + d), ("conv", 0, a + b), ("copy", a, a + b)]
    layer += [("relu", a + b, a + b + c)]
    begin = a + b + c + d + e
    step = [("step", begin, begin + f + g), ("copy", begin + f, begin + f + g)]
    shifted = [(name, start + begin + 1, end + begin + 1) for name, start, end in layer]
    return [*layer, *step, *shifted]


TASKS["03.6"] = Task(
    reference=self_seconds,
    inputs=lambda: [([("a", 0.0, 1.0), ("b", 0.2, 0.5)],), (random_trace(),), (random_trace(),)],
    hints=[
        "Go through the calls in order. Add the duration of each one to its own name, and subtract "
        "it from the call that contains it directly.",
        "Keep a list of the calls that are open, the innermost last. Before you look at a call, "
        "remove the open ones that ended at or before its start.",
        "The last of the remaining open calls is the direct parent, from which you subtract. For "
        "each open call, you only need its name and its end.",
    ],
    mistakes={
        total_seconds: "This counts the time of an inner call twice: for itself, and for the call "
        "that contains it.",
        minus_everything_inside: "You subtracted a call from all that contain it. Subtract it from "
        "its direct parent only.",
        minus_from_the_outermost: "You subtracted all inner calls from the outermost one. A call "
        "inside an inner call belongs to that one.",
    },
    atol=1e-9,
)


# 03.7: throughput


def throughput(batch_sizes, seconds):
    """Images/s of a run. Step i trains batch_sizes[i] images in seconds[i] seconds."""
    return sum(batch_sizes) / sum(seconds)


def mean_of_rates(batch_sizes, seconds):
    rates = [size / time for size, time in zip(batch_sizes, seconds, strict=True)]
    return sum(rates) / len(rates)


def steps_per_second(batch_sizes, seconds):
    return len(seconds) / sum(seconds)


def first_batch_size(batch_sizes, seconds):
    return batch_sizes[0] * len(seconds) / sum(seconds)


TASKS["03.7"] = Task(
    reference=throughput,
    inputs=lambda: [([64, 64, 64, 21], random_seconds(4)), ([32, 32, 10], random_seconds(3))],
    hints=[
        "How many images did the whole run train, and how many seconds did it take?",
    ],
    mistakes={
        mean_of_rates: "The mean of the rates counts a fast step as much as a slow one, although "
        "the run spends less time in it.",
        steps_per_second: "This is steps per second. Count images.",
        first_batch_size: "The last batch is smaller than the others.",
    },
)


# 03.8: a broken benchmark


def benchmark(programs, repeats, synchronize, clock):
    """Time the programs in the order A B B A A B ... Return {name: list of seconds}.

    `programs`: {name: a function that launches work}. Call each program once as a warm-up, then
    time `repeats` calls of each, until the device has finished.
    """
    seconds = {name: [] for name in programs}
    for call in programs.values():
        call()
    for number in range(repeats):
        names = list(programs)
        for name in names if number % 2 == 0 else reversed(names):
            synchronize()
            start = clock()
            programs[name]()
            synchronize()
            seconds[name].append(clock() - start)
    return seconds


def run_benchmark(function, seconds_a, seconds_b, repeats):
    """The times, the order of the timed calls, and whether there are calls before them."""
    device = Device()
    programs = {
        "A": Program(device, "A", [seconds_a]),
        "B": Program(device, "B", [seconds_b]),
    }
    seconds = function(programs, repeats, device.synchronize, device.clock)
    if seconds is None or seconds is ...:
        return seconds
    order = "".join(device.launched[-2 * repeats :])
    warm_up = "done" if len(device.launched) > 2 * repeats else "missing"
    return {"seconds": seconds, "order": order, "warm-up": warm_up}


def broken_benchmark(*bugs):
    """`benchmark` with some of its three mistakes."""

    def mistake(programs, repeats, synchronize, clock):
        seconds = {name: [] for name in programs}
        if "warm-up" not in bugs:
            for call in programs.values():
                call()
        wait = int if "clock" in bugs else synchronize  # int() does nothing
        for number in range(repeats):
            names = list(programs)
            if number % 2 == 1 and "order" not in bugs:
                names.reverse()
            for name in names:
                seconds[name] += time_calls(programs[name], wait, clock, 0, 1)
        return seconds

    mistake.__name__ = "_".join(bugs).replace("-", "_")
    return mistake


def waits_only_after_the_call(programs, repeats, synchronize, clock):
    seconds = {name: [] for name in programs}
    for call in programs.values():
        call()
    for number in range(repeats):
        names = list(programs)
        for name in names if number % 2 == 0 else reversed(names):
            start = clock()
            programs[name]()
            synchronize()
            seconds[name].append(clock() - start)
    return seconds


CLOCK_LEFT = "Has the device finished when the clock stops?"
ORDER_LEFT = "Which program goes first in the second round?"
WARMUP_LEFT = "Is the first call of a program timed?"

TASKS["03.8"] = Task(
    reference=benchmark,
    inputs=lambda: [(*random_seconds(2), 4), (*random_seconds(2), 3)],
    run=run_benchmark,
    hints=[
        "Compare it with `time_calls` and `measure_in_turn`. What do they do that this program "
        "does not?",
        "What happens in the first call of each program? When does the clock stop? Which program "
        "goes first in each round?",
        "Call each program once before the loops. Wait for the device before both readings of the "
        "clock. Go through the names backwards in every second round.",
    ],
    mistakes={
        broken_benchmark("warm-up", "clock", "order"): "All three mistakes are still there. One is "
        "before the first round, one is in the order, and one is in the clock.",
        broken_benchmark("clock", "order"): f"Two mistakes are left. {CLOCK_LEFT} {ORDER_LEFT}",
        broken_benchmark("warm-up", "order"): f"Two mistakes are left. {WARMUP_LEFT} {ORDER_LEFT}",
        broken_benchmark("warm-up", "clock"): f"Two mistakes are left. {WARMUP_LEFT} {CLOCK_LEFT}",
        broken_benchmark("clock"): f"One mistake is left. {CLOCK_LEFT}",
        broken_benchmark("order"): f"One mistake is left. {ORDER_LEFT}",
        broken_benchmark("warm-up"): f"One mistake is left. {WARMUP_LEFT}",
        waits_only_after_the_call: "The very first time also contains the warm-up: wait before you "
        "start the clock.",
    },
    atol=1e-9,
)


# 03.9: a decision


def decide(a, a_again, b):
    """Whether B is faster than A: "faster", "slower", "not significant" or "unreliable".

    The arguments are images/s, measured interleaved; `a` and `a_again` are the same program. The
    answer is "unreliable" if the 95% interval of `a_again` over `a` does not contain 1. Otherwise,
    B is "faster" or "slower" if the interval of `b` over `a` does not contain 1, and the difference
    is "not significant" if it does.
    """
    _, low, high = speedup_interval(a, a_again)
    if not low <= 1 <= high:
        return "unreliable"
    _, low, high = speedup_interval(a, b)
    if low <= 1 <= high:
        return "not significant"
    return "faster" if low > 1 else "slower"


def from_the_value_only(a, a_again, b):
    value, _, _ = speedup_interval(a, b)
    return "faster" if value > 1 else "slower"


def without_the_test(a, a_again, b):
    return decide(a, a, b)


def faster_if_the_upper_end_is(a, a_again, b):
    _, low, high = speedup_interval(a, a_again)
    if not low <= 1 <= high:
        return "unreliable"
    _, low, high = speedup_interval(a, b)
    return "faster" if high > 1 else "slower"


def three_runs(first, second, third):
    """Images/s of three runs with these means, which meet the same conditions in each pair."""
    conditions = torch.exp(0.2 * torch.randn(6))
    noise = torch.tensor([0.01, -0.01, 0.02, -0.02, 0.01, -0.01])[torch.randperm(6)]
    runs = torch.stack([first * (1 + noise), second * (1 - noise), third * (1 - noise)])
    return tuple((conditions * runs).tolist())


TASKS["03.9"] = Task(
    reference=decide,
    inputs=lambda: [
        three_runs(100, 100, 110),
        three_runs(100, 100, 99.5),
        three_runs(100, 100, 90),
        three_runs(100, 106, 110),
        three_runs(100, 100.2, 100.4),
    ],
    hints=[
        "Look at the A/A test first. If it finds a difference where there is none, the other "
        "comparison says nothing.",
        "`speedup_interval` returns (speedup, low, high). An interval contains 1 if low <= 1 and "
        "1 <= high.",
        "If the interval of B over A does not contain 1, it lies completely above 1 or completely "
        "below.",
    ],
    mistakes={
        without_the_test: "Here the A/A test finds a difference between A and A. The measurement "
        "is unreliable.",
        from_the_value_only: "You decided by the value alone. Use the interval: it says how far "
        "the value may be off.",
        faster_if_the_upper_end_is: "An interval from 0.99 to 1.02 contains 1, so the "
        "difference is not significant.",
    },
)
