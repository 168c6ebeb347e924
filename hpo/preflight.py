"""Checks that need the pictures, the network or the user's code at hand, made before a study is created."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpo.devices import Device
from hpo.errors import UserError
from hpo.spec import StudySpec


def check(spec: StudySpec, devices: Sequence[Device]) -> dict[str, Any]:
    """Loads the data, builds every network that the space can ask for and shows it a batch; returns the facts found.

    Raises UserError for anything that would fail in the trials. Runs on the CPU, so that the process that only
    supervises takes no memory of a GPU. Data sets that are absent are downloaded here, once, before workers start.
    """
    from hpo.search import build_pruner, build_sampler
    from hpo.train.imports import import_object

    build_pruner(spec)
    build_sampler(spec, number=0)
    if spec.objective:
        import_object(spec.objective.function, setting="objective.function")
        return {}
    import torch

    from hpo.train.data import load_data
    from hpo.train.models import build_model, check_model

    if spec.training.precision == "bf16" and any(device.kind != "cuda" for device in devices):
        names = ", ".join(device.name for device in devices)
        raise UserError(f"training.precision = 'bf16' needs a GPU that computes in bf16, got the device {names}")
    facts: dict[str, Any] = {}
    for corner in spec.corners(sections=("data", "model")):
        config = spec.trial_config(corner, seed=0)
        data = load_data(config.data, device="cpu")
        if config.training.report_test_accuracy and data.test is None:
            raise UserError(
                f"training.report_test_accuracy needs a test set, and data.name = {config.data.name!r} has none"
            )
        with torch.random.fork_rng(devices=[]):
            model = build_model(
                config.model, channels=data.channels, num_classes=data.num_classes, image_size=data.image_size
            )
        images, _ = next(data.val.batches(2))
        check_model(model, batch=images, num_classes=data.num_classes)
        facts = facts or {
            "num_train": len(data.train),
            "num_val": len(data.val),
            "num_classes": data.num_classes,
            "channels": data.channels,
            "image_size": data.image_size,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    return facts
