"""SmallCNN and VGG19 in JAX, with the parameters of PyTorch's networks (lesson 11)."""

from itertools import islice

import jax
import jax.numpy as jnp
from jax import lax
from torch import nn


def to_jax(tree):
    """Tensors, and dictionaries and lists of them, as JAX arrays on JAX's device."""
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.detach().cpu().numpy()), tree)


def convolve(images, weight, bias):
    """A 3 x 3 convolution that keeps the size."""
    return lax.conv_general_dilated(images, weight, (1, 1), "SAME") + bias[:, None, None]


def pool(images):
    """2 x 2 max-pooling, as maxima of slices.

    XLA can fuse these and their gradients. On CPUs, that of `lax.reduce_window` can be slow.
    """
    rows = jnp.maximum(images[:, :, ::2], images[:, :, 1::2])
    return jnp.maximum(rows[..., ::2], rows[..., 1::2])


def smallcnn_loss(params, images, labels):
    """The cross-entropy loss of SmallCNN. The parameters have the names of PyTorch's network."""
    for layer in ("stage1.0", "stage2.0"):
        images = convolve(images, params[f"{layer}.weight"], params[f"{layer}.bias"])
        images = pool(jax.nn.relu(images))
    features = images.reshape(len(images), -1)
    logits = features @ params["classifier.1.weight"].T + params["classifier.1.bias"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def update(params, momenta, grads):
    """SGD with momentum 0.9 and learning rate 0.05: new parameters and momenta."""
    momenta = jax.tree.map(lambda momentum, grad: 0.9 * momentum + grad, momenta, grads)
    return jax.tree.map(lambda param, momentum: param - 0.05 * momentum, params, momenta), momenta


def train_step(params, momenta, images, labels):
    """Forward pass, backward pass and update as one pure function."""
    loss, grads = jax.value_and_grad(smallcnn_loss)(params, images, labels)
    params, momenta = update(params, momenta, grads)
    return params, momenta, loss


def vgg19_layers(network):
    """[(weight, bias)] of the layers of PyTorch's VGG19, in order."""
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return [(layer.weight, layer.bias) for layer in layers]


def vgg19_forward(layers, images):
    """The logits of VGG19, without dropout. `layers`: from `vgg19_layers`, as JAX arrays."""
    remaining = iter(layers)
    for convolutions in (2, 2, 4, 4, 4):
        for weight, bias in islice(remaining, convolutions):
            images = jax.nn.relu(convolve(images, weight, bias))
        images = pool(images)
    values = images.reshape(len(images), -1)
    for number, (weight, bias) in enumerate(remaining):
        values = values @ weight.T + bias
        values = jax.nn.relu(values) if number < 2 else values
    return values
