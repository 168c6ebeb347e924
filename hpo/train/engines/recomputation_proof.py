"""Whether a network can compute its activations again: it then keeps less, and its numbers are the same bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hpo.errors import UserError
from hpo.train.config import TrialConfig
from hpo.train.data.loading import SplitDataset
from hpo.train.engines.lane_state import initial_model
from hpo.train.imports import describe_error
from hpo.train.parameter_groups import set_trained
from hpo.train.recomputation import SETTING, buffers_kept, recompute_activations
from hpo.train.seeding import seed_generators


def check_recomputation(config: TrialConfig, *, data: SplitDataset, batch: tuple[Tensor, Tensor]) -> None:
    """Compute the gradients of a batch on the CPU, with activation checkpointing and without.

    Raises UserError where the network does not offer it, keeps as much with it, or gets other numbers.
    """
    name = config.model.name
    kept_bytes, numbers = _gradients(config, data, batch, is_recomputed=False)
    try:
        recomputed_bytes, again = _gradients(config, data, batch, is_recomputed=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of what is computed again, such as a layer that changes its input
        raise UserError(f"{SETTING} cannot be used with model.name = {name!r}: {describe_error(error)}") from error
    if recomputed_bytes >= kept_bytes:
        raise UserError(f"{SETTING} has no effect on model.name = {name!r}, which keeps as many activations with it")
    if len(numbers) != len(again) or not all(map(torch.equal, numbers, again)):
        raise UserError(
            f"{SETTING} cannot be used with model.name = {name!r}, which gets other gradients when it computes its "
            "activations again"
        )


def _gradients(
    config: TrialConfig, data: SplitDataset, batch: tuple[Tensor, Tensor], *, is_recomputed: bool
) -> tuple[int, list[Tensor]]:
    """Return how many bytes of activations a network keeps for its backward pass, and what it then has changed."""
    model = initial_model(config, data=data, device=torch.device("cpu"))
    if is_recomputed:
        recompute_activations(model, name=config.model.name)
    set_trained(model, config.training, epoch=0, num_classes=data.num_classes)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}  # bytes of each tensor's memory

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images_BCHW, labels_B = batch
    seed_generators(config.seed, "recomputation")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = functional.cross_entropy(model(images_BCHW), labels_B)
    with buffers_kept(model):
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return sum(kept.values()), [loss.detach(), *gradients, *model.buffers(), torch.get_rng_state()]
