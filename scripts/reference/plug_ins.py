"""Samplers, pruners, optimizers and all else that a study file names, from their tables."""

from __future__ import annotations

from collections.abc import Mapping

from hpo.search.pruners import PRUNERS
from hpo.search.samplers import SAMPLERS
from hpo.train.data.augment import AUGMENTATIONS
from hpo.train.data.datasets import DATASETS
from hpo.train.losses import LOSSES, Loss
from hpo.train.metrics import METRICS
from hpo.train.models import MODELS
from hpo.train.optim import OPTIMIZERS, REFUSED_OPTIMIZERS
from hpo.train.schedules import SCHEDULES, Schedule
from scripts.reference.markdown import code, summary, table, with_names

__all__ = [
    "augmentations",
    "datasets",
    "losses",
    "metrics",
    "models",
    "optimizers",
    "pruners",
    "refused_optimizers",
    "samplers",
    "samplers_with_cases",
    "schedules",
]

DATASET_TEXTS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "mnist": "MNIST, brought to 32x32",
    "fashion_mnist": "Fashion-MNIST, brought to 32x32",
    "digits": "scikit-learn's 1,797 scanned digits, brought to 32x32; no download",
    "image_folder": "`ROOT/train/<class>/*`, or `ROOT/<class>/*`: [guide](../guides/own-data.md#a-folder-of-images)",
}


def samplers() -> str:
    return table(["sampler", "what it does"], [(f"`{name}`", entry.about) for name, entry in SAMPLERS.items()])


def samplers_with_cases() -> str:
    return code(name for name, entry in SAMPLERS.items() if entry.takes_cases)


def pruners() -> str:
    rows = [
        (
            f"`{name}`",
            entry.about,
            ", ".join(f"`{key}` {option_default(value)}" for key, value in entry.defaults.items()),
        )
        for name, entry in PRUNERS.items()
    ]
    return table(["pruner", "what it does", "options and defaults"], rows)


def option_default(value: object) -> str:
    return "(none)" if value is None else str(value)


def optimizers() -> str:
    rows = [(f"`{name}`", code(sorted(entry.keys)), code(entry.options)) for name, entry in OPTIMIZERS.items()]
    return table(["optimizer", "keys of `[training]` that it reads", "options"], rows)


def refused_optimizers() -> str:
    return "\n".join(f"- `{name}` is refused: {why}." for name, why in REFUSED_OPTIMIZERS.items())


def schedules() -> str:
    return entries_with_keys("schedule", "what the rate does", SCHEDULES)


def losses() -> str:
    return entries_with_keys("loss", "what it is", LOSSES)


def entries_with_keys(kind: str, what: str, entries: Mapping[str, Schedule] | Mapping[str, Loss]) -> str:
    rows = [
        (f"`{name}`", with_names(entry.about, {*entry.keys, "lr"}), code(sorted(entry.keys)))
        for name, entry in entries.items()
    ]
    return table([kind, what, "keys of `[training]` that it reads"], rows)


def metrics() -> str:
    rows = [(f"`{name}`", entry.about, entry.direction) for name, entry in METRICS.items()]
    return table(["metric", "what it is", "direction"], rows)


def models() -> str:
    rows = [
        *((f"`{name}`", summary(factory).removeprefix("Return ")) for name, factory in MODELS.items()),
        ("`torchvision:NAME`", "any classifier of `torchvision.models`; further keys go to its constructor"),
        ("`timm:NAME`", "any network of timm (extra `timm`); further keys go to `timm.create_model`"),
    ]
    return table(["model", "network"], rows)


def datasets() -> str:
    assert DATASET_TEXTS.keys() == DATASETS.keys()
    return table(["data set", "images"], [(f"`{name}`", text) for name, text in DATASET_TEXTS.items()])


def augmentations() -> str:
    return code(AUGMENTATIONS)
