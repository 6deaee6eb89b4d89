"""MNIST and CIFAR-10 from their files: whole, damaged, and real where they are at hand."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from task_rows import data, rows

from vmd_scale.data.corpora import SPLITS, documents
from vmd_scale.data.corpora.draws import words
from vmd_scale.errors import UserError

SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def write_idx(path: Path, images: np.ndarray) -> None:
    header = np.array([0x0803, len(images), 28, 28], dtype=">u4").tobytes()
    content = header + images.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_round_trip(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = (words("pixels", 50 * 784) >> np.uint64(56)).astype(np.uint8).reshape(50, 784)
    images[0, :3] = 0, 127, 128
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images[:40])
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images[40:])
    config = data("mnist", str(tmp_path), validation_documents=10)
    found = np.concatenate([rows(config, split) for split in SPLITS])
    assert np.array_equal(found, images >= 128)
    assert found[0, :3].tolist() == [0, 0, 1]
    assert len(rows(config, "validation")) == 10
    assert "do not report" in caplog.text
    with pytest.raises(UserError, match=r"data\.validation_documents is 5,000"):
        rows(data("mnist", str(tmp_path)), "train")


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason=f"MNIST not at {SHARED / 'mnist'}")
def test_real_mnist() -> None:
    config = data("mnist", str(SHARED / "mnist"))
    assert sum(1 for _ in documents(config, "train")) == 55_000
    validation, test = rows(config, "validation"), rows(config, "test")
    assert validation.shape == (5000, 784)
    assert test.shape == (10_000, 784)
    assert 0.12 < test.mean() < 0.14  # a seventh of the pixels is ink


@pytest.mark.parametrize("damage", ["magic", "short", "long", "shape", "empty", "gzip"])
def test_damaged_idx(damage: str, tmp_path: Path) -> None:
    path = tmp_path / ("t10k-images-idx3-ubyte.gz" if damage == "gzip" else "t10k-images-idx3-ubyte")
    write_idx(path, np.zeros((3, 784)))
    content = path.read_bytes()
    shape = content[:8] + np.array([32, 32], dtype=">u4").tobytes() + content[16:]
    changed = {
        "magic": b"\0\0\x08\x01" + content[4:],
        "short": content[:-1],
        "long": content + b"\0",
        "shape": shape,
        "empty": b"",
        "gzip": content[:-12],
    }
    path.write_bytes(changed[damage])
    with pytest.raises(UserError, match=path.name):
        rows(data("mnist", str(tmp_path)), "test")


def write_cifar(folder: Path, pictures: np.ndarray) -> None:
    """Pictures [60, 32, 32, 3]: ten a batch."""
    folder.mkdir(exist_ok=True)
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    for name, batch in zip(names, pictures.reshape(6, 10, 32, 32, 3), strict=True):
        records = [bytes([n % 10]) + picture.transpose(2, 0, 1).tobytes() for n, picture in enumerate(batch)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))


@pytest.fixture
def pictures(tmp_path: Path) -> np.ndarray:
    values = (words("pictures", 60 * 3072) >> np.uint64(56)).astype(np.uint8).reshape(60, 32, 32, 3)
    write_cifar(tmp_path / "cifar-10-batches-bin", values)
    return values


@pytest.mark.parametrize("place", ["folder", "above", "archive", "beside"])
def test_cifar_round_trip(place: str, pictures: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    source = {"folder": folder, "above": tmp_path, "archive": tmp_path / "a" / "cifar-10-binary.tar.gz"}
    source["beside"] = tmp_path / "a"
    (tmp_path / "a").mkdir()
    with tarfile.open(source["archive"], "w:gz") as archive:
        archive.add(folder, folder.name)
    config = data("cifar10", str(source[place]), validation_documents=5)
    found = {split: rows(config, split) for split in SPLITS}
    assert [len(part) for part in found.values()] == [45, 5, 10]
    assert np.array_equal(np.concatenate(list(found.values())), pictures.reshape(60, -1))
    assert found["train"][0, :3].tolist() == pictures[0, 0, 0].tolist()  # red, green, blue of the first pixel


@pytest.mark.usefixtures("pictures")
def test_damaged_cifar(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    content = path.read_bytes()
    config = data("cifar10", str(tmp_path))
    for damaged, message in [(content[:-1], "records of 3,073"), (b"", "records of"), (b"\x0b" + content[1:], "label")]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message) as error:
            rows(config, "test")
        assert "test_batch.bin" in str(error.value)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_4\.bin"):
        rows(config, "train")


@pytest.mark.usefixtures("pictures")
def test_damaged_cifar_archive(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-bin" / "test_batch.bin", "cifar-10-batches-bin/test_batch.bin")
    config = data("cifar10", str(path))
    with pytest.raises(UserError, match="lacks data_batch_1"):
        rows(config, "train")
    content = path.read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("something/else"))
    for damaged in (content[: len(content) // 2], b"no archive", content[:100] + b"\xff" * 100 + content[200:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cifar-10-binary\.tar\.gz: not a readable"):
            rows(config, "test")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="lacks test_batch"):
        rows(config, "test")
