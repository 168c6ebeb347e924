"""The study file: TOML read into a frozen StudySpec; every check of what a user wrote is here.

What needs the pictures, the network or the machine to be judged is checked by `hpo.workers.preflight`, also before
anything is created. The rules say what a value must be; `explain` and `UserError` turn a breach into one sentence.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError, model_validator

from hpo.config import study_file
from hpo.config.checks import check_reference, check_rule, explain
from hpo.config.sections import CheckpointsSpec, ConfirmSpec, EngineSpec, ObjectiveSpec
from hpo.errors import UserError, check_keys, unknown_name
from hpo.objective import RESERVED_METRICS
from hpo.search.config import PrunerSpec, SearchSpec, Section
from hpo.search.pruners import PRUNERS
from hpo.search.samplers import SAMPLERS
from hpo.search.space import (
    Categorical,
    Conditional,
    Parameter,
    Range,
    Scalar,
    grid_points,
    is_auto,
    value_combinations,
)
from hpo.train.config import TORCHVISION, TRIAL_NEUTRAL_KEYS, DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.optim import OPTIMIZERS, SCHEDULES

Config = TypeVar("Config", ModelConfig, DataConfig, TrainingConfig)
# What may differ between two runs of one study without changing a single number of it.
STUDY_NEUTRAL_KEYS = TRIAL_NEUTRAL_KEYS | {"search.retries", "engine.lanes", "checkpoints.url", "checkpoints.keep_best"}
BUDGET = frozenset({"search.trials"})  # of a sampled study: trials can be added to those that there are


class StudySpec(Section):
    """One study, complete: what is asked, and everything that its trials' results depend on.

    Raises `UserError` for a setting that breaks a rule and `pydantic.ValidationError` for one of the wrong type;
    `from_toml` and `from_dict` raise `UserError` for both.
    """

    name: str
    search: SearchSpec
    pruner: PrunerSpec = PrunerSpec()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    objective: ObjectiveSpec | None = None
    engine: EngineSpec = EngineSpec()
    checkpoints: CheckpointsSpec = CheckpointsSpec()
    confirm: ConfirmSpec | None = None  # None: the search has the last word

    @classmethod
    def from_toml(cls, path: str | Path, *, overrides: Iterable[str] = ()) -> StudySpec:
        """Reads a study file; `overrides` are `section.key=value` with the value written as in TOML."""
        first, *others = cls.all_from_toml(path, overrides=overrides)
        if others:
            raise UserError(f"{path} holds {1 + len(others)} studies, by its [[compare]]: `hpo run` runs them all")
        return first

    @classmethod
    def all_from_toml(cls, path: str | Path, *, overrides: Iterable[str] = ()) -> list[StudySpec]:
        """The study of a file and, for each table of its `[[compare]]`, that study with the settings of the table."""
        settings = study_file.expand_compare(study_file.read(path, overrides=overrides), source=str(path))
        sources = [str(path), *(f"{path}, [[compare]] for {one['name']}" for one in settings[1:])]
        return [cls.from_dict(one, source=source) for one, source in zip(settings, sources, strict=True)]

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], *, source: str | None = None) -> StudySpec:
        """Builds a spec from nested dictionaries as TOML gives them; `source` is named in every error."""
        try:
            # JSON mode lets pydantic be strict about numbers and text and still take a list for a sequence.
            return cls.model_validate_json(json.dumps(settings, default=str), strict=True)
        except ValidationError as error:
            message = explain(error)
        except UserError as error:
            message = str(error)
        raise UserError(f"{message} ({source})" if source else message)

    @property
    def num_trials(self) -> int:
        return len(self.search.grid) if self.search.sampler == "grid" else self.search.trials or DEFAULT_TRIALS

    @property
    def metric(self) -> str:
        return self.objective.metric if self.objective else "val_accuracy"

    @property
    def direction(self) -> str:
        return self.objective.direction if self.objective else "maximize"

    def modules(self) -> dict[str, str]:
        """The modules of users' own code that the study names, each with the setting that names it."""
        named: list[tuple[str, Any]] = [("objective.function", self.objective.function if self.objective else None)]
        for setting, value in (("model.name", self.model.name), ("data.name", self.data.name)):
            searched = self.search.parameters.get(setting)
            named += (
                [(f"search.space.{setting}", v) for v in searched.extreme_values()] if searched else [(setting, value)]
            )
        return {
            str(value).partition(":")[0]: setting for setting, value in reversed(named)
            if value is not None and ":" in str(value) and not str(value).startswith(TORCHVISION)
        }  # fmt: skip

    @cached_property
    def max_epochs(self) -> int:
        """The most epochs that any trial can have."""
        searched = self.search.parameters.get("epochs")
        return max([*map(int, searched.extreme_values())] if searched else [self.training.epochs])

    def trial_config(self, values: Mapping[str, Scalar], *, seed: int) -> TrialConfig:
        """The configuration of the trial that has these values of the space (keys as in `search.parameters`)."""
        changes: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "training": {}}
        for key, value in values.items():
            section, name = _section_and_name(key)
            changes[section][name] = value
        return TrialConfig(
            model=_replaced(self.model, changes["model"]),
            data=_replaced(self.data, changes["data"]),
            training=_replaced(self.training, changes["training"]),
            seed=seed,
        )

    def single_trial_spec(self, values: Mapping[str, Scalar], *, name: str, seed: int, stacked: bool) -> StudySpec:
        """The study that trains one trial of this one again, digit for digit on a CPU.

        `stacked`: the trial was trained in lanes, which shows in its last digits; so will this one. Its values stand in
        their sections, its learning rate and its seed are a grid of one point. For a function of a user's, which has no
        sections, all its values are that point.
        """
        config = self.trial_config({} if self.objective else values, seed=seed)
        sections = {"model": config.model, "data": config.data, "training": config.training}
        settings = self.model_copy(update=sections).frozen() | {"name": name, "pruner": {"name": "none"}}
        points = dict(values)
        if not self.objective:
            for table, entry in ((OPTIMIZERS, config.training.optimizer), (SCHEDULES, config.training.schedule)):
                for key in {key for other in table.values() for key in other.keys} - set(table[entry].keys):
                    settings["training"].pop(key, None)  # searched for other optimizers than the one that won
            points = {"lr": settings["training"].pop("lr")}
            settings["engine"] = {"lanes": 2 if stacked else 1}
        settings["training"].pop("seed")
        settings.pop("confirm", None)
        space = {key: [value] for key, value in points.items()} | {"seed": [seed]}
        settings["search"] = {"sampler": "grid", "seed": self.search.seed, "space": space}
        return StudySpec.from_dict(settings)

    def extreme_points(self, sections: Collection[str] = ("model", "data", "training")) -> Iterator[dict[str, Scalar]]:
        """The combinations of the extreme values of the space, as far as they concern these sections; at most 4,096."""
        parameters = self.search.parameters
        concerned = {key for key in parameters if _section_and_name(key)[0] in sections}
        needed = concerned | {p.by for key, p in parameters.items() if key in concerned and isinstance(p, Conditional)}
        seen = []
        points = value_combinations(
            {key: parameters[key] for key in parameters if key in needed}, lambda parameter: parameter.extreme_values()
        )
        for point in itertools.islice(points, 4096):
            corner = {key: value for key, value in point.items() if key in concerned}
            if corner not in seen:
                seen.append(corner)
                yield corner

    def frozen(self) -> dict[str, Any]:
        """The spec as plain data, complete with defaults: what a store keeps and `from_dict` takes."""
        settings = self.model_dump(mode="json", exclude_none=True)
        for section in ("model", "data"):
            settings[section] |= settings[section].pop("options")
        if self.objective:
            settings = {key: value for key, value in settings.items() if key not in ("model", "data")}
            settings["training"] = {key: settings["training"][key] for key in OBJECTIVE_TRAINING_KEYS}
        return settings

    def differences(self, other: StudySpec) -> list[str]:
        """The settings, as `section.key: theirs here, mine there`, that would change a result of `self`.

        A confirmation can be added to what was searched without one.
        """
        mine, theirs = dict(study_file.flatten(self.frozen())), dict(study_file.flatten(other.frozen()))
        neutral = (
            STUDY_NEUTRAL_KEYS if "grid" in (self.search.sampler, other.search.sampler) else STUDY_NEUTRAL_KEYS | BUDGET
        )
        return [
            f"{key}: {mine.get(key)!r} in the study, {theirs.get(key)!r} here"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
            and key not in neutral
            and not (self.confirm is None and key.startswith("confirm."))
        ]

    @model_validator(mode="before")
    @classmethod
    def _fold_options(cls, settings: Any) -> Any:
        """Moves keys of [model] and [data] that are not ours to `options`; refuses unknown keys, naming the nearest."""
        if not isinstance(settings, dict):
            return settings
        settings = dict(settings)
        check_keys("", settings, cls.model_fields)
        for section, config in (("model", ModelConfig), ("data", DataConfig), ("training", TrainingConfig)):
            given = settings.get(section)
            if not isinstance(given, dict):
                continue
            names = {field.name for field in dataclasses.fields(config)} - {"options"}
            extra = {key: value for key, value in given.items() if key not in names}
            if section == "model" or (section == "data" and ":" in str(given.get("name", ""))):
                options = extra.pop("options", {}) | extra
                settings[section] = {key: value for key, value in given.items() if key in names} | {"options": options}
            else:
                check_keys(section, given, names)
        for section, spec in SECTIONS.items():
            if isinstance(settings.get(section), dict):
                check_keys(section, settings[section], spec.model_fields)
        return settings

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise UserError(f"name must be letters, digits, '.', '_' and '-', at most 100; got {self.name!r}")
        for section in ("search", "pruner", "data", "training", "engine", "checkpoints", "confirm"):
            for key, value in (vars(getattr(self, section)) if getattr(self, section) else {}).items():
                check_rule(f"{section}.{key}", value)
        self._check_search()
        self._check_pruner()
        if self.objective:
            self._check_objective()
        else:
            self._check_training()
        return self

    def _check_pruner(self) -> None:
        if self.pruner.name not in PRUNERS:
            raise unknown_name("pruner.name", self.pruner.name, PRUNERS)
        options = PRUNERS[self.pruner.name].defaults
        for key, value in self.pruner.model_dump(exclude={"name"}, exclude_none=True).items():
            if key not in options:
                takes = f"it takes {', '.join(options)}" if options else "it takes no options"
                raise UserError(f"pruner.{key} has no meaning for pruner {self.pruner.name!r} ({takes}), got {value!r}")
        pruner = self.pruner
        if pruner.name == "threshold" and pruner.lower is None and pruner.upper is None:
            raise UserError("pruner.lower or pruner.upper must be set for pruner 'threshold'")
        if pruner.lower is not None and pruner.upper is not None and pruner.lower >= pruner.upper:
            raise UserError(f"pruner.lower must be less than pruner.upper, got {pruner.lower} and {pruner.upper}")

    def _check_search(self) -> None:
        search, name = self.search, self.search.sampler
        if name not in SAMPLERS:
            raise unknown_name("search.sampler", name, SAMPLERS)
        if not search.parameters:
            raise UserError(
                "search.space must name at least one parameter, such as lr = { low = 1e-5, high = 1e-1, log = true }"
            )
        ranges = [key for key, parameter in search.parameters.items() if isinstance(parameter, Range)]
        if len(ranges) < SAMPLERS[name].min_ranges:
            raise UserError(
                f"search.sampler {name!r} needs at least {SAMPLERS[name].min_ranges} ranges in search.space, "
                f"got {len(ranges)} ({', '.join(ranges) or 'none'})"
            )
        for key, parameter in search.parameters.items():
            if isinstance(parameter, Conditional):
                if not SAMPLERS[name].conditional:
                    able = ", ".join(key for key, sampler in SAMPLERS.items() if sampler.conditional)
                    raise UserError(f"search.space.{key}.by cannot be used with sampler {name!r}; use one of {able}")
                given = search.parameters.get(parameter.by)
                if not isinstance(given, Categorical):
                    raise UserError(f"search.space.{key}.by.{parameter.by} must be a list in search.space too")
                for case in parameter.cases:
                    if case not in map(str, given.values):
                        raise unknown_name(f"search.space.{key}.by.{parameter.by}", case, map(str, given.values))
        if name == "grid" and (size := math.prod(map(_num_points, search.parameters.values()))) > MAX_GRID:
            raise UserError(f"search.space must have at most {MAX_GRID:,} grid points, got {size:,}")
        self._check_try_first()
        if name == "grid" and search.trials not in (None, len(search.grid)):
            raise UserError(
                f"search.trials must be left out or be the grid's size, {len(search.grid)}; got {search.trials}"
            )
        if len(search.try_first) > self.num_trials:
            raise UserError(
                f"search.try_first must hold at most search.trials = {self.num_trials} points, "
                f"got {len(search.try_first)}"
            )

    def _check_try_first(self) -> None:
        for index, point in enumerate(self.search.try_first):
            where = f"search.try_first[{index}]"
            if not point or point in self.search.try_first[:index]:
                raise UserError(f"{where} must name values that are not tried already, got {point}")
            for key, value in point.items():
                if key not in self.search.parameters:
                    raise unknown_name(f"{where}: each key", key, self.search.parameters)
                parameter = self.search.parameters[key]
                if isinstance(parameter, Conditional):
                    case = parameter.cases.get(str(point.get(parameter.by)))
                    if case is None:
                        raise UserError(
                            f"{where}.{key} needs {parameter.by} beside it, with a case of search.space.{key}"
                        )
                    parameter = case
                if not parameter.contains(value):
                    raise UserError(f"{where}.{key} must be {parameter}, got {value!r}")
            if self.search.sampler == "grid" and not any(
                point.items() <= p.items() for p in grid_points(self.search.parameters)
            ):
                raise UserError(f"{where} must be a point of the grid, got {point}")

    def _check_objective(self) -> None:
        assert self.objective is not None
        if self.objective.direction not in ("maximize", "minimize"):
            raise UserError(f"objective.direction must be maximize or minimize, got {self.objective.direction!r}")
        if self.objective.metric in RESERVED_METRICS:
            raise UserError(
                f"objective.metric cannot be one of {', '.join(sorted(RESERVED_METRICS))}; got {self.objective.metric!r}"
            )
        check_reference("objective.function", self.objective.function)
        if is_auto(self.search.parameters.get("lr")):
            raise UserError(
                "search.space.lr must be a range or a list with objective.function, whose loop is not ours to test; "
                "got 'auto'"
            )
        if self.checkpoints.url is not None and "://" in self.checkpoints.url:
            raise UserError(
                "checkpoints.url must be a folder with objective.function, whose own code writes into it; "
                f"got {self.checkpoints.url!r}"
            )
        if self.checkpoints.keep_best != CheckpointsSpec().keep_best:
            raise UserError(
                "checkpoints.keep_best has no effect with objective.function, whose folders are all kept; "
                f"got {self.checkpoints.keep_best}"
            )
        if self.engine != EngineSpec():
            raise UserError(
                "engine.lanes has no effect with objective.function, which is called for one trial at a time; "
                f"got {self.engine.lanes!r}"
            )
        for section, config in (("model", self.model), ("data", self.data), ("training", self.training)):
            for field in dataclasses.fields(config):
                given = section == "training" and field.name in OBJECTIVE_TRAINING_KEYS
                if not given and not _is_default(config, field):
                    raise UserError(
                        f"{section}.{field.name} has no effect with objective.function, whose own code decides it; "
                        f"got {getattr(config, field.name)!r}"
                    )

    def _check_training(self) -> None:
        parameters = self.search.parameters
        for key, parameter in parameters.items():
            for value in parameter.extreme_values():
                _check_searched(key, value, data=self.data)
        if self.data.image_size != DataConfig.image_size and self.data.name != "image_folder":
            raise UserError(f"data.image_size has no meaning but for image_folder, got {self.data.image_size}")
        self._check_fixed_beside_searched()
        if self.training.lr is None and "lr" not in parameters:
            raise UserError("training.lr must be set, or searched as search.space.lr")
        if self.data.train_samples is not None and self.data.train_fraction is not None:
            raise UserError("data.train_samples and data.train_fraction cannot both be set")
        for kind, table in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            searched = parameters.get(kind)
            names = {getattr(self.training, kind)} if searched is None else {str(v) for v in searched.extreme_values()}
            for name in names:
                if name not in table:
                    setting = f"search.space.{kind}" if searched else f"training.{kind}"
                    raise unknown_name(setting, name, table)
            known = {key for entry in table.values() for key in entry.keys}
            used = {key for name in names for key in table[name].keys}
            for key in sorted(known - used):
                if key in parameters or not _is_default(self.training, _training_field(key)):
                    setting = f"search.space.{key}" if key in parameters else f"training.{key}"
                    takers = ", ".join(name for name, entry in table.items() if key in entry.keys)
                    raise UserError(
                        f"{setting} has no meaning for {kind} {', '.join(sorted(names))} (only for {takers})"
                    )
        for values in self.extreme_points():
            _check_combination(self.trial_config(values, seed=0), values)

    def _check_fixed_beside_searched(self) -> None:
        parameters = self.search.parameters
        for field in dataclasses.fields(TrainingConfig):
            if isinstance(parameters.get(field.name), Range | Categorical) and not _is_default(self.training, field):
                value = getattr(self.training, field.name)
                raise UserError(f"training.{field.name} has no effect beside search.space.{field.name}, got {value!r}")


SECTIONS: dict[str, type[Section]] = {
    "search": SearchSpec, "pruner": PrunerSpec, "objective": ObjectiveSpec, "engine": EngineSpec,
    "checkpoints": CheckpointsSpec, "confirm": ConfirmSpec,
}  # fmt: skip
DEFAULT_TRIALS = 20
OBJECTIVE_TRAINING_KEYS = ("epochs", "seed")  # what of [training] a user's own loop is given


MAX_GRID = 10**6


def _num_points(parameter: Parameter) -> int:
    if isinstance(parameter, Conditional):
        return max(map(_num_points, parameter.cases.values()))
    return parameter.num_points if isinstance(parameter, Range) else len(parameter.values)


def _check_combination(config: TrialConfig, values: Mapping[str, Scalar]) -> None:
    """Rules between two settings of [training], for one combination of searched values."""
    training, searched = config.training, f" (with {dict(values)} from search.space)" if values else ""
    if training.lr is None:
        raise UserError(f"training.lr must be set where search.space.lr has no case for it{searched}")
    if training.nesterov and training.momentum == 0 and "nesterov" in OPTIMIZERS[training.optimizer].keys:
        raise UserError(f"training.momentum must be greater than 0 with training.nesterov, got 0{searched}")
    if training.schedule == "multistep" and not training.milestones:
        raise UserError(f"training.milestones must name at least one epoch for schedule 'multistep'{searched}")
    if training.warmup_epochs >= training.epochs:
        raise UserError(
            f"training.warmup_epochs must be less than training.epochs = {training.epochs}, "
            f"got {training.warmup_epochs:g}{searched}"
        )


def _check_searched(key: str, value: Scalar, *, data: DataConfig) -> None:
    """A value that the search may give to a setting must be one that the setting itself could have."""
    section, name = _section_and_name(key)
    if section == "model" and name != "name":
        return  # an option of the network: its own constructor judges it, in the preflight
    config: type[DataConfig] | type[TrainingConfig] | type[ModelConfig]
    config = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}[section]
    hints = get_type_hints(config)
    if name not in hints or name == "options" or f"{section}.{name}" in STUDY_NEUTRAL_KEYS:
        if section == "data" and ":" in data.name:
            return
        raise unknown_name("search.space: each key", key, _searchable_keys())
    try:
        TypeAdapter(hints[name]).validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(f"search.space.{key} is wrong: {error.errors()[0]['msg'].lower()}, got {value!r}") from None
    check_rule(f"{section}.{name}", value, shown_as=f"search.space.{key}")


def _searchable_keys() -> list[str]:
    training = [f.name for f in dataclasses.fields(TrainingConfig) if f"training.{f.name}" not in STUDY_NEUTRAL_KEYS]
    data = [
        f.name for f in dataclasses.fields(DataConfig) if f"data.{f.name}" not in {*STUDY_NEUTRAL_KEYS, "data.options"}
    ]
    return [*training, "model.name", *(f"data.{name}" for name in data)]


def _section_and_name(key: str) -> tuple[str, str]:
    section, dot, name = key.partition(".")
    return (section, name) if dot and section in ("model", "data") else ("training", key)


def _is_default(config: Any, field: dataclasses.Field[Any]) -> bool:
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    value = getattr(config, field.name)
    return (tuple(value) if isinstance(value, list) else value) == default


def _training_field(name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(TrainingConfig) if field.name == name)


def _replaced(config: Config, changes: Mapping[str, Any]) -> Config:
    names = {field.name for field in dataclasses.fields(config)}
    known = {key: value for key, value in changes.items() if key in names}
    options = {key: value for key, value in changes.items() if key not in names}
    if options:
        assert not isinstance(config, TrainingConfig)
        known["options"] = {**config.options, **options}
    return dataclasses.replace(config, **known)
