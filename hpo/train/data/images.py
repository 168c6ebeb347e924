"""Labeled images, read by index: from memory, from files or from a user's dataset.

Shapes: N images, B batch, H W C image (channels last, as decoders give them and as the network's memory format is).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from hpo.errors import UserError
from hpo.train.data.labels import stored_labels
from hpo.train.imports import describe_error
from hpo.train.seeding import GeneratorStates

INDEXED_MODES = ("P", "PA")  # PIL's, whose numbers are those of colours in a palette
NUM_READ_TWICE = 32  # images: of a transform that changes one in ten, all but one in a thousand studies are found

if TYPE_CHECKING:
    from PIL.Image import Image


class LabeledImages(ABC):
    """Labeled images of one size, read by index."""

    labels_N: Tensor  # as in labels.py
    reads_files = True  # whether reading takes long enough to be worth several processes

    @abstractmethod
    def read(self, indices_B: Tensor) -> Tensor:
        """Return the images as uint8 (B, H, W, C). Raises UserError where one cannot be read."""

    def equals(self, other: LabeledImages) -> bool:
        """Return whether the other ones are as many with the same labels and, in memory, the same images."""
        return torch.equal(self.labels_N, other.labels_N)

    def shape_HWC(self) -> tuple[int, int, int]:
        """Return height, width and channels, by reading the first image."""
        _, height, width, channels = self.read(torch.zeros(1, dtype=torch.int64)).shape
        return height, width, channels


class ArrayImages(LabeledImages):
    """Images in memory."""

    reads_files = False

    def __init__(self, images_NHWC: Tensor, labels_N: Tensor) -> None:
        self.images_NHWC, self.labels_N = images_NHWC, labels_N

    def read(self, indices_B: Tensor) -> Tensor:
        """Return the images at these indices."""
        return self.images_NHWC[indices_B]

    def equals(self, other: LabeledImages) -> bool:
        """Return whether the other ones are the same."""
        is_same = isinstance(other, ArrayImages) and torch.equal(self.images_NHWC, other.images_NHWC)
        return is_same and super().equals(other)


class FileImages(LabeledImages):
    """Image files, decoded as RGB and brought to a square when they are read."""

    def __init__(
        self,
        paths: Sequence[Path],
        labels_N: Tensor,
        *,
        image_size: int,
        folder: Path = Path(),
        squash: bool = False,
        bits: int = 16,
        left_out: Sequence[str] = (),
    ) -> None:
        """Note which files to read, and how.

        Args:
            paths: The files.
            labels_N: Their labels.
            image_size: Side of the square in pixels.
            folder: The folder above those of the classes.
            squash: Stretch what a file stores, and leave its EXIF rotation alone. Else cut out the centre.
            bits: Of white, in files of 16 bits a channel.
            left_out: What of their folder was not taken for an image, a few words each.
        """
        self.paths, self.labels_N, self.image_size, self.left_out = paths, labels_N, image_size, left_out
        self.folder, self.squash, self.bits = folder, squash, bits

    def read(self, indices_B: Tensor) -> Tensor:
        """Return the images at these indices. Raises UserError for a damaged file."""
        return torch.stack([self._read_one(self.paths[index]) for index in indices_B.tolist()])

    def read_head(self, path: Path) -> tuple[tuple[int, int], str]:
        """Return width and height of an image file, and its mode as PIL names it; decode nothing."""
        with self._open(path) as image:
            return image.size, image.mode

    def brightest(self, path: Path) -> int:
        """Return the largest number in a file of 16 bits a channel, as it is stored."""
        with self._open(path) as image:
            return int(numpy.asarray(image).max())

    @contextmanager
    def _open(self, path: Path) -> Iterator[Image]:
        from PIL import Image

        try:
            with Image.open(path) as image:
                yield image
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and others for damaged files
            raise UserError(f"data.root holds an image that cannot be read: {path} ({error})") from error

    def _read_one(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        with self._open(path) as image:
            rgb = _to_rgb(image if self.squash else _upright(image), bits=self.bits)
        size = (self.image_size, self.image_size)
        if rgb.size == size:
            return _to_tensor(rgb)
        if self.squash:
            return _to_tensor(rgb.resize(size, Image.Resampling.BILINEAR))
        return _to_tensor(ImageOps.fit(rgb, size, Image.Resampling.BILINEAR))


class DatasetImages(LabeledImages):
    """Images of a user's map-style Dataset, whose items are (PIL image or uint8 (C, H, W) tensor, label or labels)."""

    def __init__(self, dataset: Any, *, name: str) -> None:
        self.dataset, self.name = dataset, name
        try:
            labels = torch.as_tensor(self._labels(len(dataset)))
        except UserError:
            raise
        except Exception as error:  # whatever the user's dataset does
            raise UserError(f"data.name = {name!r} cannot give its labels: {describe_error(error)}") from error
        if not torch.equal(labels.long().to(labels.dtype), labels):
            raise UserError(f"data.name = {name!r} must give integer labels, got {labels.dtype}")
        if labels.dim() not in (1, 2) or len(labels) != len(dataset):
            raise UserError(
                f"data.name = {name!r} must give one label for each of its {len(dataset)} images, or one for each "
                f"class, got labels of shape {tuple(labels.shape)}"
            )
        self.labels_N = stored_labels(labels)

    def _labels(self, num_images: int) -> Any:
        """Return the labels, for which every item is read once unless `targets`, torchvision's name, has them."""
        targets = getattr(self.dataset, "targets", None)
        if targets is None or getattr(self.dataset, "target_transform", None) is not None:
            return [self._item(index)[1] for index in range(num_images)]
        return targets

    def _item(self, index: int) -> tuple[Tensor, int | list[int]]:
        """Return an image (H, W, C) and its label or labels; raise UserError where the dataset gives something else."""
        try:
            image, label = self.dataset[index]
            pixels, numbers = _to_pixels(image), _to_integers(label)
        except Exception as error:  # whatever the user's dataset does
            raise UserError(f"data.name = {self.name!r} cannot give image {index}: {describe_error(error)}") from error
        if pixels is None:
            kind = f"{image.dtype} of shape {tuple(image.shape)}" if hasattr(image, "dtype") else type(image).__name__
            advice = ""
            if getattr(image, "dtype", None) == torch.float32:
                advice = "; leave out ToTensor and Normalize, the images are normalised after they are read"
            raise UserError(
                f"data.name = {self.name!r} must give uint8 images (C, H, W) or PIL images, got {kind}{advice}"
            )
        if numbers is None:
            raise UserError(f"data.name = {self.name!r} must give integer labels, got {label!r} for image {index}")
        return pixels, numbers

    def read(self, indices_B: Tensor) -> Tensor:
        """Return the images at these indices.

        Raises UserError where the dataset fails, the images differ in size, or a label is not the one known before.
        """
        images, labels = zip(*map(self._item, indices_B.tolist()), strict=True)
        if len({image.shape for image in images}) > 1:
            sizes = ", ".join(sorted({str(tuple(image.shape)) for image in images}))
            raise UserError(f"data.name = {self.name!r} must give images of one size, got (H, W, C) of {sizes}")
        for index, label, known in zip(indices_B.tolist(), labels, self.labels_N[indices_B].tolist(), strict=True):
            if label != known:
                raise UserError(
                    f"data.name = {self.name!r} must give each image one label; image {index} comes with {label}, "
                    f"and had {known} before, or in `targets`"
                )
        return torch.stack(images)

    def is_random(self, indices_N: Tensor) -> bool:
        """Return whether images differ when they are read again, as random transforms make them.

        It reads some of these images twice, and leaves the generators as they were.
        """
        some = indices_N[:: max(1, len(indices_N) // NUM_READ_TWICE)][:NUM_READ_TWICE]
        states = GeneratorStates()
        try:
            return not torch.equal(self.read(some), self.read(some))
        finally:
            states.restore()


def _to_integers(label: Any) -> int | list[int] | None:
    """Return the label of an item, or the list of its labels for each class; None where one is no integer."""
    if isinstance(label, list | tuple) or (hasattr(label, "ndim") and label.ndim > 0):
        given = torch.as_tensor(label)
        return given.tolist() if torch.equal(given.long().to(given.dtype), given) else None
    number = int(label)
    return number if number == float(label) else None


def _to_pixels(image: Any) -> Tensor | None:
    """Return an item of a user's dataset as uint8 (H, W, C); None where it is no image that can be taken as it is."""
    from PIL.Image import Image

    if isinstance(image, Image):
        return _to_tensor(_to_rgb(image) if image.mode in INDEXED_MODES else _to_8_bits(image))
    if isinstance(image, numpy.ndarray) and image.dtype == numpy.uint8 and image.ndim in (2, 3):
        return _to_tensor(image)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3:
        return image.cpu().permute(1, 2, 0)
    return None


def _upright(image: Image) -> Image:
    """Return a PIL image as its EXIF rotation says that it is shown."""
    from PIL import ExifTags, ImageOps

    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL raises SyntaxError, struct.error and others for damaged EXIF; the pixels may be whole
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _to_rgb(image: Image, *, bits: int = 16) -> Image:
    """Return a PIL image as RGB, with white for what is transparent. Raises ValueError as `_to_8_bits`.

    PIL would give transparent pixels their hidden colour, which is mostly black.
    """
    from PIL import Image

    image = _to_8_bits(image, bits=bits)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bits(image: Image, *, bits: int = 16) -> Image:
    """Return a PIL image with 8 bits a channel: 1 bit, 16 bits and floats from 0 to 1 are scaled, as PIL does not.

    Of 16 bits, so many are those of white. Raises ValueError where the numbers are of no such scale.
    """
    from PIL import Image

    if image.mode == "1":
        return image.convert("L")
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = numpy.asarray(image, dtype=numpy.float64)
    white = 1.0 if image.mode == "F" else 2.0**bits - 1
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"its values go from {values.min():g} to {values.max():g}, and 0 to {white:g} can be read")
    return Image.fromarray((values * (255 / white)).round().astype(numpy.uint8))


def _to_tensor(image: Any) -> Tensor:
    """Return a PIL image as uint8 (H, W, C)."""
    pixels = torch.from_numpy(numpy.array(image, dtype=numpy.uint8))
    return pixels if pixels.dim() == 3 else pixels.unsqueeze(2)
