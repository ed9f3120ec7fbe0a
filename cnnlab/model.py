"""The CNNs. Each is an ordered list of named stages that does not know how it is accelerated."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cnnlab.recipe import CnnlabError, Recipe


def build(recipe: Recipe, shape: tuple[int, int, int]) -> nn.Module:
    """The recipe's model for images of `shape`, initialized from the recipe's seed.

    `shape`: (channels, size, classes). Raises `CnnlabError` if the size does not fit the model.
    """
    model, multiple = MODELS[recipe.model]
    channels, size, classes = shape
    if size % multiple:
        raise CnnlabError(
            f"{recipe.model} needs an image size that is a multiple of {multiple} pixels, "
            f"not {size}. Change image_size or data."
        )
    options = {} if recipe.width is None else {"width": recipe.width}
    torch.manual_seed(recipe.seed)
    return model(channels=channels, size=size, classes=classes, **options)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def conv_block(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    """Convolution, batch normalization, ReLU, and with `pool` 2x2 max-pooling.

    (N, inputs, size, size) -> (N, outputs, size, size), or half the size with `pool`.
    """
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    pooling = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(), *pooling)


class SmallCNN(nn.Sequential):
    """Two convolutions and a linear classifier, as in many first lessons on CNNs.

    (N, channels, size, size) -> logits (N, classes). `size` must be a multiple of 4.
    """

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10, width: int = 16):
        super().__init__()
        w = width
        self.stage1 = nn.Sequential(
            nn.Conv2d(channels, w, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.stage2 = nn.Sequential(nn.Conv2d(w, 2 * w, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(2 * w * (size // 4) ** 2, classes))


class ResNet9(nn.Sequential):
    """The nine-layer residual network of David Page, "How to train your ResNet" (2018).

    (N, channels, size, size) -> logits (N, classes). `size` must be a multiple of 8.
    """

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10, width: int = 32):
        super().__init__()
        w = width
        self.stem = conv_block(channels, w)
        self.stage1 = nn.Sequential(
            conv_block(w, 2 * w, pool=True),
            Residual(conv_block(2 * w, 2 * w), conv_block(2 * w, 2 * w)),
        )
        self.stage2 = conv_block(2 * w, 4 * w, pool=True)
        self.stage3 = nn.Sequential(
            conv_block(4 * w, 8 * w, pool=True),
            Residual(conv_block(8 * w, 8 * w), conv_block(8 * w, 8 * w)),
        )
        linear = nn.Linear(8 * w, classes, bias=False)
        self.classifier = nn.Sequential(nn.MaxPool2d(size // 8), nn.Flatten(), linear, Scale(0.125))


class Residual(nn.Sequential):
    """Adds its input to the output of its layers. The shape stays the same."""

    def forward(self, images: Tensor) -> Tensor:
        return images + super().forward(images)


class Scale(nn.Module):
    """Multiplies by a constant. Small initial logits keep the first steps stable."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.factor


class VGG(nn.Sequential):
    """The networks of Simonyan and Zisserman, "Very Deep Convolutional Networks" (2014), table 1.

    (N, channels, size, size) -> logits (N, classes). `size` must be a multiple of 32.
    `blocks`: number of convolutions before each of the five poolings.
    """

    def __init__(
        self, blocks: tuple, channels: int = 3, size: int = 32, classes: int = 10, width: int = 64
    ) -> None:
        super().__init__()
        for number, convolutions in enumerate(blocks, start=1):
            outputs = min(width * 2 ** (number - 1), width * 8)
            layers: list[nn.Module] = []
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU()]
                channels = outputs
            self.add_module(f"stage{number}", nn.Sequential(*layers, nn.MaxPool2d(2)))
        hidden = 64 * width  # 4096 in the paper
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * (size // 32) ** 2, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, classes),
        )


# Configurations D and E of the paper: 13 and 16 convolutions, and 3 linear layers.
VGG16 = partial(VGG, (2, 2, 3, 3, 3))
VGG19 = partial(VGG, (2, 2, 4, 4, 4))

# Name: (model, number that must divide the image size).
MODELS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "SmallCNN": (SmallCNN, 4),
    "ResNet9": (ResNet9, 8),
    "VGG16": (VGG16, 32),
    "VGG19": (VGG19, 32),
}
