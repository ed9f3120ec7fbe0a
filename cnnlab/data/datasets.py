"""The data sets as tensors in memory, and the downloads of those that are not embedded."""

import gzip
import os
import shutil
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from cnnlab.data import photos
from cnnlab.recipe import CnnlabError, Recipe
from cnnlab.record import write_errors

DIGIT_CLASSES = tuple("0123456789")
FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

# Data set: {file name: checksum that its authors publish}.
FILES = {
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
    },
    "cifar10": {"cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530"},
}

# Tried in order, after the server or folder in the environment variable CNNLAB_MIRROR.
MIRRORS = {
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
    ),
}


def load(recipe: Recipe) -> "ImageSplits":
    """The recipe's images.

    Raises `CnnlabError` if they cannot be downloaded, or are too few for the recipe.
    """
    images = _load_splits(recipe)
    available = len(images.train)
    if recipe.batch_size > available:
        raise CnnlabError(
            f"batch_size={recipe.batch_size} is larger than the data set: {recipe.data} has "
            f"{available} training images. Use a batch_size of at most {available}."
        )
    steps = num_steps(recipe, images)
    if steps <= recipe.warmup_steps:
        raise CnnlabError(
            f"epochs={recipe.epochs} of batch_size={recipe.batch_size} make {steps} steps, none to "
            f"time after warmup_steps={recipe.warmup_steps}. Raise epochs or lower warmup_steps."
        )
    return images


def num_steps(recipe: Recipe, images: "ImageSplits") -> int:
    """Number of training steps of the recipe with these images."""
    return recipe.steps or recipe.epochs * (len(images.train) // recipe.batch_size)


def digits() -> "ImageSplits":
    """1,437 + 360 handwritten digits of scikit-learn, enlarged from 8x8 to 1x32x32 (bilinear)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    small = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    images = F.interpolate(small, size=(32, 32), mode="bilinear")
    labels = torch.tensor(targets)
    numbers = np.arange(len(targets))
    train, test = train_test_split(numbers, test_size=360, random_state=0, stratify=targets)
    return _normalize(images[train], labels[train], images[test], labels[test], DIGIT_CLASSES)


def fashion_mnist() -> "ImageSplits":
    """60,000 + 10,000 pieces of clothing (Zalando, 2017), padded from 28x28 to 1x32x32."""
    names = FILES["fashion-mnist"]
    train, train_labels, test, test_labels = [_read("fashion-mnist", n, _parse_idx) for n in names]
    pad = torch.nn.ConstantPad2d(2, 0)
    return _normalize(
        pad(train[:, None]), train_labels, pad(test[:, None]), test_labels, FASHION_CLASSES
    )


def cifar10() -> "ImageSplits":
    """50,000 + 10,000 color photographs of 3x32x32 (Krizhevsky, 2009), from the binary version."""
    train, test = _read("cifar10", "cifar-10-binary.tar.gz", _parse_cifar)
    images = train[:, 1:].reshape(-1, 3, 32, 32)
    test_images = test[:, 1:].reshape(-1, 3, 32, 32)
    return _normalize(images, train[:, 0], test_images, test[:, 0], CIFAR_CLASSES)


def synthetic(images: int, size: int, classes: int, seed: int = 0) -> "ImageSplits":
    """Noise of 3 x size x size with random labels, for measuring throughput at any size."""
    generator = torch.Generator().manual_seed(seed)

    def noise(count: int) -> TensorDataset:
        pixels = torch.randn(count, 3, size, size, generator=generator)
        return TensorDataset(pixels, torch.randint(classes, (count,), generator=generator))

    train = noise(images)
    test = noise(max(1, images // 8))
    return ImageSplits(train=train, test=test, classes=tuple(map(str, range(classes))))


def download(recipe: Recipe) -> None:
    """Download or create all files that the recipe reads. Raises `CnnlabError` on failure."""
    for name in FILES.get(recipe.data, {}):
        fetch(recipe.data, name)
    if recipe.data == "photos":
        photos.photo_folder(recipe.images)


def fetch(data: str, name: str) -> Path:
    """Path of a data set's file in the cache folder, downloaded if needed.

    The file always has the published checksum. Raises `CnnlabError` if no mirror provides it or the
    cache folder cannot be written.
    """
    from filelock import FileLock

    path = photos.cache_folder() / data / name
    with write_errors(path.parent, photos.CACHE_FIX):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be downloading the file. A cached file may be in a read-only folder.
        lock = FileLock(path.parent.parent / f".{name}.lock")
        with nullcontext() if path.exists() else lock:
            _fetch_from_mirrors(data, path)
    return path


def _fetch_from_mirrors(data: str, path: Path) -> None:
    import pooch
    import requests

    name = path.name
    failures = []
    for mirror in filter(None, (os.environ.get("CNNLAB_MIRROR"), *MIRRORS[data])):
        url = f"{mirror.rstrip('/')}/{name}"
        downloader = _copy_file if Path(url).is_file() else pooch.HTTPDownloader(progressbar=True)
        try:
            pooch.retrieve(url, FILES[data][name], name, path.parent, downloader=downloader)
            return
        except requests.RequestException as error:  # first: some are also a ValueError
            failures.append(f"{url}: {type(error).__name__}")
        except ValueError:  # raised by pooch
            failures.append(f"{url}: wrong checksum, so this is not the published file")
    raise CnnlabError(
        f"data={data!r} cannot be downloaded ({'; '.join(failures)}). Go online, set CNNLAB_MIRROR "
        f"to a folder or server that has {name}, or use data='digits', which is embedded."
    )


def _copy_file(path: str, output_file: str, pooch: Any) -> None:
    """A downloader for pooch that copies a file from a folder."""
    shutil.copyfile(path, output_file)


def _load_splits(recipe: Recipe) -> "ImageSplits":
    if recipe.data == "synthetic":
        return synthetic(recipe.images, recipe.image_size, recipe.classes, recipe.seed)
    if recipe.data == "photos":
        crop = recipe.augment == "crop"
        train, test = photos.photo_datasets(recipe.images, recipe.image_size, crop)
        decoded = TensorDataset(*default_collate([test[number] for number in range(len(test))]))
        return ImageSplits(train=train, test=decoded, classes=photos.PHOTO_CLASSES)
    loaders = {"digits": digits, "fashion-mnist": fashion_mnist, "cifar10": cifar10}
    return loaders[recipe.data]()


def _read(data: str, name: str, parse: Callable) -> Any:
    path = fetch(data, name)
    try:
        return parse(path)
    except Exception as error:  # whatever a damaged file makes the parser raise
        raise CnnlabError(
            f"the data file {path} cannot be read ({error}). Delete it to download it again."
        ) from None


def _parse_idx(path: Path) -> Tensor:
    """The array in an IDX file: 0, 0, type 8, number of dimensions, big-endian sizes, values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError("not an IDX file of bytes")
    dimensions = raw[3]
    sizes = np.frombuffer(raw, ">u4", count=dimensions, offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    return torch.tensor(values.reshape(sizes))


def _parse_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """(training rows, test rows) of one label and 3 x 32 x 32 pixels each."""
    rows = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None and member.name.endswith(".bin"):
                raw = np.frombuffer(file.read(), np.uint8)
                rows[Path(member.name).name] = torch.tensor(raw.reshape(-1, 1 + 3 * 32 * 32))
    train = torch.cat([rows[f"data_batch_{number}.bin"] for number in range(1, 6)])
    return train, rows["test_batch.bin"]


def _normalize(train, train_labels, test, test_labels, classes):
    """Normalize both splits with the per-channel mean and deviation of the training images."""
    train, test = train.float(), test.float()
    mean = train.mean((0, 2, 3), keepdim=True)
    std = train.std((0, 2, 3), keepdim=True)
    return ImageSplits(
        train=TensorDataset((train - mean) / std, train_labels.long()),
        test=TensorDataset((test - mean) / std, test_labels.long()),
        classes=classes,
    )


@dataclass(frozen=True, kw_only=True)
class ImageSplits:
    """Training and test images with their labels.

    Images are float32 (channels, size, size) with a mean of about 0, labels int64. All are in
    memory, except the training photographs, which stay files.
    """

    train: TensorDataset | photos.PhotoDataset
    test: TensorDataset
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, size, number of classes), which is what a model needs to know."""
        channels, size = self.test.tensors[0].shape[1:3]
        return channels, size, len(self.classes)

    def to(self, device: torch.device) -> "ImageSplits":
        """The same images and labels in the memory of a device. All must be in memory already."""
        splits: list = [self.train, self.test]
        train, test = (TensorDataset(*(t.to(device) for t in split.tensors)) for split in splits)
        return ImageSplits(train=train, test=test, classes=self.classes)
