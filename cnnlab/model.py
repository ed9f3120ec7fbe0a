"""The networks. Each is an ordered list of named stages that knows nothing of how it is accelerated."""

import torch
from torch import nn

from cnnlab.recipe import CnnlabError


class SmallCNN(nn.Sequential):
    """Two convolutions and a linear classifier, the network of most first lessons.

    Input (N, channels, size, size), output (N, classes) logits; `size` a multiple of 4.
    """

    def __init__(self, channels=3, size=32, classes=10, width=16):
        super().__init__()
        self.add_module(
            "stage1",
            nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.add_module(
            "stage2",
            nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.add_module(
            "classifier",
            nn.Sequential(nn.Flatten(), nn.Linear(2 * width * (size // 4) ** 2, classes)),
        )


class Residual(nn.Sequential):
    """Adds its input to what its stages make of it."""

    def forward(self, images):
        return images + super().forward(images)


class Scale(nn.Module):
    """Multiplies by a constant; keeps the first logits small, so that training starts calmly."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return logits * self.factor


def conv_block(inputs, outputs, pool=False):
    """Convolution, batch normalisation, ReLU, and perhaps 2x2 max-pooling."""
    layers = [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


class ResNet9(nn.Sequential):
    """The nine-layer residual network of David Page's "How to train your ResNet" (2018), CIFAR-10's fast classic.

    Input (N, channels, size, size), output (N, classes) logits; `size` a multiple of 8.
    """

    def __init__(self, channels=3, size=32, classes=10, width=32):
        super().__init__()
        w = width
        self.add_module("stem", conv_block(channels, w))
        self.add_module(
            "stage1",
            nn.Sequential(
                conv_block(w, 2 * w, pool=True),
                Residual(conv_block(2 * w, 2 * w), conv_block(2 * w, 2 * w)),
            ),
        )
        self.add_module("stage2", conv_block(2 * w, 4 * w, pool=True))
        self.add_module(
            "stage3",
            nn.Sequential(
                conv_block(4 * w, 8 * w, pool=True),
                Residual(conv_block(8 * w, 8 * w), conv_block(8 * w, 8 * w)),
            ),
        )
        self.add_module(
            "classifier",
            nn.Sequential(
                nn.MaxPool2d(size // 8),
                nn.Flatten(),
                nn.Linear(8 * w, classes, bias=False),
                Scale(0.125),
            ),
        )


class VGG(nn.Sequential):
    """Very deep plain networks, Simonyan and Zisserman, "Very Deep Convolutional Networks" (2014), table 1.

    Input (N, channels, size, size), output (N, classes) logits; `size` a multiple of 32. `blocks` says how many
    convolutions stand before each of the five poolings.
    """

    def __init__(self, blocks, channels=3, size=32, classes=10, width=64):
        super().__init__()
        for number, convolutions in enumerate(blocks, start=1):
            outputs = width * 2 ** min(number - 1, 3)
            layers = []
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU()]
                channels = outputs
            self.add_module(f"stage{number}", nn.Sequential(*layers, nn.MaxPool2d(2)))
        hidden = 64 * width  # 4096 in the paper
        self.add_module(
            "classifier",
            nn.Sequential(
                nn.Flatten(),
                nn.Linear(channels * (size // 32) ** 2, hidden),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(hidden, classes),
            ),
        )


def VGG16(**shape):
    """Configuration D of the paper."""
    return VGG((2, 2, 3, 3, 3), **shape)


def VGG19(**shape):
    """Configuration E of the paper."""
    return VGG((2, 2, 4, 4, 4), **shape)


def build(recipe, shape):
    """The recipe's model for images of `shape` (channels, size, classes), initialised from the recipe's seed."""
    models = {
        "SmallCNN": (SmallCNN, 4),
        "ResNet9": (ResNet9, 8),
        "VGG16": (VGG16, 32),
        "VGG19": (VGG19, 32),
    }
    model, multiple = models[recipe.model]
    channels, size, classes = shape
    if size % multiple:
        raise CnnlabError(
            f"{recipe.model} takes images whose side is a multiple of {multiple} pixels, not {size}: "
            f"change image_size or the data."
        )
    width = {} if recipe.width is None else {"width": recipe.width}
    torch.manual_seed(recipe.seed)
    return model(channels=channels, size=size, classes=classes, **width)


def count_parameters(model):
    """How many trainable numbers the model has."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
