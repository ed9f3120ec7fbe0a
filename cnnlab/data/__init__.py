"""The images: data sets, photographs as files, and the loader that divides batches among ranks."""

from cnnlab.data.datasets import cifar10, digits, fashion_mnist, load, synthetic
from cnnlab.data.loader import train_loader
from cnnlab.data.photos import PhotoDataset, photo_folder

__all__ = [
    "PhotoDataset",
    "cifar10",
    "digits",
    "fashion_mnist",
    "load",
    "photo_folder",
    "synthetic",
    "train_loader",
]
