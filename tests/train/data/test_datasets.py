"""Datasets are found and opened, or refused in one sentence."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import ExifTags, Image, ImageColor
from sklearn.datasets import load_digits

from hpo.errors import UserError
from hpo.train.config import DataConfig
from hpo.train.data.datasets import DATASETS, _scanned_digits, open_dataset
from hpo.train.data.images import DatasetImages
from hpo.train.imports import ImportAllowlist
from tests.train.data.datasets_under_test import epoch, load


def test_digits() -> None:
    data = load()
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, 32)
    assert data.test is not None
    assert len(data.test) == 1797 // 5
    assert len(data.train) + len(data.val) == 1797 - 1797 // 5


def test_digits_are_scikit_learns() -> None:
    images_NHWC, labels_N = _scanned_digits()
    found = load_digits()
    assert labels_N.tolist() == found.target.tolist()
    means_N = images_NHWC.double().mean(dim=(1, 2, 3)) * 16 / 255
    assert means_N.numpy() == pytest.approx(found.images.mean(axis=(1, 2)), abs=0.1)


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
    # 0.1307 is the well-known mean of the 28x28 images, here within a black border.
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
    """CIFAR-100's layout with 300 training and 100 test images; torchvision's checksums are set aside."""
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


def test_without_a_network_the_message_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names each folder once, and neither addresses nor types of exceptions."""
    import urllib.request

    def no_network(*arguments: Any, **keywords: Any) -> Any:
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    for name, folder in (("cifar10", "cifar-10-batches-py"), ("mnist", "MNIST/raw")):
        with pytest.raises(UserError) as caught:
            load(name, root=str(tmp_path))
        assert str(caught.value) == (
            f"data.name = '{name}' was not found (looked for {tmp_path}/{folder}) and cannot be downloaded "
            "(Name or service not known); set data.root or HPO_DATA to the folder that holds it"
        )


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


def test_image_folder(image_folder_root: Path) -> None:
    data = load("image_folder", root=str(image_folder_root), image_size=16)
    assert (len(data.train), len(data.val), data.num_classes, data.channels, data.image_size) == (36, 4, 2, 3, 16)
    assert data.test is not None
    assert len(data.test) == 6


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_an_unreadable_picture_is_named(placement: Any, image_folder_root: Path) -> None:
    torn = image_folder_root / "train" / "dog" / "7.png"
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(UserError, match=f"data.root holds an image that cannot be read: {torn}") as raised:
        load("image_folder", root=str(image_folder_root), placement=placement)
    assert "\n" not in str(raised.value)


def test_image_folder_without_pictures(tmp_path: Path, image_folder_root: Path) -> None:
    with pytest.raises(UserError, match=f"'image_folder' was not found .looked for {tmp_path}/empty/train.*data.root"):
        load("image_folder", root=str(tmp_path / "empty"))
    (image_folder_root / "test" / "cow").mkdir()
    assert load("image_folder", root=str(image_folder_root)).test is not None
    shutil.copy(image_folder_root / "train" / "cat" / "0.png", image_folder_root / "test" / "cow")
    with pytest.raises(UserError, match=r"a class that train/ has no images of: .*test/cow"):
        _ = load("image_folder", root=str(image_folder_root)).test
    (tmp_path / "one" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"at least two classes, got \[\] in .*; left out: .*without an image \(cat\)"):
        load("image_folder", root=str(tmp_path / "one"))


def test_a_folder_that_holds_the_classes_itself(image_folder_root: Path) -> None:
    root = image_folder_root / "train"
    (root / "empty").mkdir()
    data = load("image_folder", root=str(root), groups=r"(\d+)\.png")
    assert (len(data.train), len(data.val), data.num_classes, data.test) == (36, 4, 2, None)
    for name in ("Training", "Testing"):
        shutil.copytree(image_folder_root / "test", root / name)
    with pytest.raises(UserError, match=rf"the training images in {root}/train, next to Testing and Training$"):
        load("image_folder", root=str(root))
    shutil.copytree(image_folder_root / "test", root / "train")
    assert len(load("image_folder", root=str(root), validation_fraction=0.5).train) == 3


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_of_validation_images_is_used(name: str, image_folder_root: Path) -> None:
    shutil.copytree(image_folder_root / "test", image_folder_root / name)
    data = load("image_folder", root=str(image_folder_root))
    assert (len(data.train), len(data.val)) == (40, 6)
    assert data.val.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(load("image_folder", root=str(image_folder_root), train_samples=10).train) == 10
    split = load("image_folder", root=str(image_folder_root), validation_fraction=0.25)
    assert (len(split.train), len(split.val)) == (30, 10)
    with pytest.raises(UserError, match=r"data.groups has no effect where .* has validation images of its own"):
        load("image_folder", root=str(image_folder_root), groups="a")
    (image_folder_root / name / "dog").rename(image_folder_root / name / "cow")
    with pytest.raises(UserError, match=rf"a class that train/ has no images of: .*{name}/cow"):
        load("image_folder", root=str(image_folder_root))


def test_a_root_is_looked_for_beside_the_study_file_and_at_home(
    image_folder_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"was not found .looked for .*/images/train"):
        load("image_folder", root="images")
    with ImportAllowlist(path=(str(image_folder_root.parent),)).importable():
        assert len(load("image_folder", root="images").train) == 36
    monkeypatch.setenv("HOME", str(image_folder_root.parent))
    assert len(load("image_folder", root="~/images").train) == 36


def striped(width: int, height: int) -> Image.Image:
    """Return an image of three parts, red, green and blue, from left to right."""
    image = Image.new("RGB", (width, height), "green")
    image.paste("red", (0, 0, width // 5, height))
    image.paste("blue", (width - width // 5, 0, width, height))
    return image


@pytest.mark.parametrize(
    ("width", "height", "orientation", "resize", "corners"),
    [
        (500, 300, 1, None, "green green"),  # the sides are cut off
        (500, 300, 1, "squash", "red blue"),
        (64, 64, 3, None, "blue red"),  # upside down
        (64, 64, 3, "squash", "red blue"),
        (64, 64, 1, None, "red blue"),
    ],
)
def test_images_are_upright_and_keep_their_shape(
    width: int, height: int, orientation: int, resize: Any, corners: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(2):
            striped(width, height).save(tmp_path / "train" / name / f"{index}.png", exif=exif)
    data = open_dataset(DataConfig(name="image_folder", root=str(tmp_path), resize=resize, image_size=32))
    image = data.train.read(torch.tensor([0]))[0]
    assert image.shape == (32, 32, 3)
    expected = [ImageColor.getrgb(color) for color in corners.split()]
    assert [tuple(image[16, column].tolist()) for column in (1, 30)] == expected


def test_bits_say_what_is_white(tmp_path: Path) -> None:
    write_classes(tmp_path, {name: Image.new("I;16", (32, 32), 0x800) for name in "ab"}, ".png")
    data = load("image_folder", root=str(tmp_path), validation_fraction=0.25, bits=12)
    assert data.mean == pytest.approx([0.5] * 3, abs=0.01)
    with pytest.raises(UserError, match="values go from 2048 to 2048, and 0 to 1023 can be read"):
        load("image_folder", root=str(tmp_path), validation_fraction=0.25, bits=10)


def test_own_validation_images_are_used(own_data: str) -> None:
    data = load(f"{own_data}:three_parts")
    assert (len(data.train), len(data.val)) == (60, 6)
    assert data.test is not None
    assert len(data.test) == 9
    assert load(f"{own_data}:three_parts", options={"test": False}).test is None
    assert len(load(f"{own_data}:three_parts", options={"val": False}).val) == 6  # a tenth of the training images
    with pytest.raises(UserError, match=r"data.validation_fraction has no effect where .*three_parts' returns valid"):
        load(f"{own_data}:three_parts", validation_fraction=0.2)
    with pytest.raises(UserError, match=r"must have validation images of the training images' shape .8, 8, 3."):
        load(f"{own_data}:three_parts", options={"val_size": 9})


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


def test_to_look_for_random_transforms_draws_no_number(own_data: str) -> None:
    images = open_dataset(DataConfig(name=f"{own_data}:dataset", options={"kind": "flipped"})).train
    assert isinstance(images, DatasetImages)
    before = torch.get_rng_state()
    assert images.is_random(torch.arange(60))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_test_part_is_read_only_when_asked_for(own_data: str) -> None:
    data = load(f"{own_data}:test_is_unreadable")
    epoch(data)
    with pytest.raises(UserError, match=r"the test part was read"):
        _ = data.test


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("arrays", {"sise": 3}, "data.sise is not an option of .* takes dtype, num, size, test"),
        ("arrays", {"dtype": "float32"}, r"uint8 images \(N, C, H, W\).*got torch.float32 of shape"),
        ("arrays", {"num": 0}, "must have images, got none"),
        ("dataset", {"kind": "float"}, r"uint8 images \(C, H, W\) or PIL.*got torch.float32.*; leave out ToTensor"),
        ("dataset", {"kind": "sizes"}, "must give images of one size"),
        ("dataset", {"kind": "broken"}, "cannot give image 50: RuntimeError: disk on fire"),
        ("not_a_pair", {}, r"must return \(train, test\) or \(train, val, test\), got int"),
        ("oblong", {}, "must give square images, got 8x9"),
        ("arrays", {"size": 0}, r"must give images with pixels, got \(H, W, C\) of \(0, 0, 3\)"),
        ("array", {}, "data.name.*got 'array'.*did you mean 'arrays'"),
    ],
)
def test_wrong_own_data(factory: str, options: dict[str, Any], message: str, own_data: str) -> None:
    with pytest.raises(UserError, match=message):
        load(f"{own_data}:{factory}", options=options)


def test_a_setting_that_may_be_meant_for_an_argument_of_the_factory_is_refused(own_data: str) -> None:
    load(f"{own_data}:mirrored")
    for setting in ({"flip": True}, {"root": "elsewhere"}):
        with pytest.raises(
            UserError, match=rf"data.{next(iter(setting))} is a setting of hpo's own, and is not given to"
        ):
            load(f"{own_data}:mirrored", **setting)


def test_test_labels_have_to_be_those_of_the_training(own_data: str) -> None:
    with pytest.raises(UserError, match=r"must have labels from 0 to 2, got 3 to 5"):
        _ = load(f"{own_data}:bad_test_labels").test


def test_unknown_data_set() -> None:
    with pytest.raises(UserError, match=r"data.name must be one of cifar10, .*got 'cifar'"):
        load("cifar")
    with pytest.raises(UserError, match=r"data.size is not an option of data.name = 'digits'"):
        load("digits", options={"size": 3})
    assert {"cifar10", "cifar100", "mnist", "fashion_mnist", "digits", "image_folder"} == set(DATASETS)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    for name, level in (("dark", 0x2000), ("light", 0xC000)):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for index in range(8):
            Image.fromarray(numpy.full((32, 32), level, "uint16")).save(folder / f"{index}.png")
    data = load("image_folder", root=str(tmp_path), validation_fraction=0.25)
    assert data.mean == pytest.approx([(0x20 + 0xC0) / 2 / 255] * 3, abs=0.01)


def write_classes(folder: Path, images: dict[str, Image.Image], suffix: str) -> None:
    """Write a class for each image, with 8 copies of it."""
    for name, image in images.items():
        (folder / "train" / name).mkdir(parents=True)
        for index in range(8):
            image.save(folder / "train" / name / f"{index}{suffix}")


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path: Path) -> None:
    levels = {"dark": 0.25, "light": 0.75}
    write_classes(
        tmp_path / "ok", {n: Image.fromarray(numpy.full((32, 32), v, "float32")) for n, v in levels.items()}, ".tif"
    )
    data = load("image_folder", root=str(tmp_path / "ok"), validation_fraction=0.25)
    assert data.mean == pytest.approx([0.5] * 3, abs=0.01)
    for name, level in (("float", 7.5), ("nan", float("nan"))):
        image = Image.fromarray(numpy.full((32, 32), level, "float32"))
        write_classes(tmp_path / name, {"a": image, "b": image}, ".tif")
        with pytest.raises(
            UserError, match=rf"cannot be read: .*a/.*its values go from {level:g} to {level:g}, and 0 to 1"
        ):
            load("image_folder", root=str(tmp_path / name), validation_fraction=0.25)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 16, 32))
    write_classes(tmp_path, {"a": image.convert(mode), "b": image.convert(mode)}, ".png")
    data = load("image_folder", root=str(tmp_path), validation_fraction=0.25)
    assert data.mean == pytest.approx([1.0] * 3, abs=0.01)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("numpy.arange(40) / 40", "integer labels, got torch.float64"),
        ("numpy.zeros(40, int)", "at least 2 classes, got 1"),
        ("numpy.arange(40) * 10**9", "labels that count the classes from 0"),
        ("numpy.arange(40) % 3 + 1", "from 0 without a gap; the labels are 1 to 3, and no image has label 0"),
        ("numpy.arange(40) % 3 * 2", "the labels are 0 to 4, and no image has label 1"),
        ("numpy.arange(40) // 39", "at least 2 images of each class.* of class 1 it has 1"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: str, message: str, own_code: Path) -> None:
    (own_code / "own_labels.py").write_text(
        f"import numpy\ndef data():\n    return (numpy.zeros((40, 1, 32, 32), 'uint8'), {labels}), None\n"
    )
    with pytest.raises(UserError, match=message):
        load("own_labels:data")
