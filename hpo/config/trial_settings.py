"""The settings of one trial: which setting each key of the search space names, and a trial's values in their places."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from hpo.config.sections import STUDY_NEUTRAL_KEYS
from hpo.search.space import GROUPS, Conditional, Parameter, Scalar, value_combinations
from hpo.train.config import TIMM, TORCHVISION, DataConfig, ModelConfig, TrainingConfig
from hpo.train.data.augment import named
from hpo.train.imports import is_import_path
from hpo.train.losses import LOSSES, Loss
from hpo.train.metrics import METRICS, Metric
from hpo.train.optim import OPTIMIZERS, OWN_OPTIMIZER_KEYS, Optimizer
from hpo.train.schedules import SCHEDULES, Schedule

MAX_EXTREME_POINTS = 4096
CONFIGS: dict[str, type[ModelConfig | DataConfig | TrainingConfig]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
}
# The default of each field of these: to check the spec of a study looks up a hundred.
DEFAULTS: dict[type[Any], dict[str, Any]] = {
    config: {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }
    for config in CONFIGS.values()
}

# The plug-ins that [training] names, and the keys that a user's own understands.
PLUG_INS: dict[str, Mapping[str, Optimizer | Schedule | Loss | Metric]] = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "loss": LOSSES,
    "metric": METRICS,
}
OWN_KEYS: dict[str, frozenset[str]] = {
    "optimizer": OWN_OPTIMIZER_KEYS,
    "schedule": frozenset(),
    "loss": frozenset(),
    "metric": frozenset({"metric_direction"}),
}
# Tables and lists of [training], and what says how a study's trials are compared: no trial has its own.
UNSEARCHED = (GROUPS, "freeze", "optimizer_options", "class_weights", "metric", "metric_direction")

Config = TypeVar("Config", ModelConfig, DataConfig, TrainingConfig)


def section_and_name(key: str) -> tuple[str, str]:
    """Return the setting that a key of the space names: `lr` is ("training", "lr"), `data.crop` ("data", "crop").

    An option of the optimizer, `optimizer_options.amsgrad`, keeps the name of its table.
    """
    section, dot, name = key.partition(".")
    return (section, name) if dot and section in ("model", "data") else ("training", key)


def group_and_factor(name: str) -> tuple[str, str] | None:
    """Return the pattern and the multiplier that `groups.head.lr` names: ("head", "lr"); None for any other key."""
    prefix, _, rest = name.partition(".")
    pattern, _, factor = rest.rpartition(".")
    return (pattern, factor) if prefix == GROUPS and pattern else None


def searchable_keys() -> list[str]:
    """Return the keys that a space can have, without those of users' own networks and data."""
    left_out = {*STUDY_NEUTRAL_KEYS, "data.options", "data.augment"}
    left_out |= {f"training.{name}" for name in UNSEARCHED}
    training = [f.name for f in dataclasses.fields(TrainingConfig) if f"training.{f.name}" not in left_out]
    data = [f"data.{f.name}" for f in dataclasses.fields(DataConfig) if f"data.{f.name}" not in left_out]
    return [*training, "groups.PATTERN.lr", "groups.PATTERN.weight_decay", "model.name", "model.weights", *data]


def unread_keys(training: TrainingConfig) -> set[str]:
    """Return the keys of [training] that other optimizers and schedules read, but not these."""
    unread: set[str] = set()
    for kind in PLUG_INS:
        unread |= known_keys(kind) - keys_of(kind, getattr(training, kind))
    return unread


def known_keys(kind: str) -> frozenset[str]:
    """Return the keys of [training] that some plug-in of a kind understands."""
    return OWN_KEYS[kind].union(*(entry.keys for entry in PLUG_INS[kind].values()))


def keys_of(kind: str, name: str) -> frozenset[str]:
    """Return the keys of [training] that a plug-in of this name understands, be it in the table or the user's own."""
    entry = PLUG_INS[kind].get(name)
    return OWN_KEYS[kind] if entry is None else entry.keys


def named_plug_ins(
    model: ModelConfig, data: DataConfig, training: TrainingConfig, parameters: Mapping[str, Parameter]
) -> list[tuple[str, str]]:
    """Return each name of a network, a data set, a plug-in or a function that trials can have, after its setting."""
    fixed = {"model.name": model.name, "data.name": data.name, **{kind: getattr(training, kind) for kind in PLUG_INS}}
    names = []
    for key, value in fixed.items():
        if (searched := parameters.get(key)) is not None:
            names += [(f"search.space.{key}", str(name)) for name in searched.extreme_values()]
        else:
            names.append((".".join(section_and_name(key)), str(value)))
    names += [("data.augment", named(transform)[0]) for transform in data.augment]
    return [*names, ("data.groups", data.groups or "")]


def names_of_own(references: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return each name of users' own code among references, each after its setting, with the first that has it."""
    return {
        name: setting
        for setting, name in reversed(references)
        if is_import_path(name) and not name.startswith((TORCHVISION, TIMM))
    }


def is_default(config: ModelConfig | DataConfig | TrainingConfig, name: str) -> bool:
    """Return whether a field of a config has its default."""
    value = getattr(config, name)
    return bool((tuple(value) if isinstance(value, list) else value) == DEFAULTS[type(config)][name])


def with_values(config: Config, values: Mapping[str, Scalar], *, section: str) -> Config:
    """Return a section's config with a trial's values in it; a key that is no field's becomes an option."""
    names = {field.name for field in dataclasses.fields(config)}
    table = "optimizer_options" if isinstance(config, TrainingConfig) else "options"
    fields: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in values.items():
        key_section, name = section_and_name(key)
        if key_section == section and (group := group_and_factor(name)) is not None:
            assert isinstance(config, TrainingConfig)
            groups = fields.setdefault(GROUPS, {pattern: dict(of) for pattern, of in config.groups.items()})
            groups.setdefault(group[0], {})[group[1]] = value
        elif key_section == section:
            (fields if name in names else options)[name.removeprefix(f"{table}.")] = value
    if options:
        fields[table] = {**getattr(config, table), **options}
    return dataclasses.replace(config, **fields)


def extreme_points(parameters: Mapping[str, Parameter], sections: Collection[str]) -> Iterator[dict[str, Scalar]]:
    """Yield the combinations of extreme values, each once, as far as they concern these sections; at most 4,096."""
    concerned = {key for key in parameters if section_and_name(key)[0] in sections}
    needed = concerned | {p.by for key, p in parameters.items() if key in concerned and isinstance(p, Conditional)}
    seen = set()
    points = value_combinations(
        {key: parameters[key] for key in parameters if key in needed}, lambda parameter: parameter.extreme_values()
    )
    for point in itertools.islice(points, MAX_EXTREME_POINTS):
        extreme_point = {key: value for key, value in point.items() if key in concerned}
        if (items := tuple(extreme_point.items())) not in seen:
            seen.add(items)
            yield extreme_point
