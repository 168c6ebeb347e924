"""Datasets by name: where each is looked for, how it is opened, and what the user reads where it is absent or damaged.

A loader opens the training images at once and the test images only when asked: a search never reads them.
Shapes: N images, C H W image.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from hpo.errors import UserError, unknown_name
from hpo.train.config import DataConfig
from hpo.train.data.folders import (
    FoundImages,
    misnamed_parts,
    other_folders,
    scan_folder,
    training_folder,
    validation_folder,
)
from hpo.train.data.images import ArrayImages, DatasetImages, FileImages, LabeledImages
from hpo.train.data.labels import has_several, stored_labels
from hpo.train.data.splits import stratified_order
from hpo.train.imports import call_factory, code_path, describe_error, import_object, is_import_path
from hpo.train.seeding import generators_kept

DOWNLOAD_TIMEOUT_S = 10.0  # of silence; torchvision would wait for the operating system's minutes
TORCHVISION_FOLDERS = {  # where torchvision has the files of a data set, below its root
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "mnist": "MNIST/raw",
    "fashion_mnist": "FashionMNIST/raw",
}


@dataclass(frozen=True, kw_only=True)
class OpenedDataset:
    """A dataset as it was found: not yet split, and its test images not yet read."""

    train: LabeledImages  # to be split into training and validation images, unless there are `val`
    open_test: Callable[[], LabeledImages] | None  # None: there are no test images
    num_classes: int
    class_names: Sequence[str] = ()  # where they have any
    val: LabeledImages | None = None


def open_dataset(config: DataConfig) -> OpenedDataset:
    """Open the dataset that `config` names. Raises UserError where it is unknown, absent, damaged or malformed."""
    if config.name in DATASETS:
        if config.options:
            raise UserError(f"data.{min(config.options)} is not an option of data.name = {config.name!r}")
        return DATASETS[config.name](config)
    if is_import_path(config.name):
        return _user_dataset(config)
    raise unknown_name("data.name", config.name, [*DATASETS, "package.module:factory"])


def _candidates(config: DataConfig) -> list[Path]:
    """Return the folders that may hold a dataset, in the order in which they are searched."""
    return [folder for base in _bases(config) for folder in (base, base / config.name)]


def _bases(config: DataConfig) -> list[Path]:
    """Return the folders of datasets: `data.root`, from where code is looked for, or else $HPO_DATA and ./data."""
    if config.root is not None:
        root = Path(config.root).expanduser()
        return [Path(folder) / root for folder in dict.fromkeys((*code_path(), os.getcwd()))]
    environment = os.environ.get("HPO_DATA")
    return [*([Path(environment)] if environment else []), Path("data")]


def _not_found_error(config: DataConfig, subfolder: str, reason: str) -> UserError:
    looked = ", ".join(str(folder.absolute() / subfolder) for folder in _bases(config))
    return UserError(
        f"data.name = {config.name!r} was not found (looked for {looked}){reason}; "
        "set data.root or HPO_DATA to the folder that holds it"
    )


def _download_problem(error: Exception) -> str:
    """Return why a download failed: the network's reason, without the addresses and types that libraries add."""
    text = " ".join(str(error).split())
    found = re.search(r"<urlopen error (?:\[Errno -?\d+\] )?(.+?)>", text)
    return found[1] if found else text


def _torchvision_loader(class_name: str, subfolder: str) -> Callable[[DataConfig], OpenedDataset]:
    """Return the loader of a dataset of torchvision's, whose files are in `subfolder` of its root."""

    def load(config: DataConfig) -> OpenedDataset:
        from torchvision import datasets

        dataset_class = getattr(datasets, class_name)
        root = next((folder for folder in _candidates(config) if (folder / subfolder).is_dir()), None)
        if root is None:
            root = _download(dataset_class, subfolder, config)

        def open_part(train: bool) -> tuple[Any, LabeledImages]:
            try:
                dataset = dataset_class(root, train=train, download=False)
            except Exception as error:  # torchvision raises RuntimeError, ValueError, AssertionError and others
                raise UserError(
                    f"data.name = {config.name!r}: the files in {root / subfolder} are damaged or incomplete "
                    f"({' '.join(str(error).split()) or type(error).__name__}); "
                    "delete that folder to have them downloaded again"
                ) from error
            images = torch.as_tensor(dataset.data)
            if images.dim() == 3:  # MNIST's (N, 28, 28)
                images = torch.nn.functional.pad(images, (2, 2, 2, 2)).unsqueeze(3)
            return dataset, ArrayImages(images, torch.as_tensor(dataset.targets).long())

        dataset, train = open_part(True)
        return OpenedDataset(train=train, open_test=lambda: open_part(False)[1], num_classes=len(dataset.classes))

    return load


def _download(dataset_class: Any, subfolder: str, config: DataConfig) -> Path:
    """Download into the first folder that can be written; return the root to open.

    The files arrive in a temporary folder and move to their place whole. An interrupted download is therefore never
    taken for a dataset, and two workers do not write over each other.
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
            (root / subfolder).parent.mkdir(exist_ok=True)
            if not (root / subfolder).is_dir():  # else another worker was first
                os.rename(Path(temporary) / subfolder, root / subfolder)
            return root
        except (OSError, RuntimeError) as error:
            raise _not_found_error(
                config, subfolder, f" and cannot be downloaded ({_download_problem(error)})"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in created:  # a failed download leaves nothing behind
                with suppress(OSError):
                    folder.rmdir()
    raise _not_found_error(config, subfolder, f" and cannot be downloaded, as {' and '.join(failures)}")


def _digits(config: DataConfig) -> OpenedDataset:
    """Open scikit-learn's 1,797 scanned digits: 8x8 with 17 levels of grey, enlarged to 32x32; a fifth is the test."""
    images, labels = _scanned_digits()
    order = stratified_order(labels, seed=0)
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return OpenedDataset(
        train=ArrayImages(images[train], labels[train]),
        open_test=lambda: ArrayImages(images[test], labels[test]),
        num_classes=10,
    )


@functools.cache  # 2 MB, for every split of them
def _scanned_digits() -> tuple[Tensor, Tensor]:
    """Read scikit-learn's file without scikit-learn, which takes more than a second to load."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    rows = numpy.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",", dtype=numpy.int64)
    images_N1HW = torch.from_numpy(rows[:, :-1]).float().view(-1, 1, 8, 8)
    enlarged = torch.nn.functional.interpolate(images_N1HW, size=(32, 32), mode="bilinear")
    images_NHWC = (enlarged * 255 / 16).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return images_NHWC, torch.from_numpy(rows[:, -1]).clone()


def _image_folder(config: DataConfig) -> OpenedDataset:
    """Open the images of ROOT/train/<class>/ and, where these folders exist, of ROOT/val/ and ROOT/test/.

    Without train/ the classes are the folders in ROOT. With a `data.validation_fraction`, or without val/, the
    validation images are taken from the training images.
    """
    root, train = _find_training_images(config)
    found = scan_folder(train)
    classes = list(found.images)
    if len(classes) < 2:
        left_out = f"; left out: {'; '.join(found.left_out)}" if found.left_out else ""
        raise UserError(
            f"data.root must hold train/<class>/ with images for at least two classes, got {classes} in {root}"
            f"{left_out}"
        )

    def open_part(part: str) -> LabeledImages:
        images = scan_folder(root / part)
        for name in images.images:
            if name not in classes:
                raise UserError(f"data.root has a class that train/ has no images of: {root / part / name}")
        return _file_images(images, classes, config, folder=root / part)

    if train == root:
        return OpenedDataset(
            train=_file_images(found, classes, config, folder=root),
            open_test=None,
            num_classes=len(classes),
            class_names=classes,
        )
    val = validation_folder(root) if config.validation_fraction is None else None
    others = other_folders(root, ["train", *([val] if val else []), "test"])
    return OpenedDataset(
        train=_file_images(replace(found, left_out=[*found.left_out, *others]), classes, config, folder=train),
        val=open_part(val) if val else None,
        open_test=partial(open_part, "test") if (root / "test").is_dir() else None,
        num_classes=len(classes),
        class_names=classes,
    )


def _find_training_images(config: DataConfig) -> tuple[Path, Path]:
    """Return ROOT and the folder in it, or ROOT itself, that holds the folders of the classes."""
    for root in sorted(_candidates(config), key=lambda folder: not (folder / "train").is_dir()):
        if (train := training_folder(root)) is not None:
            return root, train
        if misnamed := misnamed_parts(root):
            raise UserError(
                f"data.root must have the training images in {root / 'train'}, next to {' and '.join(misnamed)}"
            )
    raise _not_found_error(config, "train", "")


def _file_images(found: FoundImages, classes: Sequence[str], config: DataConfig, *, folder: Path) -> FileImages:
    files = [(path, classes.index(name)) for name, paths in found.images.items() for path in paths]
    labels_N = torch.tensor([label for _, label in files], dtype=torch.int64)
    paths = [path for path, _ in files]
    return FileImages(
        paths,
        labels_N,
        image_size=config.image_size,
        folder=folder,
        squash=config.resize == "squash",
        bits=config.bits,
        left_out=found.left_out,
    )


def _check_own_arguments(factory: Callable[..., Any], config: DataConfig) -> None:
    """Refuse a setting of ours that the user may have meant for an argument of that name of the factory."""
    with suppress(ValueError):  # `call_factory` says it
        arguments = inspect.signature(factory).parameters
        for key in arguments.keys() & vars(config).keys() - {"name", "options"}:
            if (value := getattr(config, key) or None) != (getattr(DataConfig(), key) or None):
                raise UserError(
                    f"data.{key} is a setting of hpo's own, and is not given to data.name = {config.name!r}, which has "
                    f"an argument of that name: give that another name, or leave out data.{key}; got {value!r}"
                )


def _user_dataset(config: DataConfig) -> OpenedDataset:
    """Open what a user's factory returns when called with the options: (train, test) or (train, val, test).

    All but the training images may be None.
    """
    with generators_kept():
        factory = import_object(config.name, setting="data.name")
    _check_own_arguments(factory, config)
    parts = call_factory(factory, section="data", name=config.name, options=config.options, fixed={})
    if not isinstance(parts, tuple | list) or len(parts) not in (2, 3):
        got = f"{len(parts)} items" if isinstance(parts, tuple | list) else type(parts).__name__
        raise UserError(f"data.name = {config.name!r} must return (train, test) or (train, val, test), got {got}")
    train, val, test = parts if len(parts) == 3 else (parts[0], None, parts[1])
    if val is not None and config.validation_fraction is not None:
        raise UserError(
            f"data.validation_fraction has no effect where data.name = {config.name!r} returns validation images, "
            f"got {config.validation_fraction}"
        )
    images = _user_images(train, config.name)
    return OpenedDataset(
        train=images,
        val=None if val is None else _user_images(val, config.name),
        open_test=None if test is None else lambda: _user_images(test, config.name),
        num_classes=_num_classes(images.labels_N),
    )


def _num_classes(labels_N: Tensor) -> int:
    if has_several(labels_N):
        return labels_N.shape[1]
    return int(labels_N.max()) + 1 if len(labels_N) else 0


def _user_images(part: Any, name: str) -> LabeledImages:
    """Return the images of one part: a pair of arrays (images, labels), or a map-style Dataset."""
    if not isinstance(part, tuple | list):
        if not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
            raise UserError(
                f"data.name = {name!r} must return pairs (images, labels) or map-style Datasets, "
                f"got {type(part).__name__}"
            )
        return DatasetImages(part, name=name)
    try:
        images, labels = (torch.as_tensor(item) for item in part)
    except Exception as error:
        raise UserError(f"data.name = {name!r} must return arrays (images, labels): {describe_error(error)}") from error
    are_labels = labels.dim() in (1, 2) and len(labels) == len(images)
    if images.dtype != torch.uint8 or images.dim() != 4 or not are_labels:
        raise UserError(
            f"data.name = {name!r} must return uint8 images (N, C, H, W) and labels (N,), or 0 and 1 (N, classes), got "
            f"{images.dtype} of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}"
        )
    if labels.is_complex() or (labels.is_floating_point() and not has_several(labels)):
        raise UserError(f"data.name = {name!r} must return integer labels, got {labels.dtype}")
    return ArrayImages(images.permute(0, 2, 3, 1).contiguous(), stored_labels(labels))


DATASETS: dict[str, Callable[[DataConfig], OpenedDataset]] = {
    "cifar10": _torchvision_loader("CIFAR10", TORCHVISION_FOLDERS["cifar10"]),
    "cifar100": _torchvision_loader("CIFAR100", TORCHVISION_FOLDERS["cifar100"]),
    "mnist": _torchvision_loader("MNIST", TORCHVISION_FOLDERS["mnist"]),
    "fashion_mnist": _torchvision_loader("FashionMNIST", TORCHVISION_FOLDERS["fashion_mnist"]),
    "digits": _digits,
    "image_folder": _image_folder,
}
