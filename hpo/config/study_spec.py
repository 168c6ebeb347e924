"""StudySpec: one study, complete, as a frozen model that is built from TOML, dictionaries or Python and checked whole.

The bounds of each setting are beside its field, in `hpo.config.sections`, `hpo.search.config` and `hpo.train.config`;
the rules between settings are in `hpo.config.checks`. What needs the images, the network or the machine to be judged is
checked by `hpo.workers.preflight`, also before anything is created.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from hpo.config import checks, study_file
from hpo.config.constraints import explain
from hpo.config.sections import (
    BUDGET_KEYS,
    OBJECTIVE_TRAINING_KEYS,
    SECTIONS,
    STUDY_NEUTRAL_KEYS,
    CheckpointsSpec,
    ConfirmSpec,
    EngineSpec,
    ObjectiveSpec,
)
from hpo.config.trial_settings import CONFIGS, extreme_points, named_plug_ins, names_of_own, unread_keys, with_values
from hpo.errors import UserError, check_keys
from hpo.search.config import PrunerSpec, SearchSpec, Section
from hpo.search.race import course_of
from hpo.search.space import Scalar
from hpo.system.readable import one_line
from hpo.train.config import (
    DEFAULT_RESIZE,
    IMAGE_FOLDER,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    TrialConfig,
    metric_name,
)
from hpo.train.metrics import METRICS, metric_direction


class StudySpec(Section):
    """One study, complete: what is asked, and everything that its trials' results depend on.

    Attributes:
        name: The study's name in its store; letters, digits, '.', '_' and '-', at most 100.
        search: The sampler, the number of trials and the search space.
        pruner: Which trials are stopped early.
        model: The network.
        data: The images, how they are split and how they are augmented.
        training: How the network is trained.
        objective: A training loop of your own; None trains the network above.
        engine: How a device is shared among trials.
        checkpoints: Where trials in training are saved.
        confirm: How the best learning rates are trained again after the search; None leaves that out.

    Raises:
        UserError: A setting is of the wrong type or breaks a rule.
    """

    # The plain dataclasses check nothing when they are made in Python: they are checked where they are put in here.
    model_config = ConfigDict(revalidate_instances="always")

    name: Annotated[
        str,
        Field(description="Names the study in its store.", json_schema_extra={"pattern": f"^{checks.NAME_PATTERN}$"}),
    ]
    search: SearchSpec
    pruner: PrunerSpec = PrunerSpec()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    objective: ObjectiveSpec | None = None
    engine: EngineSpec = EngineSpec()
    checkpoints: CheckpointsSpec = CheckpointsSpec()
    confirm: ConfirmSpec | None = None

    @classmethod
    def from_toml(cls, path: str | Path, *, overrides: Iterable[str] = ()) -> StudySpec:
        """Read a study file.

        Args:
            path: The study file.
            overrides: Settings in place of the file's: `section.key=value` with the value written as in TOML.

        Returns:
            The study.

        Raises:
            UserError: The file cannot be read, a setting is wrong, or the file holds several studies.
        """
        first, *others = cls.all_from_toml(path, overrides=overrides)
        if others:
            raise UserError(f"{path} holds {1 + len(others)} studies, by its [[compare]]: `hpo run` runs them all")
        return first

    @classmethod
    def all_from_toml(cls, path: str | Path, *, overrides: Iterable[str] = ()) -> list[StudySpec]:
        """Read a study file with its `[[compare]]`.

        Args:
            path: The study file, or the name of one that comes with hpo, such as "quickstart".
            overrides: Settings in place of the file's: `section.key=value` with the value written as in TOML.

        Returns:
            The study of the file and, for each table of its `[[compare]]`, that study with the table's settings.

        Raises:
            UserError: The file cannot be read, or a setting is wrong.
        """
        path = study_file.find_study_file(path)
        settings = study_file.expand_compare(study_file.read(path, overrides=overrides), source=str(path))
        sources = [str(path), *(f"{path}, [[compare]] for {one['name']}" for one in settings[1:])]
        anchored = [study_file.anchor_weights(one, folder=Path(path).parent) for one in settings]
        return [cls.from_dict(one, source=source) for one, source in zip(anchored, sources, strict=True)]

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], *, source: str | None = None) -> StudySpec:
        """Build a spec from nested dictionaries.

        Args:
            settings: The settings as TOML gives them.
            source: Where the settings are from, named in every error.

        Returns:
            The study.

        Raises:
            UserError: A setting is wrong.
        """
        try:
            # JSON mode lets pydantic be strict about numbers and text and still take a list for a sequence.
            return cls.model_validate_json(json.dumps(settings, default=str), strict=True)
        except UserError as error:
            message = one_line(str(error))
        except (ValidationError, RecursionError):  # the settings are not even JSON that pydantic reads
            message = "the settings are nested too deeply"
        except ValueError as error:  # an integer of thousands of digits
            message = f"the settings cannot be read: {error}"
        raise UserError(f"{message} ({source})" if source else message)

    @property
    def num_trials(self) -> int:
        """The number of trials of the search."""
        course = course_of(self)
        return self.search.num_trials if course is None else course.num_starters

    @property
    def metric(self) -> str:
        """The metric that is optimized."""
        return self.objective.metric if self.objective else metric_name(self.training.metric)

    @property
    def direction(self) -> str:
        """Whether to `maximize` or `minimize` the metric."""
        return self.objective.direction if self.objective else metric_direction(self.training)

    @property
    def has_recipe(self) -> bool:
        """Whether trials are trained as [model], [data] and [training] say, be it by hpo or by a user's own loop."""
        return self.objective is None or self.objective.recipe

    @cached_property
    def max_epochs(self) -> int:
        """The most epochs that a trial can have."""
        searched = self.search.parameters.get("epochs")
        return max(int(epochs) for epochs in searched.extreme_values()) if searched else self.training.epochs

    def names_of_code(self) -> dict[str, str]:
        """Return each `package.module:name` of users' own code in the study, with the first setting that has it."""
        loop = list(self.objective.code.items()) if self.objective else []
        return names_of_own(loop + named_plug_ins(self.model, self.data, self.training, self.search.parameters))

    def trial_config(self, values: Mapping[str, Scalar], *, seed: int) -> TrialConfig:
        """Return the configuration of a trial.

        Args:
            values: The trial's values of the search space; keys as in `search.parameters`.
            seed: The trial's seed.

        Returns:
            What an engine needs to train the trial.
        """
        return TrialConfig(
            model=with_values(self.model, values, section="model"),
            data=with_values(self.data, values, section="data"),
            training=with_values(self.training, values, section="training"),
            seed=seed,
        )

    def extreme_points(self, sections: Collection[str] = tuple(CONFIGS)) -> Iterator[dict[str, Scalar]]:
        """Yield the corners of the search space.

        Args:
            sections: Which sections' parameters are combined; by default all of them.

        Yields:
            Combinations of extreme values, at most 4,096.
        """
        return extreme_points(self.search.parameters, sections)

    def frozen(self) -> dict[str, Any]:
        """Return the spec as plain data, complete with defaults: what a store keeps and `from_dict` takes."""
        settings = self.model_dump(mode="json", exclude_none=True)
        for section in ("model", "data"):
            settings[section] |= settings[section].pop("options")
        if self.data.name == IMAGE_FOLDER:
            settings["data"].setdefault("resize", DEFAULT_RESIZE)
        if not self.has_recipe:
            settings = {key: value for key, value in settings.items() if key not in ("model", "data")}
            settings["training"] = {key: settings["training"][key] for key in OBJECTIVE_TRAINING_KEYS}
        elif self.training.metric in METRICS:
            del settings["training"]["metric_direction"]  # its default is none of theirs
        return settings

    def differences(self, other: StudySpec) -> list[str]:
        """Compare this spec, which is in a store, with another one.

        Args:
            other: The spec of whoever wants to join the study.

        Returns:
            A text for each setting that would change a result. A confirmation may be added to a study without one.
        """
        stored, given = dict(study_file.flatten(self.frozen())), dict(study_file.flatten(other.frozen()))
        neutral = STUDY_NEUTRAL_KEYS
        if "grid" not in (self.search.sampler, other.search.sampler):
            neutral |= BUDGET_KEYS
        return [
            f"{key}: {_difference_side(stored, key)} in the study, {_difference_side(given, key)} here"
            for key in sorted(stored.keys() | given.keys())
            if not _are_same(stored.get(key), given.get(key))
            and key not in neutral
            and not (self.confirm is None and key.startswith("confirm."))
        ]

    @model_validator(mode="before")
    @classmethod
    def _fold_options(cls, settings: Any) -> Any:
        """Move the keys of [model] and [data] that are not ours to `options`; refuse unknown keys."""
        if not isinstance(settings, dict):
            return settings
        settings = dict(settings)
        check_keys("", settings, cls.model_fields)
        for section, config in CONFIGS.items():
            given = settings.get(section)
            if not isinstance(given, dict):
                continue
            names = {field.name for field in dataclasses.fields(config)} - {"options"}
            checks.check_no_none(section, given, names)
            extra = {key: value for key, value in given.items() if key not in names}
            if section == "model" or (section == "data" and ":" in str(given.get("name", ""))):
                fields = {key: value for key, value in given.items() if key in names}
                settings[section] = fields | {"options": checks.joined_options(section, extra, names)}
            else:
                check_keys(section, given, names)
        if isinstance(settings.get("training"), dict):
            settings["training"] = checks.settled_training(settings["training"])
        for section, spec in SECTIONS.items():
            if isinstance(settings.get(section), dict):
                check_keys(section, settings[section], spec.model_fields)
                checks.check_no_none(section, settings[section], spec.model_fields.keys())
        return settings

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        checks.check_name(self.name)
        checks.check_search(self.search)
        checks.check_goal(self.search, metric=self.metric)
        checks.check_growth(self.search)
        checks.check_pruner(self.pruner)
        checks.check_race(course_of(self), pruner=self.pruner)
        checks.check_checkpoints(self.checkpoints)
        if self.objective:
            checks.check_objective(self.objective, search=self.search, checkpoints=self.checkpoints, engine=self.engine)
            checks.check_unused_with_objective(self.objective, self.model, self.data, self.training)
        if self.has_recipe:
            checks.check_training(self.search.parameters, data=self.data, training=self.training)
            checks.check_engine(self.engine, self.search.parameters, training=self.training)
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _raise_user_errors(cls, settings: Any, handler: ModelWrapValidatorHandler[StudySpec]) -> StudySpec:
        # Defined last, so that it encloses the other validators.
        try:
            return handler(settings)
        except ValidationError as error:
            raise UserError(explain(error, cls)) from None


def single_trial_spec(
    spec: StudySpec, values: Mapping[str, Scalar], *, name: str, seed: int, stacked: bool
) -> StudySpec:
    """Return the study that trains one trial of a study again, digit for digit on a CPU.

    The trial's values stand in their sections; its learning rate and its seed are a grid of one point. A user's own
    function has no sections, so that all its values are that point.

    Args:
        spec: The study.
        values: The trial's values.
        name: The name of the new study.
        seed: The trial's seed.
        stacked: Whether the trial was trained in lanes, which shows in its last digits; so will the new one.

    Returns:
        The new study.
    """
    config = spec.trial_config(values if spec.has_recipe else {}, seed=seed)
    sections = {"model": config.model, "data": config.data, "training": config.training}
    settings = spec.model_copy(update=sections).frozen() | {"name": name, "pruner": {"name": "none"}}
    points = dict(values)
    if spec.has_recipe:
        for key in unread_keys(config.training):  # searched for other optimizers than the one that won
            settings["training"].pop(key, None)
        points = {"lr": settings["training"].pop("lr")}
        settings["engine"] = {"lanes": 2 if stacked else 1} if spec.objective is None else {}
    settings["training"].pop("seed")
    settings.pop("confirm", None)
    space = {key: [value] for key, value in points.items()} | {"seed": [seed]}
    settings["search"] = {"sampler": "grid", "seed": spec.search.seed, "space": space}
    return StudySpec.from_dict(settings)


def _difference_side(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "not set"


def _are_same(stored: Any, given: Any) -> bool:
    """Return whether two settings are the same; 1, 1.0 and true, which Python takes for equal, are not."""
    first, second = (json.dumps(value, sort_keys=True, default=str) for value in (stored, given))
    return first == second
