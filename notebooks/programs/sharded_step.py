"""Training steps of SmallCNN, sharded over simulated devices: python sharded_step.py DEVICES

The flag must be set before JAX is imported, so this is a program of its own.
"""

import os
import sys

devices = int(sys.argv[1])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from jax_models import to_jax, train_step  # noqa: E402

from cnnlab import data  # noqa: E402
from cnnlab.model import SmallCNN  # noqa: E402

mesh = Mesh(np.array(jax.devices()), ("data",))
split = NamedSharding(mesh, PartitionSpec("data"))  # the first dimension, over the devices
replicated = NamedSharding(mesh, PartitionSpec())  # a whole copy on each device

torch.manual_seed(0)
params = to_jax(dict(SmallCNN(channels=1).named_parameters()))
params = jax.device_put(params, replicated)
momenta = jax.tree.map(lambda param: 0 * param, params)
images, labels = to_jax([tensor[:64] for tensor in data.digits().train.tensors])
images, labels = jax.device_put((images, labels), split)
for shard in images.addressable_shards:
    rows = shard.index[0]
    print(f"device {shard.device.id}: rows {rows.start or 0} to {(rows.stop or len(images)) - 1}")

step = jax.jit(train_step).lower(params, momenta, images, labels).compile()
hlo = step.as_text()
print("collectives in the compiled program:", hlo.count(" all-reduce("), "all-reduce")
losses = []
for _ in range(5):
    params, momenta, loss = step(params, momenta, images, labels)
    losses.append(float(loss))
print("losses:", *(f"{loss:.4f}" for loss in losses))
