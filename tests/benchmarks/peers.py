from cnnlab import machine, model
from cnnlab.data import datasets

"""cnnlab beside other ways to train the same network: images/s, each in a fresh process, in turn.

    pip install lightning accelerate keras jax flax optax
    python tests/benchmarks/peers.py [--model ResNet9] [--batch-size 128] [--steps 30] [--repeats 5] [--only plain lightning ...] [--json FILE]

The same network (from cnnlab.model; the same layers in Keras and Flax), digits of 32x32, Adam, the same batch, all cores. Each peer runs at its defaults, and with
the flags that its documentation offers for speed: bf16, channels_last, compiling. The first steps are warm-up and not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings

import numpy as np

WARMUP = 4
FLAGS = {  # of each peer: the first is its default
    "cnnlab": ["default", "best"],
    "plain": ["default", "bf16", "bf16 channels_last", "bf16 channels_last compiled"],
    "lightning": ["default", "bf16", "bf16 channels_last", "bf16 channels_last compiled"],
    "accelerate": ["default", "bf16", "bf16 channels_last", "bf16 channels_last compiled"],
    "keras": ["default", "bf16"],
    "flax": ["default", "bf16"],
}


class Timer:
    """Images/s of the steps after the warm-up."""

    def __init__(self, options):
        self.batch, self.last, self.done, self.began, self.rate = (
            options.batch_size,
            WARMUP + options.steps,
            0,
            0.0,
            None,
        )

    def step(self):
        """To be called after each step; True when there were enough."""
        self.done += 1
        if self.done == WARMUP:
            self.began = time.perf_counter()
        if self.done == self.last:
            self.rate = (self.last - WARMUP) * self.batch / (time.perf_counter() - self.began)
        return self.done >= self.last


def cnnlab(options, timer):
    """Its default is a plain `Recipe`; its best, what `python -m cnnlab ladder` found here or --best says."""
    from cnnlab.events import Finished
    from cnnlab.launch.launcher import run
    from cnnlab.recipe import Recipe

    best = json.loads(options.best) if options.flags == "best" else {}
    recipe = Recipe(
        model=options.model,
        batch_size=options.batch_size,
        steps=WARMUP + options.steps,
        warmup_steps=WARMUP,
        evaluate=False,
        **best,
    )
    timer.rate = next(event for event in run(recipe) if isinstance(event, Finished)).images_per_s


def parts(options):
    """(the digits as TensorDataset, the network) for what is built on torch."""
    import torch

    images = datasets.digits()
    torch.manual_seed(0)
    network = getattr(model, options.model)(channels=1)
    if "channels_last" in options.flags:
        network = network.to(memory_format=torch.channels_last)
    if "compiled" in options.flags:
        network = torch.compile(network)
    return images.train, network


def loader_of(dataset, options):
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch_size=options.batch_size, shuffle=True, drop_last=True)


def laid_out(images, options):
    import torch

    return (
        images.contiguous(memory_format=torch.channels_last)
        if "channels_last" in options.flags
        else images
    )


def plain(options, timer):
    """The loop of PyTorch's own tutorials."""
    import torch
    from torch.nn.functional import cross_entropy

    dataset, network = parts(options)
    optimizer, loader = (
        torch.optim.Adam(network.parameters(), lr=0.001),
        loader_of(dataset, options),
    )
    while True:
        for images, labels in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options.flags):
                loss = cross_entropy(network(laid_out(images, options)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            if timer.step():
                return


def lightning(options, timer):
    import lightning as L
    import torch
    from torch.nn.functional import cross_entropy

    dataset, network = parts(options)

    class Lesson(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network

        def training_step(self, batch, _):
            images, labels = batch
            return cross_entropy(self.network(laid_out(images, options)), labels)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.001)

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = timer.step() or trainer.should_stop

    precision = {"precision": "bf16-mixed"} if "bf16" in options.flags else {}
    trainer = L.Trainer(
        max_steps=WARMUP + options.steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[Steps()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **precision,
    )
    trainer.fit(Lesson(), loader_of(dataset, options))


def accelerate(options, timer):
    import torch
    from accelerate import Accelerator
    from torch.nn.functional import cross_entropy

    dataset, network = parts(options)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if "bf16" in options.flags else "no")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    network, optimizer, loader = accelerator.prepare(
        network, optimizer, loader_of(dataset, options)
    )
    while True:
        for images, labels in loader:
            with accelerator.autocast():
                loss = cross_entropy(network(laid_out(images, options)), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            loss.item()
            if timer.step():
                return


def keras(options, timer):
    """`model.fit` with the torch backend; the same layers, channels last as is Keras' default."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    from keras import layers

    if "bf16" in options.flags:
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    images, labels = datasets.digits().train.tensors
    shown = keras.Input((32, 32, 1))

    def block(x, outputs, pool=False):
        x = layers.ReLU()(
            layers.BatchNormalization()(
                layers.Conv2D(outputs, 3, padding="same", use_bias=False)(x)
            )
        )
        return layers.MaxPooling2D(2)(x) if pool else x

    if options.model == "SmallCNN":
        x = shown
        for outputs in (16, 32):
            x = layers.MaxPooling2D(2)(
                layers.Conv2D(outputs, 3, padding="same", activation="relu")(x)
            )
        x = layers.Dense(10, dtype="float32")(layers.Flatten()(x))
    else:
        x = block(block(shown, 32), 64, pool=True)
        x = layers.Add()([x, block(block(x, 64), 64)])
        x = block(block(x, 128, pool=True), 256, pool=True)
        x = layers.Add()([x, block(block(x, 256), 256)])
        x = (
            layers.Dense(10, use_bias=False, dtype="float32")(
                layers.Flatten()(layers.MaxPooling2D(4)(x))
            )
            * 0.125
        )
    network = keras.Model(shown, x)
    network.compile(
        optimizer=keras.optimizers.Adam(0.001),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    class Steps(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = timer.step() or self.model.stop_training

    whole = len(images) // options.batch_size * options.batch_size
    network.fit(
        images.permute(0, 2, 3, 1).numpy()[:whole],
        labels.numpy()[:whole],
        batch_size=options.batch_size,
        epochs=1000,
        verbose=0,
        callbacks=[Steps()],
    )


def flax(options, timer):
    """Flax's linen networks and optax in one jitted step; batches are indexed from NumPy arrays."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    kind = jnp.bfloat16 if "bf16" in options.flags else jnp.float32

    class SmallCNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            for outputs in (16, 32):
                x = nn.max_pool(nn.relu(nn.Conv(outputs, (3, 3), dtype=kind)(x)), (2, 2), (2, 2))
            return nn.Dense(10)(x.reshape(len(x), -1))

    class ResNet9(nn.Module):
        @nn.compact
        def __call__(self, x):
            def block(x, outputs, pool=False):
                x = nn.relu(
                    nn.BatchNorm(use_running_average=False, dtype=kind)(
                        nn.Conv(outputs, (3, 3), use_bias=False, dtype=kind)(x)
                    )
                )
                return nn.max_pool(x, (2, 2), (2, 2)) if pool else x

            x = block(block(x, 32), 64, pool=True)
            x = x + block(block(x, 64), 64)
            x = block(block(x, 128, pool=True), 256, pool=True)
            x = x + block(block(x, 256), 256)
            return 0.125 * nn.Dense(10, use_bias=False)(
                nn.max_pool(x, (4, 4), (4, 4)).reshape(len(x), -1)
            )

    network = {"SmallCNN": SmallCNN, "ResNet9": ResNet9}[options.model]()
    images, labels = (tensor.numpy() for tensor in datasets.digits().train.tensors)
    images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    state = network.init(jax.random.key(0), images[:2])
    rest, parameters = (
        {name: part for name, part in state.items() if name != "params"},
        state["params"],
    )
    optimizer = optax.adam(0.001)
    moments = optimizer.init(parameters)

    @jax.jit
    def step(parameters, rest, moments, images, labels):
        def loss_of(parameters):
            logits, changed = network.apply(
                {"params": parameters, **rest}, images, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), labels
            ).mean(), changed

        (loss, changed), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(parameters, updates), changed, moments, loss

    order = np.random.default_rng(0)
    while True:
        for rows in np.array_split(
            order.permutation(len(images)), len(images) // options.batch_size
        ):
            rows = rows[: options.batch_size]
            parameters, rest, moments, loss = step(
                parameters, rest, moments, images[rows], labels[rows]
            )
            loss.block_until_ready()
            if timer.step():
                return


def one(options):
    """This process is one run of one peer."""
    import logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.peer != "flax":
        import torch

        torch.set_num_threads(machine.cores())
    timer = Timer(options)
    globals()[options.peer](options, timer)
    print(json.dumps({"images_per_s": timer.rate}))


def measured(peer, flags, options):
    command = [
        sys.executable,
        __file__,
        "--peer",
        peer,
        "--flags",
        flags,
        "--model",
        options.model,
        "--batch-size",
        str(options.batch_size),
        "--steps",
        str(options.steps),
        "--best",
        options.best,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])["images_per_s"]


def main():
    read = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    read.add_argument("--model", default="ResNet9", choices=["SmallCNN", "ResNet9"])
    read.add_argument("--batch-size", type=int, default=128)
    read.add_argument("--steps", type=int, default=20)
    read.add_argument("--repeats", type=int, default=5)
    read.add_argument("--only", nargs="+", default=list(FLAGS), choices=list(FLAGS))
    read.add_argument(
        "--best",
        default='{"loader": "batch", "precision": "bf16", "memory_format": "channels_last", "pooling": "before-relu"}',
        help="cnnlab's best recipe here, as JSON",
    )
    read.add_argument("--json", metavar="FILE")
    read.add_argument("--peer", help=argparse.SUPPRESS)
    read.add_argument("--flags", default="default", help=argparse.SUPPRESS)
    options = read.parse_args()
    if options.peer:
        return one(options)
    found = {(peer, flags): [] for peer in options.only for flags in FLAGS[peer]}
    for repeat in range(options.repeats):
        for (peer, flags), rates in found.items():
            rate = measured(peer, flags, options)
            print(
                f"{repeat + 1}/{options.repeats} {peer:10} {flags:28} {rate if isinstance(rate, str) else f'{rate:,.0f} images/s'}",
                flush=True,
            )
            rates += [rate] if not isinstance(rate, str) else []
    report({way: rates for way, rates in found.items() if len(rates) == options.repeats}, options)


def report(found, options):
    """A line each: median, quartiles, and how many times as fast cnnlab's best is, from the ratios of runs side by side (95% confidence)."""
    from cnnlab.measure.compare import Measurement, speedup
    from cnnlab.recipe import Recipe

    best = (
        Measurement(name="cnnlab", recipe=Recipe(), images_per_s=tuple(found["cnnlab", "best"]))
        if ("cnnlab", "best") in found
        else None
    )
    print(
        f"\n{options.model}, batch {options.batch_size}, {options.steps} steps, {options.repeats} runs each\n"
    )
    rows = []
    for (peer, flags), rates in found.items():
        each = Measurement(name=f"{peer} ({flags})", recipe=Recipe(), images_per_s=tuple(rates))
        gain = speedup(each, best) if best else None
        q1, median, q3 = each.quartiles
        rows.append(
            {
                "peer": peer,
                "flags": flags,
                "median": median,
                "q1": q1,
                "q3": q3,
                **({"cnnlab": gain.value, "low": gain.low, "high": gain.high} if gain else {}),
            }
        )
        print(
            f"| {peer} | {flags} | {median:,.0f} ({q1:,.0f} to {q3:,.0f}) | "
            + (f"{gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f}) |" if gain else "|")
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"model": options.model, "batch_size": options.batch_size, "rows": rows},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
