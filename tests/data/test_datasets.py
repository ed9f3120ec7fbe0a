"""The data sets, and downloads from a real server on this machine."""

import gzip
import hashlib
import io
import struct
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from cnnlab.data import datasets
from cnnlab.recipe import CnnlabError, Recipe


@pytest.fixture(scope="module")
def digits():
    return datasets.digits()


def test_digits_are_1437_and_360_of_one_channel(digits):
    assert digits.train.tensors[0].shape == (1437, 1, 32, 32)
    assert digits.test.tensors[0].shape == (360, 1, 32, 32)
    assert digits.train.tensors[1].dtype == torch.int64
    assert digits.shape == (1, 32, 10)


def test_both_splits_together_are_the_digits_of_scikit_learn(digits):
    """Compared as sorted lists, because a few digits occur twice in scikit-learn's data."""
    from sklearn.datasets import load_digits

    small = torch.tensor(load_digits().data, dtype=torch.float32).reshape(-1, 1, 8, 8)
    raw = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear")
    ours = torch.cat([digits.train.tensors[0], digits.test.tensors[0]])
    ours = (ours - ours.min()) / (ours.max() - ours.min()) * 16
    rows = [sorted(images.flatten(1)[:, ::5].round(decimals=2).tolist()) for images in (raw, ours)]
    assert np.allclose(*rows, atol=0.02)


def test_digits_are_stratified(digits):
    shares = [
        torch.bincount(part.tensors[1], minlength=10) / len(part)
        for part in (digits.train, digits.test)
    ]
    assert (shares[0] - shares[1]).abs().max() < 1 / 360  # at most one image off


def test_training_images_have_mean_0_and_deviation_1(digits):
    images = digits.train.tensors[0]
    assert abs(images.mean()) < 1e-5
    assert abs(images.std() - 1) < 1e-3


def test_the_split_is_the_same_each_time(digits):
    assert torch.equal(datasets.digits().test.tensors[1], digits.test.tensors[1])


def test_synthetic_images_have_the_size_of_the_recipe():
    recipe = Recipe(data="synthetic", images=80, image_size=16, classes=3, batch_size=40, epochs=3)
    images = datasets.load(recipe)
    assert images.train.tensors[0].shape == (80, 3, 16, 16) and len(images.test) == 10
    assert images.shape == (3, 16, 3)
    assert set(images.train.tensors[1].tolist()) == {0, 1, 2}


def test_synthetic_images_follow_the_seed():
    first, second, other = (
        datasets.synthetic(10, 8, 10, seed).train.tensors[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_batch_larger_than_the_data_is_rejected():
    message = "batch_size=1438 is larger.*digits has 1437.*at most 1437"
    with pytest.raises(CnnlabError, match=message):
        datasets.load(Recipe(batch_size=1438))


def test_epochs_must_have_more_steps_than_the_warm_up():
    with pytest.raises(CnnlabError, match="batch_size=700 make 2 steps.*warmup_steps=2"):
        datasets.load(Recipe(batch_size=700))
    datasets.load(Recipe(batch_size=700, epochs=2))


# Downloads


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`, logs requests, and truncates files as `server.cut` says."""

    def do_GET(self):  # noqa: N802
        name = self.path.rsplit("/", 1)[1]
        self.server.requested.append(name)
        if name not in self.server.files:
            return self.send_error(404)
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut.get(name)])

    def log_message(self, *arguments):
        pass


class SlowHandler(Handler):
    def do_GET(self):  # noqa: N802
        time.sleep(0.5)
        super().do_GET()


@contextmanager
def serving(files):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requested, server.cut = dict(files), [], {}
    server.url = f"http://127.0.0.1:{server.server_port}/some/folder/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def idx(array):
    return gzip.compress(
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def tar_gz(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def md5(content):
    return "md5:" + hashlib.md5(content).hexdigest()


random = np.random.default_rng(0)
FASHION = {
    "train images": random.integers(0, 256, (300, 28, 28), np.uint8),
    "train labels": random.integers(0, 10, 300).astype(np.uint8),
    "test images": random.integers(0, 256, (5, 28, 28), np.uint8),
    "test labels": random.integers(0, 10, 5).astype(np.uint8),
}
FASHION_FILES = {
    name: idx(array)
    for name, array in zip(datasets.FILES["fashion-mnist"], FASHION.values(), strict=True)
}
FIRST = next(iter(FASHION_FILES))
CIFAR = {
    f"data_batch_{n}.bin": random.integers(0, 10, (2, 3073), np.uint8) for n in (3, 1, 2, 5, 4)
} | {"test_batch.bin": random.integers(0, 10, (3, 3073), np.uint8)}
CIFAR_FILE = tar_gz(
    {"readme.html": b"hello", **{name: rows.tobytes() for name, rows in CIFAR.items()}}
)


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A cache folder of its own, and two mirrors: (cache, first server, second server)."""
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("CNNLAB_MIRROR", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    files = {**FASHION_FILES, "cifar-10-binary.tar.gz": CIFAR_FILE}
    with serving(files) as first, serving(files) as second:
        publish(monkeypatch, files)
        mirrors = dict.fromkeys(datasets.MIRRORS, (first.url, second.url))
        monkeypatch.setattr(datasets, "MIRRORS", mirrors)
        yield tmp_path / "cache", first, second


def publish(monkeypatch, files):
    """Make the checksums of these files the published ones."""
    published = {
        data: {name: md5(files[name]) for name in names} for data, names in datasets.FILES.items()
    }
    monkeypatch.setattr(datasets, "FILES", published)


def test_fashion_mnist_has_the_pixels_and_labels_of_its_files(network):
    images = datasets.fashion_mnist()
    for part, name in ((images.train, "train"), (images.test, "test")):
        assert part.tensors[0].shape == (len(FASHION[f"{name} images"]), 1, 32, 32)
        assert part.tensors[1].tolist() == FASHION[f"{name} labels"].tolist()
    raw = np.pad(FASHION["train images"].astype(float), ((0, 0), (2, 2), (2, 2)))
    mean, std = raw.mean(), raw.std(ddof=1)  # of the training images, for both splits
    train = images.train.tensors[0][:, 0]
    assert np.allclose(train, (raw - mean) / std, atol=1e-4)
    test = images.test.tensors[0][:, 0, 2:-2, 2:-2]
    assert np.allclose(test, (FASHION["test images"] - mean) / std, atol=1e-4)


def test_cifar10_has_the_pixels_and_labels_of_its_archive(network):
    images = datasets.cifar10()
    raw = np.concatenate([CIFAR[f"data_batch_{n}.bin"] for n in range(1, 6)])
    pixels = raw[:, 1:].reshape(-1, 3, 32, 32).astype(float)
    assert images.train.tensors[1].tolist() == raw[:, 0].tolist()
    assert images.test.tensors[1].tolist() == CIFAR["test_batch.bin"][:, 0].tolist()
    mean = pixels.mean((0, 2, 3), keepdims=True)
    std = pixels.std((0, 2, 3), ddof=1, keepdims=True)
    assert np.allclose(images.train.tensors[0], (pixels - mean) / std, atol=1e-4)


def test_a_file_is_downloaded_once(network):
    cache, first, _ = network
    datasets.fashion_mnist()
    datasets.fashion_mnist()
    assert first.requested == list(FASHION_FILES)
    assert sorted(p.name for p in (cache / "fashion-mnist").iterdir()) == sorted(FASHION_FILES)


def test_concurrent_requests_download_a_file_once(network):
    _, first, _ = network
    first.RequestHandlerClass = SlowHandler
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: datasets.fetch("fashion-mnist", FIRST), range(4)))
    assert {path.read_bytes() for path in paths} == {FASHION_FILES[FIRST]}
    assert first.requested == [FIRST]


def test_a_file_missing_on_one_mirror_comes_from_the_next(network):
    _, first, second = network
    first.files.clear()
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    assert second.requested == [FIRST]


def test_a_file_with_a_wrong_checksum_comes_from_the_next_mirror(network):
    _, first, second = network
    first.files[FIRST] = b"<html>log in to the hotel network</html>"
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    assert first.requested == second.requested == [FIRST]


def test_wrong_files_on_all_mirrors_are_rejected_with_a_fix(network):
    cache, first, second = network
    for server in (first, second):
        server.files[FIRST] = b"<html>log in to the hotel network</html>"
    with pytest.raises(CnnlabError) as raised:
        datasets.fashion_mnist()
    assert str(raised.value).count("wrong checksum") == 2
    assert "data='digits', which is embedded" in str(raised.value)
    assert list((cache / "fashion-mnist").iterdir()) == []


def test_a_truncated_download_is_replaced_from_the_next_mirror(network):
    cache, first, second = network
    first.cut[FIRST] = 100_000
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    assert first.requested == second.requested == [FIRST]
    assert [path.name for path in (cache / "fashion-mnist").iterdir()] == [FIRST]


def test_a_truncated_download_is_never_accepted(network):
    cache, first, second = network
    first.cut[FIRST], second.cut[FIRST] = 80_000, 150_000
    with pytest.raises(CnnlabError, match="cannot be downloaded"):
        datasets.fetch("fashion-mnist", FIRST)
    assert list((cache / "fashion-mnist").iterdir()) == []
    second.cut.clear()
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]


def test_a_mirror_that_is_down_is_skipped(network):
    _, first, second = network
    first.shutdown()
    first.server_close()
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    assert second.requested == [FIRST]


def test_without_a_network_the_error_names_the_fixes(network):
    _, first, second = network
    for server in (first, second):
        server.shutdown()
        server.server_close()
    message = "cannot be downloaded.*ConnectionError.*Go online.*CNNLAB_MIRROR.*digits"
    with pytest.raises(CnnlabError, match=message):
        datasets.load(Recipe(data="fashion-mnist", batch_size=4))


def test_a_damaged_file_in_the_cache_is_downloaded_again(network):
    path = datasets.fetch("fashion-mnist", FIRST)
    path.write_bytes(b"damaged")
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]


def test_an_unwritable_data_folder_is_reported(network, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path / "file"))
    with pytest.raises(CnnlabError, match="cannot write .*CNNLAB_DATA"):
        datasets.fashion_mnist()


def test_the_users_mirror_is_tried_first(network, monkeypatch):
    _, first, second = network
    with serving(FASHION_FILES) as own:
        monkeypatch.setenv("CNNLAB_MIRROR", own.url)
        datasets.fashion_mnist()
        assert own.requested == list(FASHION_FILES)
    assert first.requested == second.requested == []


def test_a_mirror_can_be_a_folder(network, tmp_path, monkeypatch):
    _, first, _ = network
    (tmp_path / "mirror").mkdir()
    for name, content in FASHION_FILES.items():
        (tmp_path / "mirror" / name).write_bytes(content)
    monkeypatch.setenv("CNNLAB_MIRROR", str(tmp_path / "mirror"))
    assert len(datasets.fashion_mnist().train) == 300
    assert first.requested == []
    assert (tmp_path / "mirror" / FIRST).exists()


@pytest.mark.parametrize("mirror", ["/no/such/folder", "http://", "nonsense"])
def test_an_invalid_mirror_is_named_and_the_others_are_tried(network, monkeypatch, mirror):
    _, first, second = network
    monkeypatch.setenv("CNNLAB_MIRROR", mirror)
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    first.files.clear()
    second.files.clear()
    with pytest.raises(CnnlabError) as raised:
        datasets.fetch("fashion-mnist", "train-labels-idx1-ubyte.gz")
    assert mirror in str(raised.value) and "checksum" not in str(raised.value)


GARBAGE = {
    "no gzip": b"garbage",
    "gzip of garbage": gzip.compress(b"garbage"),
    "cut": FASHION_FILES[FIRST][:50],
    "empty": b"",
    "damaged inside": gzip.compress(b"x")[:10] + b"\xff" * 30,
    "too few pixels": gzip.compress(b"\x00\x00\x08\x01" + struct.pack(">I", 99) + b"abc"),
    "tiny": gzip.compress(b"\x00\x00\x08"),
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_a_damaged_file_with_the_right_checksum_is_rejected(network, monkeypatch, name, kind):
    _, first, _ = network
    first.files.update({FIRST: GARBAGE[kind], "cifar-10-binary.tar.gz": GARBAGE[kind]})
    publish(monkeypatch, first.files)
    with pytest.raises(CnnlabError, match="cannot be read.*Delete it"):
        datasets.load(Recipe(data=name, batch_size=2))


def test_an_incomplete_archive_is_rejected(network, monkeypatch):
    _, first, _ = network
    only_one = {"data_batch_1.bin": CIFAR["data_batch_1.bin"].tobytes()}
    first.files["cifar-10-binary.tar.gz"] = tar_gz(only_one)
    publish(monkeypatch, first.files)
    with pytest.raises(CnnlabError, match="cannot be read"):
        datasets.cifar10()
