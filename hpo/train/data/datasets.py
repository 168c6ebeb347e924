"""The data sets: where each is looked for, how it is opened, and what is said where it is absent or damaged.

A loader opens the training pictures at once and the test pictures only when asked: a search never reads them.
Shapes: N pictures, B batch, H W C picture (channels last, as decoders give them and as the network's memory format is).
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpo.errors import UserError, unknown_name
from hpo.train.config import DataConfig
from hpo.train.imports import call_factory, describe, import_object, is_import_path

DOWNLOAD_TIMEOUT_S = 10.0  # of silence; torchvision would wait for the operating system's minutes
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})


def stratified_order(labels_N: Tensor, *, seed: int) -> Tensor:
    """A random order of which every prefix holds each class in its share, up to one picture."""
    shuffled = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    labels = labels_N[shuffled]
    class_sizes = torch.bincount(labels)
    by_class = torch.argsort(labels, stable=True)
    first_of_class = class_sizes.cumsum(0) - class_sizes
    rank_in_class = torch.empty_like(labels)
    rank_in_class[by_class] = torch.arange(len(labels)) - first_of_class[labels[by_class]]
    position = (rank_in_class.double() + 0.5) / class_sizes[labels]
    return shuffled[torch.argsort(position, stable=True)]


class Pictures(ABC):
    """Labelled pictures of one size, read by index; `labels_N` is int64."""

    labels_N: Tensor
    reads_files = True  # whether reading takes long enough to be worth several processes

    @abstractmethod
    def read(self, indices_B: Tensor) -> Tensor:
        """The pictures as uint8 (B, H, W, C). Raises UserError where one cannot be read."""

    def shape_HWC(self) -> tuple[int, int, int]:
        _, height, width, channels = self.read(torch.zeros(1, dtype=torch.int64)).shape
        return height, width, channels


class ArrayPictures(Pictures):
    """Pictures in memory."""

    reads_files = False

    def __init__(self, images_NHWC: Tensor, labels_N: Tensor) -> None:
        self.images_NHWC, self.labels_N = images_NHWC, labels_N

    def read(self, indices_B: Tensor) -> Tensor:
        return self.images_NHWC[indices_B]


class FilePictures(Pictures):
    """Picture files, decoded as RGB and resized to a square when they are read."""

    def __init__(self, paths: Sequence[Path], labels_N: Tensor, *, image_size: int) -> None:
        self.paths, self.labels_N, self.image_size = paths, labels_N, image_size

    def read(self, indices_B: Tensor) -> Tensor:
        return torch.stack([self._read_one(self.paths[index]) for index in indices_B.tolist()])

    def _read_one(self, path: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as image:
                # PIL would clip 16 bits, not scale them.
                deep = image.mode.startswith("I")
                grey = image.convert("I").point(lambda value: value * (1 / 257)).convert("L") if deep else image
                rgb = grey.convert("RGB")
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and others for damaged files
            raise UserError(f"data.root holds a picture that cannot be read: {path} ({error})") from error
        size = (self.image_size, self.image_size)
        return _to_tensor(rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BILINEAR))


class DatasetPictures(Pictures):
    """A user's map-style Dataset of (PIL picture or uint8 (C, H, W) tensor, int label)."""

    def __init__(self, dataset: Any, *, name: str) -> None:
        self.dataset, self.name = dataset, name
        # Without `targets`, torchvision's name for them, every picture has to be read once for its label.
        labels = getattr(dataset, "targets", None)
        if labels is None:
            labels = [self._item(index)[1] for index in range(len(dataset))]
        self.labels_N = torch.as_tensor(labels).long()
        if self.labels_N.shape != (len(dataset),):
            raise UserError(
                f"data.name = {name!r} must give one label for each of its {len(dataset)} pictures, "
                f"got labels of shape {tuple(self.labels_N.shape)}"
            )

    def _item(self, index: int) -> tuple[Any, int]:
        try:
            picture, label = self.dataset[index]
            return picture, int(label)
        except Exception as error:  # whatever the user's data set does
            raise UserError(f"data.name = {self.name!r} cannot give picture {index}: {describe(error)}") from error

    def read(self, indices_B: Tensor) -> Tensor:
        images = [self._image(index) for index in indices_B.tolist()]
        if len({image.shape for image in images}) > 1:
            sizes = ", ".join(sorted({str(tuple(image.shape)) for image in images}))
            raise UserError(f"data.name = {self.name!r} must give pictures of one size, got (H, W, C) of {sizes}")
        return torch.stack(images)

    def _image(self, index: int) -> Tensor:
        picture = self._item(index)[0]
        if isinstance(picture, Tensor):
            if picture.dtype != torch.uint8 or picture.dim() != 3:
                raise UserError(
                    f"data.name = {self.name!r} must give uint8 pictures (C, H, W) or PIL pictures, "
                    f"got {picture.dtype} of shape {tuple(picture.shape)}"
                )
            return picture.permute(1, 2, 0)
        return _to_tensor(picture)


def _to_tensor(picture: Any) -> Tensor:
    """A PIL picture as uint8 (H, W, C)."""
    import numpy

    image = torch.from_numpy(numpy.array(picture, dtype=numpy.uint8))
    return image if image.dim() == 3 else image.unsqueeze(2)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """An opened data set; `open_test` reads nothing until it is called and is None where there is no test part."""

    train: Pictures
    open_test: Callable[[], Pictures] | None
    num_classes: int


def open_data_set(config: DataConfig) -> DataSet:
    """Open the data set that `config` names. Raises UserError where it is unknown, absent, damaged or malformed."""
    if config.name in DATA_SETS:
        if config.options:
            raise UserError(f"data.{min(config.options)} is not an option of data.name = {config.name!r}")
        return DATA_SETS[config.name](config)
    if is_import_path(config.name):
        return _own(config)
    raise unknown_name("data.name", config.name, [*DATA_SETS, "package.module:factory"])


def _candidates(config: DataConfig) -> list[Path]:
    """The folders in which a data set is looked for, in that order."""
    return [folder for base in _bases(config) for folder in (base, base / config.name)]


def _bases(config: DataConfig) -> list[Path]:
    if config.root is not None:
        return [Path(config.root)]
    environment = os.environ.get("HPO_DATA")
    return [*([Path(environment)] if environment else []), Path("data")]


def _absent(config: DataConfig, holds: str, reason: str) -> UserError:
    looked = ", ".join(str(folder.absolute() / holds) for folder in _candidates(config))
    return UserError(
        f"data.name = {config.name!r} was not found (looked for {looked}){reason}; "
        f"set data.root or the environment variable HPO_DATA to the folder that holds it"
    )


def _torchvision(class_name: str, holds: str) -> Callable[[DataConfig], DataSet]:
    """A loader of one of torchvision's data sets, whose files lie in the folder `holds` below its root."""

    def load(config: DataConfig) -> DataSet:
        from torchvision import datasets

        dataset_class = getattr(datasets, class_name)
        root = next((folder for folder in _candidates(config) if (folder / holds).is_dir()), None)
        if root is None:
            root = _download(dataset_class, holds, config)

        def open_part(train: bool) -> tuple[Any, Pictures]:
            try:
                dataset = dataset_class(root, train=train, download=False)
            except Exception as error:  # torchvision raises RuntimeError, ValueError, AssertionError and others
                raise UserError(
                    f"data.name = {config.name!r}: the files in {root / holds} are damaged or incomplete "
                    f"({' '.join(str(error).split()) or type(error).__name__}); "
                    "delete that folder to have them downloaded again"
                ) from error
            images = torch.as_tensor(dataset.data)
            if images.dim() == 3:  # MNIST's (N, 28, 28)
                images = torch.nn.functional.pad(images, (2, 2, 2, 2)).unsqueeze(3)
            return dataset, ArrayPictures(images, torch.as_tensor(dataset.targets).long())

        dataset, train = open_part(True)
        return DataSet(train=train, open_test=lambda: open_part(False)[1], num_classes=len(dataset.classes))

    return load


def _download(dataset_class: Any, holds: str, config: DataConfig) -> Path:
    """Download into the first folder that can be written; returns the root to open.

    The files arrive in a temporary folder beside their place and are moved there whole, so that an interrupted download
    is never taken for a data set and two workers do not write over each other.
    """
    failures = []
    for base in _bases(config):
        root = base / config.name
        created = [folder for folder in (root, *root.parents) if not folder.exists()]
        temporary = None
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
        try:
            root.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.mkdtemp(prefix=".download-", dir=root)
        except OSError as error:
            failures.append(f"{base.absolute()} cannot be written ({error.strerror})")
            continue
        try:
            dataset_class(temporary, download=True)
            (root / holds).parent.mkdir(exist_ok=True)
            if not (root / holds).is_dir():  # else another worker was first
                os.rename(Path(temporary) / holds, root / holds)
            return root
        except (OSError, RuntimeError) as error:
            raise _absent(config, holds, f" and cannot be downloaded ({' '.join(str(error).split())})") from error
        finally:
            socket.setdefaulttimeout(timeout)
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in created:  # a failed download leaves nothing behind
                with suppress(OSError):
                    folder.rmdir()
    raise _absent(config, holds, f" and cannot be downloaded, as {' and '.join(failures)}")


def _digits(config: DataConfig) -> DataSet:
    """scikit-learn's 1,797 scanned digits, 8x8 with 17 levels of grey, enlarged to 32x32; a fixed fifth is the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images_N1HW = torch.from_numpy(digits.images).float().unsqueeze(1)
    enlarged = torch.nn.functional.interpolate(images_N1HW, size=(32, 32), mode="bilinear")
    images = (enlarged * 255 / 16).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    order = stratified_order(labels, seed=0)
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return DataSet(
        train=ArrayPictures(images[train], labels[train]),
        open_test=lambda: ArrayPictures(images[test], labels[test]),
        num_classes=10,
    )


def _image_folder(config: DataConfig) -> DataSet:
    """ROOT/train/<class>/* and, where there is one, ROOT/test/<class>/*."""
    root = next((folder for folder in _candidates(config) if (folder / "train").is_dir()), None)
    if root is None:
        raise _absent(config, "train", "")
    classes = sorted(folder.name for folder in (root / "train").iterdir() if _is_class(folder))
    if len(classes) < 2:
        raise UserError(f"data.root must hold train/<class>/ for at least two classes, got {classes} in {root}")

    def open_part(part: str) -> Pictures:
        folders = [folder for folder in (root / part).iterdir() if _is_class(folder)]
        for folder in folders:
            if folder.name not in classes:
                raise UserError(f"data.root has pictures of a class in {folder} that is not among those of train/")
        files = [
            (path, classes.index(folder.name))
            for folder in sorted(folders)
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        ]
        labels_N = torch.tensor([label for _, label in files], dtype=torch.int64)
        return FilePictures([path for path, _ in files], labels_N, image_size=config.image_size)

    return DataSet(
        train=open_part("train"),
        open_test=(lambda: open_part("test")) if (root / "test").is_dir() else None,
        num_classes=len(classes),
    )


def _is_class(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".")


def _own(config: DataConfig) -> DataSet:
    """A user's factory: called with the options, it returns (train, test), and test may be None."""
    factory = import_object(config.name, setting="data.name")
    parts = call_factory(factory, section="data", name=config.name, options=config.options, fixed={})
    if not isinstance(parts, tuple | list) or len(parts) != 2:
        raise UserError(f"data.name = {config.name!r} must return (train, test), got {type(parts).__name__}")
    train, test = parts
    pictures = _own_part(train, config.name)
    return DataSet(
        train=pictures,
        open_test=None if test is None else lambda: _own_part(test, config.name),
        num_classes=int(pictures.labels_N.max()) + 1 if len(pictures.labels_N) else 0,
    )


def _own_part(part: Any, name: str) -> Pictures:
    if not isinstance(part, tuple | list):
        if not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
            raise UserError(
                f"data.name = {name!r} must return pairs (images, labels) or map-style Datasets, "
                f"got {type(part).__name__}"
            )
        return DatasetPictures(part, name=name)
    try:
        images, labels = (torch.as_tensor(item) for item in part)
    except Exception as error:
        raise UserError(f"data.name = {name!r} must return arrays (images, labels): {describe(error)}") from error
    if images.dtype != torch.uint8 or images.dim() != 4 or labels.shape != (len(images),):
        raise UserError(
            f"data.name = {name!r} must return uint8 images (N, C, H, W) and labels (N,), got {images.dtype} of shape "
            f"{tuple(images.shape)} and labels of shape {tuple(labels.shape)}"
        )
    if labels.is_floating_point():
        raise UserError(f"data.name = {name!r} must return integer labels, got {labels.dtype}")
    return ArrayPictures(images.permute(0, 2, 3, 1).contiguous(), labels.long())


DATA_SETS: dict[str, Callable[[DataConfig], DataSet]] = {
    "cifar10": _torchvision("CIFAR10", "cifar-10-batches-py"),
    "cifar100": _torchvision("CIFAR100", "cifar-100-python"),
    "mnist": _torchvision("MNIST", "MNIST/raw"),
    "fashion_mnist": _torchvision("FashionMNIST", "FashionMNIST/raw"),
    "digits": _digits,
    "image_folder": _image_folder,
}
