"""What tools make of a function: its graphs, and whether the result is right (lesson 11)."""

import logging
import warnings
from contextlib import redirect_stderr
from io import StringIO

import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

torch._logging.set_logs(dynamo=logging.ERROR)  # A graph break is expected here.


class AsModule(nn.Module):
    """A function as a module, which torch.export needs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def export(function, x):
    """The program that torch.export captures, with x as the example."""
    return torch.export.export(AsModule(function), (x,)).module()


def first_line(error):
    """The error in one short line."""
    line = str(error).strip().splitlines()[0].partition(" (")[0]
    return f"{type(error).__name__}: {line}"


def try_tool(make_program, function, inputs):
    """Make a program of the function with a tool, and compare its results with the function's."""
    torch.compiler.reset()
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        try:
            program = make_program(function)
            results = [torch.tensor(program(x).tolist()) for x in inputs]
        except Exception as error:  # what it raises is the answer
            return first_line(error)
    for x, result in zip(inputs, results, strict=True):
        if not torch.equal(result, function(x)):
            return f"WRONG for {x.tolist()}: {result.tolist()}"
    return "right"


def captured_graphs(function, *inputs, **options):
    """The graphs of torch.compile, forward, backward and others: a list of operations for each."""
    torch.compiler.reset()
    graphs = []

    def note(graph, _):
        targets = [node.target for node in graph.graph.nodes]
        packets = [getattr(target, "overloadpacket", None) for target in targets]
        graphs.append([packet.__name__ for packet in packets if packet is not None])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    torch.compile(function, backend=backend, **options)(*inputs)
    return graphs
