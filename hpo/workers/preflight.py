"""Checks that need the pictures, the network or the user's code at hand, made before a study is created."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


def check(spec: StudySpec, kinds: Collection[str]) -> dict[str, Any]:
    """Loads the data, builds every network that the space can ask for and shows it a batch; returns the facts found.

    `kinds` are those of the devices that are to train ("cuda", "mps", "cpu").

    Raises UserError for anything that would fail in the trials. Runs on the CPU, so that the process that only
    supervises takes no memory of a GPU. Data sets that are absent are downloaded here, once, before workers start.
    """
    from hpo.search.pruners import build_pruner
    from hpo.search.samplers import build_sampler
    from hpo.train.imports import import_object

    build_pruner(spec)
    build_sampler(spec, number=0)
    if spec.checkpoints.url is not None and "://" in spec.checkpoints.url:
        _check_place(spec.checkpoints.url)
    if spec.objective:
        import_object(spec.objective.function, setting="objective.function")
        return {}
    import torch

    from hpo.train.data.loading import load_data
    from hpo.train.engines.lane_state import check_test_set, mixed_precision
    from hpo.train.models import build_model, check_model

    for kind in kinds:
        if kind != "cuda":  # a GPU would have to be touched to be asked
            mixed_precision(spec.training, device=torch.device(kind))
    facts: dict[str, Any] = {}
    for corner in spec.extreme_points(sections=("data", "model")):
        config = spec.trial_config(corner, seed=0)
        data = load_data(config.data, device="cpu")
        check_test_set(config, data=data)
        with torch.random.fork_rng(devices=[]):
            model = build_model(
                config.model, channels=data.channels, num_classes=data.num_classes, image_size=data.image_size
            )
        images, _ = next(data.val.batches(2))
        check_model(model, batch=images, num_classes=data.num_classes)
        smallest = min(map(int, [config.training.batch_size, *_extreme_values(spec, "batch_size")]))
        _check_trains(model, *next(data.train.batches(min(smallest, 8))))
        facts = facts or {
            "num_train": len(data.train),
            "num_val": len(data.val),
            "num_classes": data.num_classes,
            "channels": data.channels,
            "image_size": data.image_size,
            "has_test": data.open_test is not None,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    return facts


def _check_place(url: str) -> None:
    """Asks an object store for what is there: a wrong name or absent credentials are found before training."""
    from hpo.train.checkpoint import list_folders

    try:
        list_folders(url)
    except OSError as error:
        raise UserError(f"checkpoints.url must be a place that this machine can read: {error}") from None


def _extreme_values(spec: StudySpec, key: str) -> list[Any]:
    parameter = spec.search.parameters.get(key)
    return list(parameter.extreme_values()) if parameter else []


def _check_trains(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """One forward and backward pass in training mode: some networks can be looked at and not trained."""
    from torch.nn import functional

    from hpo.train.imports import describe_error

    try:
        model.train()
        functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise UserError(
            f"model.name must name a network that can be trained on a batch of {len(images)} pictures; "
            f"it raised {describe_error(error)}"
        ) from error
