"""The images, their order, and downloads from a real server on this machine."""

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
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cnnlab.data import datasets, loader
from cnnlab.recipe import CnnlabError, Recipe


@pytest.fixture(scope="module")
def digits():
    return datasets.digits()


def test_digits_are_1437_and_360_of_one_channel(digits):
    assert digits.train.tensors[0].shape == (1437, 1, 32, 32) and digits.test.tensors[0].shape == (
        360,
        1,
        32,
        32,
    )
    assert digits.train.tensors[1].dtype == torch.int64
    assert digits.shape == (1, 32, 10)


def test_no_digit_is_in_both_parts(digits):
    """Counted, since a few digits occur twice in scikit-learn's data: train and test together are its 1,797 images."""
    from sklearn.datasets import load_digits

    raw = torch.nn.functional.interpolate(
        torch.tensor(load_digits().data, dtype=torch.float32).reshape(-1, 1, 8, 8),
        size=(32, 32),
        mode="bilinear",
    )
    ours = torch.cat([digits.train.tensors[0], digits.test.tensors[0]])
    ours = (ours - ours.min()) / (ours.max() - ours.min()) * 16
    as_sets = [
        sorted(tuple(row) for row in images.flatten(1)[:, ::5].round(decimals=2).tolist())
        for images in (raw, ours)
    ]
    assert np.allclose(*as_sets, atol=0.02)


def test_digits_are_stratified(digits):
    shares = [
        torch.bincount(part.tensors[1], minlength=10) / len(part)
        for part in (digits.train, digits.test)
    ]
    assert (shares[0] - shares[1]).abs().max() < 1 / 360  # at most one image off


def test_training_images_have_mean_0_and_deviation_1(digits):
    assert (
        abs(digits.train.tensors[0].mean()) < 1e-5 and abs(digits.train.tensors[0].std() - 1) < 1e-3
    )


def test_the_split_is_the_same_each_time(digits):
    assert torch.equal(datasets.digits().test.tensors[1], digits.test.tensors[1])


def test_synthetic_images_have_the_size_asked_for():
    images = datasets.load(
        Recipe(data="synthetic", images=80, image_size=16, classes=3, batch_size=40, epochs=3)
    )
    assert images.train.tensors[0].shape == (80, 3, 16, 16) and len(images.test) == 10
    assert images.shape == (3, 16, 3)
    assert set(images.train.tensors[1].tolist()) == {0, 1, 2}


def test_synthetic_images_follow_the_seed():
    make = lambda seed: datasets.synthetic(10, 8, 10, seed).train.tensors[0]
    assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        CnnlabError, match="batch_size=1438 is larger.*digits has 1437.*at most 1437"
    ):
        datasets.load(Recipe(batch_size=1438))


def test_data_that_last_only_for_the_warm_up_are_refused():
    with pytest.raises(CnnlabError, match="batch_size=700 make 2 steps.*warmup_steps=2"):
        datasets.load(Recipe(batch_size=700))
    datasets.load(Recipe(batch_size=700, epochs=2))


# The order of the images


def batches_of(loader, epochs=3):
    return [labels.tolist() for _ in range(epochs) for _, labels in loader]


@pytest.fixture(scope="module")
def numbered():
    """100 images whose labels are their numbers."""
    return torch.utils.data.TensorDataset(
        torch.arange(100.0).reshape(-1, 1, 1, 1).expand(100, 1, 4, 4), torch.arange(100)
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"loader": "batch"}, {"loader_workers": 2}, {"loader": "batch", "loader_workers": 2}],
    ids=str,
)
def test_the_order_is_that_of_a_plain_shuffled_loader(numbered, options):
    plain = DataLoader(
        numbered,
        batch_size=32,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(7),
    )
    ours = loader.train_loader(Recipe(batch_size=32, seed=7, **options), numbered)
    assert len(ours) == len(plain) == 3
    assert batches_of(ours) == batches_of(plain)


@pytest.mark.parametrize("loader", ["sample", "batch"])
def test_images_come_with_their_own_labels(numbered, loader):
    for images, labels in loader.train_loader(Recipe(batch_size=32, loader=loader), numbered):
        assert images.shape == (32, 1, 4, 4) and torch.equal(images[:, 0, 0, 0].long(), labels)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("loader", ["sample", "batch"])
def test_the_shares_of_all_ranks_make_up_each_batch(numbered, world, loader):
    recipe = Recipe(batch_size=24 if world == 3 else 32, replicas=world, loader=loader)
    whole = batches_of(loader.train_loader(recipe, numbered))
    shares = [
        batches_of(loader.train_loader(recipe, numbered, rank, world)) for rank in range(world)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part) for part in parts} == {recipe.batch_size // world}
        assert sorted(sum(parts, [])) == sorted(batch)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("first", [0, 2, 3, 7])
def test_a_run_that_goes_on_sees_the_batches_that_it_would_have_seen(numbered, first, workers):
    """3 batches are an epoch; the run ends after 8."""
    recipe = Recipe(batch_size=32, loader_workers=workers)
    whole = batches_of(loader.train_loader(recipe, numbered))
    assert batches_of(loader.train_loader(recipe, numbered, first=first, steps=8)) == whole[first:8]


def test_another_seed_gives_another_order(numbered):
    order = lambda seed: batches_of(loader.train_loader(Recipe(batch_size=32, seed=seed), numbered))
    assert order(1) != order(2)


def test_a_shifted_batch_moves_as_one_by_at_most_two_pixels():
    images, seen = torch.rand(2, 1, 8, 8), set()
    for shift in islice(loader.random_shifts(seed=0), 200):
        moved = loader.shift_images(images, shift)
        seen |= {
            (y, x)
            for y in range(-4, 4)
            for x in range(-4, 4)
            if torch.equal(moved, images.roll((y, x), (2, 3)))
        }
    assert seen == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_a_run_that_goes_on_moves_its_batches_as_it_would_have():
    assert (
        list(islice(loader.random_shifts(3), 5, 9)) == list(islice(loader.random_shifts(3), 9))[5:]
    )
    assert list(islice(loader.random_shifts(3), 9)) != list(islice(loader.random_shifts(4), 9))


# Downloads


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; remembers each request; ranges as real servers have them; ends early where `server.cut` says so."""

    def do_GET(self):
        name, wanted = self.path.rsplit("/", 1)[1], self.headers.get("Range")
        self.server.seen.append((name, wanted))
        if name not in self.server.files:
            return self.send_error(404)
        whole = self.server.files[name]
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if start and start >= len(whole):
            return self.send_error(416)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(whole) - start))
        self.end_headers()
        self.wfile.write(whole[start : self.server.cut.pop(name, len(whole))])

    def log_message(self, *words):
        pass


@contextmanager
def serving(files):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.seen, server.cut = dict(files), [], {}
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
FASHION_FILES = dict(zip(datasets.FASHION_FILES, map(idx, FASHION.values()), strict=True))
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
        promise(monkeypatch, files)
        monkeypatch.setattr(
            datasets, "MIRRORS", {name: (first.url, second.url) for name in datasets.MIRRORS}
        )
        yield tmp_path / "cache", first, second


def promise(monkeypatch, files):
    """Let these files be the published ones."""
    monkeypatch.setattr(
        datasets, "FASHION_FILES", {name: md5(files[name]) for name in FASHION_FILES}
    )
    monkeypatch.setattr(
        datasets, "CIFAR_FILES", {"cifar-10-binary.tar.gz": md5(files["cifar-10-binary.tar.gz"])}
    )


def test_fashion_mnist_has_the_pixels_and_labels_of_its_files(network):
    images = datasets.fashion_mnist()
    for part, name in ((images.train, "train"), (images.test, "test")):
        assert part.tensors[0].shape == (len(FASHION[f"{name} images"]), 1, 32, 32)
        assert part.tensors[1].tolist() == FASHION[f"{name} labels"].tolist()
    raw = np.pad(FASHION["train images"].astype(float), ((0, 0), (2, 2), (2, 2)))
    expected = lambda pixels: (pixels - raw.mean()) / raw.std(ddof=1)
    assert np.allclose(images.train.tensors[0][:, 0], expected(raw), atol=1e-4)
    assert np.allclose(
        images.test.tensors[0][:, 0, 2:-2, 2:-2], expected(FASHION["test images"]), atol=1e-4
    )  # by the training images' figures


def test_cifar10_has_the_pixels_and_labels_of_its_archive(network):
    images = datasets.cifar10()
    raw = np.concatenate([CIFAR[f"data_batch_{n}.bin"] for n in range(1, 6)])
    pixels = raw[:, 1:].reshape(-1, 3, 32, 32).astype(float)
    assert images.train.tensors[1].tolist() == raw[:, 0].tolist()
    assert images.test.tensors[1].tolist() == CIFAR["test_batch.bin"][:, 0].tolist()
    expected = (pixels - pixels.mean((0, 2, 3), keepdims=True)) / pixels.std(
        (0, 2, 3), ddof=1, keepdims=True
    )
    assert np.allclose(images.train.tensors[0], expected, atol=1e-4)


def test_a_file_is_downloaded_once(network):
    cache, first, _ = network
    datasets.fashion_mnist()
    datasets.fashion_mnist()
    assert [name for name, _ in first.seen] == list(FASHION_FILES)
    assert sorted(p.name for p in (cache / "fashion-mnist").iterdir()) == sorted(FASHION_FILES)


def test_those_who_need_a_file_at_once_download_it_once(network):
    _, first, _ = network
    first.RequestHandlerClass = type(
        "Slow", (Handler,), {"do_GET": lambda self: (time.sleep(0.5), Handler.do_GET(self))}
    )
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: datasets.fetch("fashion-mnist", FIRST), range(4)))
    assert {path.read_bytes() for path in paths} == {FASHION_FILES[FIRST]} and first.seen == [
        (FIRST, None)
    ]


def test_a_missing_file_is_taken_from_the_next_mirror(network):
    _, first, second = network
    first.files.clear()
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    assert second.seen == [(FIRST, None)]


def test_a_wrong_file_is_taken_from_the_next_mirror(network):
    _, first, second = network
    first.files[FIRST] = b"<html>log in to the hotel network</html>"
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]


def test_wrong_files_everywhere_are_refused_with_what_is_embedded(network):
    cache, first, second = network
    for server in (first, second):
        server.files[FIRST] = b"<html>log in to the hotel network</html>"
    with pytest.raises(CnnlabError) as refused:
        datasets.fashion_mnist()
    assert str(refused.value).count("wrong checksum") == 2
    assert "data='digits', which is embedded" in str(refused.value)
    assert list((cache / "fashion-mnist").iterdir()) == []


def asked_from(request):
    """The first byte that a request asks for: what came of a chunk that broke off is asked for again."""
    return int(request[1].removeprefix("bytes=").removesuffix("-"))


def test_a_broken_download_goes_on_at_the_next_mirror(network):
    _, first, second = network
    first.cut[FIRST] = 100_000
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    assert 0 < asked_from(second.seen[0]) <= 100_000


def test_a_broken_download_goes_on_at_the_next_try(network):
    _, first, second = network
    first.cut[FIRST], second.cut[FIRST] = 80_000, 150_000
    with pytest.raises(CnnlabError, match="cannot be downloaded"):
        datasets.fetch("fashion-mnist", FIRST)
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    assert first.seen[0] == (FIRST, None)
    assert asked_from(second.seen[0]) < asked_from(first.seen[1]) <= 150_000


def test_leftovers_that_do_not_belong_to_the_file_are_thrown_away(network):
    cache, first, _ = network
    (cache / "fashion-mnist").mkdir(parents=True)
    (cache / "fashion-mnist" / f"{FIRST}.part").write_bytes(b"x" * 100_000)
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    assert not (cache / "fashion-mnist" / f"{FIRST}.part").exists()


def test_a_server_without_ranges_sends_the_whole_file_again(network):
    cache, first, _ = network
    (cache / "fashion-mnist").mkdir(parents=True)
    (cache / "fashion-mnist" / f"{FIRST}.part").write_bytes(FASHION_FILES[FIRST][:100])
    first.RequestHandlerClass = type(
        "Plain",
        (Handler,),
        {"do_GET": lambda self: (self.headers.__delitem__("Range"), Handler.do_GET(self))},
    )
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    assert first.seen == [(FIRST, None)]


def test_no_network_at_all_is_refused_in_one_sentence(network, monkeypatch):
    _, first, second = network
    for server in (first, second):
        server.shutdown()
        server.server_close()
    with pytest.raises(
        CnnlabError,
        match="cannot be downloaded here.*ConnectionError.*Go online.*CNNLAB_MIRROR.*digits",
    ):
        datasets.load(Recipe(data="fashion-mnist", batch_size=4))


def test_a_damaged_file_in_the_cache_is_downloaded_again(network):
    path = datasets.fetch("fashion-mnist", FIRST)
    path.write_bytes(b"damaged")
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]


def test_a_data_folder_that_cannot_be_written_is_refused(network, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CNNLAB_DATA", str(tmp_path / "file"))
    with pytest.raises(CnnlabError, match="cannot write to the data folder.*CNNLAB_DATA"):
        datasets.fashion_mnist()


def test_a_mirror_of_ones_own_goes_first(network, monkeypatch):
    _, first, second = network
    with serving(FASHION_FILES) as own:
        monkeypatch.setenv("CNNLAB_MIRROR", own.url)
        datasets.fashion_mnist()
        assert [name for name, _ in own.seen] == list(FASHION_FILES)
    assert first.seen == second.seen == []


def test_a_folder_can_be_the_mirror(network, tmp_path, monkeypatch):
    _, first, _ = network
    (tmp_path / "stick").mkdir()
    for name, content in FASHION_FILES.items():
        (tmp_path / "stick" / name).write_bytes(content)
    monkeypatch.setenv("CNNLAB_MIRROR", str(tmp_path / "stick"))
    assert len(datasets.fashion_mnist().train) == 300
    assert first.seen == []
    assert (tmp_path / "stick" / FIRST).exists()


@pytest.mark.parametrize("mirror", ["/no/such/folder", "http://", "nonsense"])
def test_a_mirror_that_is_none_is_named_and_the_others_are_tried(network, monkeypatch, mirror):
    _, first, second = network
    monkeypatch.setenv("CNNLAB_MIRROR", mirror)
    assert datasets.fetch("fashion-mnist", FIRST).read_bytes() == FASHION_FILES[FIRST]
    first.files.clear(), second.files.clear()
    with pytest.raises(CnnlabError) as refused:
        datasets.fetch("fashion-mnist", "train-labels-idx1-ubyte.gz")
    assert mirror in str(refused.value) and "checksum" not in str(refused.value)


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
def test_garbage_with_the_right_checksum_is_refused(network, monkeypatch, name, kind):
    _, first, _ = network
    first.files.update({FIRST: GARBAGE[kind], "cifar-10-binary.tar.gz": GARBAGE[kind]})
    promise(monkeypatch, first.files)
    with pytest.raises(CnnlabError, match="cannot be read.*Delete it"):
        datasets.load(Recipe(data=name, batch_size=2))


def test_an_archive_without_all_its_parts_is_refused(network, monkeypatch):
    _, first, _ = network
    first.files["cifar-10-binary.tar.gz"] = tar_gz(
        {"data_batch_1.bin": CIFAR["data_batch_1.bin"].tobytes()}
    )
    promise(monkeypatch, first.files)
    with pytest.raises(CnnlabError, match="cannot be read"):
        datasets.cifar10()
