"""cnnlab compared with other ways to train the same network: images/s, interleaved.

    pip install lightning accelerate keras jax flax optax
    python tests/benchmarks/peers.py [--model ResNet9] [--batch-size 128] [--steps 30]
        [--repeats 5] [--only plain lightning ...] [--json FILE]

All train the same network (from cnnlab.model; the same layers in Keras and Flax) on digits of 32x32
with Adam, the same batch size and all cores, each run in a fresh process. Each peer runs with its
defaults and with the flags that its documentation offers for speed: bf16, channels_last, compiling.
The first steps are warm-up and are not counted.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings

import numpy as np

from cnnlab import machine, model
from cnnlab.data import datasets
from cnnlab.recipe import Recipe

WARMUP = 4
TORCH_FLAGS = ["default", "bf16", "bf16 channels_last", "bf16 channels_last compiled"]
FLAGS = {
    "cnnlab": ["default", "best"],
    "plain": TORCH_FLAGS,
    "lightning": TORCH_FLAGS,
    "accelerate": TORCH_FLAGS,
    "keras": ["default", "bf16"],
    "flax": ["default", "bf16"],
}
BEST = {
    "loader": "batch",
    "precision": "bf16",
    "memory_format": "channels_last",
    "pooling": "before-relu",
}


class Timer:
    """Measures the images/s of the steps after the warm-up."""

    def __init__(self, batch_size, steps):
        self.batch_size = batch_size
        self.last_step = WARMUP + steps
        self.step_count = 0
        self.began = 0.0
        self.images_per_s = None

    def step(self):
        """Call it after each step. Returns True when there have been enough."""
        self.step_count += 1
        if self.step_count == WARMUP:
            self.began = time.perf_counter()
        if self.step_count == self.last_step:
            seconds = time.perf_counter() - self.began
            self.images_per_s = (self.last_step - WARMUP) * self.batch_size / seconds
        return self.step_count >= self.last_step


def train_cnnlab(options, timer):
    """A plain `Recipe`, or for "best" the result of `python -m cnnlab ladder`, from --best."""
    from cnnlab.events import Finished
    from cnnlab.launch.launcher import run

    best = json.loads(options.best) if options.flags == "best" else {}
    recipe = Recipe(
        model=options.model,
        batch_size=options.batch_size,
        steps=WARMUP + options.steps,
        warmup_steps=WARMUP,
        evaluate=False,
        **best,
    )
    finished = next(event for event in run(recipe) if isinstance(event, Finished))
    timer.images_per_s = finished.images_per_s


def torch_parts(options):
    """The data loader and the network for the peers that are built on torch."""
    import torch
    from torch.utils.data import DataLoader

    images = datasets.digits()
    torch.manual_seed(0)
    network = getattr(model, options.model)(channels=1)
    if "channels_last" in options.flags:
        network = network.to(memory_format=torch.channels_last)
    if "compiled" in options.flags:
        network = torch.compile(network)
    loader = DataLoader(images.train, batch_size=options.batch_size, shuffle=True, drop_last=True)
    return loader, network


def in_layout(images, options):
    import torch

    if "channels_last" in options.flags:
        return images.contiguous(memory_format=torch.channels_last)
    return images


def train_plain(options, timer):
    """The loop of PyTorch's tutorials."""
    import torch
    from torch.nn.functional import cross_entropy

    loader, network = torch_parts(options)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    while True:
        for images, labels in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options.flags):
                loss = cross_entropy(network(in_layout(images, options)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            if timer.step():
                return


def train_lightning(options, timer):
    import lightning
    import torch
    from torch.nn.functional import cross_entropy

    loader, network = torch_parts(options)

    class Lesson(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network

        def training_step(self, batch, _):
            images, labels = batch
            return cross_entropy(self.network(in_layout(images, options)), labels)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.001)

    class Steps(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = timer.step() or trainer.should_stop

    precision = {"precision": "bf16-mixed"} if "bf16" in options.flags else {}
    trainer = lightning.Trainer(
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
    trainer.fit(Lesson(), loader)


def train_accelerate(options, timer):
    import torch
    from accelerate import Accelerator
    from torch.nn.functional import cross_entropy

    loader, network = torch_parts(options)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if "bf16" in options.flags else "no")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    while True:
        for images, labels in loader:
            with accelerator.autocast():
                loss = cross_entropy(network(in_layout(images, options)), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            loss.item()
            if timer.step():
                return


def keras_network(name):
    import keras
    from keras import layers

    def block(x, outputs, pool=False):
        x = layers.Conv2D(outputs, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        return layers.MaxPooling2D(2)(x) if pool else x

    images = keras.Input((32, 32, 1))
    if name == "SmallCNN":
        x = images
        for outputs in (16, 32):
            x = layers.Conv2D(outputs, 3, padding="same", activation="relu")(x)
            x = layers.MaxPooling2D(2)(x)
        x = layers.Dense(10, dtype="float32")(layers.Flatten()(x))
    else:
        x = block(block(images, 32), 64, pool=True)
        x = layers.Add()([x, block(block(x, 64), 64)])
        x = block(block(x, 128, pool=True), 256, pool=True)
        x = layers.Add()([x, block(block(x, 256), 256)])
        x = layers.Flatten()(layers.MaxPooling2D(4)(x))
        x = layers.Dense(10, use_bias=False, dtype="float32")(x) * 0.125
    return keras.Model(images, x)


def train_keras(options, timer):
    """`model.fit` with the torch backend and Keras' default layout, channels last."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    if "bf16" in options.flags:
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    images, labels = datasets.digits().train.tensors
    network = keras_network(options.model)
    network.compile(
        optimizer=keras.optimizers.Adam(0.001),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    class Steps(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = timer.step() or self.model.stop_training

    in_full_batches = len(images) // options.batch_size * options.batch_size
    network.fit(
        images.permute(0, 2, 3, 1).numpy()[:in_full_batches],
        labels.numpy()[:in_full_batches],
        batch_size=options.batch_size,
        epochs=1000,
        verbose=0,
        callbacks=[Steps()],
    )


def flax_network(name, dtype):
    from flax import linen as nn

    def block(x, outputs, pool=False):
        x = nn.Conv(outputs, (3, 3), use_bias=False, dtype=dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=dtype)(x))
        return nn.max_pool(x, (2, 2), (2, 2)) if pool else x

    class SmallCNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            for outputs in (16, 32):
                x = nn.relu(nn.Conv(outputs, (3, 3), dtype=dtype)(x))
                x = nn.max_pool(x, (2, 2), (2, 2))
            return nn.Dense(10)(x.reshape(len(x), -1))

    class ResNet9(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = block(block(x, 32), 64, pool=True)
            x = x + block(block(x, 64), 64)
            x = block(block(x, 128, pool=True), 256, pool=True)
            x = x + block(block(x, 256), 256)
            x = nn.max_pool(x, (4, 4), (4, 4)).reshape(len(x), -1)
            return 0.125 * nn.Dense(10, use_bias=False)(x)

    return {"SmallCNN": SmallCNN, "ResNet9": ResNet9}[name]()


def train_flax(options, timer):
    """Flax's linen networks and optax in one jitted step; batches are indexed from NumPy arrays."""
    import jax
    import jax.numpy as jnp
    import optax

    network = flax_network(options.model, jnp.bfloat16 if "bf16" in options.flags else jnp.float32)
    images, labels = (tensor.numpy() for tensor in datasets.digits().train.tensors)
    images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    state = dict(network.init(jax.random.key(0), images[:2]))
    parameters = state.pop("params")
    optimizer = optax.adam(0.001)
    moments = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, moments, images, labels):
        def loss_fn(parameters):
            variables = {"params": parameters, **state}
            logits, changed = network.apply(variables, images, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), labels
            )
            return losses.mean(), changed

        (loss, changed), gradients = jax.value_and_grad(loss_fn, has_aux=True)(parameters)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(parameters, updates), changed, moments, loss

    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(len(images))
        for rows in np.array_split(order, len(images) // options.batch_size):
            rows = rows[: options.batch_size]
            parameters, state, moments, loss = step(
                parameters, state, moments, images[rows], labels[rows]
            )
            loss.block_until_ready()
            if timer.step():
                return


TRAIN = {
    "cnnlab": train_cnnlab,
    "plain": train_plain,
    "lightning": train_lightning,
    "accelerate": train_accelerate,
    "keras": train_keras,
    "flax": train_flax,
}


def run_peer(options):
    """One run of one peer, in this process. Prints images/s as JSON."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.peer != "flax":
        import torch

        torch.set_num_threads(machine.cores())
    timer = Timer(options.batch_size, options.steps)
    TRAIN[options.peer](options, timer)
    print(json.dumps({"images_per_s": timer.images_per_s}))


def run_in_fresh_process(peer, flags, options):
    """Images/s of one run, or the last line of its error."""
    command = [
        *(sys.executable, __file__, "--peer", peer, "--flags", flags, "--model", options.model),
        *("--batch-size", str(options.batch_size), "--steps", str(options.steps)),
        *("--best", options.best),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])["images_per_s"]


def measure_all(options):
    """Images/s of all repeats, by (peer, flags). Those that failed are left out."""
    rates = {(peer, flags): [] for peer in options.only for flags in FLAGS[peer]}
    for repeat in range(options.repeats):
        for peer, flags in rates:
            result = run_in_fresh_process(peer, flags, options)
            failed = isinstance(result, str)
            text = result if failed else f"{result:,.0f} images/s"
            print(f"{repeat + 1}/{options.repeats} {peer:10} {flags:28} {text}", flush=True)
            if not failed:
                rates[peer, flags].append(result)
    return {key: values for key, values in rates.items() if len(values) == options.repeats}


def report(rates, options):
    """Print a row each: median, quartiles, and the speedup of cnnlab's best (95% CI, paired)."""
    from cnnlab.measure.compare import Measurement, speedup

    best = None
    if ("cnnlab", "best") in rates:
        values = tuple(rates["cnnlab", "best"])
        best = Measurement(name="cnnlab", recipe=Recipe(), images_per_s=values)
    print(
        f"\n{options.model}, batch {options.batch_size}, {options.steps} steps, "
        f"{options.repeats} runs each\n"
    )
    rows = []
    for (peer, flags), values in rates.items():
        each = Measurement(name=f"{peer} ({flags})", recipe=Recipe(), images_per_s=tuple(values))
        q1, median, q3 = each.quartiles
        row = {"peer": peer, "flags": flags, "median": median, "q1": q1, "q3": q3}
        cells = [peer, flags, f"{median:,.0f} ({q1:,.0f} to {q3:,.0f})"]
        if best:
            gain = speedup(each, best)
            row |= {"cnnlab": gain.value, "low": gain.low, "high": gain.high}
            cells.append(f"{gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f})")
        rows.append(row)
        print(f"| {' | '.join(cells)} |")
    if options.json:
        result = {"model": options.model, "batch_size": options.batch_size, "rows": rows}
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ResNet9", choices=["SmallCNN", "ResNet9"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(FLAGS), choices=list(FLAGS))
    parser.add_argument("--best", default=json.dumps(BEST), help="cnnlab's best recipe, as JSON")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--flags", default="default", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_options()
    if options.peer:
        run_peer(options)
    else:
        report(measure_all(options), options)
