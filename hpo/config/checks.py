"""The rules between the settings of a study file: one function a topic, each of the tables that it concerns.

The rules of one setting alone are beside its field. Rules that need the images, the network or the machine are in
`hpo.workers.preflight`. All of them raise `UserError` and return nothing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from hpo.config.constraints import check_value
from hpo.config.sections import (
    DIRECTIONS,
    OBJECTIVE_TRAINING_KEYS,
    STUDY_NEUTRAL_KEYS,
    TRAINER_KEYS,
    CheckpointsSpec,
    EngineSpec,
    ObjectiveSpec,
)
from hpo.config.trial_settings import (
    CONFIGS,
    PLUG_INS,
    UNSEARCHED,
    extreme_points,
    group_and_factor,
    is_default,
    keys_of,
    known_keys,
    searchable_keys,
    section_and_name,
    with_values,
)
from hpo.errors import OWN_CODE, UserError, did_you_mean, unknown_name
from hpo.objective import RESERVED_METRICS
from hpo.search.config import PrunerSpec, SearchSpec
from hpo.search.pruners import PRUNERS
from hpo.search.race import MIN_STARTERS, Course
from hpo.search.samplers import SAMPLERS
from hpo.search.space import Categorical, Conditional, Parameter, Range, Scalar, is_auto
from hpo.train.config import IMAGE_FOLDER, TIMM, DataConfig, EpochResult, ModelConfig, TrainingConfig, metric_name
from hpo.train.data.augment import AUGMENTATIONS, named
from hpo.train.imports import is_import_path
from hpo.train.metrics import METRICS, is_percent
from hpo.train.optim import OPTIMIZERS, REFUSED_OPTIMIZERS, check_optimizer_options, optimizer_keys

ENGINE_METRICS = frozenset(field.name for field in dataclasses.fields(EpochResult))  # of an epoch, by name
# Keys of [training] that a loop of a user's own decides, though it trains what the others say.
UNREAD_BY_RECIPE = ("mixup", "cutmix", "gradient_accumulation", "checkpoint_epochs", "report_test_accuracy")
MULTIPLIERS = ("lr", "weight_decay")  # of training.groups
MAX_GRID = 10**6
MAX_LISTED = 10**6  # values of a range, in a sampler's memory
MAX_POINTS_BEHIND = 100  # percentage points; more decades than that has no range either
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
OPTION = "optimizer_options."  # begins a key of the space that is an argument of the optimizer's
REFERENCE_PATTERN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def check_name(name: str) -> None:
    """Refuse a study's name that is no name of a folder."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"name must be letters, digits, '.', '_' and '-', at most 100; got {name!r}")


def check_no_none(section: str, given: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse the text "None" as the value of one of a section's own keys: TOML has no such value."""
    for key in sorted(set(names) & given.keys()):
        if given[key] in ("None", "null"):
            raise UserError(f"{section}.{key} must be left out to set nothing, got the text {given[key]!r}")


def settled_training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of [training] without a direction that goes without saying; refuse one that contradicts."""
    settled, metric = dict(settings), settings.get("metric", TrainingConfig().metric)
    if isinstance(metric, str) and metric in METRICS and "metric_direction" in settled:
        given, direction = settled.pop("metric_direction"), METRICS[metric].direction
        if given != direction:
            raise UserError(
                f"training.metric_direction must be left out, or {direction!r}, for metric {metric!r}; got {given!r}"
            )
    return settled


def joined_options(section: str, extra: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the options of [model] or [data]: the keys that are no fields, and those of the table `options`."""
    options = extra.get("options", {})
    if not isinstance(options, dict):
        raise UserError(f"{section}.options must be a table, got {options!r}")
    for key in options:
        if key in {*names, "options"}:
            raise UserError(f"{section}.options cannot have the key {key!r}, which is one of [{section}]'s own")
    return options | {key: value for key, value in extra.items() if key != "options"}


# --- [search] ---


def check_search(search: SearchSpec) -> None:
    """Refuse a space that its sampler cannot search, and points to try first that are not in it."""
    _check_sampler(search)
    _check_listed_values(search)
    _check_cases(search)
    _check_grid_size(search)
    _check_race_space(search)
    for index in range(len(search.try_first)):
        _check_first_point(search, index)
    if search.sampler == "grid" and search.trials not in (None, len(search.grid)):
        raise UserError(
            f"search.trials must be left out or be the grid's size, {len(search.grid)}; got {search.trials}"
        )
    if search.learn_from:
        _check_learning(search)
    if len(search.try_first) > search.num_trials:
        raise UserError(
            f"search.try_first must hold at most search.trials = {search.num_trials} points, "
            f"got {len(search.try_first)}"
        )


def _check_sampler(search: SearchSpec) -> None:
    name = search.sampler
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


def _check_listed_values(search: SearchSpec) -> None:
    """Refuse ranges of more values than a sampler that lists them all has room for."""
    for key, parameter in search.parameters.items() if SAMPLERS[search.sampler].lists_values else ():
        if isinstance(parameter, Range) and MAX_LISTED < parameter.num_values < math.inf:
            raise UserError(
                f"search.space.{key} must have at most {MAX_LISTED:,} values for sampler {search.sampler!r}, "
                f"got {parameter.num_values:,}"
            )


def _check_cases(search: SearchSpec) -> None:
    """Refuse cases that are no values of the list on which the parameter depends."""
    for key, parameter in search.parameters.items():
        if not isinstance(parameter, Conditional):
            continue
        if not SAMPLERS[search.sampler].takes_cases:
            able = ", ".join(name for name, entry in SAMPLERS.items() if entry.takes_cases)
            raise UserError(f"search.space.{key}.by cannot be used with sampler {search.sampler!r}; use one of {able}")
        condition = search.parameters.get(parameter.by)
        if not isinstance(condition, Categorical):
            raise UserError(f"search.space.{key}.by.{parameter.by} must be a list in search.space too")
        names = [str(value) for value in condition.values]
        if len(set(names)) < len(names):
            raise UserError(
                f"search.space.{parameter.by} must hold no values that are written alike where search.space.{key}.by "
                f"names them; got {list(condition.values)}"
            )
        for case in parameter.cases:
            if case not in names:
                raise unknown_name(f"search.space.{key}.by.{parameter.by}", case, names)


def _check_grid_size(search: SearchSpec) -> None:
    if search.sampler == "grid":
        size = math.prod(_num_grid_values(parameter) for parameter in search.parameters.values())
        if size > MAX_GRID:
            raise UserError(f"search.space must have at most {MAX_GRID:,} grid points, got {size:,}")


def _num_grid_values(parameter: Parameter) -> int:
    if isinstance(parameter, Conditional):
        return max(_num_grid_values(case) for case in parameter.cases.values())
    return parameter.num_points if isinstance(parameter, Range) else len(parameter.values)


def _check_first_point(search: SearchSpec, index: int) -> None:
    setting, point = f"search.try_first[{index}]", search.try_first[index]
    if not point or point in search.try_first[:index]:
        raise UserError(f"{setting} must name values that are not tried already, got {point}")
    check_point(search, point, setting=setting)


def check_point(search: SearchSpec, point: Mapping[str, Any], *, setting: str) -> None:
    """Refuse values that are not in the space; `setting` names the point. Of a grid they may be some of a point's."""
    for key, value in point.items():
        if key not in search.parameters:
            raise unknown_name(f"{setting}: each key", key, search.parameters)
        parameter = search.parameters[key]
        if isinstance(parameter, Conditional):
            case = parameter.cases.get(str(point.get(parameter.by)))
            if case is None:
                raise UserError(f"{setting}.{key} needs {parameter.by} alongside it, with a case of search.space.{key}")
            parameter = case
        if not parameter.contains(value):
            raise UserError(f"{setting}.{key} must be {parameter}, got {value!r}")
    if search.sampler == "grid" and not any(point.items() <= other.items() for other in search.grid):
        raise UserError(f"{setting} must be a point of the grid, got {point}")


def check_goal(search: SearchSpec, *, metric: str) -> None:
    """Refuse a goal that says nothing of this search: one that is reached at once, or never."""
    goal = search.goal
    if goal is None:
        return
    if "lr" not in search.parameters:
        raise UserError(f"search.until needs a learning rate to determine, search.space.lr; got {search.until!r}")
    if not 0 < goal.amount < MAX_POINTS_BEHIND:
        raise UserError(f"search.until must be greater than 0 and less than {MAX_POINTS_BEHIND}, got {search.until!r}")
    if goal.unit == "point" and not is_percent(metric):
        raise UserError(
            f"search.until must be in decades, as the metric is not an accuracy but {metric!r}, got {search.until!r}"
        )
    lr = search.parameters["lr"]
    ends = [] if is_auto(lr) else [end for end in lr.extreme_values() if isinstance(end, int | float) and end > 0]
    if goal.unit == "decade" and ends and goal.amount >= (width := math.log10(max(ends) / min(ends))):
        raise UserError(
            f"search.until must be less than the {width:.2g} decades that search.space.lr has, got {search.until!r}"
        )


def _check_learning(search: SearchSpec) -> None:
    """Refuse to learn learning rates for a search that has none of its own to choose."""
    if search.sampler == "grid" or not isinstance(search.parameters.get("lr"), Range | Conditional):
        raise UserError(
            "search.learn_from needs a range of learning rates, search.space.lr, and a sampler other than 'grid'; "
            f"got {search.learn_from}"
        )
    if len(set(search.learn_from)) < len(search.learn_from):
        raise UserError(f"search.learn_from must name each study once, got {search.learn_from}")


def _check_race_space(search: SearchSpec) -> None:
    """Refuse a space that a race cannot search, and settings of [search] that it has no use for."""
    if search.sampler != "race":
        if search.trainings is not None:
            raise UserError(f"search.trainings applies only to sampler 'race', got sampler {search.sampler!r}")
        return
    lr = search.parameters.get("lr")
    if len(search.parameters) > 1 or not isinstance(lr, Range) or lr.step is not None or lr.is_integer:
        raise UserError(
            "search.space must be one range of learning rates for sampler 'race', such as "
            f"lr = {{ low = 1e-5, high = 1e-1, log = true }}; got {search.space}"
        )
    if search.trials is not None:
        raise UserError(
            f"search.trials does not apply to sampler 'race', which takes search.trainings; got {search.trials}"
        )
    for key in ("try_first", "until", "hours", "grow", "learn_from"):
        if value := getattr(search, key):
            raise UserError(f"search.{key} does not apply to sampler 'race', got {value!r}")


def check_race(course: Course | None, *, pruner: PrunerSpec) -> None:
    """Refuse a pruner for a race, which drops trials itself, and a budget for too few learning rates."""
    if course is None:
        return
    if pruner.name != "none":
        raise UserError(
            f"pruner.name must be 'none' for sampler 'race', which drops trials itself; got {pruner.name!r}"
        )
    if course.num_starters < MIN_STARTERS:
        raise UserError(
            f"search.trainings must be at least {course.least_trainings:g} for {MIN_STARTERS} learning rates and "
            f"training.epochs = {course.num_epochs}, got {course.budget / course.num_epochs:g}"
        )


def check_growth(search: SearchSpec) -> None:
    """Refuse to grow anything but one range of learning rates."""
    lr = search.parameters.get("lr")
    is_range = isinstance(lr, Range) and lr.log and lr.step is None and not lr.is_integer
    if search.grow and (search.sampler == "grid" or not is_range):
        raise UserError(
            "search.grow needs one range of learning rates and a sampler other than 'grid', such as "
            f"lr = {{ low = 1e-5, high = 1e-1, log = true }}; got {search.space.get('lr')} and {search.sampler!r}"
        )


# --- [pruner] ---


def check_pruner(pruner: PrunerSpec) -> None:
    """Refuse an unknown pruner and options that are not this pruner's."""
    if pruner.name not in PRUNERS:
        raise unknown_name("pruner.name", pruner.name, PRUNERS)
    options = PRUNERS[pruner.name].defaults
    takes = f"it takes {', '.join(options)}" if options else "it takes no options"
    for key, value in pruner.model_dump(exclude={"name"}, exclude_none=True).items():
        if key not in options:
            raise UserError(f"pruner.{key} does not apply to pruner {pruner.name!r} ({takes}), got {value!r}")
    if pruner.name == "threshold" and pruner.lower is None and pruner.upper is None:
        raise UserError("pruner.lower or pruner.upper must be set for pruner 'threshold'")
    if pruner.lower is not None and pruner.upper is not None and pruner.lower >= pruner.upper:
        raise UserError(f"pruner.lower must be less than pruner.upper, got {pruner.lower} and {pruner.upper}")


# --- [checkpoints] ---


def check_checkpoints(checkpoints: CheckpointsSpec) -> None:
    """Refuse a URL with a secret in it, and a chain of URLs, by which a store could have workers read any file system.

    No part of such a URL is shown.
    """
    protocol, _, rest = (checkpoints.url or "").rpartition("://")
    if "::" in protocol + rest:
        raise UserError("checkpoints.url must be one folder or URL, not a chain of several with '::'")
    if protocol and re.search(r":.*@|\?", rest):
        raise UserError(
            "checkpoints.url must hold no password, key or query: they belong into the environment; got '***'"
        )


# --- [engine] ---


def check_engine(engine: EngineSpec, parameters: Mapping[str, Parameter], *, training: TrainingConfig) -> None:
    """Refuse lanes for trials that take several devices each, and batches that cannot be divided among these."""
    num_devices = engine.devices_per_trial
    if num_devices == 1:
        return
    if engine.lanes not in ("auto", 1):
        raise UserError(f"engine.lanes must be left out with engine.devices_per_trial, got {engine.lanes}")
    searched = parameters.get("batch_size")
    sizes = [training.batch_size] if searched is None else [int(size) for size in searched.extreme_values()]
    if min(sizes) < 2 * num_devices:
        raise UserError(
            f"training.batch_size must be at least 2 for each of the {num_devices} devices of a trial "
            f"(engine.devices_per_trial), got {min(sizes)}"
        )


# --- [objective] ---


def check_objective(
    objective: ObjectiveSpec, *, search: SearchSpec, checkpoints: CheckpointsSpec, engine: EngineSpec
) -> None:
    """Refuse what a loop of a user's own cannot be: unnamed, measured by nothing, trained in lanes, saved by us."""
    _check_loop(objective)
    loop = objective.setting
    if objective.direction not in DIRECTIONS:
        raise UserError(f"objective.direction must be maximize or minimize, got {objective.direction!r}")
    if objective.metric in RESERVED_METRICS:
        reserved = ", ".join(sorted(RESERVED_METRICS))
        raise UserError(f"objective.metric cannot be one of {reserved}; got {objective.metric!r}")
    if is_auto(search.parameters.get("lr")) and not objective.recipe:
        raise UserError(
            f"search.space.lr must be a range or a list with {loop}, whose loop is not ours to test; got 'auto'"
        )
    for key in OBJECTIVE_TRAINING_KEYS:
        for value in search.parameters[key].extreme_values() if key in search.parameters else ():
            if isinstance(value, str):
                raise UserError(f"search.space.{key} must hold integers, got {value!r}")
    if checkpoints.url is not None and "://" in checkpoints.url:
        raise UserError(
            f"checkpoints.url must be a folder with {loop}, whose own code writes into it; got {checkpoints.url!r}"
        )
    if checkpoints.keep_best != CheckpointsSpec().keep_best:
        raise UserError(
            f"checkpoints.keep_best has no effect with {loop}, whose folders are all kept; got {checkpoints.keep_best}"
        )
    for key, default in EngineSpec().model_dump().items():
        if (value := getattr(engine, key)) != default:
            raise UserError(
                f"engine.{key} has no effect with {loop}, which is called for one trial at a time; got {value!r}"
            )


def _check_loop(objective: ObjectiveSpec) -> None:
    """Refuse no loop, two of them, names that are none, and settings of Lightning for a function."""
    if (objective.function is None) == (objective.lightning is None):
        raise UserError("objective must have either function, your training loop, or lightning, your LightningModule")
    for setting, path in objective.code.items():
        if not re.fullmatch(REFERENCE_PATTERN, path):
            raise UserError(
                f"{setting} must be written package.module:name, got {path!r}{did_you_mean(path, [OWN_CODE])}"
            )
    for key in ("datamodule", "trainer"):
        if objective.function is not None and getattr(objective, key):
            raise UserError(f"objective.{key} cannot be used with objective.function, got {getattr(objective, key)!r}")
    if objective.recipe and objective.function is None:
        raise UserError("objective.recipe cannot be used with objective.lightning, whose module has its own recipe")
    for key in objective.trainer:
        if key not in TRAINER_KEYS:
            raise unknown_name("objective.trainer: each key", key, TRAINER_KEYS)


def check_unused_with_objective(
    objective: ObjectiveSpec, model: ModelConfig, data: DataConfig, training: TrainingConfig
) -> None:
    """Refuse settings that a loop of a user's own does not read."""
    for section, config in (("model", model), ("data", data), ("training", training)):
        for field in dataclasses.fields(config):
            is_read = section == "training" and field.name in OBJECTIVE_TRAINING_KEYS
            if objective.recipe:
                is_read = section != "training" or field.name not in UNREAD_BY_RECIPE
            if not is_read and not is_default(config, field.name):
                key, value = field.name, getattr(config, field.name)
                if key == "options":  # whose keys are the section's in a study file
                    key, value = next(iter(value.items()))
                raise UserError(
                    f"{section}.{key} has no effect with {objective.setting}, whose own code decides it; got {value!r}"
                )


# --- [model], [data], [training], and what the space has of them ---


def check_training(parameters: Mapping[str, Parameter], *, data: DataConfig, training: TrainingConfig) -> None:
    """Refuse settings, fixed or searched, with which a trial could not be trained as its user means it."""
    for key, parameter in parameters.items():
        for value in parameter.extreme_values():
            _check_searched_value(key, value, data=data)
    _check_images(data)
    _check_fixed_beside_searched(parameters, training)
    _check_groups(training)
    if training.lr is None and "lr" not in parameters:
        raise UserError("training.lr must be set, or searched as search.space.lr")
    if data.train_samples is not None and data.train_fraction is not None:
        raise UserError("data.train_samples and data.train_fraction cannot both be set")
    names = {kind: _check_names(kind, parameters, training) for kind in PLUG_INS}
    for kind in PLUG_INS:
        _check_keys_of(kind, names[kind], parameters, training)
    _check_optimizer_options(names["optimizer"], parameters, training)
    _check_rprop_rates(names["optimizer"], parameters)
    if training.metric not in METRICS and metric_name(training.metric) in RESERVED_METRICS | ENGINE_METRICS:
        raise UserError(
            f"training.metric = {training.metric!r} must have another name: {metric_name(training.metric)} is "
            "already reported for every epoch"
        )
    for values in extreme_points(parameters, CONFIGS):
        _check_combination(with_values(training, values, section="training"), values)


def _check_images(data: DataConfig) -> None:
    """Refuse settings of image files for other data, and groups that are no pattern."""
    for key in ("image_size", "resize", "bits"):
        if not is_default(data, key) and data.name != IMAGE_FOLDER:
            raise UserError(f"data.{key} applies only to image_folder, got {getattr(data, key)!r}")
    for entry in data.augment:
        _check_augmentation(entry)
    if data.groups is not None and not is_import_path(data.groups) and not data.groups.endswith(".csv"):
        try:
            re.compile(data.groups)
        except re.error as error:
            raise UserError(
                f"data.groups must be a regular expression or package.module:function ({error}), got {data.groups!r}"
            ) from None


def _check_augmentation(entry: Any) -> None:
    """Refuse an entry of data.augment that is no name, or names what no transform is."""
    if not isinstance(entry, str) and not (isinstance(entry, dict) and isinstance(entry.get("name"), str)):
        raise UserError(
            f"data.augment must be a list of names and of tables with a name, such as {{ name = 'RandAugment', "
            f"magnitude = 9 }}; got {entry!r}"
        )
    name, _ = named(entry)
    if (key := name.lower()) in ("mixup", "cutmix"):
        raise UserError(f"data.augment: {name} mixes the images of a batch; set training.{key} = 0.2, for instance")
    if name not in AUGMENTATIONS and not is_import_path(name):
        raise unknown_name("data.augment: each name", name, [*AUGMENTATIONS, "package.module:function"])


def _check_searched_value(key: str, value: Scalar, *, data: DataConfig) -> None:
    """Refuse a value of the space that the setting itself could not have."""
    section, name = section_and_name(key)
    if (group := group_and_factor(name)) is not None:
        _check_multiplier(f"search.space.{key}", group[1], value)
        return
    if section == "model" and name not in ("name", "weights"):
        return  # an option of the network: its own constructor judges it, in the preflight
    if key.startswith(OPTION):
        return  # `_check_optimizer_options` judges it
    names = {field.name for field in dataclasses.fields(CONFIGS[section])} - {"options", *UNSEARCHED}
    if name not in names or f"{section}.{name}" in STUDY_NEUTRAL_KEYS:
        if section == "data" and ":" in data.name:
            return
        raise unknown_name("search.space: each key", key, searchable_keys())
    check_value(f"search.space.{key}", value, CONFIGS[section], name)


def _check_groups(training: TrainingConfig) -> None:
    """Refuse multipliers that are none, and settings of what is frozen where nothing is."""
    for setting, patterns in (("freeze", training.freeze), ("groups", training.groups)):
        if "" in patterns:
            raise UserError(f"training.{setting} must name modules, parameters or patterns of them, got ''")
    for pattern, group in training.groups.items():
        if not group:
            raise UserError(f"training.groups.{pattern} must have a multiplier, such as lr = 10.0")
        for name, value in group.items():
            _check_multiplier(f"training.groups.{pattern}.{name}", name, value)
    if training.freeze_epochs is not None and not training.freeze:
        raise UserError(f"training.freeze_epochs has no effect without training.freeze, got {training.freeze_epochs}")


def _check_multiplier(setting: str, name: str, value: Scalar) -> None:
    if name not in MULTIPLIERS:
        raise unknown_name(f"the last part of {setting}", name, MULTIPLIERS)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and name == "lr"):  # type: ignore[operator]
        rule = "a number greater than 0" if name == "lr" else "a number of at least 0"
        raise UserError(f"{setting} must be {rule}, got {value!r}")


def _check_fixed_beside_searched(parameters: Mapping[str, Parameter], training: TrainingConfig) -> None:
    for key in parameters:
        group = group_and_factor(key)
        if group is not None and group[1] in training.groups.get(group[0], {}):
            raise UserError(f"training.{key} has no effect together with search.space.{key}")
    for field in dataclasses.fields(TrainingConfig):
        name = field.name
        if isinstance(parameters.get(name), Range | Categorical) and not is_default(training, name):
            value = getattr(training, name)
            raise UserError(f"training.{name} has no effect together with search.space.{name}, got {value!r}")


def _check_names(kind: str, parameters: Mapping[str, Parameter], training: TrainingConfig) -> set[str]:
    """Return the names of the optimizers or schedules that trials can have; refuse one that is no name of any."""
    searched = parameters.get(kind)
    setting, names = f"training.{kind}", {str(getattr(training, kind))}
    if searched is not None:
        setting, names = f"search.space.{kind}", {str(value) for value in searched.extreme_values()}
    for name in names:
        if kind == "optimizer" and name in REFUSED_OPTIMIZERS:
            raise UserError(f"{setting} cannot be {name!r}: {REFUSED_OPTIMIZERS[name]}")
        if name not in PLUG_INS[kind] and not re.fullmatch(REFERENCE_PATTERN, name):
            of_others = [f"{OWN_CODE}name", f"{TIMM}NAME"] if kind == "optimizer" else [f"{OWN_CODE}name"]
            raise unknown_name(setting, name, [*PLUG_INS[kind], *of_others])
    return names


def _check_optimizer_options(
    names: Collection[str], parameters: Mapping[str, Parameter], training: TrainingConfig
) -> None:
    """Refuse options that none of these optimizers takes; those of a user's own are known when it is imported."""
    searched = {key.removeprefix(OPTION): one for key, one in parameters.items() if key.startswith(OPTION)}
    for key in searched.keys() & training.optimizer_options.keys():
        raise UserError(f"training.{OPTION}{key} has no effect together with search.space.{OPTION}{key}")
    if not set(names) <= OPTIMIZERS.keys():
        return
    check_optimizer_options(training.optimizer_options, names, setting=f"training.{OPTION[:-1]}")
    for key, parameter in searched.items():
        for value in parameter.extreme_values():
            check_optimizer_options({key: value}, names, setting=f"search.space.{OPTION[:-1]}")


def _check_rprop_rates(names: Collection[str], parameters: Mapping[str, Parameter]) -> None:
    lr = parameters.get("lr")
    of_rprop = lr.cases.get("rprop") if isinstance(lr, Conditional) and lr.by == "optimizer" else lr
    if "rprop" in names and is_auto(of_rprop):
        raise UserError(
            "search.space.lr must be a range or a list for optimizer 'rprop', which reads lr at its first step alone; "
            "got 'auto'"
        )


def _check_keys_of(
    kind: str, names: Collection[str], parameters: Mapping[str, Parameter], training: TrainingConfig
) -> None:
    """Refuse a key of [training] that none of these optimizers or schedules reads."""
    table = PLUG_INS[kind]
    known = known_keys(kind)
    used = {key for name in names for key in keys_of(kind, name)}
    for key in sorted(known - used):
        if key in parameters or not is_default(training, key):
            setting = f"search.space.{key}" if key in parameters else f"training.{key}"
            takers = ", ".join(name for name, entry in table.items() if key in entry.keys) or "package.module:name"
            subject = f"{kind} {', '.join(sorted(names))}"
            raise UserError(f"{setting} does not apply to {subject} (only for {takers}){_as_option(key, names)}")


def _as_option(key: str, names: Collection[str]) -> str:
    """Return which of these optimizers may take a key of [training] as an option of its own; else the empty text."""
    option = "betas" if key in ("beta1", "beta2") else key
    takers = [name for name in names if name in OPTIMIZERS and option in OPTIMIZERS[name].options]
    takers += [name for name in names if re.fullmatch(REFERENCE_PATTERN, name) and key in known_keys("optimizer")]
    return f"; {takers[0]} may take {option} in training.optimizer_options" if takers else ""


def _check_combination(training: TrainingConfig, values: Mapping[str, Scalar]) -> None:
    """Check the rules between two settings of [training], for one combination of searched values."""
    searched = f" (with {dict(values)} from search.space)" if values else ""
    if training.lr is None:
        raise UserError(f"training.lr must be set where search.space.lr has no case for it{searched}")
    if training.nesterov and training.momentum == 0 and "nesterov" in optimizer_keys(training.optimizer):
        raise UserError(f"training.momentum must be greater than 0 with training.nesterov, got 0{searched}")
    if training.tf32 and training.precision != "fp32":
        raise UserError(f"training.precision must be 'fp32' with training.tf32, got {training.precision!r}{searched}")
    if training.optimizer == "rprop" and (training.schedule != "constant" or training.warmup_epochs > 0):
        raise UserError(
            "training.schedule must be 'constant', without warm-up, for optimizer 'rprop', which reads lr at its first "
            f"step alone; got {training.schedule!r}{searched}"
        )
    if training.schedule == "multistep" and not training.milestones:
        raise UserError(f"training.milestones must name at least one epoch for schedule 'multistep'{searched}")
    if training.warmup_epochs >= training.epochs:
        raise UserError(
            f"training.warmup_epochs must be less than training.epochs = {training.epochs}, "
            f"got {training.warmup_epochs:g}{searched}"
        )
    if training.freeze_epochs is not None and training.freeze_epochs >= training.epochs:
        raise UserError(
            f"training.freeze_epochs must be less than training.epochs = {training.epochs}, or left out to freeze to "
            f"the end; got {training.freeze_epochs}{searched}"
        )
