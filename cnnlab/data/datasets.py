"""The images: where they come from, how they reach memory, and how each rank gets its share of every batch."""

import gzip
import os
import shutil
import tarfile
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import (
    TensorDataset,
    default_collate,
)

from cnnlab.data.photos import (
    PHOTO_CLASSES,
    PhotoDataset,
    cache_folder,
    photo_datasets,
    photo_folder,
)
from cnnlab.recipe import CnnlabError

DIGIT_CLASSES = tuple("0123456789")


FASHION_CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


CIFAR_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


FASHION_FILES = {  # file name: checksum, as the data set's authors publish it
    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}


CIFAR_FILES = {"cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530"}


MIRRORS = {  # tried in order; a folder of your own goes first, in the variable CNNLAB_MIRROR
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
    ),
}


READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    zlib.error,
    tarfile.TarError,
)  # what damaged files raise


@dataclass(frozen=True, kw_only=True)
class ImageSplits:
    """A data set: images as float32 (N, channels, size, size) of about zero mean, labels as int64 (N,).

    All in memory, but for photographs: those to train on stay files.
    """

    train: TensorDataset | PhotoDataset
    test: TensorDataset
    classes: tuple[str, ...]

    @property
    def shape(self):
        """(channels, size, number of classes): what a model needs to know."""
        return *self.test.tensors[0].shape[1:3], len(self.classes)


def load(recipe):
    """The recipe's `ImageSplits`. Raises `CnnlabError` when they cannot be had, or are too few for the recipe."""
    loaders = {
        "digits": digits,
        "fashion-mnist": fashion_mnist,
        "cifar10": cifar10,
        "synthetic": lambda: synthetic(
            recipe.images, recipe.image_size, recipe.classes, recipe.seed
        ),
        "photos": lambda: photos(recipe.images, recipe.image_size, recipe.augment == "crop"),
    }
    images = loaders[recipe.data]()
    steps = num_steps(recipe, images)
    if recipe.batch_size > len(images.train):
        raise CnnlabError(
            f"batch_size={recipe.batch_size} is larger than the data: {recipe.data} has {len(images.train)} "
            f"training images. Take a batch of at most {len(images.train)}."
        )
    if steps <= recipe.warmup_steps:
        raise CnnlabError(
            f"epochs={recipe.epochs} of batch_size={recipe.batch_size} make {steps} steps, which leaves nothing to time after "
            f"warmup_steps={recipe.warmup_steps}: raise epochs or lower warmup_steps."
        )
    return images


def num_steps(recipe, images):
    """How many steps the recipe takes with these `ImageSplits`."""
    return recipe.steps or recipe.epochs * (len(images.train) // recipe.batch_size)


def digits():
    """1,437 + 360 handwritten digits that ship with scikit-learn, enlarged from 8x8 to 1x32x32 (bilinear)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    images = torch.nn.functional.interpolate(
        images, size=(32, 32), mode="bilinear", align_corners=False
    )
    labels = torch.tensor(labels)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    return _normalize(images[train], labels[train], images[test], labels[test], DIGIT_CLASSES)


def fashion_mnist():
    """60,000 + 10,000 pieces of clothing (Zalando, 2017), padded from 28x28 to 1x32x32. Downloaded once."""
    arrays = []
    for name in FASHION_FILES:
        path = fetch("fashion-mnist", name)
        try:
            with gzip.open(path) as file:
                arrays.append(torch.from_numpy(_parse_idx(file.read()).copy()))
        except READ_ERRORS as error:
            raise _damaged_file(path, error) from None
    train, train_labels, test, test_labels = arrays
    pad = torch.nn.ConstantPad2d(2, 0)
    return _normalize(
        pad(train[:, None]).float(),
        train_labels.long(),
        pad(test[:, None]).float(),
        test_labels.long(),
        FASHION_CLASSES,
    )


def cifar10():
    """50,000 + 10,000 colour photographs of 3x32x32 (Krizhevsky, 2009), from the binary version. Downloaded once."""
    path = fetch("cifar10", "cifar-10-binary.tar.gz")
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    rows = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if Path(member.name).name in names:
                    raw = np.frombuffer(archive.extractfile(member).read(), np.uint8)
                    rows[Path(member.name).name] = raw.reshape(
                        -1, 1 + 3 * 32 * 32
                    )  # one label, then the pixels
        train, test = np.concatenate([rows[name] for name in names[:5]]), rows[names[5]]
    except READ_ERRORS as error:
        raise _damaged_file(path, error) from None
    split = lambda rows: (
        torch.tensor(rows[:, 1:].reshape(-1, 3, 32, 32)).float(),
        torch.tensor(rows[:, 0]).long(),
    )
    return _normalize(*split(train), *split(test), CIFAR_CLASSES)


def synthetic(images, size, classes, seed=0):
    """Noise with random labels, 3 channels: nothing to learn, right for measuring throughput at any size."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda n: TensorDataset(
        torch.randn(n, 3, size, size, generator=generator),
        torch.randint(classes, (n,), generator=generator),
    )
    return ImageSplits(
        train=make(images),
        test=make(max(1, images // 8)),
        classes=tuple(str(c) for c in range(classes)),
    )


def photos(images, size, augment=False):
    """So many JPEG files of 256x256 pixels, two classes; those to train on are decoded anew each time they are asked for."""
    train, test = photo_datasets(images, size, augment)
    test = TensorDataset(*default_collate([test[number] for number in range(len(test))]))
    return ImageSplits(train=train, test=test, classes=PHOTO_CLASSES)


def download(recipe):
    """Have all files that the recipe reads in the cache. Raises `CnnlabError` when one cannot be had."""
    for name in {"fashion-mnist": FASHION_FILES, "cifar10": CIFAR_FILES}.get(recipe.data, ()):
        fetch(recipe.data, name)
    if recipe.data == "photos":
        photo_folder(recipe.images)


def fetch(data, name):
    """Path of one checksummed file of a data set in the cache (CNNLAB_DATA, or the user's cache folder).

    Mirrors are tried in order; a broken download goes on where it stopped. Raises `CnnlabError` when none delivers.
    """
    import pooch
    import requests
    from filelock import FileLock

    checksum = {**FASHION_FILES, **CIFAR_FILES}[name]
    folder = cache_folder() / data
    own = os.environ.get("CNNLAB_MIRROR")
    reasons = []
    for mirror in (*([own] if own else []), *MIRRORS[data]):
        url = mirror.rstrip("/") + "/" + name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (
                nullcontext()
                if (folder / name).exists()
                else FileLock(folder.parent / f".{name}.lock")
            ):  # another process may be at it
                return Path(
                    pooch.retrieve(
                        url, checksum, fname=name, path=folder, downloader=_http_download
                    )
                )
        except (
            requests.RequestException
        ) as error:  # before the two others, of which some of these are kinds
            reasons.append(f"{url}: {type(error).__name__}")
        except ValueError:  # pooch: the checksum differs
            reasons.append(
                f"{url}: the file there is not the one that was published (wrong checksum)"
            )
        except OSError as error:
            raise CnnlabError(
                f"cannot write to the data folder {folder} ({error.strerror or error}). Free some room, or set CNNLAB_DATA "
                f"to a folder that you may write to."
            ) from None
    raise CnnlabError(
        f"data={data!r} cannot be downloaded here ({'; '.join(reasons)}). Go online and try again, set "
        f"CNNLAB_MIRROR to a folder or server that has {name}, or take data='digits', which is embedded."
    )


def _http_download(url, output_file, pooch):
    """Pooch's downloader with a progress bar, that resumes: bytes are kept in a .part file beside the target."""
    import requests
    from tqdm.auto import tqdm

    if Path(url).is_file():  # CNNLAB_MIRROR is a folder
        shutil.copyfile(url, output_file)
        return
    part = Path(output_file).parent / (url.rsplit("/", 1)[1] + ".part")
    have = part.stat().st_size if part.exists() else 0
    with requests.get(
        url, headers={"Range": f"bytes={have}-"} if have else {}, stream=True, timeout=20
    ) as reply:
        if reply.status_code == 416:  # already whole, or not this file: let the checksum decide
            shutil.move(part, output_file)
            return
        reply.raise_for_status()
        resumed = reply.status_code == 206
        total = int(reply.headers.get("Content-Length", 0)) + have * resumed
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(
                total=total or None,
                initial=have * resumed,
                unit="B",
                unit_scale=True,
                desc=part.stem,
                leave=False,
            ) as bar,
        ):
            for chunk in reply.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    if total and part.stat().st_size != total:
        raise requests.ConnectionError(
            f"{url} stopped after {part.stat().st_size} of {total} bytes"
        )
    shutil.move(part, output_file)


def _parse_idx(raw):
    """The array in an IDX file: two zero bytes, type 8, number of dimensions, big-endian sizes, then the bytes."""
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError("not an IDX file of bytes")
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def _normalize(train, train_labels, test, test_labels, classes):
    """Both parts shifted and scaled by the training images' mean and standard deviation, channel by channel."""
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return ImageSplits(
        train=TensorDataset((train - mean) / std, train_labels),
        test=TensorDataset((test - mean) / std, test_labels),
        classes=classes,
    )


def _damaged_file(path, error):
    return CnnlabError(
        f"the data file {path} cannot be read ({error}). Delete it, and it will be downloaded again."
    )
