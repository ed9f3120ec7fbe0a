"""Lesson 13, large batches and asynchronous training: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

import copy
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from cnnlab.check import Task
from cnnlab.launch.task_ranks import call_in_ranks

TIMEOUT_S = 12  # Three ranks need about 0.5 s, and seconds on a busy machine.
TASKS = {}


def by_rank(call, world):
    """What `call()` returns in each of `world` ranks."""
    return call_in_ranks(call, world, TIMEOUT_S)


def random_integers(low, high, count):
    return torch.randint(low, high, (count,)).tolist()


# 13.1: time to accuracy


def time_to_accuracy(times, accuracies, target, window):
    """The first time at which the mean of the last `window` accuracies is at least `target`.

    `times` and `accuracies` are lists with an item for each evaluation, in their order. A mean
    needs `window` evaluations; its time is that of the last one. Return infinity,
    `float("inf")`, if no mean reaches the target.
    """
    for end in range(window, len(times) + 1):
        if sum(accuracies[end - window : end]) / window >= target:
            return times[end - 1]
    return float("inf")


def curves():
    yield [5, 10, 15, 20, 25, 30], [0.5, 0.96, 0.7, 0.96, 0.97, 0.98], 0.95, 3
    yield [1, 2, 3, 4, 5], [0.8, 0.92, 0.94, 0.95, 0.88], 0.9, 2
    yield [1, 2, 3, 4], [0.2, 0.97, 0.3, 0.96], 0.9, 2
    times = torch.rand(40).cumsum(0).tolist()
    yield times, torch.linspace(0.1, 1, 40).add(0.2 * torch.rand(40)).tolist(), 0.9, 5


def single_evaluation(times, accuracies, target, window):
    return time_to_accuracy(times, accuracies, target, 1)


def start_of_the_window(times, accuracies, target, window):
    end = time_to_accuracy(times, accuracies, target, window)
    return end if end == float("inf") else times[times.index(end) - window + 1]


def best_mean(times, accuracies, target, window):
    ends = range(window, len(times) + 1)
    best = max(ends, key=lambda end: sum(accuracies[end - window : end]))
    return times[best - 1]


def end_of_training(times, accuracies, target, window):
    return times[-1]


TASKS["13.1"] = Task(
    reference=time_to_accuracy,
    inputs=curves,
    hints=[
        "Go through the evaluations in their order. At which one is the first mean complete?",
        "A slice has the last accuracies before position `end`: it starts at `end - window`. "
        "Which time belongs to its last item?",
        "The ends go from `window` to the length of the lists, included. Return the time inside of "
        "the loop, and infinity after it.",
    ],
    mistakes={
        single_evaluation: "This is the first single accuracy that reaches the target. It may be "
        "luck: take the mean of the last evaluations.",
        start_of_the_window: "At this time, the mean is not known yet. Return the time of the last "
        "evaluation in the mean.",
        best_mean: "This is the time of the highest mean. Return the first time that is enough.",
        end_of_training: "This is the time of the last evaluation. When was the target reached?",
    },
)


# 13.2: the learning rate of a large batch


def learning_rate(step, batch_size, warmup_steps, base_rate, base_batch):
    """The learning rate of a step (from 0), with linear scaling and a linear warm-up.

    `base_rate` is right for batches of `base_batch` images. The rate for `batch_size` images is
    larger by the same factor as the batch. The warm-up begins with `base_rate` at step 0, adds the
    same amount in each step, and reaches the rate for `batch_size` at step `warmup_steps` (at
    least 1). Afterwards, the rate is constant. Source: Goyal et al. (2017), sections 2.1 and 2.2.
    """
    scaled = base_rate * batch_size / base_batch
    progress = min(1.0, step / warmup_steps)
    return base_rate + progress * (scaled - base_rate)


def steps_of_a_warmup():
    for step in (0, 3, 10, 25):
        yield step, 512, 10, 0.05, 32
    yield *random_integers(1, 40, 1), 8 * random_integers(2, 9, 1)[0], 40, 0.1, 8


def no_warmup(step, batch_size, warmup_steps, base_rate, base_batch):
    return base_rate * batch_size / base_batch


def from_zero(step, batch_size, warmup_steps, base_rate, base_batch):
    return min(1.0, step / warmup_steps) * base_rate * batch_size / base_batch


def without_an_end(step, batch_size, warmup_steps, base_rate, base_batch):
    return base_rate + step / warmup_steps * base_rate * (batch_size / base_batch - 1)


def square_root(step, batch_size, warmup_steps, base_rate, base_batch):
    scaled = base_rate * (batch_size / base_batch) ** 0.5
    return base_rate + min(1.0, step / warmup_steps) * (scaled - base_rate)


def base_rate_added(step, batch_size, warmup_steps, base_rate, base_batch):
    return base_rate + min(1.0, step / warmup_steps) * base_rate * batch_size / base_batch


TASKS["13.2"] = Task(
    reference=learning_rate,
    inputs=steps_of_a_warmup,
    hints=[
        "First compute the rate after the warm-up: by which factor is the batch larger?",
        "`step / warmup_steps` is the share of the warm-up that is over. After the warm-up, it "
        "must stay 1: use `min`.",
        "The rate is the base rate, plus this share of the difference between both rates.",
    ],
    mistakes={
        no_warmup: "This is the rate after the warm-up. At step 0, it must be the base rate.",
        from_zero: "This warm-up begins with 0. It must begin with the base rate.",
        without_an_end: "After the warm-up, the rate must stay constant. Yours keeps growing.",
        square_root: "The rate grows with the square root of the batch size. Linear scaling: "
        "twice the batch, twice the rate.",
        base_rate_added: "After the warm-up, your rate is too large by the base rate. The warm-up "
        "adds the difference between both rates.",
    },
)


# 13.3: the gradient noise scale


def noise_scale(small, large, small_batch, large_batch):
    """The gradient noise scale: the noise tr(S) divided by the signal |G|^2, as a float.

    `small` (draws, n) has a row for each batch of `small_batch` images: its gradient. `large` has
    the same for `large_batch` images. For batches of B images, the mean of the squared norms of
    the rows is about |G|^2 + tr(S) / B. (The squared norm is the sum of the squares.) Solve the two
    equations for |G|^2 and tr(S). `.item()` makes a float of a tensor.
    Source: McCandlish et al. (2018), appendix A.1.
    """
    small_norm = small.square().sum(dim=1).mean()
    large_norm = large.square().sum(dim=1).mean()
    noise = (small_norm - large_norm) / (1 / small_batch - 1 / large_batch)
    signal = (large_batch * large_norm - small_batch * small_norm) / (large_batch - small_batch)
    return (noise / signal).item()


def gradients():
    for small_batch, large_batch in ((4, 64), (8, 128)):
        signal, noise = torch.randn(30), torch.randn(2, 20, 30)
        small = signal + 2 * noise[0] / small_batch**0.5
        yield small, signal + 2 * noise[1] / large_batch**0.5, small_batch, large_batch


def signal_from_large_batches(small, large, small_batch, large_batch):
    small_norm = small.square().sum(dim=1).mean()
    large_norm = large.square().sum(dim=1).mean()
    noise = (small_norm - large_norm) / (1 / small_batch - 1 / large_batch)
    return (noise / large_norm).item()


def norms_of_the_means(small, large, small_batch, large_batch):
    means = [rows.mean(dim=0, keepdim=True) for rows in (small, large)]
    return noise_scale(*means, small_batch, large_batch)


def norms_without_square(small, large, small_batch, large_batch):
    norms = [rows.norm(dim=1, keepdim=True).sqrt() for rows in (small, large)]
    return noise_scale(*norms, small_batch, large_batch)


def signal_over_noise(small, large, small_batch, large_batch):
    return 1 / noise_scale(small, large, small_batch, large_batch)


TASKS["13.3"] = Task(
    reference=noise_scale,
    inputs=gradients,
    hints=[
        "First compute two numbers: the mean of the squared norms of the rows, for the small and "
        "for the large batches. A squared norm is the sum of the squares of a row.",
        "If you subtract the two equations, |G|^2 disappears. What is left has tr(S) and the "
        "difference of 1 / small_batch and 1 / large_batch.",
        "If you multiply each equation by its batch size and subtract them, tr(S) disappears. "
        "What is left is |G|^2 times the difference of the batch sizes.",
    ],
    mistakes={
        signal_from_large_batches: "The squared norm of a large batch's gradient is not yet the "
        "signal: it still has a part of the noise. Solve for |G|^2 too.",
        norms_of_the_means: "The gradients were averaged before the norm. This removes the noise "
        "that you want to measure. Compute the squared norm of each row, then the mean.",
        norms_without_square: "These are means of norms. The equations are about squared norms.",
        signal_over_noise: "This is the signal divided by the noise.",
    },
)


# 13.4: local SGD


def local_sgd_round(model, optimizer, batches):
    """Train alone on `batches`, then average the parameters over all ranks. Return nothing.

    `batches` is a list of (images, labels) of this rank. Take one step of the optimizer for each
    of them, without any message; the loss is the cross-entropy. Then replace each parameter, in
    place and under `torch.no_grad()`, by its mean over the ranks: `dist.all_reduce` adds up.
    """
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            dist.all_reduce(parameter)
            parameter /= dist.get_world_size()


def local_batches():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
    own = [(torch.randn(4, 1, 8, 8), torch.randint(10, (4,))) for _ in range(6)]
    yield model, [own[:3], own[3:]]


def run_round(function, model, batches):
    """The parameters of each rank after one round."""

    def call():
        network = copy.deepcopy(model)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        function(network, optimizer, batches[dist.get_rank()])
        pairs = zip(network.parameters(), model.parameters(), strict=True)
        if all(torch.equal(after, before) for after, before in pairs):
            return None
        return [parameter.detach() for parameter in network.parameters()]

    return by_rank(call, 2)


def train_alone(model, optimizer, batches):
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def synchronous_steps(model, optimizer, batches):
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()


def added_parameters(model, optimizer, batches):
    train_alone(model, optimizer, batches)
    with torch.no_grad():
        for parameter in model.parameters():
            dist.all_reduce(parameter)


def without_zero_grad(model, optimizer, batches):
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    local_sgd_round(model, optimizer, [])


TASKS["13.4"] = Task(
    reference=local_sgd_round,
    inputs=local_batches,
    run=run_round,
    hints=[
        "Two loops, one after the other: the training loop of lesson 02, then a loop over the "
        "parameters with one collective for each.",
        "`dist.all_reduce(tensor)` replaces a tensor by the sum over all ranks, in place. What is "
        "missing for a mean?",
        "Autograd must not record the averaging: use `with torch.no_grad():` for the second loop.",
    ],
    mistakes={
        train_alone: "The ranks have different parameters afterwards. Average the parameters; "
        "averaging the gradients after the last step changes nothing.",
        synchronous_steps: "The gradients were averaged in each step. This is synchronous "
        "training. Here the ranks communicate only after the last batch.",
        added_parameters: "The parameters were added, not averaged. Divide by the number of ranks.",
        without_zero_grad: "The gradients of earlier batches are still there, so they add up. "
        "Clear them in each step.",
    },
)


# 13.5: a parameter server


def serve(parameters, learning_rate, updates):
    """Be the parameter server, in rank 0. Return the ranks that sent gradients, in their order.

    Do `updates` times: receive a gradient (n,) from any rank, subtract learning_rate * gradient
    from `parameters` (n,), in place, and send the parameters to the rank whose gradient it was.
    `dist.recv` needs a tensor to write into, such as `torch.empty_like(parameters)`.
    """
    order = []
    gradient = torch.empty_like(parameters)
    for _ in range(updates):
        worker = dist.recv(gradient)
        parameters -= learning_rate * gradient
        dist.send(parameters, worker)
        order.append(worker)
    return order


def gradients_of_workers():
    yield torch.randn(6), torch.randn(2, 3, 3), 0.5
    yield torch.randn(8), torch.randn(2, 2, 4), 0.1


def run_server(function, parameters, gradients, learning_rate):
    """What the server has at the end, and what two workers receive.

    `gradients` (worker, step, n / 2): a worker changes only its half of the parameters, so that the
    result does not depend on the order, which is random.
    """
    workers, steps, half = gradients.shape

    def call():
        rank = dist.get_rank()
        if rank == 0:
            after = parameters.clone()
            order = function(after, learning_rate, workers * steps)
            if torch.equal(after, parameters):
                raise NotImplementedError
            return {"parameters": after, "order, sorted": order and sorted(order)}
        own = slice((rank - 1) * half, rank * half)
        received, copied = [], torch.empty_like(parameters)
        for values in gradients[rank - 1]:
            gradient = torch.zeros_like(parameters)
            gradient[own] = values
            dist.send(gradient, 0)
            dist.recv(copied, 0)
            received.append(copied[own].clone())
        return {"received": received}

    return by_rank(call, 1 + workers)


def gradient_added(parameters, learning_rate, updates):
    return serve(parameters, -learning_rate, updates)


def sent_before_the_update(parameters, learning_rate, updates):
    order, gradient = [], torch.empty_like(parameters)
    for _ in range(updates):
        worker = dist.recv(gradient)
        dist.send(parameters, worker)
        parameters -= learning_rate * gradient
        order.append(worker)
    return order


def no_learning_rate(parameters, learning_rate, updates):
    return serve(parameters, 1.0, updates)


TASKS["13.5"] = Task(
    reference=serve,
    inputs=gradients_of_workers,
    run=run_server,
    hints=[
        "One loop with three parts: receive, update, send. A tensor for the gradient must exist "
        "before you can receive into it.",
        "`dist.recv(tensor)` without a rank waits for a message from any rank, and returns the "
        "rank that has sent it.",
        "The update must be in place: `parameters -= ...`. Append the sender to a list, and return "
        "this list after the loop.",
    ],
    mistakes={
        gradient_added: "The parameters moved along the gradient. Subtract it.",
        sent_before_the_update: "The worker gets the parameters before its own update. First "
        "update, then send.",
        no_learning_rate: "Multiply the gradient by the learning rate.",
    },
)


# 13.6: staleness


def staleness(order):
    """The staleness of each update: a list of numbers.

    `order` has the rank of each update, such as [1, 2, 1, 1, 2]. All ranks read the parameters at
    the start, and each reads them again right after its own update. The staleness of an update is
    the number of updates by others since its rank has last read the parameters.
    """
    read_at, found = {}, []
    for number, rank in enumerate(order):
        found.append(number - read_at.get(rank, 0))
        read_at[rank] = number + 1
    return found


def orders():
    yield ([1, 2, 1, 1, 2],)
    yield ([1, 2, 3, 1, 2, 3, 1, 2, 3],)
    yield (random_integers(1, 5, 12),)


def own_update_counted(order):
    last = {}
    found = []
    for number, rank in enumerate(order):
        found.append(number - last.get(rank, 0))
        last[rank] = number
    return found


def since_the_start(order):
    return [sum(other != rank for other in order[:number]) for number, rank in enumerate(order)]


def updates_of_all(order):
    return list(range(len(order)))


TASKS["13.6"] = Task(
    reference=staleness,
    inputs=orders,
    hints=[
        "Before update number k (from 0), there were k updates. How many of them did the rank "
        "already know when it last read the parameters?",
        "Keep a dictionary: for each rank, the number of updates at the time when it last read. A "
        "rank that is not in it has read at the start, after 0 updates.",
        "The staleness is a difference of two numbers. After the rank's own update number k, there "
        "are k + 1 updates, and it reads again.",
    ],
    mistakes={
        own_update_counted: "A rank's own update was counted. It reads again after this update, so "
        "it knows it.",
        since_the_start: "These are all updates by others. Those before the rank's last read do "
        "not count, because it knows them.",
        updates_of_all: "These are all updates so far. Only those since the rank's last read "
        "count.",
    },
)


# 13.7: throughput with a straggler


def throughput(step_s, images):
    """Predict images/s of all ranks together: (synchronous training, asynchronous training).

    `step_s` has the seconds that each rank needs for one of its steps if it waits for nobody. In
    each step, a rank trains on `images` images. Messages take no time.
    """
    synchronous = len(step_s) * images / max(step_s)
    asynchronous = sum(images / seconds for seconds in step_s)
    return synchronous, asynchronous


def step_times():
    yield [0.005, 0.025], 32
    yield [0.01] * 7 + [0.1], 64
    yield (0.01 + 0.05 * torch.rand(4)).tolist(), 16


def mean_of_steps(step_s, images):
    return len(step_s) * images / (sum(step_s) / len(step_s)), throughput(step_s, images)[1]


def one_rank_only(step_s, images):
    return images / max(step_s), throughput(step_s, images)[1]


def everyone_as_the_fastest(step_s, images):
    return throughput(step_s, images)[0], len(step_s) * images / min(step_s)


def everyone_as_the_mean(step_s, images):
    seconds = sum(step_s) / len(step_s)
    return throughput(step_s, images)[0], len(step_s) * images / seconds


TASKS["13.7"] = Task(
    reference=throughput,
    inputs=step_times,
    hints=[
        "Synchronous: how long does one step take for all ranks, and how many images do they "
        "train on in this time?",
        "Asynchronous: how many images/s does each rank reach alone? Nobody waits, so the rates "
        "add up.",
        "Synchronous: the number of ranks times the images of one rank, divided by the time of the "
        "slowest rank. Asynchronous: a sum with one fraction for each rank.",
    ],
    mistakes={
        mean_of_steps: "A synchronous step does not take as long as the mean step: all ranks wait "
        "for the slowest one.",
        one_rank_only: "These are the images of one rank. All ranks train at the same time.",
        everyone_as_the_fastest: "In asynchronous training, a slow rank stays slow. Only the "
        "others do not wait for it.",
        everyone_as_the_mean: "A rate of the mean time is not the sum of the rates. Compute the "
        "rate of each rank first.",
    },
)


# 13.8: find the straggler


def find_straggler(waiting):
    """The number of the slowest rank.

    `waiting` has a list for each rank: the seconds that it has spent in the all-reduce, for each
    step. A rank may be late once for another reason, so compare the medians.
    """
    medians = [median(seconds) for seconds in waiting]
    return medians.index(min(medians))


def traces():
    for count in (4, 8):
        straggler = random_integers(0, count, 1)[0]
        waiting = 0.02 + 0.002 * torch.rand(count, 9)
        waiting[straggler] = 0.001 * torch.rand(9)
        waiting[straggler, 3] = 5.0  # once, another rank was late
        yield (waiting.tolist(),)


def longest_wait(waiting):
    medians = [median(seconds) for seconds in waiting]
    return medians.index(max(medians))


def shortest_mean(waiting):
    sums = [sum(seconds) for seconds in waiting]
    return sums.index(min(sums))


TASKS["13.8"] = Task(
    reference=find_straggler,
    inputs=traces,
    hints=[
        "The all-reduce ends when the last rank has arrived. Who waits for a short time then?",
        "Compute the median of each rank's list. `statistics.median` does it.",
        "`medians.index(value)` is the position of a value in a list, which is the rank here.",
    ],
    mistakes={
        longest_wait: "This rank waits the longest, so it is early. For whom does it wait?",
        shortest_mean: "One long wait changes a mean, but not a median.",
    },
)


# 13.9: a fair comparison


def speedup_to_accuracy(ours, baseline, target):
    """The speedup of `ours` over `baseline` in time to accuracy: the median over the seeds.

    Both are lists with a run for each seed, in the same order. A run has three lists: "seconds",
    "train" (accuracy on training images) and "held out" (accuracy on held-out images). For each
    seed, divide the time to accuracy of the baseline by that of ours, with a window of 2.
    """
    factors = []
    for our_run, base_run in zip(ours, baseline, strict=True):
        our_s, base_s = (
            time_to_accuracy(run["seconds"], run["held out"], target, 2)
            for run in (our_run, base_run)
        )
        factors.append(base_s / our_s)
    return median(factors)


def random_run(pace):
    seconds = (pace * (0.5 + torch.rand(30))).cumsum(0)
    held_out = torch.linspace(0.5, 1, 30) - 0.05 * torch.rand(30)
    train = (held_out + 0.1 * torch.rand(30)).clamp(max=1)
    lists = {"seconds": seconds, "train": train, "held out": held_out}
    return {name: values.tolist() for name, values in lists.items()}


def runs_of_seeds():
    for count in (3, 5):
        ours = [random_run(0.8) for _ in range(count)]
        yield ours, [random_run(1.0) for _ in range(count)], 0.9


def not_repaired(ours, baseline, target):
    our_s = [time_to_accuracy(run["seconds"], run["train"], target, 2) for run in ours]
    base_s = [time_to_accuracy(run["seconds"], run["held out"], target, 2) for run in baseline]
    return max(base_s) / min(our_s)


def best_of_ours(ours, baseline, target):
    our_s = [time_to_accuracy(run["seconds"], run["held out"], target, 2) for run in ours]
    base_s = [time_to_accuracy(run["seconds"], run["held out"], target, 2) for run in baseline]
    return max(base_s) / min(our_s)


def on_training_images(ours, baseline, target):
    swapped = [[{**run, "held out": run["train"]} for run in runs] for runs in (ours, baseline)]
    return speedup_to_accuracy(*swapped, target)


def different_accuracies(ours, baseline, target):
    swapped = [{**run, "held out": run["train"]} for run in ours]
    return speedup_to_accuracy(swapped, baseline, target)


def best_of_both(ours, baseline, target):
    our_s = [time_to_accuracy(run["seconds"], run["held out"], target, 2) for run in ours]
    base_s = [time_to_accuracy(run["seconds"], run["held out"], target, 2) for run in baseline]
    return min(base_s) / min(our_s)


TASKS["13.9"] = Task(
    reference=speedup_to_accuracy,
    inputs=runs_of_seeds,
    hints=[
        "Imagine that `ours` and `baseline` are the same runs. A fair program then returns 1. "
        "Which lines of this program would favor one side?",
        "Both sides need the same accuracy, and it must say how good the network is at images "
        "that it has never seen.",
        "Compare the runs of the same seed with each other: a factor for each seed. Then the "
        "median of these factors: `statistics.median`.",
    ],
    mistakes={
        not_repaired: "At least two things are unfair. Which accuracy does each side use? And "
        "which of its runs?",
        best_of_ours: "One side still uses its best seed, and the other one its worst.",
        on_training_images: "Both sides use the accuracy on images that they were trained on.",
        different_accuracies: "The two sides use different accuracies.",
        best_of_both: "The best seed of each side is not a typical run. Use all seeds.",
    },
)


# 13.10: stale synchronous parallel


def updates_made(step_ms, bound, milliseconds):
    """The number of updates of each rank, a list, under stale synchronous parallel.

    Rank r needs `step_ms[r]` milliseconds for a step, and makes one update at its end. It may work
    only while it is at most `bound` updates ahead of the rank with the fewest updates; otherwise it
    waits. Go through the milliseconds one by one. At the start of each, decide which ranks may
    work, all of them from the same numbers of updates.
    """
    updates = [0] * len(step_ms)
    left = list(step_ms)
    for _ in range(milliseconds):
        slowest = min(updates)
        for rank, needed in enumerate(step_ms):
            if updates[rank] - slowest <= bound:
                left[rank] -= 1
                if left[rank] == 0:
                    updates[rank] += 1
                    left[rank] = needed
    return updates


def simulations():
    yield [5, 25], 0, 1000
    yield [5, 25], 2, 1000
    yield [5, 25], float("inf"), 1000
    yield random_integers(3, 30, 4), 1, 500


def never_waits(step_ms, bound, milliseconds):
    return updates_made(step_ms, float("inf"), milliseconds)


def too_strict(step_ms, bound, milliseconds):
    return updates_made(step_ms, bound - 1, milliseconds)


def one_more(step_ms, bound, milliseconds):
    return updates_made(step_ms, bound + 1, milliseconds)


def always_synchronous(step_ms, bound, milliseconds):
    return updates_made(step_ms, 0, milliseconds)


TASKS["13.10"] = Task(
    reference=updates_made,
    inputs=simulations,
    hints=[
        "Keep two lists with an item for each rank: how many updates it has made, and how many "
        "milliseconds of its current step are left.",
        "In each millisecond, first take the smallest number of updates. Then, for each rank that "
        "may work, reduce what is left of its step by 1.",
        "When nothing is left of a step, count one update of this rank, and start its next step "
        "with all of its milliseconds.",
    ],
    mistakes={
        never_waits: "No rank ever waits. Use the bound.",
        too_strict: "A rank may be exactly `bound` updates ahead and still work. With a bound of "
        "0, your ranks never start.",
        one_more: "A rank that is more than `bound` updates ahead must wait.",
        always_synchronous: "The fast rank makes as many updates as with a bound of 0. Use the "
        "bound.",
    },
)
