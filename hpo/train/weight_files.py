"""Files of weights: where the one is that a study names, by path or by a library's name, and a digest of it."""

from __future__ import annotations

import hashlib
import socket
import statistics
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from hpo.errors import UserError, unknown_name
from hpo.train.config import TIMM, TORCHVISION, WEIGHTS_ENDINGS, ModelConfig, is_weights_file
from hpo.train.data.datasets import DOWNLOAD_TIMEOUT_S
from hpo.train.imports import import_timm


@dataclass(frozen=True)
class ImagesOfWeights:
    """The images that weights were trained on: their side in pixels, and mean and deviation of the normalisation."""

    size: int
    mean: tuple[float, ...]  # per channel, pixels from 0 to 1
    std: tuple[float, ...]

    def for_channels(self, channels: int) -> ImagesOfWeights:
        """Return the same for images of one channel, which the network is shown as three."""
        if channels == len(self.mean):
            return self
        return replace(self, mean=(statistics.fmean(self.mean),), std=(statistics.fmean(self.std),))


def images_of_weights(config: ModelConfig) -> ImagesOfWeights | None:
    """Return the images of the weights that `config` names; None for a file and without weights: nobody knows."""
    if config.weights is None or is_weights_file(config.weights):
        return None
    if config.name.startswith(TIMM):
        known = _timm_weights(config)
        return ImagesOfWeights(known.input_size[-1], known.mean, known.std)
    preset = torchvision_weights(config).transforms()
    return ImagesOfWeights(preset.crop_size[0], tuple(preset.mean), tuple(preset.std))


def weights_digest(config: ModelConfig) -> str | None:
    """Return a digest of the content of the weights that `config` names; None where it names none."""
    return None if config.weights is None else _digest(*file_signature(find_weights(config)))


def find_weights(config: ModelConfig) -> Path:
    """Return the file of the weights that `config` names; download a library's where they are not in its hub's cache.

    Raises UserError where there is none.
    """
    assert config.weights is not None
    if not is_weights_file(config.weights):
        return _timm_file(config) if config.name.startswith(TIMM) else _torchvision_file(config)
    path = Path(config.weights).expanduser()
    if not path.is_file():
        raise UserError(
            f"model.weights must be a file, and there is none at {path.absolute()} on {socket.gethostname()}"
        )
    return path


def check_library_name(config: ModelConfig) -> None:
    """Refuse a network of torchvision's or timm's that the library does not have."""
    from torchvision import models

    if config.name.startswith(TIMM):
        timm, name = import_timm(f"model.name = {config.name!r}"), config.name.removeprefix(TIMM)
        if not timm.is_model(name):
            raise unknown_name("model.name after 'timm:'", name, timm.list_models())
        return
    name, names = config.name.removeprefix(TORCHVISION), models.list_models(module=models)
    if name not in names:
        raise unknown_name("model.name after 'torchvision:'", name, names)


def torchvision_weights(config: ModelConfig) -> Any:
    """Return the entry of torchvision's table that `config` names. Raises UserError where it names none."""
    from torchvision import models

    setting = f"model.weights = {config.weights!r}"
    if not config.name.startswith(TORCHVISION):
        raise UserError(
            f"{setting} must be a file ({', '.join(WEIGHTS_ENDINGS)}): "
            f"model.name = {config.name!r} has no weights by name"
        )
    check_library_name(config)
    table = models.get_model_weights(config.name.removeprefix(TORCHVISION))
    names = [*table.__members__]
    if not names:
        raise UserError(f"{setting} must be a file: torchvision has no weights for model.name = {config.name!r}")
    if config.weights not in names:
        raise unknown_name("model.weights", config.weights, names)
    return table[config.weights]


def _torchvision_file(config: ModelConfig) -> Path:
    """Return torchvision's file in the hub's cache, where it is downloaded if need be."""
    url = torchvision_weights(config).url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.is_file():
        return path
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights = {config.weights!r} was not found (looked for {path}) and cannot be downloaded from {url} "
            f"({' '.join(str(error).split())}); put the file there, or let TORCH_HOME be a folder with hub/checkpoints/"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _timm_weights(config: ModelConfig) -> Any:
    """Return timm's description of the weights that `config` names. Raises UserError where it has none."""
    check_library_name(config)
    timm = import_timm(f"model.name = {config.name!r}")
    name, setting = config.name.removeprefix(TIMM), f"model.weights = {config.weights!r}"
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
    if not tags:
        raise UserError(f"{setting} must be a file: timm has no weights for model.name = {config.name!r}")
    if config.weights not in ["DEFAULT", *tags]:
        raise unknown_name("model.weights", str(config.weights), ["DEFAULT", *tags])
    tag = "" if config.weights == "DEFAULT" else f".{config.weights}"
    return timm.models.get_pretrained_cfg(f"{name}{tag}" if tag else name)


def _timm_file(config: ModelConfig) -> Path:
    """Return timm's file in the cache of the Hugging Face hub, where it is downloaded if need be."""
    import huggingface_hub

    known = _timm_weights(config)
    file = known.hf_hub_filename or "model.safetensors"
    try:
        cached = huggingface_hub.try_to_load_from_cache(known.hf_hub_id, file)
        if isinstance(cached, str):
            return Path(cached)
        return Path(huggingface_hub.hf_hub_download(known.hf_hub_id, file, etag_timeout=DOWNLOAD_TIMEOUT_S))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.weights = {config.weights!r} was not found (looked for {file} of {known.hf_hub_id} in "
            f"{huggingface_hub.constants.HF_HUB_CACHE}) and cannot be downloaded ({reason}); "
            "put it there, or let HF_HOME be a folder with hub/"
        ) from None


def file_signature(path: Path) -> tuple[Path, int, int]:
    """Return what tells a file from a later one at the same place: its path, its size and its time."""
    status = path.stat()
    return path, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=8)
def _digest(path: Path, size_bytes: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
