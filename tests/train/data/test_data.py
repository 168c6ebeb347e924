"""Images: found or refused in one sentence, split exactly, and the same batches wherever they are kept."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from hpo.errors import UserError
from hpo.train.config import DataConfig, derive_seed
from hpo.train.data.batches import flip_and_crop
from hpo.train.data.datasets import DATASETS
from hpo.train.data.loading import SplitDataset, load_data
from hpo.train.data.sources import batch_bounds
from hpo.train.data.splits import stratified_order

OWN_DATA = """
import numpy, torch
from PIL import Image

def arrays(size=8, num=60, test=True, dtype="uint8"):
    images = numpy.random.RandomState(0).randint(0, 256, (num, 3, size, size)).astype(dtype)
    labels = numpy.arange(num) % 3
    return (images, labels), ((images[:6], labels[:6]) if test else None)

class Listed(torch.utils.data.Dataset):
    def __init__(self, kind, num=60):
        self.pictures = torch.from_numpy(arrays(num=num)[0][0])
        self.kind = kind

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        picture = self.pictures[index]
        if self.kind == "pil":
            return Image.fromarray(picture.permute(1, 2, 0).numpy()), index % 3
        if self.kind == "float":
            return picture / 255, index % 3
        if self.kind == "sizes":
            return picture[:, index % 2 :], index % 3
        if self.kind == "broken" and index == 50:
            raise RuntimeError("disk on fire")
        return picture, index % 3

def dataset(kind="tensor"):
    return Listed(kind), Listed(kind, num=6)

class Unreadable:
    def __len__(self):
        raise AssertionError("the test part was read")
    def __getitem__(self, index):
        raise AssertionError("the test part was read")

def test_is_unreadable():
    return arrays()[0], Unreadable()

def bad_test_labels():
    (images, labels), (test_images, test_labels) = arrays()
    return (images, labels), (test_images, test_labels + 3)

def not_a_pair():
    return 3

def oblong():
    return (numpy.zeros((60, 1, 8, 9), dtype="uint8"), numpy.arange(60) % 3), None
"""


@pytest.fixture(autouse=True)
def two_threads(one_thread: None) -> None:
    """And so two processes that read pictures from files."""
    torch.set_num_threads(2)


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_data_under_test.py").write_text(OWN_DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_data_under_test"
    sys.modules.pop("own_data_under_test", None)


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Two classes of 20 training and 3 test pictures of different sizes, among files that are no pictures."""
    random = numpy.random.RandomState(0)
    for part, count in (("train", 20), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("not a picture")
            for index in range(count):
                pixels = random.randint(0, 256, (20 + index, 30, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "pictures"


def load(name: str = "digits", **keys: Any) -> SplitDataset:
    return load_data(DataConfig(name=name, **keys), device="cpu")


def epoch(data: SplitDataset, *, seed: int = 1, number: int = 0, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    images, labels = zip(*data.train.batches(batch_size, seed=seed, epoch=number), strict=True)
    return torch.cat(images), torch.cat(labels)


# The split


@pytest.mark.parametrize("sizes", [[50, 50, 50], [90, 9, 1], [1, 2, 97], [7]])
def test_every_prefix_of_the_order_is_stratified(sizes: list[int]) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    order = stratified_order(labels, seed=3)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for length in range(len(labels) + 1):
        counts = torch.bincount(labels[order[:length]], minlength=len(sizes))
        shares = torch.tensor(sizes) * length / len(labels)
        assert (counts - shares).abs().max() <= 1.01


def test_the_split_is_exact_and_depends_on_its_seed_alone() -> None:
    data = load(validation_fraction=0.25, train_samples=500)
    assert (len(data.train), len(data.val)) == (500, round(0.25 * 1438))
    assert len(load(train_fraction=0.5).train) == round(0.5 * (1438 - 144))

    def val(**keys: Any) -> Tensor:
        return torch.cat([images for images, _ in load(**keys).val.batches(100)])

    # The same pictures; the numbers differ by the normalisation, which is the training part's own.
    assert torch.equal(val().argsort(0), val(flip=True, placement="stream").argsort(0))
    assert not torch.equal(val(), val(split_seed=1))


def test_a_smaller_training_part_is_a_prefix_of_a_larger() -> None:
    """Labels of the first of 100 pictures and of 200 pictures in the stored order agree."""
    small, large = load(train_samples=100), load(train_samples=200)
    assert torch.equal(small.train.labels_N, large.train.labels_N[:100])
    assert torch.equal(small.val.labels_N, large.val.labels_N)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"validation_fraction": 0.0}, "data.validation_fraction must be between 0 and 1, got 0"),
        ({"validation_fraction": 1.0}, "data.validation_fraction must be between 0 and 1, got 1"),
        ({"validation_fraction": 0.001}, "data.validation_fraction must leave .*validation part, got 0.001.*none of"),
        ({"validation_fraction": 0.999}, "data.validation_fraction must leave .*training part, got 0.999.*none of"),
        ({"train_samples": 5}, "data.train_samples must leave .*10 classes.*training part, got 5"),
        ({"train_samples": 5000}, "data.train_samples must be between 1 and the 1294 .*got 5000"),
        ({"train_fraction": 0.001}, "data.train_fraction must leave .*got 0.001"),
        ({"train_fraction": 1.5}, "data.train_fraction must be above 0 and at most 1, got 1.5"),
    ],
)
def test_a_split_that_leaves_a_class_out_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**keys)


# Batches


def test_batches_hold_every_picture_once_and_never_a_single_one() -> None:
    assert batch_bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert batch_bounds(9, 4) == [(0, 4), (4, 9)]
    assert batch_bounds(1, 4) == [(0, 1)]
    assert batch_bounds(3, 1) == [(0, 1), (1, 2), (2, 3)]
    data = load(train_samples=129)
    sizes = [len(labels) for _, labels in data.train.batches(64, seed=0)]
    assert sizes == [64, 65]
    assert len(sizes) == data.train.num_batches(64)
    assert torch.equal(epoch(data)[1].bincount(), data.train.labels_N.bincount())


def test_batches_are_normalised_float32_channels_last() -> None:
    data = load(placement="device")
    images, labels = next(data.train.batches(64, seed=0))
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == (64, 1, 32, 32)
    assert labels.dtype == torch.int64
    everything = epoch(data)[0]
    assert abs(float(everything.mean())) < 1e-4
    assert abs(float(everything.std()) - 1) < 1e-3


@pytest.mark.parametrize("name", ["digits", "image_folder"])
@pytest.mark.parametrize("augment", [{}, {"flip": True}, {"flip": True, "crop": 4}])
def test_device_and_stream_give_the_same_batches(name: str, augment: dict[str, Any], picture_folder: Path) -> None:
    source = {"name": name, "root": str(picture_folder), **augment}
    kept, streamed = load(**source, placement="device"), load(**source, placement="stream")
    assert (kept.mean, kept.std) == (streamed.mean, streamed.std)
    for ours, theirs in zip(epoch(kept, number=1), epoch(streamed, number=1), strict=True):
        assert torch.equal(ours, theirs)


def test_an_epoch_depends_on_the_seed_and_the_epoch() -> None:
    data = load(flip=True, crop=2)
    images = epoch(data, seed=1, number=0)[0]
    assert torch.equal(images, epoch(data, seed=1, number=0)[0])
    assert not torch.equal(images, epoch(data, seed=2, number=0)[0])
    assert not torch.equal(images, epoch(data, seed=1, number=1)[0])


def test_reading_batches_leaves_torchs_generator_alone() -> None:
    """Or a trial's dropout would depend on where its pictures are kept."""
    for placement in ("device", "stream"):
        data = load(placement=placement)
        torch.manual_seed(0)
        epoch(data)
        assert torch.initial_seed() == 0
        drawn = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(1))


def test_flip_and_crop_are_those_of_one_picture_at_a_time() -> None:
    images = torch.randint(0, 256, (20, 6, 6, 3), dtype=torch.uint8)
    flips = torch.rand(20) < 0.5
    offsets = torch.randint(0, 5, (20, 2))
    together = flip_and_crop(images, flips_B=flips, offsets_B2=offsets, padding=2)
    for image, flip, (row, column), result in zip(images, flips, offsets.tolist(), together, strict=True):
        padded = torch.nn.functional.pad(image, (0, 0, 2, 2, 2, 2))[row : row + 6, column : column + 6]
        assert torch.equal(result, padded.flip(1) if flip else padded)


def test_auto_placement_keeps_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    def store(available: int) -> str:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))
        return type(load().train.source).__name__

    num_bytes = 1438 * 32 * 32
    assert store(num_bytes * 4 + 4) == "DeviceSource"
    assert store(num_bytes * 4) == "StreamSource"


# The data sets


def test_digits() -> None:
    data = load()
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, 32)
    assert data.test is not None
    assert len(data.test) == 1797 // 5
    assert len(data.train) + len(data.val) == 1797 - 1797 // 5


def test_mnist(mnist_root: Path) -> None:
    data = load("mnist", root=str(mnist_root))
    assert (len(data.train), len(data.val), data.num_classes, data.channels, data.image_size) == (
        54000,
        6000,
        10,
        1,
        32,
    )
    assert data.test is not None
    assert len(data.test) == 10000
    # 0.1307 is the well-known mean of the 28x28 pictures, here within a black border.
    assert data.mean[0] == pytest.approx(0.1307 * 28**2 / 32**2, abs=5e-4)


def test_mnist_is_found_below_hpo_data(mnist_root: Path) -> None:
    assert len(load("mnist", train_samples=100).train) == 100


def test_cifar10_pictures(cifar10_root: Path) -> None:
    data = load("image_folder", root=str(cifar10_root), train_samples=1000, validation_fraction=0.02)
    assert (len(data.train), len(data.val), data.num_classes, data.channels, data.image_size) == (1000, 1000, 10, 3, 32)
    assert data.train.labels_N.bincount().tolist() == [100] * 10
    assert data.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.02)


@pytest.fixture
def cifar100_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-100's layout with 300 training and 100 test pictures; torchvision's checksums are set aside."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    random = numpy.random.RandomState(0)
    for name, count in (("train", 300), ("test", 100)):
        pixels = random.randint(0, 256, (count, 3072), dtype=numpy.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [i % 100 for i in range(count)]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    return tmp_path


def test_cifar100(cifar100_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPO_DATA", raising=False)
    monkeypatch.chdir(cifar100_root)
    data = load("cifar100", validation_fraction=1 / 3)
    assert (len(data.train), len(data.val), data.num_classes, data.channels) == (200, 100, 100, 3)
    assert data.test is not None
    assert len(data.test) == 100


def test_a_damaged_data_set_is_said_to_be_damaged(cifar100_root: Path) -> None:
    train = cifar100_root / "data" / "cifar-100-python" / "train"
    train.write_bytes(train.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"data.name = 'cifar100': the files in \S*cifar-100-python are damaged"):
        load("cifar100", root=str(cifar100_root / "data"))


def test_torn_mnist_is_said_to_be_damaged(tmp_path: Path) -> None:
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03torn")
    with pytest.raises(UserError, match=r"data.name = 'mnist': the files in .* are damaged or incomplete"):
        load("mnist", root=str(tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_an_absent_data_set_says_where_it_was_looked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is there but nothing answers: each address is tried once and the file is not asked for again."""
    import urllib.request

    asked = []

    def no_network(*arguments: Any, **keywords: Any) -> Any:
        asked.append(arguments)
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match=f"data.name = '{name}' was not found .looked for {tmp_path}.*data.root"):
        load(name, root=str(tmp_path))
    assert len(asked) <= 2
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_download_arrives_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    source = tmp_path / "served"
    source.mkdir()

    def download(self: Any) -> None:
        folder = Path(self.root) / "cifar-100-python"
        folder.mkdir()
        for name, count in (("train", 300), ("test", 100)):
            content = {"data": numpy.zeros((count, 3072), "uint8"), "fine_labels": [i % 100 for i in range(count)]}
            (folder / name).write_bytes(pickle.dumps(content))
            if (source / "torn").exists():
                raise OSError("connection reset")
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))

    monkeypatch.setattr(CIFAR100, "download", download)
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    root = tmp_path / "data"
    (source / "torn").touch()
    with pytest.raises(UserError, match=r"cannot be downloaded .connection reset"):
        load("cifar100", root=str(root))
    assert not root.exists(), "a failed download leaves nothing behind"
    (source / "torn").unlink()
    assert len(load("cifar100", root=str(root), validation_fraction=1 / 3).train) == 200
    assert [path.name for path in (root / "cifar100").iterdir()] == ["cifar-100-python"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot be downloaded, as {tmp_path}/file cannot be written"):
        load("mnist", root=str(tmp_path / "file"))


def test_image_folder(picture_folder: Path) -> None:
    data = load("image_folder", root=str(picture_folder), image_size=16)
    assert (len(data.train), len(data.val), data.num_classes, data.channels, data.image_size) == (36, 4, 2, 3, 16)
    assert data.test is not None
    assert len(data.test) == 6


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_an_unreadable_picture_is_named(placement: Any, picture_folder: Path) -> None:
    torn = picture_folder / "train" / "dog" / "7.png"
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(UserError, match=f"data.root holds a picture that cannot be read: {torn}") as raised:
        load("image_folder", root=str(picture_folder), placement=placement)
    assert "\n" not in str(raised.value)


def test_image_folder_without_pictures(tmp_path: Path, picture_folder: Path) -> None:
    with pytest.raises(UserError, match=f"'image_folder' was not found .looked for {tmp_path}/empty/train.*data.root"):
        load("image_folder", root=str(tmp_path / "empty"))
    (picture_folder / "test" / "cow").mkdir()
    with pytest.raises(UserError, match=r"test/cow that is not among those of train/"):
        _ = load("image_folder", root=str(picture_folder)).test
    (tmp_path / "one" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"at least two classes, got .'cat'."):
        load("image_folder", root=str(tmp_path / "one"))


@pytest.mark.parametrize("factory", ["arrays", "dataset"])
@pytest.mark.parametrize("placement", ["device", "stream"])
def test_own_data(factory: str, placement: Any, own_data: str) -> None:
    data = load(f"{own_data}:{factory}", placement=placement)
    assert (len(data.train), len(data.val), data.num_classes, data.channels, data.image_size) == (54, 6, 3, 3, 8)
    assert data.test is not None
    assert len(data.test) == 6
    reference = load(f"{own_data}:arrays")
    assert torch.equal(epoch(data)[0], epoch(reference)[0])


def test_own_data_as_pil_pictures_and_without_a_test_part(own_data: str) -> None:
    pil = load(f"{own_data}:dataset", options={"kind": "pil"})
    assert torch.equal(epoch(pil)[0], epoch(load(f"{own_data}:arrays"))[0])
    assert load(f"{own_data}:arrays", options={"test": False}).test is None


def test_the_test_part_is_read_only_when_asked_for(own_data: str) -> None:
    data = load(f"{own_data}:test_is_unreadable")
    epoch(data)
    with pytest.raises(AssertionError, match=r"the test part was read"):
        _ = data.test


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("arrays", {"sise": 3}, "data.sise is not an option of .* takes dtype, num, size, test"),
        ("arrays", {"dtype": "float32"}, r"uint8 images \(N, C, H, W\).*got torch.float32 of shape"),
        ("arrays", {"num": 0}, "must have pictures, got none"),
        ("dataset", {"kind": "float"}, r"uint8 pictures \(C, H, W\) or PIL.*got torch.float32"),
        ("dataset", {"kind": "sizes"}, "must give pictures of one size"),
        ("dataset", {"kind": "broken"}, "cannot give picture 50: RuntimeError: disk on fire"),
        ("not_a_pair", {}, r"must return \(train, test\), got int"),
        ("oblong", {}, "must give square pictures, got 8x9"),
        ("array", {}, "data.name.*got 'array'.*did you mean 'arrays'"),
    ],
)
def test_wrong_own_data(factory: str, options: dict[str, Any], message: str, own_data: str) -> None:
    with pytest.raises(UserError, match=message):
        load(f"{own_data}:{factory}", options=options)


def test_test_labels_have_to_be_those_of_the_training(own_data: str) -> None:
    with pytest.raises(UserError, match=r"must have labels from 0 to 2, got 3 to 5"):
        _ = load(f"{own_data}:bad_test_labels").test


def test_unknown_data_set() -> None:
    with pytest.raises(UserError, match=r"data.name must be one of cifar10, .*got 'cifar'"):
        load("cifar")
    with pytest.raises(UserError, match=r"data.size is not an option of data.name = 'digits'"):
        load("digits", options={"size": 3})
    assert {"cifar10", "cifar100", "mnist", "fashion_mnist", "digits", "image_folder"} == set(DATASETS)


def test_derived_seeds_are_the_same_everywhere() -> None:
    assert derive_seed(0, "data", 1) == derive_seed(0, "data", 1) != derive_seed(0, "data", 2)
    assert derive_seed(1, "2") != derive_seed("1", 2) != derive_seed(12, "")
    seeds = [derive_seed(0, "trial", number) for number in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "data", 1) == 479118118  # a new value would change every study's results


def test_configs_compare_by_value() -> None:
    """The engine keeps the data of trials whose configs are equal."""
    config = DataConfig(options={"a": 1})
    assert config == DataConfig(options={"a": 1}) != replace(config, flip=True)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    from PIL import Image

    for name, level in (("dark", 0x2000), ("light", 0xC000)):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for index in range(8):
            Image.fromarray(numpy.full((32, 32), level, "uint16")).save(folder / f"{index}.png")
    data = load("image_folder", root=str(tmp_path), validation_fraction=0.25)
    assert data.mean == pytest.approx([(0x20 + 0xC0) / 2 / 255] * 3, abs=0.01)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("numpy.arange(40) / 40", "integer labels, got torch.float64"),
        ("numpy.zeros(40, int)", "at least 2 classes, got 1"),
        ("numpy.arange(40) * 10**9", "labels that count the classes from 0"),
    ],
)
def test_labels_that_are_no_classes_are_refused(
    labels: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_labels.py").write_text(
        f"import numpy\ndef data():\n    return (numpy.zeros((40, 1, 32, 32), 'uint8'), {labels}), None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_labels", None)
    with pytest.raises(UserError, match=message):
        load("own_labels:data")
