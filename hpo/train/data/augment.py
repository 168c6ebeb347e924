"""Augmentation by torchvision.transforms.v2 and by users' own functions, drawn from the seed, the epoch and the image.

Each transform draws its numbers for each image after the generators were seeded for that image, so that an image looks
the same in any batch, lane and process. The pixels are computed on the device of the batch. Transforms of the
AutoAugment family first draw what becomes of each image; then all images of one fate are computed at once. torch is
imported only where transforms are built, because reading a study file needs the names without it.
Shapes: B batch, C H W image; pixels are uint8.
"""

from __future__ import annotations

import copy
import enum
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpo.errors import UserError, did_you_mean
from hpo.train.config import DataConfig, derive_seed
from hpo.train.imports import describe_error, import_object, is_import_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Those of torchvision.transforms.v2 that draw at random, and give an image of the same size and kind on any device.
AUGMENTATIONS = (
    "AugMix",
    "AutoAugment",
    "ColorJitter",
    "ElasticTransform",
    "GaussianBlur",
    "GaussianNoise",
    "RandAugment",
    "RandomAdjustSharpness",
    "RandomAffine",
    "RandomAutocontrast",
    "RandomChannelPermutation",
    "RandomCrop",
    "RandomEqualize",
    "RandomErasing",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomInvert",
    "RandomPerspective",
    "RandomPhotometricDistort",
    "RandomPosterize",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomSolarize",
    "RandomVerticalFlip",
    "TrivialAugmentWide",
)
LISTED_FATES = ("AutoAugment", "RandAugment", "TrivialAugmentWide")
# Pixels of the largest image whose sums of bytes are whole numbers in float32: the mean that a change of contrast takes
# is then the same in every batch. Larger ones are computed one by one.
MAX_EXACT_PIXELS = 2**16
NUM_TRIED = 8  # draws of each transform, on an image of noise, before anything is trained

Draw = tuple[int, int, int]  # the seed, the epoch and the number of an image
Transform = Callable[[Any], Any]


def named(entry: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of an entry of `data.augment`."""
    if isinstance(entry, str):
        return entry, {}
    return str(entry["name"]), {key: value for key, value in entry.items() if key != "name"}


class Augmentation:
    """The transforms that `data.augment` names, one after the other."""

    def __init__(self, config: DataConfig, *, shape_CHW: tuple[int, int, int]) -> None:
        """Build the transforms, and try them on images of this shape.

        Raises:
            UserError: A transform cannot be built, fails, or gives something else than an image of the same shape.
        """
        self._steps = [_Step(entry, image_size=shape_CHW[1]) for entry in config.augment]
        for step in self._steps:
            step.check(shape_CHW)

    def __call__(self, images_BHWC: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Return the images, transformed, each by its own draw; the generators stay as they were."""
        from hpo.train.seeding import generators_kept

        images_BCHW = images_BHWC.permute(0, 3, 1, 2).contiguous()
        with generators_kept(images_BHWC.device):
            for index, step in enumerate(self._steps):
                images_BCHW = step(images_BCHW, [derive_seed(*draw, "augment", index) for draw in draws])
        return images_BCHW.permute(0, 2, 3, 1)


class _Step:
    """One transform."""

    def __init__(self, entry: Any, *, image_size: int) -> None:
        self.name, options = named(entry)
        self._is_own = is_import_path(self.name)
        self._transform = (_own if self._is_own else _of_torchvision)(self.name, options, image_size=image_size)
        self._listed = _FateList(self._transform) if self.name in LISTED_FATES else None

    def __call__(self, images_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        import torch

        if self._listed is not None and images_BCHW.shape[-2:].numel() <= MAX_EXACT_PIXELS:
            return self._listed(images_BCHW, seeds)
        images = []
        for image_CHW, seed in zip(images_BCHW, seeds, strict=True):
            self._seed(seed, images_BCHW.device)
            images.append(self._transformed(image_CHW))
        return torch.stack(images)

    def check(self, shape_CHW: tuple[int, int, int]) -> None:
        """Raise UserError where the transform fails, or gives something else than an image like that it was given."""
        import torch

        from hpo.train.seeding import generators_kept

        with generators_kept():
            image_CHW = torch.randint(256, shape_CHW, dtype=torch.uint8)
            for seed in range(NUM_TRIED):
                self._seed(seed, image_CHW.device)
                got = self._transformed(image_CHW.clone())
                if not isinstance(got, torch.Tensor):
                    kind = type(got).__name__
                elif got.shape != image_CHW.shape or got.dtype != image_CHW.dtype:
                    kind = f"{got.dtype} of shape {tuple(got.shape)}"
                else:
                    continue
                raise UserError(
                    f"data.augment: {self.name} must give a uint8 tensor of the image's shape {shape_CHW} (C, H, W), "
                    f"got {kind}"
                )

    def _seed(self, seed: int, device: torch.device) -> None:
        _seed_torch(seed, device)
        if self._is_own:  # may draw from these, too
            import random

            import numpy

            random.seed(seed)
            numpy.random.seed(seed)

    def _transformed(self, image_CHW: Tensor) -> Any:
        import torch

        try:
            return self._transform(image_CHW)
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # whatever a transform raises
            raise UserError(f"data.augment: {self.name} cannot transform an image: {describe_error(error)}") from error


class _FateList:
    """A transform of the AutoAugment family for a whole batch: it lists each image's operations, then does them."""

    def __init__(self, transform: Any) -> None:
        self._transform = transform
        self._fate: list[tuple[str, float]] = []
        self._lister = copy.copy(transform)
        self._lister._apply_image_or_video_transform = self._note

    def _note(self, image: Tensor, transform_id: str, magnitude: float, **_: Any) -> Tensor:
        self._fate.append((transform_id, magnitude))
        return image

    def __call__(self, images_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        import torch

        fates = []
        for seed in seeds:
            _seed_torch(seed, images_BCHW.device)
            self._fate = []
            self._lister(images_BCHW[0])
            fates.append(self._fate)
        images_BCHW = images_BCHW.clone()
        for position in range(max(map(len, fates), default=0)):
            members: dict[tuple[str, float], list[int]] = {}
            for number, fate in enumerate(fates):
                if position < len(fate) and fate[position][0] != "Identity":
                    members.setdefault(fate[position], []).append(number)
            for (operation, magnitude), numbers in members.items():
                indices = torch.tensor(numbers, device=images_BCHW.device)
                images_BCHW[indices] = self._done(images_BCHW[indices], operation, magnitude)
        return images_BCHW

    def _done(self, images_BCHW: Tensor, operation: str, magnitude: float) -> Tensor:
        transform = self._transform
        done: Tensor = transform._apply_image_or_video_transform(
            images_BCHW, operation, magnitude, interpolation=transform.interpolation, fill=transform._fill
        )
        return done


def _seed_torch(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of a device; `torch.manual_seed` looks at the stack where CUDA is unused."""
    import torch

    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _of_torchvision(name: str, options: Mapping[str, Any], *, image_size: int) -> Transform:
    """Return a transform of torchvision's with these options, those that it needs of an image's size among them."""
    from torchvision.transforms import v2

    transform_class = getattr(v2, name)
    signature = inspect.signature(transform_class)
    _check_options(name, options, list(signature.parameters))
    arguments = dict(options)
    for key, parameter in signature.parameters.items():
        if key == "size":
            arguments.setdefault(key, image_size)
        if isinstance(parameter.default, enum.Enum) and key in arguments:
            arguments[key] = _enum_value(name, key, arguments[key], type(parameter.default))
    with warnings.catch_warnings():  # of options that cannot work: what comes of them is our sentence
        warnings.simplefilter("ignore", UserWarning)
        transform: Transform = _built(name, transform_class, arguments)
    return transform


def _own(name: str, options: Mapping[str, Any], *, image_size: int) -> Transform:
    """Return a user's function with its options bound, or what a class of theirs makes of its options."""
    from functools import partial

    from hpo.train.seeding import generators_kept

    with generators_kept():
        function = import_object(name, setting="data.augment")
    parameters = list(inspect.signature(function).parameters.values())
    first = 0 if inspect.isclass(function) else 1  # a function is given the image
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        _check_options(name, options, [parameter.name for parameter in parameters[first:]])
    return _built(name, function, options) if inspect.isclass(function) else partial(function, **options)


def _check_options(name: str, options: Mapping[str, Any], valid: Sequence[str]) -> None:
    for key in options:
        if key not in valid:
            raise UserError(
                f"data.augment: {key} is not an option of {name}, which takes {', '.join(valid) or 'none'}"
                f"{did_you_mean(key, valid)}"
            )


def _enum_value(name: str, key: str, value: Any, kind: type[enum.Enum]) -> Any:
    try:
        return kind(value)
    except ValueError:
        valid = [str(member.value) for member in kind]
        raise UserError(
            f"data.augment: {key} of {name} must be one of {', '.join(valid)}; got {value!r}"
            f"{did_you_mean(str(value), valid)}"
        ) from None


def _built(name: str, transform_class: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return transform_class(**arguments)
    except Exception as error:  # whatever its constructor raises
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no options"
        message = " ".join(str(error).split())
        raise UserError(
            f"data.augment: {name} cannot be built with {given}: {type(error).__name__}: {message}"
        ) from error
