"""Lesson 15, many machines: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

import math
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch

import cnnlab
from cnnlab import all_reduce_seconds
from cnnlab.check import Task

TASKS = {}


# 15.1: the number of a rank


def number_of_rank(node, local_rank, ranks_per_node):
    """The number of a rank, and how many ranks there are, as a tuple (RANK, WORLD_SIZE).

    `ranks_per_node`: how many ranks each node has, for example [4, 4, 2]. The rank is number
    `local_rank` on node number `node`; both count from 0. The ranks of node 0 have the first
    numbers, then come those of node 1, and so on.
    """
    return sum(ranks_per_node[:node]) + local_rank, sum(ranks_per_node)


def all_nodes_equal(node, local_rank, ranks_per_node):
    return node * ranks_per_node[node] + local_rank, sum(ranks_per_node)


def own_node_counted(node, local_rank, ranks_per_node):
    return sum(ranks_per_node[: node + 1]) + local_rank, sum(ranks_per_node)


def local_rank_only(node, local_rank, ranks_per_node):
    return local_rank, sum(ranks_per_node)


def nodes_as_world(node, local_rank, ranks_per_node):
    return sum(ranks_per_node[:node]) + local_rank, len(ranks_per_node)


TASKS["15.1"] = Task(
    reference=number_of_rank,
    inputs=lambda: [(2, 1, [4, 4, 2]), (0, 3, [4, 4]), (3, 5, [8, 2, 8, 8])],
    hints=[
        "How many ranks do the nodes before this one have together?",
        "Add up a slice of the list, from its beginning to this node, which is not counted. Then "
        "add the number of the rank in its node.",
    ],
    mistakes={
        all_nodes_equal: "This is right only if all nodes have the same number of ranks.",
        own_node_counted: "The ranks of this node were counted too. Add up those of the nodes "
        "before it.",
        local_rank_only: "Two ranks of different nodes would get the same number.",
        nodes_as_world: "The world size counts ranks, not nodes.",
    },
)


# 15.2: from Slurm to torchrun


def torchrun_command(slurm, hosts):
    """The start of the torchrun command for a node of a Slurm job, as a list of words.

    `slurm`: environment variables of the job on this node. `hosts`: the names of its nodes, the
    same list on all of them; the store runs on the first one. Each GPU gets one rank. The id
    names the run: use the number of the job.
    """
    job = slurm["SLURM_JOB_ID"]
    return [
        "torchrun",
        f"--nnodes={slurm['SLURM_NNODES']}",
        f"--nproc-per-node={slurm['SLURM_GPUS_ON_NODE']}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={hosts[0]}:{20000 + int(job) % 10000}",
        f"--rdzv-id={job}",
    ]


def jobs():
    for gpus in (8, 4):
        job = int(torch.randint(10_000, 99_999, ()))
        slurm = {
            "SLURM_JOB_ID": str(job),
            "SLURM_NNODES": "3",
            "SLURM_NTASKS": "3",
            "SLURM_GPUS_ON_NODE": str(gpus),
        }
        yield slurm, ["gpu17", "gpu18", "gpu40"]


def run_on_nodes(function, slurm, hosts):
    """The command on each node."""
    return {
        f"node {node}": function({**slurm, "SLURM_NODEID": str(node)}, hosts)
        for node in range(len(hosts))
    }


def with_options(slurm, hosts, **options):
    """The right command with other values for some options."""
    command = torchrun_command(slurm, hosts)
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}="
        command = [f"{option}{value}" if word.startswith(option) else word for word in command]
    return command


def own_endpoint(slurm, hosts):
    port = 20000 + int(slurm["SLURM_JOB_ID"]) % 10000
    return f"{hosts[int(slurm['SLURM_NODEID'])]}:{port}"


def three_options_wrong(slurm, hosts):
    """The broken program that the lesson shows."""
    node = slurm["SLURM_NODEID"]
    tasks = slurm["SLURM_NTASKS"]
    endpoint = own_endpoint(slurm, hosts)
    return with_options(
        slurm, hosts, nproc_per_node=tasks, rdzv_endpoint=endpoint, rdzv_id=f"node{node}"
    )


def everybody_waits_at_home(slurm, hosts):
    return with_options(slurm, hosts, rdzv_endpoint=own_endpoint(slurm, hosts))


def own_meeting(slurm, hosts):
    return with_options(slurm, hosts, rdzv_id=f"node{slurm['SLURM_NODEID']}")


def a_rank_for_each_task(slurm, hosts):
    return with_options(slurm, hosts, nproc_per_node=slurm["SLURM_NTASKS"])


def endpoint_and_id(slurm, hosts):
    command = three_options_wrong(slurm, hosts)
    command[2] = torchrun_command(slurm, hosts)[2]
    return command


TASKS["15.2"] = Task(
    reference=torchrun_command,
    inputs=jobs,
    run=run_on_nodes,
    hints=[
        "Write down what node 0 and node 1 execute. They can only meet if they go to the same "
        "place and ask for the same run. Which options differ?",
        "Slurm starts one task on each node, the torchrun. How many ranks must torchrun start on "
        "its node, if each GPU gets one rank?",
        "The place is the first name of the list. The name of the run is the number of the job.",
    ],
    mistakes={
        three_options_wrong: "Each node runs this function with its own SLURM_NODEID. Two options "
        "differ between the nodes, and must not. A third one counts the wrong thing.",
        everybody_waits_at_home: "Each node waits for the others at its own address. All must go "
        "to the same one.",
        own_meeting: "The nodes ask for different runs, so they do not find each other.",
        a_rank_for_each_task: "SLURM_NTASKS counts the tasks of all nodes, here one torchrun on "
        "each. How many GPUs does a node have?",
        endpoint_and_id: "The number of ranks is right. The endpoint and the id still differ "
        "between the nodes.",
    },
)


# 15.3: the images of a step


def images_of_step(step, batch_size, images, rank, world):
    """The numbers of the images on which a rank trains in a step, as a tensor.

    `images` is how many there are. Steps count from 0 and go on over the epochs; an epoch has
    images // batch_size of them. The order of the images in epoch e is
    `torch.randperm(images, generator=torch.Generator().manual_seed(e))`. Each step takes the next
    `batch_size` of them: its batch. The `world` ranks divide it into equal parts, in any way.
    """
    epoch, number = divmod(step, images // batch_size)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch))
    batch = order[number * batch_size : (number + 1) * batch_size]
    return batch[rank::world]


def run_in_worlds(function, step, batch_size, images):
    """The images of a step in worlds of 1, 2 and 4 ranks: those of each rank are counted."""
    outcome = {}
    for world in (1, 2, 4):
        parts = [function(step, batch_size, images, rank, world) for rank in range(world)]
        if not all(isinstance(part, torch.Tensor) for part in parts):
            return parts[0]
        outcome[f"images of each rank, world size {world}"] = [len(part) for part in parts]
        outcome[f"the batch, world size {world}"] = torch.cat(parts).sort().values
    return outcome


def one_order_for_all_epochs(step, batch_size, images, rank, world):
    return images_of_step(step % (images // batch_size), batch_size, images, rank, world)


def batch_for_each_rank(step, batch_size, images, rank, world):
    epoch, number = divmod(step, images // batch_size)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch))
    return order[rank::world][number * batch_size : (number + 1) * batch_size]


def same_images_in_all_ranks(step, batch_size, images, rank, world):
    return images_of_step(step, batch_size, images, 0, 1)


def order_from_the_global_generator(step, batch_size, images, rank, world):
    number = step % (images // batch_size)
    order = torch.randperm(images)
    return order[number * batch_size : (number + 1) * batch_size][rank::world]


def next_epoch_starts_late(step, batch_size, images, rank, world):
    epoch, number = divmod(step, images // batch_size + 1)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch))
    return order[number * batch_size : (number + 1) * batch_size][rank::world]


TASKS["15.3"] = Task(
    reference=images_of_step,
    inputs=lambda: [(7, 8, 50), (0, 4, 16), (13, 8, 50)],
    run=run_in_worlds,
    hints=[
        "First find the epoch of the step, and the number of the step in this epoch. The images "
        "must not depend on anything else, such as a variable that counts the calls.",
        "`divmod(a, b)` returns the quotient and the remainder. Make the order of the epoch, and "
        "cut the batch out of it with a slice.",
        "Cut the batch first, and divide it among the ranks afterwards. A slice with a step size, "
        "`[start::size]`, takes every size-th entry.",
    ],
    mistakes={
        one_order_for_all_epochs: "The second epoch has the same order as the first one. The seed "
        "is the number of the epoch.",
        batch_for_each_rank: "Each rank takes a whole batch, so the batch grows with the number "
        "of ranks. Cut the batch first, then divide it.",
        same_images_in_all_ranks: "All ranks train on the same images. Use `rank` and `world`.",
        order_from_the_global_generator: "The order depends on the random numbers that were drawn "
        "before. Give randperm a generator of its own, with the epoch as its seed.",
        next_epoch_starts_late: "An epoch has images // batch_size steps. Images that are left "
        "over are not used.",
    },
)


# 15.4: a checkpoint that is never half-written


def save_checkpoint(path, state):
    """Write `state` to the file `path` (a `Path`) so that a half-written file never has its name.

    First write it to another file in the same folder, whose name does not end with ".pt":
    `path.with_suffix` makes one. While this file is open, flush it, and wait with `os.fsync`
    until it is on the disk. When it is closed, rename it with `os.replace(old, new)`.
    """
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Crash:
    """An object that cannot be saved: as if the process ended in the middle of writing."""

    def __reduce__(self):
        raise OSError("crash")


def run_save(function, step):
    """What is in the folder after a crash during the second of two checkpoints."""
    calls = []
    folder = Path(tempfile.mkdtemp(prefix="cnnlab-"))
    rename = os.replace

    def replace(source, target, **options):
        calls.append("renamed")
        rename(source, target, **options)

    with (
        mock.patch.object(os, "fsync", lambda _: calls.append("on the disk")),
        mock.patch.object(os, "replace", replace),
        mock.patch.object(os, "rename", replace),
    ):
        function(folder / f"step-{step}.pt", {"step": step})
        written = sorted(path.name for path in folder.glob("*.pt"))
        saved = [torch.load(folder / name) for name in written]
        order = list(calls)
        try:
            function(folder / f"step-{step + 1}.pt", {"step": step + 1, "bad": Crash()})
        except OSError:
            after = sorted(path.name for path in folder.glob("*.pt"))
        else:
            after = written
    shutil.rmtree(folder)
    if not saved and not order:
        return None
    return {"saved": saved, "order": order, "checkpoints after a crash while writing": after}


def save_in_place(path, state):
    torch.save(state, path)


def not_on_the_disk(path, state):
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def renamed_too_early(path, state):
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
    os.replace(part, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def copied(path, state):
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.copy(part, path)


TASKS["15.4"] = Task(
    reference=save_checkpoint,
    inputs=lambda: [(5,), (20,)],
    run=run_save,
    hints=[
        "There are three steps: write to a file with a temporary name, wait until it is on the "
        "disk, rename it.",
        "`path.with_suffix('.part')` is a temporary name. Open that file with mode 'wb'; torch can "
        "save to an open file.",
        "Flush the open file: Python then hands its bytes to the operating system. os.fsync waits "
        "until these are on the disk; it takes file.fileno(). After the `with`, os.replace renames "
        "the file.",
    ],
    mistakes={
        save_in_place: "After a crash, a half-written file has the name of a checkpoint.",
        not_on_the_disk: "The file was renamed before its bytes were on the disk. If the machine "
        "loses power now, the name may be there and the bytes may not: os.fsync.",
        renamed_too_early: "os.fsync must come before the new name.",
        copied: "A copy takes time, and a crash can interrupt it. Renaming is one operation.",
    },
)


# 15.5: the newest checkpoint


def newest_checkpoint(folder):
    """The path of the newest complete checkpoint in `folder` (a `Path`), or None without one.

    Complete checkpoints are named step-N.pt, and the newest one has the largest number N. A name
    that ends with ".part" is a file that was not written to its end. `folder.glob(pattern)` finds
    paths, and the `stem` of a path is its name without the ending, such as "step-90".
    """
    paths = list(folder.glob("step-*.pt"))
    return max(paths, key=lambda path: int(path.stem.removeprefix("step-")), default=None)


def run_newest(function, complete, unfinished):
    """The name of the file that the function finds. The files' dates are misleading."""
    folder = Path(tempfile.mkdtemp(prefix="cnnlab-"))
    names = [f"step-{step}.pt" for step in complete] + [f"step-{step}.part" for step in unfinished]
    for age, name in enumerate(names):
        (folder / name).touch()
        os.utime(folder / name, (1e9 - 100 * age, 1e9 - 100 * age))
    found = function(folder)
    shutil.rmtree(folder)
    if found is None and not complete:
        return "no checkpoint"
    return getattr(found, "name", found)


def last_by_name(folder):
    return max(folder.glob("step-*.pt"), default=None)


def unfinished_ones_too(folder):
    paths = list(folder.glob("step-*"))
    return max(paths, key=lambda path: int(path.stem.removeprefix("step-")), default=None)


def last_by_date(folder):
    return max(folder.glob("step-*.pt"), key=lambda path: path.stat().st_mtime, default=None)


def none_forgotten(folder):
    return max(folder.glob("step-*.pt"), key=lambda path: int(path.stem.removeprefix("step-")))


TASKS["15.5"] = Task(
    reference=newest_checkpoint,
    inputs=lambda: [([5, 90, 100], [105]), ([1000, 995], []), ([], [5])],
    run=run_newest,
    hints=[
        "`folder.glob(pattern)` finds files by a pattern such as step-*.pt. Which of them has the "
        "largest number?",
        "`path.stem` is the name without its ending, 'step-90'. `'step-90'.removeprefix('step-')` "
        "is '90', a string. `int` makes a number of it.",
        "`max` takes a `key`, a function that computes the number of a path, and a `default` for "
        "an empty list. A loop that remembers the largest number is fine, too.",
    ],
    mistakes={
        last_by_name: "Strings are compared character by character, so 'step-90' comes after "
        "'step-100'. Compare the numbers.",
        unfinished_ones_too: "This file was not written to its end.",
        last_by_date: "The date of a file changes when it is copied. Use the number in its name.",
        none_forgotten: "The folder may be empty: then the result is None, and training starts "
        "from the beginning.",
    },
)


# 15.6: an all-reduce in a cluster


def hierarchical_seconds(size, nodes, per_node, inside, between):
    """Seconds of a hierarchical all-reduce of `size` bytes.

    `inside` and `between` are (latency in s, bandwidth in bytes/s) of the links inside a node and
    of the network between nodes. The two phases inside the nodes, the first and the last, take as
    long as one ring all-reduce of the `per_node` ranks of a node. The rings between the nodes
    share the network, so together they take as long as one ring of `nodes` ranks for all bytes.
    """
    inside_s = all_reduce_seconds(size, per_node, *inside)
    return inside_s + all_reduce_seconds(size, nodes, *between)


def flat_ring(size, nodes, per_node, inside, between):
    return all_reduce_seconds(size, nodes * per_node, *between)


def network_not_shared(size, nodes, per_node, inside, between):
    inside_s = all_reduce_seconds(size, per_node, *inside)
    return inside_s + all_reduce_seconds(size / per_node, nodes, *between)


def links_swapped(size, nodes, per_node, inside, between):
    inside_s = all_reduce_seconds(size, nodes, *inside)
    return inside_s + all_reduce_seconds(size, per_node, *between)


def at_the_same_time(size, nodes, per_node, inside, between):
    inside_s = all_reduce_seconds(size, per_node, *inside)
    return max(inside_s, all_reduce_seconds(size, nodes, *between))


def clusters():
    for nodes, per_node in ((4, 8), (2, 16), (1, 8)):
        speed = 1 + torch.rand(2).double()
        inside, between = (5e-6, 1e11 * speed[0].item()), (2e-5, 1e9 * speed[1].item())
        yield 102_400_000, nodes, per_node, inside, between


TASKS["15.6"] = Task(
    reference=hierarchical_seconds,
    inputs=clusters,
    hints=[
        "Add up two rings. `all_reduce_seconds(size, ranks, latency, bandwidth)` is the time of "
        "one.",
        "The ring inside a node has `per_node` ranks and fast links. The other one has a member "
        "for each node. Both are about all bytes.",
    ],
    mistakes={
        flat_ring: "This is one ring of all ranks, with many more messages over the network.",
        network_not_shared: "Each rank of a node sends its share of the bytes, but all of them use "
        "the same network. Together they send all bytes.",
        links_swapped: "The ring inside a node has `per_node` ranks; the one between the nodes has "
        "`nodes`.",
        at_the_same_time: "The phases follow one another: their times add up.",
    },
)


# 15.7: efficiency on paper


def predicted_efficiency(batch, images_per_s, communication_s):
    """The efficiency of a step: the time of one GPU alone, divided by the time in the cluster.

    Each GPU trains on `batch` images per step. One GPU alone trains on `images_per_s`, and 2/3
    of the time of its step is the backward pass. In the cluster, an all-reduce of
    `communication_s` seconds starts with the backward pass and runs at the same time. If it takes
    longer than the backward pass, the rest of it makes the step longer.
    """
    compute_s = batch / images_per_s
    exposed_s = max(0.0, communication_s - compute_s * 2 / 3)
    return compute_s / (compute_s + exposed_s)


def no_overlap(batch, images_per_s, communication_s):
    compute_s = batch / images_per_s
    return compute_s / (compute_s + communication_s)


def overlap_with_the_forward_pass(batch, images_per_s, communication_s):
    compute_s = batch / images_per_s
    return compute_s / max(compute_s, communication_s)


def efficiency_above_one(batch, images_per_s, communication_s):
    compute_s = batch / images_per_s
    return compute_s / (compute_s + communication_s - compute_s * 2 / 3)


def forward_pass_for_backward_pass(batch, images_per_s, communication_s):
    compute_s = batch / images_per_s
    return compute_s / (compute_s + max(0.0, communication_s - compute_s / 3))


def slowdown(batch, images_per_s, communication_s):
    return 1 / predicted_efficiency(batch, images_per_s, communication_s)


TASKS["15.7"] = Task(
    reference=predicted_efficiency,
    inputs=lambda: [(32, 400, 0.1), (128, 354, 0.02), (128, 354, 0.5), (16, 1000, 0.013)],
    hints=[
        "How long does the GPU compute? How long is the backward pass? How much of the all-reduce "
        "is left when the backward pass ends?",
        "What is left is 0 if the all-reduce is shorter than the backward pass: use max.",
    ],
    mistakes={
        no_overlap: "The all-reduce starts while the backward pass still runs. Subtract what it "
        "hides.",
        overlap_with_the_forward_pass: "There are no gradients to send in the forward pass. Only "
        "the backward pass hides communication.",
        efficiency_above_one: "The part that is left cannot be negative.",
        forward_pass_for_backward_pass: "The backward pass takes two thirds of the time of a step, "
        "the forward pass one third. Which one hides the all-reduce?",
        slowdown: "This is the slowdown. The efficiency is at most 1.",
    },
)


# 15.8: which rank failed first?


def failed_rank(log):
    """The rank that made a run fail. The others only report that a connection was closed.

    `log`: lines (seconds, rank, text) in any order. A line with "Error" reports an error. If it
    also has "Connection", it is a consequence: another rank was gone. Among the other errors, the
    earliest one is the cause. If there are none, the cause is the only rank without an error: it
    died before it could report one.
    """
    errors = [line for line in log if "Error" in line[2]]
    own = [line for line in errors if "Connection" not in line[2]]
    if own:
        return min(own)[1]
    [silent] = {line[1] for line in log} - {line[1] for line in errors}
    return silent


STEPS = [(0.1 * step, rank, f"step {step}") for step in range(1, 4) for rank in range(4)]
CLOSED = "RuntimeError: Connection closed by peer"


def logs():
    cause, late, first, other = torch.randperm(4).tolist()
    errors = [
        (0.52, late, CLOSED),
        (0.43, first, CLOSED),
        (0.61, other, "ValueError: expected 10 classes"),
        (0.45, cause, "OutOfMemoryError: tried to allocate 2.00 GiB"),
    ]
    yield [*STEPS, *errors], [*errors[:2], (0.9, other, CLOSED), *STEPS]


def run_on_logs(function, log, other_log):
    """The result for a log with errors of two ranks, and for one in which a rank is silent."""
    return {"first log": function(log), "second log": function(other_log)}


def first_line_with_error(log):
    return next(line[1] for line in log if "Error" in line[2])


def earliest_error_of_all(log):
    return min(line for line in log if "Error" in line[2])[1]


def own_error_that_comes_first_in_the_log(log):
    return next(line[1] for line in log if "Error" in line[2] and "Connection" not in line[2])


def dead_rank_not_found(log):
    own = [line for line in log if "Error" in line[2] and "Connection" not in line[2]]
    return min(own)[1] if own else None


TASKS["15.8"] = Task(
    reference=failed_rank,
    inputs=logs,
    run=run_on_logs,
    hints=[
        "Divide the lines with an error into two lists: consequences, and others.",
        "Lines are tuples that begin with the time, so `min` finds the earliest one.",
        "If all errors are consequences, compare two sets: the ranks in the log, and the ranks "
        "that reported an error. `a - b` is the difference of two sets.",
    ],
    mistakes={
        first_line_with_error: "The log is not sorted: outputs of several machines were merged.",
        earliest_error_of_all: "The first report came from a rank that only noticed that another "
        "one was gone.",
        own_error_that_comes_first_in_the_log: "Two ranks have an error of their own. Which one "
        "was earlier?",
        dead_rank_not_found: "A rank that is killed cannot report anything. Which rank is silent?",
    },
)


# 15.9: how often?


def checkpoint_interval(cost_s, host_mtbf_s, hosts):
    """Seconds between checkpoints that lose the least time: sqrt(2 * cost * MTBF) (Young, 1974).

    `cost_s`: seconds to write a checkpoint. MTBF: that of the run, which fails when any of its
    hosts fails. `hosts` is how many it has, and one host fails once in `host_mtbf_s` seconds, on
    average. A square root is x ** 0.5.
    """
    return math.sqrt(2 * cost_s * host_mtbf_s / hosts)


def mtbf_of_one_host(cost_s, host_mtbf_s, hosts):
    return math.sqrt(2 * cost_s * host_mtbf_s)


def more_hosts_fail_less(cost_s, host_mtbf_s, hosts):
    return math.sqrt(2 * cost_s * host_mtbf_s * hosts)


def root_forgotten(cost_s, host_mtbf_s, hosts):
    return 2 * cost_s * host_mtbf_s / hosts


def divided_after_the_root(cost_s, host_mtbf_s, hosts):
    return math.sqrt(2 * cost_s * host_mtbf_s) / hosts


TASKS["15.9"] = Task(
    reference=checkpoint_interval,
    inputs=lambda: [(30.0, 1e8, 100), (5.0, 1e7, 1), (60.0, 1.5e8, 2048)],
    hints=[
        "If one host fails once in three years, how often does one of 1,000 hosts fail?",
        "The MTBF of the run is that of a host, divided by the number of hosts.",
    ],
    mistakes={
        mtbf_of_one_host: "The run fails when any host fails, so more hosts fail more often.",
        more_hosts_fail_less: "With more hosts, the time between failures gets shorter.",
        root_forgotten: "The interval is the square root of this.",
        divided_after_the_root: "The number of hosts changes the MTBF, which is under the root.",
    },
)


# 15.10: what to buy


def cheapest_cluster(offers, target):
    """The cheapest cluster that trains at least `target` images/s: (name of the offer, devices).

    `offers`: {name: (spec, price)}, with the price of one device and its share of the network.
    `cnnlab.predict(spec)["predictions"]` is a list of dicts, one for each number of devices that
    you can buy: "devices" is this number, and "images_per_s" is that of all of them together. At
    least one cluster reaches the target.
    """
    found = []
    for name, (spec, price) in offers.items():
        for row in cnnlab.predict(spec)["predictions"]:
            if row["images_per_s"] >= target:
                found.append((price * row["devices"], name, row["devices"]))
    return min(found)[1:]


def make_offer(images_per_s, network_gbps, price):
    spec = {
        "model": {"parameters": 25.6e6, "bytes_per_parameter": 4},
        "device": {"images_per_s": images_per_s, "batch": 32},
        "node": {"devices": 8, "bandwidth_gbps": 1200, "latency_us": 5},
        "network": {"bandwidth_gbps": network_gbps, "latency_us": 20},
        "devices": [8, 16, 32, 64, 128, 256],
    }
    return spec, price


def offers_and_target():
    factor = (0.95 + 0.1 * torch.rand(())).item()
    offers = {
        "fast GPUs, slow network": make_offer(1000, 10, 1.6 * factor),
        "slow GPUs, fast network": make_offer(400, 100, 1.1),
        "fast GPUs, fast network": make_offer(1000, 200, 4.5),
        "old GPUs, slow network": make_offer(150, 10, 0.8),
    }
    yield offers, 20_000.0
    yield offers, 5_000.0


def network_forgotten(offers, target):
    found = []
    for name, (spec, price) in offers.items():
        for devices in spec["devices"]:
            if devices * spec["device"]["images_per_s"] >= target:
                found.append((price * devices, name, devices))
    return min(found)[1:]


def rows_of(offers, target):
    for name, (spec, price) in offers.items():
        for row in cnnlab.predict(spec)["predictions"]:
            if row["images_per_s"] >= target:
                yield price * row["devices"], name, row


def fewest_devices(offers, target):
    return min((row["devices"], name) for _, name, row in rows_of(offers, target))[::-1]


def fastest_cluster(offers, target):
    rate, name, devices = max(
        (row["images_per_s"], name, row["devices"]) for _, name, row in rows_of(offers, target)
    )
    return name, devices


def cheapest_device(offers, target):
    name = min(offers, key=lambda name: offers[name][1])
    return min((row["devices"], n) for _, n, row in rows_of(offers, target) if n == name)[::-1]


TASKS["15.10"] = Task(
    reference=cheapest_cluster,
    inputs=offers_and_target,
    hints=[
        "Go through all offers, and in each through all predictions. Which of them are fast "
        "enough? What does each cost?",
        "Collect tuples that begin with the price of the whole cluster. `min` compares tuples by "
        "their first entry.",
    ],
    mistakes={
        network_forgotten: "N devices are not N times as fast as one. Use the predicted images/s.",
        fewest_devices: "This is the cluster with the fewest devices. Compare prices.",
        fastest_cluster: "This cluster is faster than needed. Take the cheapest one that reaches "
        "the target.",
        cheapest_device: "This device has the lowest price, but the cluster needs more of them.",
    },
)
