"""Measure one way of training or classifying, in a process of its own (lesson 11).

python step_worker.py WORK WAY DEVICE CORES

For each line "BATCH REPEATS" of the input, it prints a line of JSON: the seconds of each call. The
first line for a batch size also has the seconds of the first call, which compiles, and its result.
"""

import json
import os
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value

from cnnlab import data, full_or_quick, machine
from cnnlab.model import VGG19, SmallCNN

CHUNK = 20  # images at a time: 100 images at once need several GB
VGG = full_or_quick(
    {"size": 224, "width": 64, "classes": 1000}, {"size": 32, "width": 8, "classes": 10}
)


def choose_cores(cores):
    """One core if the system allows it, or all: for the threads of PyTorch and of XLA."""
    if cores == "one" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(machine.cores())


def training_data(batch, device):
    """A SmallCNN and a batch of digits. The result of a call is the loss before its step."""
    torch.manual_seed(0)
    network = SmallCNN(channels=1).to(device)
    images, labels = (tensor[:batch].to(device) for tensor in data.digits().train.tensors)
    return network, images, labels


def train_eager(batch, device):
    """The usual training step: one operation after the other."""
    network, images, labels = training_data(batch, device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)

    def call():
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return call


def train_one_graph(batch, device):
    """A pure step, compiled by torch.compile as one graph."""
    network, images, labels = training_data(batch, device)
    params = {name: param.detach() for name, param in network.named_parameters()}

    def loss_of(params, images, labels):
        return F.cross_entropy(functional_call(network, params, images), labels)

    def step(params, momenta, images, labels):
        grads, loss = grad_and_value(loss_of)(params, images, labels)
        momenta = {name: 0.9 * momenta[name] + grads[name] for name in params}
        return {name: params[name] - 0.05 * momenta[name] for name in params}, momenta, loss

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    state = [params, {name: torch.zeros_like(param) for name, param in params.items()}]

    def call():
        *state[:], loss = compiled(*state, images, labels)
        return loss.item()

    return call


def train_xla(batch, device):
    """The same step in JAX, compiled by XLA as one program."""
    import jax
    from jax_models import to_jax, train_step

    network, images, labels = training_data(batch, "cpu")
    params = to_jax(dict(network.named_parameters()))
    state = [params, jax.tree.map(lambda param: 0 * param, params)]
    images, labels = to_jax([images, labels])
    compiled = jax.jit(train_step, donate_argnums=(0, 1))

    def call():
        *state[:], loss = compiled(*state, images, labels)
        return float(loss)  # waits

    return call


def classify_torch(batch, device, compiled=False):
    """VGG19 forward, in chunks. The result is a sum of logits, so that the call waits."""
    torch.manual_seed(0)
    network = VGG19(**VGG).eval().to(device)
    forward = torch.compile(network, dynamic=False) if compiled else network
    images = torch.randn(min(batch, CHUNK), 3, VGG["size"], VGG["size"], device=device)

    def call(images_left=batch):
        total = 0.0
        with torch.no_grad():
            for first in range(0, images_left, CHUNK):
                total += forward(images[: images_left - first]).sum().item()
        return total

    return call


def classify_xla(batch, device):
    import jax
    from jax_models import to_jax, vgg19_forward, vgg19_layers

    torch.manual_seed(0)
    layers = to_jax(vgg19_layers(VGG19(**VGG).eval()))
    images = to_jax(torch.randn(min(batch, CHUNK), 3, VGG["size"], VGG["size"]))
    forward = jax.jit(vgg19_forward)

    def call(images_left=batch):
        total = 0.0
        for first in range(0, images_left, CHUNK):
            total += float(forward(layers, images[: images_left - first]).sum())
        return total

    return call


WAYS = {
    ("train", "eager"): train_eager,
    ("train", "one graph"): train_one_graph,
    ("train", "XLA"): train_xla,
    ("VGG19", "eager"): classify_torch,
    ("VGG19", "torch.compile"): partial(classify_torch, compiled=True),
    ("VGG19", "XLA"): classify_xla,
}


def seconds_of(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def answer(calls, make, batch, repeats):
    """What to print for one line of the input."""
    found = {"batch": batch}
    if batch not in calls:
        calls[batch] = make(batch)
        warm_up = calls[batch] if batch <= CHUNK else partial(calls[batch], CHUNK)
        warm_up = calls[batch] if sys.argv[1] == "train" else warm_up
        found["first_s"], found["result"] = seconds_of(warm_up)
    found["seconds"] = [seconds_of(calls[batch])[0] for _ in range(repeats)]
    return found


def main(work, way, device, cores):
    choose_cores(cores)
    # Compile times must not depend on what was compiled in earlier runs.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = full_or_quick("1", "0")
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # On a GPU, both compute in fp32.
    torch.backends.cudnn.allow_tf32 = False
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves memory to the other processes
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    make, calls = partial(WAYS[work, way], device=device), {}
    for line in sys.stdin:
        batch, repeats = map(int, line.split())
        try:
            found = answer(calls, make, batch, repeats)
        except Exception as error:  # printed by the notebook
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
