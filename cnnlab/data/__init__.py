"""The images: where they come from, how they reach memory, how each rank gets its part of every batch."""

from cnnlab.data.datasets import (
    ImageSplits,
    cifar10,
    digits,
    download,
    fashion_mnist,
    load,
    num_steps,
    synthetic,
)
from cnnlab.data.loader import RankBatchSampler, random_shifts, shift_images, train_loader
from cnnlab.data.photos import PhotoDataset, photo_folder

__all__ = [
    "ImageSplits",
    "PhotoDataset",
    "RankBatchSampler",
    "cifar10",
    "digits",
    "download",
    "fashion_mnist",
    "load",
    "num_steps",
    "photo_folder",
    "random_shifts",
    "shift_images",
    "synthetic",
    "train_loader",
]
