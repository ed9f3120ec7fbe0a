"""Lesson 16, the whole ladder: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

import math
import random
from itertools import combinations

import numpy as np
from scipy.stats import t

import cnnlab
from cnnlab import Recipe
from cnnlab.check import Task

TASKS = {}


# 16.1: when a technique pays


def pays(speedups):
    """Return True if the whole 95% confidence interval of the mean speedup is above 1."""
    logs = np.log(speedups)
    n = len(logs)
    half = t.ppf(0.975, n - 1) * logs.std(ddof=1) / np.sqrt(n)
    return bool(logs.mean() - half > 0)


def speedups():
    yield ([1.10, 1.12, 1.09],)
    yield ([1.50, 0.90, 1.20],)
    yield ([1.02, 1.30, 1.25],)  # all above 1, and no proof
    yield ([0.99, 1.04, 1.05, 1.06, 1.05, 1.04],)  # one below 1, and a proof
    yield ([0.80, 0.81, 0.79],)
    yield ([5.0, 0.2] * 7,)  # they cancel out


def mean_above_one(speedups):
    return bool(np.mean(speedups) > 1)


def all_above_one(speedups):
    return all(speedup > 1 for speedup in speedups)


def lower_end_above_one(speedups):
    """Of the logarithms."""
    logs = np.log(speedups)
    half = t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return bool(logs.mean() - half > 1)


def without_logarithms(speedups):
    half = t.ppf(0.975, len(speedups) - 1) * np.std(speedups, ddof=1) / np.sqrt(len(speedups))
    return bool(np.mean(speedups) - half > 1)


def interval_of_single_runs(speedups):
    logs = np.log(speedups)
    half = t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1)
    return bool(logs.mean() - half > 0)


TASKS["16.1"] = Task(
    reference=pays,
    inputs=speedups,
    hints=[
        "Compute the lower end of the interval of the logarithms. log(1) is 0, so compare the "
        "lower end with 0.",
        "`np.log(speedups)` is an array. Its methods `mean()` and `std(ddof=1)` give m and s. Do "
        "not forget to divide s by the square root of n.",
    ],
    mistakes={
        without_logarithms: "Without logarithms, speedups of 5 and 0.2 do not cancel out.",
        interval_of_single_runs: "This interval is too wide: it is the one of a single run. The "
        "mean of n runs varies less, by a factor of sqrt(n).",
        all_above_one: "It does not count how many speedups are above 1, but where the interval "
        "of their mean is.",
        mean_above_one: "The mean is above 1, but the interval is not. With this spread, the gain "
        "may be luck.",
        lower_end_above_one: "A logarithm above 0 means a speedup above 1.",
    },
)


# 16.2: the climb


def climb_ladder(baseline, techniques, measure, pays):
    """Try the techniques in their order, each on top of those that are kept."""
    below = baseline
    for change in techniques.values():
        candidate = {**below, **change}
        if pays(measure(below, candidate)):
            below = candidate
    return below


def speed_of(settings):
    """A made-up machine on which 16-bit numbers pay with the right layout only."""
    speed = 100 * settings["threads"]
    if settings["bf16"]:
        speed *= 2 if settings["channels_last"] else 0.9
    if settings["compiled"]:
        speed *= 0.7
    return speed


def measure_made_up(below, candidate):
    return [speed_of(candidate) / speed_of(below)] * 3


def measure_layout_first(below, candidate):
    """Another one: the layout alone pays a little, compiling pays on one thread only."""
    gain = 1.0
    if candidate["channels_last"] > below["channels_last"]:
        gain *= 1.1
    if candidate["compiled"] > below["compiled"]:
        gain *= 1.5 if below["threads"] == 1 else 0.9
    if candidate["threads"] > below["threads"]:
        gain *= 1.8
    return [gain, gain * 1.01]


def above_one(speedups):
    return min(speedups) > 1


def ladders():
    baseline = {"threads": 1, "channels_last": False, "bf16": False, "compiled": False}
    threads = {"threads": {"threads": random.choice([2, 4, 8])}}
    layout = {"channels_last + bf16": {"channels_last": True, "bf16": True}}
    compiled = {"compiled": {"compiled": True}}
    yield baseline, threads | compiled | layout, measure_made_up, above_one
    layout = {"channels_last": {"channels_last": True}}
    yield baseline, threads | compiled | layout, measure_layout_first, above_one


def each_against_the_baseline(baseline, techniques, measure, pays):
    kept = dict(baseline)
    for change in techniques.values():
        if pays(measure(baseline, {**baseline, **change})):
            kept.update(change)
    return kept


def keeps_everything(baseline, techniques, measure, pays):
    below = baseline
    for change in techniques.values():
        candidate = {**below, **change}
        measure(below, candidate)
        below = candidate
    return below


def changes_the_baseline(baseline, techniques, measure, pays):
    below = baseline
    for change in techniques.values():
        candidate = below
        candidate.update(change)
        if pays(measure(below, candidate)):
            below = candidate
    return below


def stops_at_the_first_loss(baseline, techniques, measure, pays):
    below = baseline
    for change in techniques.values():
        candidate = {**below, **change}
        if not pays(measure(below, candidate)):
            break
        below = candidate
    return below


TASKS["16.2"] = Task(
    reference=climb_ladder,
    inputs=ladders,
    hints=[
        "Start with the baseline as the rung below. For each technique, make the settings of the "
        "candidate: those of the rung below, with the changes of the technique.",
        "`below | change` makes a new dictionary. If the candidate pays, it becomes the rung below "
        "of the next technique. Otherwise nothing changes.",
    ],
    mistakes={
        each_against_the_baseline: "Compare the candidate with the rung below, not with the "
        "baseline: what paid alone may not pay on top of other techniques.",
        changes_the_baseline: "`update` changes the dictionary itself, so `baseline` changes, too. "
        "Make a new dictionary for each candidate.",
        keeps_everything: "A technique that does not pay was kept.",
        stops_at_the_first_loss: "Continue after a technique that does not pay: later ones may "
        "still pay.",
    },
)


# 16.3: what was left out, and why


def verdicts(rungs):
    """Return {name: "kept", "slower" or "no significant gain"} for all rungs but the first one."""
    found = {}
    for rung in rungs[1:]:
        if rung["kept"]:
            found[rung["name"]] = "kept"
        elif rung["over_below_ci"][1] < 1:
            found[rung["name"]] = "slower"
        else:
            found[rung["name"]] = "no significant gain"
    return found


def made_up_rungs():
    cases = (
        ("baseline", True, (1.0, 1.0)),
        ("threads", True, (1.7, 1.9)),
        ("whole-batch loader", False, (0.98, 1.03)),
        ("torch.compile", False, (0.7, 0.8)),
        ("replicas", False, (0.4, 1.2)),
    )
    yield ([{"name": name, "kept": kept, "over_below_ci": ci} for name, kept, ci in cases],)


def lower_end_below_one(rungs):
    """Of all rungs here that are not kept, the lower end is below 1."""
    return {rung["name"]: "kept" if rung["kept"] else "slower" for rung in rungs[1:]}


def with_the_baseline(rungs):
    return verdicts([{"name": ""}, *rungs])


TASKS["16.3"] = Task(
    reference=verdicts,
    inputs=made_up_rungs,
    hints=[
        "Begin with the second rung, and with an empty dictionary. There are three cases.",
        "Of a rung that is not kept, look at the upper end of the interval: if even that is under "
        "1, the technique is slower.",
    ],
    mistakes={
        lower_end_below_one: "If only the lower end is under 1, the interval contains 1, and the "
        "runs do not show that the technique is slower.",
        with_the_baseline: "Leave out the baseline, which is the first rung.",
    },
)


# 16.4: the speedup at the top


def speedup_at_the_top(rungs):
    """Return the speedup of the highest kept rung over the baseline."""
    total = 1.0
    for rung in rungs:
        if rung["kept"]:
            total *= rung["over_below"]
    return total


def rungs_with_speedups():
    gains = [random.uniform(1.1, 2) for _ in range(3)]
    rungs = [{"name": "baseline", "kept": True, "over_below": 1.0}]
    rungs += [
        {"name": f"technique {n}", "kept": True, "over_below": g} for n, g in enumerate(gains)
    ]
    rungs.insert(2, {"name": "loses", "kept": False, "over_below": random.uniform(0.5, 0.9)})
    yield (rungs,)


def all_rungs(rungs):
    return math.prod(rung["over_below"] for rung in rungs)


def added_gains(rungs):
    return 1 + sum(rung["over_below"] - 1 for rung in rungs if rung["kept"])


def the_last_rung(rungs):
    return [rung["over_below"] for rung in rungs if rung["kept"]][-1]


TASKS["16.4"] = Task(
    reference=speedup_at_the_top,
    inputs=rungs_with_speedups,
    hints=[
        "If the second rung is 2 times faster than the first one, and the third one 1.5 times "
        "faster than the second one, how much faster is the third one than the first one?",
        "Multiply the speedups of the rungs that are kept.",
    ],
    mistakes={
        all_rungs: "Rungs that are not kept are not part of the best recipe.",
        added_gains: "Speedups multiply. Percentages must not be added.",
        the_last_rung: "This is the speedup over the rung below, not over the baseline.",
    },
)


# 16.5: what to try next


def what_to_try(parts, helps, tried):
    """Return the technique to try next: one that shortens the largest part and is not tried yet."""
    for part in sorted(parts, key=parts.get, reverse=True):
        for technique in helps[part]:
            if technique not in tried:
                return technique
    return "none"


def steps_in_parts():
    helps = {
        "loader": ["loader workers", "whole-batch loader"],
        "arithmetic": ["threads", "bf16"],
        "memory": ["pooling before ReLU", "torch.compile"],
        "launch": [],
    }
    parts = {"loader": 0.004, "arithmetic": 0.03, "memory": 0.002, "launch": 0.003}
    yield parts, helps, {"threads"}
    yield parts, helps, {"threads", "bf16"}
    parts = {name: random.uniform(0.001, 0.01) for name in helps} | {"launch": 0.02}
    yield parts, helps, set(random.sample(["threads", "loader workers", "torch.compile"], 2))
    yield parts, helps, {technique for techniques in helps.values() for technique in techniques}


def tries_again(parts, helps, tried):
    return next(helps[part][0] for part in sorted(parts, key=parts.get, reverse=True))


def only_the_largest_part(parts, helps, tried):
    left = [technique for technique in helps[max(parts, key=parts.get)] if technique not in tried]
    return left[0] if left else "none"


def in_the_order_of_the_dictionary(parts, helps, tried):
    return what_to_try(dict.fromkeys(parts, 0.0), helps, tried)


def the_smallest_part_first(parts, helps, tried):
    return what_to_try({name: -seconds for name, seconds in parts.items()}, helps, tried)


TASKS["16.5"] = Task(
    reference=what_to_try,
    inputs=steps_in_parts,
    hints=[
        "Go through the parts from the largest to the smallest. For each, go through its "
        "techniques, and stop at the first one that is not tried.",
        "Two loops, one inside the other. `reverse=True` makes `sorted` begin with the largest "
        "part. Return inside the loops, and return the text after both of them.",
    ],
    mistakes={
        tries_again: "This technique is tried already.",
        only_the_largest_part: "When nothing is left for the largest part, look at the next "
        "largest one.",
        the_smallest_part_first: "Begin with the part that takes the most time.",
        in_the_order_of_the_dictionary: "Sort the parts by their time first.",
    },
)


# 16.6: an unfair comparison (repair)


def unfair_differences(below, candidate, technique):
    """Return the names of the fields that differ and that the technique does not change, sorted."""
    return sorted(name for name in cnnlab.changes(below, candidate) if name not in technique)


def pairs_of_recipes():
    below = Recipe(model="ResNet9", threads=1)
    bf16 = {"precision": "bf16"}
    yield below, below.replace(**bf16, batch_size=256), bf16
    yield below, below.replace(**bf16), bf16
    yield below, below.replace(threads=2, epochs=3, seed=random.randint(1, 9)), {"threads": 2}


def the_broken_program(below, candidate, technique):
    return sorted(name for name in technique if getattr(below, name) != getattr(candidate, name))


def all_differences(below, candidate, technique):
    return sorted(cnnlab.changes(below, candidate))


TASKS["16.6"] = Task(
    reference=unfair_differences,
    inputs=pairs_of_recipes,
    hints=[
        "The function looks only at the fields of the technique. Which fields should it look at?",
        "`cnnlab.changes(below, candidate)` is a dictionary of all fields that differ. Leave out "
        "those that the technique changes.",
    ],
    mistakes={
        the_broken_program: "These are the fields that may differ. List the others.",
        all_differences: "What the technique itself changes is not unfair.",
    },
)


# 16.7: the best of all combinations


def best_combination(techniques, speed):
    """Return the combination of techniques that trains fastest, as a sorted list of names."""
    best = []
    for count in range(len(techniques) + 1):
        for names in combinations(techniques, count):
            if speed(list(names)) > speed(best):
                best = list(names)
    return sorted(best)


def speed_with_partners(names):
    """bf16 pays only together with channels_last, and compiling only without threads."""
    speed = 100.0
    if "threads" in names:
        speed *= 1.9
    if "channels_last" in names:
        speed *= 0.95
    if "bf16" in names:
        speed *= 2.5 if "channels_last" in names else 0.9
    if "compile" in names:
        speed *= 0.8 if "threads" in names else 1.4
    return speed


def speed_without_gains(names):
    return 100.0 / (1 + len(names))


def speed_in_total(names):
    return 100.0 * (1 + len(names))


def combinations_to_try():
    techniques = ["compile", "threads", "channels_last", "bf16"]
    yield techniques, speed_with_partners
    yield techniques[:3], speed_without_gains
    yield techniques[:3], speed_in_total


def one_after_the_other(techniques, speed):
    kept = []
    for name in techniques:
        if speed([*kept, name]) > speed(kept):
            kept.append(name)
    return sorted(kept)


def single_techniques(techniques, speed):
    return [max(techniques, key=lambda name: speed([name]))]


def not_all(techniques, speed):
    tried = [list(names) for n in range(len(techniques)) for names in combinations(techniques, n)]
    return sorted(max(tried, key=speed))


TASKS["16.7"] = Task(
    reference=best_combination,
    inputs=combinations_to_try,
    hints=[
        "Go through all combinations of 0, 1, 2, ... techniques, and remember the fastest one.",
        "For each count from 0 to the number of techniques, loop over `combinations`. It yields "
        "tuples, so make lists of them.",
    ],
    mistakes={
        one_after_the_other: "This is the ladder again: each technique once, in a fixed order. It "
        "misses techniques that pay only together.",
        single_techniques: "Also try several techniques together, and none.",
        not_all: "Also try all techniques together.",
    },
)
