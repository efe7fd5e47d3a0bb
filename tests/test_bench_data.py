"""The benchmarks' data sets, batches and metrics, on tiny files of each format."""

import gzip
import hashlib
import io
import json
import math
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from bench import atomic, datasets, fetch, metrics, tasks, text

GENERATOR = np.random.default_rng(0)


def random_bytes(*shape):
    return GENERATOR.integers(0, 256, shape, np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tar_of(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def hashed(monkeypatch, name, path):
    """Lets the data set's source expect the file that is there."""
    source = getattr(datasets, name)
    digest = hashlib.new(source.algorithm, path.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets, name, source._replace(digest=digest))


def same(tensor, array):
    assert torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(array)).to(tensor.dtype))


def test_cifar10(tmp_path, monkeypatch):
    pictures = random_bytes(12, 32, 32, 3)
    rows = pictures.reshape(12, 1024, 3)
    members = {f"package/data_batch_{i + 1}.png": png(rows[2 * i : 2 * i + 2]) for i in range(5)}
    members["package/test_batch.png"] = png(rows[10:])
    members["package/train_lables.json"] = json.dumps(list(range(10))).encode()
    members["package/test_lables.json"] = b"[3, 8]"
    tar_of(tmp_path / datasets.CIFAR10.name, members)
    hashed(monkeypatch, "CIFAR10", tmp_path / datasets.CIFAR10.name)
    data = datasets.load("cifar10", tmp_path)
    same(data.train_x, pictures[:10].transpose(0, 3, 1, 2))
    same(data.test_x, pictures[10:].transpose(0, 3, 1, 2))
    assert (data.train_y.tolist(), data.test_y.tolist(), data.classes) == (list(range(10)), [3, 8], 10)


def test_cifar100(tmp_path, monkeypatch):
    records = random_bytes(5, 2 + 3072) % 100
    parts = {"train": records[:3], "test": records[3:]}
    tar_of(
        tmp_path / datasets.CIFAR100.name, {f"cifar-100-binary/{k}.bin": part.tobytes() for k, part in parts.items()}
    )
    hashed(monkeypatch, "CIFAR100", tmp_path / datasets.CIFAR100.name)
    data = datasets.load("cifar100", tmp_path)
    same(data.train_x, records[:3, 2:].reshape(-1, 3, 32, 32))
    same(data.test_y, records[3:, 1])  # the fine class is the second byte


def test_tiny_imagenet(tmp_path, monkeypatch):
    path = tmp_path / datasets.TINY_IMAGENET.name
    grey, colored = random_bytes(64, 64), random_bytes(64, 64, 3)
    with zipfile.ZipFile(path, "w") as archive:
        root = "tiny-imagenet-200"
        archive.writestr(f"{root}/wnids.txt", "n02\nn01\n")
        # Pillow tells the format from the contents; PNG, unlike JPEG, gives the same pixels back
        archive.writestr(f"{root}/train/n01/images/n01_0.JPEG", png(colored))
        archive.writestr(f"{root}/train/n02/images/n02_0.JPEG", png(grey))
        archive.writestr(f"{root}/val/val_annotations.txt", "val_0.JPEG\tn02\t0\t0\t9\t9\n")
        archive.writestr(f"{root}/val/images/val_0.JPEG", png(colored))
    hashed(monkeypatch, "TINY_IMAGENET", path)
    data = datasets.load("tiny-imagenet", tmp_path)
    same(data.train_x[0], colored.transpose(2, 0, 1))
    same(data.train_x[1], np.stack([grey] * 3))
    assert (data.train_y.tolist(), data.test_y.tolist(), data.classes) == ([0, 1], [1], 2)


def test_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path)
    arrays = [random_bytes(4, 28, 28), np.array([1, 2, 3, 9]), random_bytes(2, 28, 28), np.array([0, 4])]
    hashes = []
    for source, array in zip(datasets.FASHION_MNIST, arrays, strict=True):
        contents = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
        (tmp_path / source.name).write_bytes(gzip.compress(contents))
        hashes.append(hashlib.sha256(contents).hexdigest())
    monkeypatch.setattr(datasets, "FASHION_MNIST_SHA256", hashes)
    data = datasets.load("fashion-mnist", tmp_path)
    same(data.train_x, arrays[0][:, None])
    same(data.test_y, arrays[3])
    monkeypatch.setattr(datasets, "FASHION_MNIST_SHA256", hashes[::-1])
    with pytest.raises(fetch.DataError, match="does not hold what it should"):
        datasets.load("fashion-mnist", tmp_path)


def test_digits():
    data = datasets.load("digits")
    assert (len(data.train_x), len(data.test_x)) == (1438, 359)
    assert data.train_x.max() == 255
    assert data.test_y[:3].tolist() == [4, 9, 4]  # the 5th, 10th and 15th digit


def test_labels_must_fit(tmp_path, monkeypatch):
    x = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(fetch.DataError, match="digits is damaged: 2 pictures, 3 labels"):
        datasets._images("digits", x, [1, 2, 3], x, [1, 2], 10)
    with pytest.raises(fetch.DataError, match="labels that must be 0 to 9"):
        datasets._images("digits", x, [1, 10], x, [1, 2], 10)


def test_file_with_another_hash_is_refused_and_left_alone(tmp_path):
    path = tmp_path / datasets.CIFAR10.name
    path.write_bytes(b"damaged")
    with pytest.raises(fetch.DataError, match=r"sha256 is .* not 141f061f.*delete it"):
        datasets.load("cifar10", tmp_path)
    assert path.read_bytes() == b"damaged"


def test_damaged_text_is_refused_and_left_alone(tmp_path):
    path = tmp_path / text.ARCHIVE
    path.write_bytes(b"something else")
    with pytest.raises(datasets.DataError, match=r"is not the expected file; delete it"):
        datasets.load("shakespeare", tmp_path)
    assert path.read_bytes() == b"something else"


def test_archive_without_its_members(tmp_path, monkeypatch):
    tar_of(tmp_path / datasets.CIFAR10.name, {"package/README.md": b""})
    hashed(monkeypatch, "CIFAR10", tmp_path / datasets.CIFAR10.name)
    with pytest.raises(fetch.DataError, match=r"files of cifar10 .* cannot be read"):
        datasets.load("cifar10", tmp_path)


def test_fetched_file_is_checked_and_kept_whole_or_not_at_all(tmp_path):
    origin, cache = tmp_path / "origin.bin", tmp_path / "cache"
    origin.write_bytes(b"data")
    right = hashlib.sha256(b"data").hexdigest()
    source = fetch.Source("file.bin", "sha256", "0" * 64, origin.as_uri())
    with pytest.raises(fetch.DataError, match="nothing was kept"):
        fetch.obtain(source, cache)
    assert list(cache.iterdir()) == []
    assert fetch.obtain(source._replace(digest=right), cache).read_bytes() == b"data"
    with pytest.raises(fetch.DataError, match=r"could not be fetched from file:.*put it there"):
        fetch.obtain(source._replace(name="other.bin", address=(tmp_path / "absent").as_uri()), cache)
    assert [path.name for path in cache.iterdir()] == ["file.bin"]


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"dataset must be one of .*got 'mnist'"):
        datasets.load("mnist")


def small_task(**settings):
    x = torch.arange(20, dtype=torch.uint8).repeat_interleave(64).view(20, 1, 8, 8) * 10
    return tasks.ImageTask(datasets.Images(x, torch.arange(20) % 10, x, torch.arange(20) % 10, 10), 4, **settings)


def test_an_epoch_shows_every_picture_once_and_depends_on_the_seed():
    task = small_task(held_back=4)
    labels = [torch.cat([task.training_batch(seed, i)[1] for i in range(4)]).tolist() for seed in (0, 1)]
    again = torch.cat([task.training_batch(0, i)[1] for i in range(4, 8)]).tolist()
    assert sorted(labels[0]) == sorted(labels[1]) == sorted(again) == sorted(task.train[1].tolist())
    assert labels[0] != labels[1]
    assert labels[0] != again
    held_back = task.parts["validation"][0].flatten().unique().tolist()
    assert not set(held_back) & set(task.train[0].flatten().unique().tolist())


def test_pictures_are_normalised():
    task = small_task(held_back=4)
    x = torch.cat([task.training_batch(0, i)[0] for i in range(4)])
    assert x.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert x.std().item() == pytest.approx(1.0, abs=1e-5)


def test_evaluation_of_known_predictions():
    task = small_task(held_back=4)

    class Sure(torch.nn.Module):
        """Says class 3 with probability one half, and else nothing."""

        def forward(self, x):
            return torch.tensor([0.0] * 3 + [math.log(9.0)] + [0.0] * 6).expand(len(x), 10)

    measured = task.evaluate(Sure(), "test", torch.device("cpu"))
    entropy = (math.log(2) / 2 + math.log(18) / 2) / math.log(10)
    assert measured["accuracy"] == 0.1
    assert measured["loss"] == pytest.approx(0.1 * math.log(2) + 0.9 * math.log(18), abs=1e-6)
    assert measured["entropy_mean"] == pytest.approx(entropy, abs=1e-6)
    assert measured["entropy_histogram"].index(20) == int(entropy * metrics.ENTROPY_BINS)


def test_normalised_entropy_of_certainty_and_ignorance():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1000.0, -1000.0]])
    torch.testing.assert_close(metrics.normalized_entropy(logits), torch.tensor([1.0, 0.0, 0.5]))


def test_text_targets_are_the_characters_that_follow():
    text = torch.arange(1000)
    task = tasks.TextTask(datasets.Text(text[:900], text[900:950], text[950:], 1000), batch=3, context=8)
    x, y = task.training_batch(0, 5)
    assert torch.equal(y, x + 1)
    assert x.max() < 899
    assert not torch.equal(x, task.training_batch(0, 6)[0])


def test_spread():
    assert metrics.spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    assert metrics.spread([5.0]).text(2) == "5.00 (1)"
    assert metrics.spread([0.1, 0.2, 0.3]).text(1, 100) == "20.0 ± 10.0 (3)"


def test_interrupted_write_leaves_what_was(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("before")

    def half(beside):
        beside.write_text("aft")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.write(path, half)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("results.json", "before")]
