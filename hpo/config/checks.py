"""What each setting of a study file may be: one rule a setting, in words and as a test."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from hpo.errors import UserError

Rule = tuple[str, Callable[[Any], bool]]

AT_LEAST_0: Rule = ("at least 0", lambda value: value >= 0)
AT_LEAST_1: Rule = ("at least 1", lambda value: value >= 1)
FINITE: Rule = ("a finite number", lambda value: True)  # as every number has to be
POSITIVE: Rule = ("greater than 0", lambda value: value > 0)
FRACTION: Rule = ("between 0 and 1", lambda value: 0 <= value <= 1)
INSIDE: Rule = ("greater than 0 and less than 1", lambda value: 0 < value < 1)
BELOW_1: Rule = ("at least 0 and less than 1", lambda value: 0 <= value < 1)
SHARE: Rule = ("greater than 0 and at most 1", lambda value: 0 < value <= 1)

RULES: dict[str, Rule] = {
    "search.trials": ("between 1 and 1,000,000", lambda value: 1 <= value <= 10**6),
    "search.seed": AT_LEAST_0,
    "search.retries": ("between 0 and 100", lambda value: 0 <= value <= 100),
    "pruner.startup_trials": AT_LEAST_0,
    "pruner.warmup_epochs": AT_LEAST_0,
    "pruner.percentile": ("between 0 and 100", lambda value: 0 <= value <= 100),
    "pruner.min_epochs": AT_LEAST_1,
    "pruner.reduction_factor": ("at least 2", lambda value: value >= 2),
    "pruner.patience": AT_LEAST_1,
    "pruner.min_delta": AT_LEAST_0,
    "pruner.lower": FINITE,
    "pruner.upper": FINITE,
    "data.validation_fraction": INSIDE,
    "data.split_seed": AT_LEAST_0,
    "data.train_samples": AT_LEAST_1,
    "data.train_fraction": SHARE,
    "data.image_size": ("between 8 and 4096", lambda value: 8 <= value <= 4096),
    "data.crop": ("between 0 and 64", lambda value: 0 <= value <= 64),
    "training.epochs": AT_LEAST_1,
    "training.batch_size": AT_LEAST_1,
    "training.lr": POSITIVE,
    "training.momentum": BELOW_1,
    "training.beta1": BELOW_1,
    "training.beta2": BELOW_1,
    "training.eps": POSITIVE,
    "training.weight_decay": AT_LEAST_0,
    "training.warmup_epochs": AT_LEAST_0,
    "training.step_epochs": AT_LEAST_1,
    "training.milestones": (
        "rising epochs of at least 1",
        lambda v: list(v) == sorted(set(v)) and all(e >= 1 for e in v),
    ),
    "training.gamma": SHARE,
    "training.restarts": AT_LEAST_1,
    "training.power": POSITIVE,
    "training.final_lr_fraction": FRACTION,
    "training.peak_fraction": INSIDE,
    "training.initial_lr_fraction": SHARE,
    "training.plateau_epochs": AT_LEAST_0,
    "training.gradient_clip": POSITIVE,
    "training.label_smoothing": BELOW_1,
    "training.checkpoint_epochs": AT_LEAST_1,
    "training.seed": AT_LEAST_0,
    "engine.lanes": (
        "'auto' or an integer between 1 and 1024",
        lambda value: value == "auto" or (type(value) is int and 1 <= value <= 1024),
    ),
    "checkpoints.url": (
        "an absolute folder or a URL such as s3://bucket/folder, which every machine can reach",
        lambda value: "://" in value or value.startswith(("/", "~")),
    ),
    "checkpoints.keep_best": AT_LEAST_0,
    "confirm.top": AT_LEAST_1,
    "confirm.seeds": ("between 2 and 1,000", lambda value: 2 <= value <= 1000),
}


def check_rule(setting: str, value: Any, *, shown_as: str | None = None) -> None:
    """Raises `UserError` where the value of a setting, named `section.key`, breaks its rule; None breaks none."""
    if value is None or setting not in RULES:
        return
    rule, holds = RULES[setting]
    if (isinstance(value, float) and not math.isfinite(value)) or not holds(value):
        raise UserError(f"{shown_as or setting} must be {rule}, got {value!r}")


def check_reference(setting: str, reference: str) -> None:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", reference):
        raise UserError(f"{setting} must be written package.module:function, got {reference!r}")


# Pydantic's names for types, and those of a study file.
WORDS = {
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid string": "a text",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "an object": "a table",
}


def explain(error: ValidationError) -> str:
    """Pydantic's complaints about types as our sentences: setting, rule, value."""
    sentences = []
    for complaint in error.errors():
        setting = ".".join(map(str, complaint["loc"]))
        if complaint["type"] == "missing":
            sentences.append(f"{setting} must be set")
        else:
            rule = complaint["msg"].removeprefix("Input should be ").partition(", got")[0]
            for theirs, ours in WORDS.items():
                rule = rule.replace(theirs, ours)
            sentences.append(f"{setting} must be {rule}, got {complaint['input']!r}")
    return "; ".join(sentences)
