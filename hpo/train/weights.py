"""Weights that a network starts from: what of a file fits the network, and what does not.

The tensors of the head are left out where the file has another number of classes; any other tensor of another shape is
an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import UserError
from hpo.train.checkpoint import read_checkpoint_weights
from hpo.train.config import ModelConfig
from hpo.train.modules import head_of, is_inside
from hpo.train.weight_files import file_signature, find_weights

# Tables in which training scripts keep the weights among other things, and what wrappers put before the names.
TABLES = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")
MAX_NAMES_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class FittedWeights:
    """The tensors of a file beside those of a network, by what becomes of them."""

    source: str
    network: nn.Module
    given: Mapping[str, Tensor]
    loaded: Sequence[str]
    new: Sequence[str]  # tensors of the network's head that are not loaded
    missing: Sequence[str]  # other tensors of the network that the file does not have
    left_out: Sequence[str]  # tensors of the file that the network has no place for

    @torch.no_grad()
    def load(self) -> None:
        """Put the tensors into the network."""
        tensors = self.network.state_dict()
        for name in self.loaded:
            tensors[name].copy_(self.given[name])

    @property
    def text(self) -> str:
        """The weights in words: what is loaded, what is new, and what is missing or left out."""
        whole = len(self.loaded) + len(self.new) + len(self.missing)
        parts = [f"{len(self.loaded)} of {whole} tensors from {self.source}"]
        parts.append(f"the head is new ({_names_shown(self.new)})" if self.new else "the head too")
        if self.missing:
            parts.append(f"not in the file, so initialised at random: {_names_shown(self.missing)}")
        if self.left_out:
            parts.append(f"left out: {_names_shown(self.left_out)}")
        return "; ".join(parts)


def fit_weights(network: nn.Module, config: ModelConfig, *, num_classes: int) -> FittedWeights:
    """Compare the weights that `config` names with a network, and change nothing.

    Raises UserError where they are not found or cannot be read, a tensor outside the head has another shape, or none
    fits.
    """
    path = find_weights(config)
    setting = f"model.weights = {config.weights!r}"
    expected = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    given = _without_prefix(read_weights(path, setting=setting), expected)
    head = head_of(network, num_classes=num_classes)
    loaded: list[str] = []
    other_shapes: list[str] = []
    for name in (name for name in expected if name in given):
        (loaded if given[name].shape == expected[name].shape else other_shapes).append(name)
    for name in other_shapes:
        if not is_inside(name, head):
            raise UserError(
                f"{setting}: the tensor {name} has the shape {tuple(given[name].shape)}, and the network of "
                f"model.name = {config.name!r} needs {tuple(expected[name].shape)}"
            )
    if not loaded:
        raise UserError(
            f"{setting} must hold tensors of the network of model.name = {config.name!r}, such as "
            f"{_names_shown(list(expected))}; got {_names_shown(list(given)) or 'none'}"
        )
    absent = [name for name in expected if name not in loaded]
    return FittedWeights(
        source=path.name,
        network=network,
        given=given,
        loaded=loaded,
        new=[name for name in absent if is_inside(name, head)],
        missing=[name for name in absent if not is_inside(name, head) and not name.endswith("num_batches_tracked")],
        left_out=[name for name in given if name not in expected],
    )


def read_weights(path: Path, *, setting: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name. Raises UserError, naming `setting`, where it holds none or is no such file.

    The file may be a trial's checkpoint, or what a training script saved around the weights.
    """
    return _read(*file_signature(path), setting=setting)


@lru_cache(maxsize=1)  # every trial of a study begins with the same file
def _read(path: Path, size_bytes: int, mtime_ns: int, *, setting: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        elif path.suffix == ".ckpt":
            content = read_checkpoint_weights(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch's message advises to switch its safeguard off
        reason = "objects other than tensors are in it" if "weights_only" in str(error) else _first_sentence(error)
        raise UserError(f"{setting} must be a file of tensors, and {path} cannot be read as one: {reason}") from None
    for table in TABLES:
        if isinstance(content, dict) and isinstance(content.get(table), dict):
            content = content[table]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {name: tensor for name, tensor in named if isinstance(tensor, Tensor)}
    if not tensors:
        raise UserError(f"{setting} must be a file of tensors by name, such as state_dict() gives, and {path} has none")
    return tensors


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _without_prefix(given: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without what a wrapper put before all of their names, where the network does not have it."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in given) and not any(name.startswith(prefix) for name in expected):
            given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    return given


def _names_shown(names: Sequence[str]) -> str:
    """Return the names, with a count in place of the rest of many."""
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    return f"{shown} and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else shown
