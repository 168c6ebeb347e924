"""Networks that a study can train: the article's CNN, torchvision's and timm's classifiers, any factory of the user's.

Shapes: B batch, C channels, H W image, L classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import UserError, unknown_name
from hpo.train.config import TIMM, TORCHVISION, ModelConfig
from hpo.train.imports import call_factory, describe_error, import_object, import_timm, is_import_path
from hpo.train.modules import RepeatChannels, named_network
from hpo.train.seeding import generators_kept
from hpo.train.weight_files import check_library_name
from hpo.train.weights import fit_weights

ARTICLE_IMAGE_SIZE = 32


def article_cnn(*, channels: int, num_classes: int, width: float = 1.0) -> nn.Sequential:
    """Return the article's 7-layer CNN for 32x32 images, 5.2 M parameters at 100 classes; `width` scales channels."""
    if not width > 0:
        raise UserError(f"model.width must be > 0, got {width}")

    def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1), nn.ReLU(inplace=True)]

    c16, c64, c128, c256, c512 = (max(1, round(size * width)) for size in (16, 64, 128, 256, 512))
    return nn.Sequential(
        *conv(channels, c16, stride=2),  # 32x32 -> 16x16
        *conv(c16, c64),
        nn.MaxPool2d(2),  # -> 8x8
        *conv(c64, c128),
        *conv(c128, c256),
        nn.MaxPool2d(2),  # -> 4x4
        *conv(c256, c512),
        *conv(c512, c512),
        nn.MaxPool2d(2),  # -> 2x2
        *conv(c512, c256),
        nn.Flatten(),
        nn.Linear(c256 * 2 * 2, num_classes),
    )


MODELS: dict[str, Callable[..., nn.Module]] = {"article_cnn": article_cnn}


def build_model(config: ModelConfig, *, channels: int, num_classes: int, image_size: int) -> nn.Module:
    """Return the network that `config` names, on the CPU, with parameters drawn from torch's global generator.

    What `config.weights` has of it is in the place of what was drawn. Raises UserError for an unknown name, for options
    that the network does not take, for weights that do not fit, and for a factory that cannot be imported or does not
    return an nn.Module.
    """
    model = _untrained_model(config, channels=channels, num_classes=num_classes, image_size=image_size)
    if config.weights is not None:
        fit_weights(named_network(model), config, num_classes=num_classes).load()
    return model


def _untrained_model(config: ModelConfig, *, channels: int, num_classes: int, image_size: int) -> nn.Module:
    shape = {"channels": channels, "num_classes": num_classes}
    for key in config.options.keys() & shape.keys():
        raise UserError(f"model.{key} comes from the data set and cannot be set, got {config.options[key]!r}")
    if config.name in MODELS:
        if config.name == "article_cnn" and image_size != ARTICLE_IMAGE_SIZE:
            raise UserError(
                f"model.name = 'article_cnn' takes {ARTICLE_IMAGE_SIZE}x{ARTICLE_IMAGE_SIZE} images, "
                f"got {image_size}x{image_size} (data.image_size)"
            )
        return _call(MODELS[config.name], config, shape)
    if config.name.startswith(TORCHVISION):
        return _torchvision_model(config, channels=channels, num_classes=num_classes)
    if config.name.startswith(TIMM):
        return _timm_model(config, channels=channels, num_classes=num_classes)
    if is_import_path(config.name):
        with generators_kept():
            factory = import_object(config.name, setting="model.name")
        return _call(factory, config, shape)
    raise unknown_name(
        "model.name",
        config.name,
        [*MODELS, "torchvision:NAME", "timm:NAME", "package.module:factory"],
        unlisted=[f"{library}{name}" for library, names in _library_models().items() for name in names],
    )


def _library_models() -> dict[str, list[str]]:
    """Return the names of the classifiers of torchvision and, where it is installed, of timm."""
    from torchvision import models

    names = {TORCHVISION: models.list_models(module=models)}
    with suppress(UserError):
        names[TIMM] = import_timm("model.name").list_models()
    return names


def fit_memory_format(model: nn.Module, images_BCHW: Tensor) -> nn.Module:
    """Bring a network to channels_last, the faster memory format, where it can train in it; return the network.

    A network that calls `view` on feature maps, for one, cannot. It keeps its own format and gets contiguous images.

    Args:
        model: The network, on the device of the images. It is changed in place.
        images_BCHW: Two images of the data set's shape, in channels_last; their pixels do not matter.
    """
    with generators_kept(images_BCHW.device):
        is_contiguous = not _can_train(model, images_BCHW, torch.channels_last) and _can_train(
            model, _contiguous(images_BCHW), torch.contiguous_format
        )
    if not is_contiguous:
        return model.to(memory_format=torch.channels_last)
    model.register_forward_pre_hook(_with_contiguous_images)
    return model


def _can_train(model: nn.Module, images_BCHW: Tensor, memory_format: torch.memory_format) -> bool:
    """Return whether a copy of the network, with its weights in this format, takes a step with these images."""
    try:
        copied = copy.deepcopy(model).to(memory_format=memory_format).train()
        copied(images_BCHW).float().sum().backward()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception:  # whatever a user's network raises
        return False
    return True


def _with_contiguous_images(_model: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(map(_contiguous, images))


def _contiguous(images_BCHW: Tensor) -> Tensor:
    """Return a copy that is contiguous by its strides, too: images of one channel count as contiguous in any format."""
    return images_BCHW.clone(memory_format=torch.contiguous_format)


def _torchvision_model(config: ModelConfig, *, channels: int, num_classes: int) -> nn.Module:
    from torchvision import models

    check_library_name(config)
    name = config.name.removeprefix(TORCHVISION)
    fixed: dict[str, Any] = {"num_classes": num_classes, "weights": None}
    if name in ("googlenet", "inception_v3"):  # else they return a tuple in training, and warn
        fixed |= {"aux_logits": False, "init_weights": True}
    return _of_three_channels(partial(models.get_model, name), config, fixed, channels=channels)


def _timm_model(config: ModelConfig, *, channels: int, num_classes: int) -> nn.Module:
    check_library_name(config)
    timm = import_timm(f"model.name = {config.name!r}")
    for key in config.options.keys() & {"pretrained", "pretrained_cfg", "checkpoint_path"}:
        raise UserError(f"model.{key} is model.weights here, such as 'DEFAULT'; got {config.options[key]!r}")
    create = partial(timm.create_model, config.name.removeprefix(TIMM))
    return _of_three_channels(create, config, {"num_classes": num_classes}, channels=channels)


def _of_three_channels(
    create: Callable[..., nn.Module], config: ModelConfig, fixed: Mapping[str, Any], *, channels: int
) -> nn.Module:
    """Return a library's network for images of three channels, or of one, which it is shown as three."""
    if channels not in (1, 3):
        raise UserError(f"model.name = {config.name!r} takes images of 1 or 3 channels, got {channels}")
    model = _call(create, config, fixed)
    return RepeatChannels(model) if channels == 1 else model


def _call(factory: Callable[..., Any], config: ModelConfig, fixed: Mapping[str, Any]) -> nn.Module:
    model = call_factory(factory, section="model", name=config.name, options=config.options, fixed=fixed)
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name = {config.name!r} must return a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
        raise UserError("model.name must name a network whose layers all have their sizes; it has lazy ones")
    return model


def check_model(model: nn.Module, *, batch: Tensor, num_classes: int) -> None:
    """Run the network once, as in validation, on a batch of real images (B, C, H, W) on the network's device.

    Raises UserError where the network cannot take the images, or its output is not a float tensor (B, num_classes).
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits_BL = model(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the user's network raises
        raise UserError(
            f"model.name must name a network that takes images of shape {tuple(batch.shape)} (B, C, H, W); "
            f"it raised {describe_error(error)}"
        ) from error
    finally:
        model.train(was_training)
    expected = (len(batch), num_classes)
    if not isinstance(logits_BL, Tensor):
        got = type(logits_BL).__name__
    elif tuple(logits_BL.shape) != expected or not logits_BL.is_floating_point():
        got = f"{tuple(logits_BL.shape)} of {logits_BL.dtype}"
    else:
        return
    raise UserError(
        f"model.name must name a network whose output is a float tensor of shape {expected}, one score for each of the "
        f"{num_classes} classes of the data set; got {got}"
    )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a network by their names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_fresh(model: nn.Module, begun: Mapping[str, Tensor], *, trained: nn.Module, name: str) -> None:
    """Raise UserError where a network is not as its seed gave it before: a trial must not begin where another ended.

    Args:
        model: The network, built once more from the same seed.
        begun: Copies of the parameters and buffers of the first one, from before it was trained.
        trained: The first network.
        name: The value of model.name.
    """
    tensors, addresses = named_tensors(model), {tensor.data_ptr() for tensor in named_tensors(trained).values()}
    for key in tensors.keys() | begun.keys():
        if key in tensors and key in begun and torch.equal(tensors[key], begun[key]):
            continue
        if key in tensors and tensors[key].data_ptr() in addresses:
            raise UserError(
                f"model.name = {name!r} must build a new network whenever it is called; it returned one with the "
                f"weights of an earlier one ({key}), and a trial would begin where the one before it ended"
            )
        raise UserError(
            f"model.name = {name!r} must build networks whose weights follow from the seed of torch's, numpy's and "
            f"random's generators; two of the same seed differ in {key}"
        )
