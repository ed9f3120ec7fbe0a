"""Lesson 00, start here: the function that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

import random

from cnnlab.check import Task


def speedup(before, after):
    """Return how many times faster a program has become."""
    return before / after


def times():
    yield 6.0, 2.0
    yield random.uniform(2, 9), random.uniform(0.5, 1.5)


def the_wrong_way_round(before, after):
    return after / before


def seconds_saved(before, after):
    return before - after


def with_the_text_of_a_print(before, after):
    return f"{before / after:.2f}x"


TASKS = {
    "00.1": Task(
        reference=speedup,
        inputs=times,
        hints=[
            "If a program took 6 seconds and now takes 2 seconds, it has become 3 times faster.",
            "Divide one argument by the other one, and return the result.",
        ],
        mistakes={
            the_wrong_way_round: "This is the reciprocal. A speedup above 1 means faster.",
            seconds_saved: "These are the seconds that are saved. Divide instead of subtracting.",
            with_the_text_of_a_print: "This is text. Return the number itself.",
        },
    )
}
