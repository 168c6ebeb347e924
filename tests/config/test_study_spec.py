"""A study file is read into a frozen spec, and every mistake in it is one sentence with the setting, rule and value."""

from __future__ import annotations

import itertools
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hpo.config.earlier_studies import adopt_stored_data, stored_spec
from hpo.config.study_file import apply_override
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.search.proposals import fixed_values
from hpo.train.config import TrainingConfig

MINIMAL = """
name = "lr"
[search.space]
lr = { low = 1e-5, high = 1e-1, log = true }
"""


def read(text: str, *overrides: str) -> StudySpec:
    settings = tomllib.loads(text)
    return StudySpec.from_dict(settings) if not overrides else StudySpec.from_dict(_overridden(settings, overrides))


def _overridden(settings: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    for override in overrides:
        apply_override(settings, override)
    return settings


MISTAKES = {
    # what is added to, or set in, the minimal file: what the message must say
    "[model]\noptions = 3": ["model.options must be a table, got 3"],
    "[model]\noptions.name = 'x'": ["model.options cannot have the key 'name', which is one of [model]'s own"],
    '[training]\n"ep\\noch" = 3': ["unknown key training.ep\\noch", "did you mean 'epochs'"],
    "[engine]\ndevices_per_trial = 0": ["engine.devices_per_trial must be between 1 and 64, got 0"],
    "[engine]\ndevices_per_trial = 2\nlanes = 4": [
        "engine.lanes must be left out with engine.devices_per_trial, got 4"
    ],
    "[engine]\ndevices_per_trial = 2\n[training]\nbatch_size = 3": [
        "training.batch_size must be at least 2 for each of the 2 devices of a trial",
        "got 3",
    ],
    "[engine]\nlanes = 'all'": ["engine.lanes must be 'auto' or an integer between 1 and 1024, got 'all'"],
    "[checkpoints]\nurl = 'x'": ["checkpoints.url must be an absolute folder or a URL such as", "got 'x'"],
    "[checkpoints]\nurl = 'reference::file:///x.json'": ["checkpoints.url must be one folder or URL, not a chain"],
    "[checkpoints]\nurl = '/x::y'": ["checkpoints.url must be one folder or URL, not a chain"],
    "[checkpoints]\nurl = 's3://key:hunter2@bucket'": ["checkpoints.url must hold no password", "got '***'"],
    "[checkpoints]\nurl = 'https://host/?token=hunter2'": ["checkpoints.url must hold no password", "got '***'"],
    "[data]\ncrop = 65": ["data.crop must be between 0 and 64, got 65"],
    "[data]\nbits = 8": ["data.bits must be between 9 and 16, got 8"],
    "[data]\nresize = 'crop'": ["data.resize applies only to image_folder, got 'crop'"],
    "[data]\nbits = 12": ["data.bits applies only to image_folder, got 12"],
    "[data]\nresize = 'stretch'": ["data.resize must be 'crop' or 'squash', got 'stretch'"],
    "[data]\ngroups = '('": ["data.groups must be a regular expression or package.module:function (missing )"],
    "[data]\nimage_size = 4097": ["data.image_size must be between 8 and 4096, got 4097"],
    "[confirm]\nseeds = 1": ["confirm.seeds must be between 2 and 1,000, got 1"],
    "[pruner]\nname = 'threshold'\nlower = inf": ["pruner.lower must be a finite number, got inf"],
    "[training]\nlearning_rate = 0.1": ["unknown key training.learning_rate", "did you mean 'lr'"],
    "[model]\nweights = 'None'": ["model.weights must be left out to set nothing, got the text 'None'"],
    "[search]\nuntil = 'None'": ["search.until must be left out to set nothing"],
    "[training]\nschedule = 'rates.down'": ["training.schedule must be one of", "did you mean 'rates:down'"],
    "[search]\nsmapler = 'tpe'": ["unknown key search.smapler", "did you mean 'sampler'"],
    "[training]\nepoch = 3": ["unknown key training.epoch", "epochs"],
    "[data]\nroots = 'x'": ["unknown key data.roots", "root"],
    "[pruner]\nname = 'median'\nwarmup = 1": ["unknown key pruner.warmup", "warmup_epochs"],
    "[trainings]\nlr = 1": ["unknown key trainings", "training"],
    "[confirmation]\ntop = 3": ["unknown key confirmation", "confirm"],
    "[search]\ntrainings = 3.0": ["search.trainings applies only to sampler 'race', got sampler 'tpe'"],
    "[search]\nsampler = 'race'\ntrials = 9": [
        "search.trials does not apply to sampler 'race', which takes search.trainings; got 9"
    ],
    "[search]\nsampler = 'race'\ntry_first = [{ lr = 0.001 }]": ["search.try_first does not apply to sampler 'race'"],
    "[search]\nsampler = 'race'\nhours = 2.0": ["search.hours does not apply to sampler 'race', got 2.0"],
    "[search]\nsampler = 'race'\ntrainings = 1.0": [
        "search.trainings must be at least 1.9 for 5 learning rates and training.epochs = 10, got 1"
    ],
    "[search]\nsampler = 'race'\n[pruner]\nname = 'asha'": [
        "pruner.name must be 'none' for sampler 'race', which drops trials itself; got 'asha'"
    ],
    "[search]\nsampler = 'bayes'": ["search.sampler must be one of", "tpe", "'bayes'"],
    "[pruner]\nname = 'hyperbrand'": ["pruner.name must be one of", "did you mean 'hyperband'"],
    "[training]\noptimizer = 'adm'": ["training.optimizer must be one of", "adadelta", "did you mean"],
    "[training]\nloss = 'crossentropy'": ["training.loss must be one of", "did you mean 'cross_entropy'"],
    "[training]\nloss = 'focal'\nlabel_smoothing = 0.1": ["training.label_smoothing does not apply to loss focal"],
    "[training]\nloss = 'm:f'\nclass_weights = 'balanced'": ["training.class_weights does not apply to loss m:f"],
    "[training]\nfocal_gamma = 1": ["training.focal_gamma does not apply to loss cross_entropy (only for focal)"],
    "[training]\nclass_weights = 'balancd'": ["training.class_weights must be 'balanced' or a list of numbers"],
    "[training]\nclass_weights = []": ["training.class_weights must be 'balanced' or a list of numbers", "got []"],
    "[training]\nclass_weights = [1, -1]": ["training.class_weights must be 'balanced' or a list of numbers"],
    "[training]\nmetric = 'accuracy'": ["training.metric must be one of", "did you mean 'val_accuracy'"],
    "[training]\nmetric_direction = 'minimize'": ["metric_direction must be left out, or 'maximize'", "'val_accuracy'"],
    "[training]\nmetric = 'm:val_loss'": ["training.metric = 'm:val_loss' must have another name"],
    "[training]\nmetric = 'm:state'": ["training.metric = 'm:state' must have another name"],
    "[training]\noptimizer = 'adamxa'": ["training.optimizer must be one of", "did you mean 'adamax'"],
    "[training]\noptimizer = 'lbfgs'": ["training.optimizer cannot be 'lbfgs': it calls the network several times"],
    "[training]\noptimizer = 'my.module:'": ["training.optimizer must be one of", "got 'my.module:'"],
    "[training]\noptimizer = 'm:C'\nmomentum = 0.9": [
        "training.momentum does not apply to optimizer m:C",
        "; m:C may take momentum in training.optimizer_options",
    ],
    "[training]\noptimizer = 'muon'\nnesterov = true": ["; muon may take nesterov in training.optimizer_options"],
    "[training]\noptimizer = 'timm:'": ["training.optimizer must be one of", "timm:NAME"],
    "[training.optimizer_options]\namsgradd = true": [
        "training.optimizer_options.amsgradd is not an option of optimizer adam (did you mean 'amsgrad'?), "
        "which takes amsgrad, decoupled_weight_decay"
    ],
    "[training.optimizer_options]\nbetas = [0.9, 0.99]": [
        "training.optimizer_options.betas has a place of its own: training.beta1 and training.beta2"
    ],
    "[training.optimizer_options]\nlr = 0.1": ["optimizer_options.lr has a place of its own: training.lr or search"],
    "[training.optimizer_options]\nfused = true": ["training.optimizer_options.fused cannot be set"],
    "[training.optimizer_options]\namsgrad = 1": ["training.optimizer_options.amsgrad must be true or false, got 1"],
    "[training]\noptimizer = 'rmsprop'\noptimizer_options = { alpha = nan }": ["must be a finite number, got nan"],
    "[training]\noptimizer = 'rprop'\noptimizer_options = { etas = [1] }": ["must be a list of 2 numbers, got [1]"],
    "[training]\noptimizer = 'muon'\noptimizer_options = { ns_steps = 1.5 }": ["ns_steps must be an integer, got 1.5"],
    "[training]\noptimizer = 'muon'\noptimizer_options = { adjust_lr_fn = 3 }": ["adjust_lr_fn must be a text, got 3"],
    "[training]\noptimizer = 'adamax'\noptimizer_options = { amsgrad = true }": ["which takes no options"],
    "[search.space.optimizer_options]\namsgrad = [1, 2]": ["search.space.optimizer_options.amsgrad must be true or"],
    "[search.space.optimizer_options]\namsgrda = [true]": ["search.space.optimizer_options.amsgrda is not an option"],
    "[search.space.optimizer_options]\namsgrad = [true]\n[training.optimizer_options]\namsgrad = true": [
        "training.optimizer_options.amsgrad has no effect together with search.space.optimizer_options.amsgrad"
    ],
    "[training]\noptimizer = 'rprop'\nschedule = 'cosine'": ["training.schedule must be 'constant', without warm-up"],
    "[training]\nschedule = 'cosin'": ["training.schedule must be one of", "'cosin'", "did you mean 'cosine'"],
    "[training]\ncheckpoint_epochs = 0": [
        "training.checkpoint_epochs must be 'auto' or an integer of at least 1, got 0"
    ],
    "[training]\ncheckpoint_epochs = 'often'": ["training.checkpoint_epochs must be 'auto' or an", "got 'often'"],
    "[training]\ncheckpoint_epochs = 1.5": ["training.checkpoint_epochs must be 'auto' or an", "got 1.5"],
    "[training.groups]\nhead = { lr = 0 }": ["training.groups.head.lr must be a number greater than 0, got 0"],
    "[training.groups]\nhead = { weight_decay = -1.0 }": ["training.groups.head.weight_decay must be a number of at"],
    "[training.groups]\nhead = { wd = 1.0 }": ["the last part of training.groups.head.wd must be one of lr"],
    "[training.groups]\nhead = {}": ["training.groups.head must have a multiplier, such as lr = 10.0"],
    "[training.groups]\nhead = { lr = 'x' }": ["training.groups.head.lr must be a number, got 'x'"],
    "[training]\nfreeze = ['']": ["training.freeze must name modules, parameters or patterns of them, got ''"],
    '[training]\ngroups."".lr = 2.0': ["training.groups must name modules, parameters or patterns"],
    "[training]\nfreeze = ['body']\nfreeze_epochs = 10": [
        "training.freeze_epochs must be less than training.epochs = 10, or left out to freeze to the end; got 10"
    ],
    "[training]\nfreeze_epochs = 2": ["training.freeze_epochs has no effect without training.freeze, got 2"],
    "[training]\nlayer_decay = 0.0": ["training.layer_decay must be greater than 0 and at most 1, got 0.0"],
    "groups.head.lr = [0.0]": ["search.space.groups.head.lr must be a number greater than 0, got 0.0"],
    "groups.head.l = [0.0]": ["the last part of search.space.groups.head.l must be one of lr, weight_decay; got 'l'"],
    "groups.lr = [1.0]": ["search.space: each key must be one of", "groups.PATTERN.lr", "got 'groups.lr'"],
    "groups.head.lr = [2.0]\n[training.groups]\nhead = { lr = 3.0 }": [
        "training.groups.head.lr has no effect together with search.space.groups.head.lr"
    ],
    "[training]\nepochs = 0": ["training.epochs must be at least 1, got 0"],
    "[training]\nepochs = 2.5": ["training.epochs must be an integer, got 2.5"],
    "[training]\nepochs = true": ["training.epochs must be", "True"],
    "[training]\nlr = '1e-3'": ["training.lr must be a number, got '1e-3'"],
    "[training]\nlr = 0.0": ["training.lr must be greater than 0, got 0.0"],
    "[training]\nlr = nan": ["training.lr must be greater than 0, got nan"],
    "[training]\nbatch_size = -1": ["training.batch_size must be at least 1, got -1"],
    "[training]\nprecision = 'fp8'": ["training.precision must be 'auto', 'fp32', 'bf16' or 'fp16'", "'fp8'"],
    "[training]\ntf32 = true": ["training.precision must be 'fp32' with training.tf32, got 'auto'"],
    "[training]\nwarmup_epochs = 10": ["training.warmup_epochs must be less than training.epochs = 10, got 10"],
    "[training]\nlabel_smoothing = 1.0": ["training.label_smoothing must be at least 0 and less than 1"],
    "[training]\ngradient_clip = 0.0": ["training.gradient_clip must be greater than 0"],
    "[training]\nmomentum = 0.9": ["training.momentum does not apply to optimizer adam", "sgd"],
    "[training]\noptimizer = 'sgd'\nbeta1 = 0.5": ["training.beta1 does not apply to optimizer sgd"],
    "[training]\noptimizer = 'sgd'\nnesterov = true": ["training.momentum must be greater than 0 with", "nesterov"],
    "[training]\nstep_epochs = 3": ["training.step_epochs does not apply to schedule constant", "step"],
    "[training]\nschedule = 'multistep'\nmilestones = [5, 3]": ["training.milestones must be rising epochs"],
    "[training]\nlr = 0.1": ["training.lr has no effect together with search.space.lr, got 0.1"],
    "[training]\nschedule = 'multistep'": ["training.milestones must name at least one epoch"],
    "[search]\ntry_first = [{ lr = 1e-3 }, { lr = 1e-3 }]": ["search.try_first[1] must name values that are not tried"],
    "[search]\ntry_first = [{}]": ["search.try_first[0] must name values"],
    "[search]\ntrials = 0": ["search.trials must be between 1 and 1,000,000, got 0"],
    "[search]\ntrials = -3": ["search.trials must be between 1 and 1,000,000, got -3"],
    "[search]\nuntil = 0.3": [
        "search.until must be a width of the interval or an expected shortfall, such as",
        "got 0.3",
    ],
    "[search]\nuntil = '0.3 decade s'": ["search.until must be a width", "'0.3 decades' or '0.5 points', got"],
    "[search]\nuntil = '0 points'": ["search.until must be greater than 0 and less than 100, got '0 points'"],
    "[search]\nuntil = '4 decades'": ["search.until must be less than the 4 decades that search.space.lr has"],
    "[search]\nhours = 0": ["search.hours must be greater than 0 and at most 100,000, got 0"],
    "[search]\ngrow = 1": ["search.grow must be true or false, got 1"],
    "[search]\nhours = 'two'": ["search.hours must be a number, got 'two'"],
    "[search]\nsampler = 'grid'": ["search.space.lr.points must be at least 2 for sampler 'grid'"],
    "[search]\nsampler = 'cmaes'": ["'cmaes' needs at least 2 ranges", "got 1 (lr)"],
    "[search]\ntry_first = [{ lr = 1.0 }]": ["search.try_first[0].lr must be a number from 1e-05 to 0.1, got 1.0"],
    "[search]\ntry_first = [{ wd = 1.0 }]": ["search.try_first[0]", "lr", "'wd'"],
    "[search]\ntrials = 1\ntry_first = [{ lr = 1e-3 }, { lr = 1e-4 }]": ["search.try_first must hold at most", "got 2"],
    "[data]\nvalidation_fraction = 0.0": ["data.validation_fraction must be greater than 0 and less than 1, got 0.0"],
    "[data]\nvalidation_fraction = 1.0": ["data.validation_fraction must be greater than 0 and less than 1, got 1.0"],
    "[data]\ntrain_samples = 10\ntrain_fraction = 0.5": ["data.train_samples and data.train_fraction cannot both"],
    "[pruner]\nname = 'asha'\npercentile = 25.0": ["pruner.percentile does not apply to pruner 'asha'", "min_epochs"],
    "[pruner]\nname = 'threshold'": ["pruner.lower or pruner.upper must be set"],
    "[pruner]\nname = 'asha'\nreduction_factor = 1": ["pruner.reduction_factor must be at least 2, got 1"],
    "[objective]\nfunction = 'train'": ["objective.function must be written package.module:name, got 'train'"],
    "[objective]\nfunction = 'm:f'\ndirection = 'up'": ["objective.direction must be maximize or minimize, got 'up'"],
    "[objective]\nfunction = 'm:f'\nguess = nan": ["objective.guess must be a finite number, got nan"],
    "[objective]\nfunction = 'm:f'\n[model]\nname = 'x'": ["model.name has no effect with objective.function"],
    "[objective]\nfunction = 'm:f'\n[model]\nwidth = 0.5": [
        "model.width has no effect with objective.function",
        "got 0.5",
    ],
    "[objective]\nfunction = 'm:f'\n[training]\nbatch_size = 3": ["training.batch_size has no effect", "got 3"],
}


@pytest.mark.parametrize("added", MISTAKES)
def test_a_mistake_is_one_sentence_naming_setting_rule_and_value(added: str, tmp_path: Path) -> None:
    text = MINIMAL
    if added.startswith("[search]\n"):  # the minimal file opens [search.space] itself
        text = MINIMAL.replace("[search.space]", f"{added}\n[search.space]")
    else:
        text += added
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        StudySpec.from_toml(path)
    message = str(caught.value)
    for part in MISTAKES[added]:
        assert part in message
    assert "\n" not in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("lr", "sampler"), [([0.1, 0.2], "tpe"), ({"low": 0.1, "high": 0.2}, "random"), ([0.1, 0.2], "grid")]
)
def test_only_one_range_of_learning_rates_on_a_log_scale_grows(lr: Any, sampler: str) -> None:
    search = {"sampler": sampler, "grow": True, "space": {"lr": lr}}
    with pytest.raises(UserError, match=r"search\.grow needs one range of learning rates .* got .* and"):
        StudySpec.from_dict({"name": "s", "search": search})
    StudySpec.from_dict({"name": "s", "search": {"grow": True, "space": {"lr": "auto"}}})


def test_a_goal_needs_a_learning_rate_and_percentage_points_an_accuracy() -> None:
    search = {"until": "1 point", "space": {"lr": [0.1, 0.2]}}
    loop = {"function": "m:f", "metric": "val_loss", "direction": "minimize"}
    with pytest.raises(
        UserError, match=r"search\.until must be in decades, as the metric is not an accuracy but 'val_loss'"
    ):
        StudySpec.from_dict({"name": "s", "search": search, "objective": loop})
    search = {"until": "1 point", "space": {"batch_size": [32, 64]}}
    with pytest.raises(UserError, match=r"search\.until needs a learning rate to determine, search\.space\.lr"):
        StudySpec.from_dict({"name": "s", "search": search, "training": {"lr": 0.1}})
    for auto in ("0.3 decades", "1 decade", ".5 points"):
        StudySpec.from_dict({"name": "s", "search": {"until": auto, "space": {"lr": "auto"}}})


def test_options_of_an_optimizer_are_settings_and_can_be_searched() -> None:
    text = MINIMAL + "optimizer = ['adam', 'nadam', 'own:Lion']\noptimizer_options.amsgrad = [true, false]\n"
    spec = read(text + "[training.optimizer_options]\nmomentum_decay = 0.1\n[pruner]\nname = 'none'")
    assert StudySpec.from_dict(spec.frozen()).frozen() == spec.frozen()
    assert spec.names_of_code() == {"own:Lion": "search.space.optimizer"}
    training = spec.trial_config({"lr": 0.1, "optimizer": "adam", "optimizer_options.amsgrad": True}, seed=0).training
    assert (training.optimizer, training.optimizer_options) == ("adam", {"momentum_decay": 0.1, "amsgrad": True})


@pytest.mark.parametrize(
    ("training", "metric", "direction"),
    [
        ({}, "val_accuracy", "maximize"),
        ({"metric": "val_loss"}, "val_loss", "minimize"),
        ({"metric": "auroc"}, "auroc", "maximize"),
        ({"metric": "own:mistakes", "metric_direction": "minimize"}, "mistakes", "minimize"),
    ],
)
def test_what_is_optimized_follows_the_metric(training: dict[str, str], metric: str, direction: str) -> None:
    spec = StudySpec.from_dict({"name": "s", "search": {"space": {"lr": [0.1, 0.2]}}, "training": training})
    assert (spec.metric, spec.direction) == (metric, direction)
    with pytest.raises(UserError, match=r"search.space: each key must be one of .*'metric'"):
        StudySpec.from_dict({"name": "s", "search": {"space": {"lr": [0.1], "metric": ["auroc"]}}})


def test_the_direction_of_a_known_metric_goes_without_saying_and_is_not_contradicted() -> None:
    of_loss = MINIMAL + "[training]\nmetric = 'val_loss'\n"
    assert read(of_loss + "metric_direction = 'minimize'").frozen() == read(of_loss).frozen()
    with pytest.raises(UserError, match="must be left out, or 'minimize', for metric 'val_loss'; got 'maximize'"):
        read(of_loss + "metric_direction = 'maximize'")
    stored = read(of_loss).frozen()
    stored["training"]["metric_direction"] = "maximize"  # the default, which earlier versions stored with any metric
    assert not stored_spec(stored).differences(read(of_loss))


@pytest.mark.parametrize("lr", ["lr = 'auto'", "lr.by.optimizer = { adam = [0.1], rprop = 'auto' }"])
def test_a_range_test_is_no_use_to_rprop(lr: str) -> None:
    with pytest.raises(UserError, match=r"search\.space\.lr must be a range or a list for optimizer 'rprop'"):
        read(f"name = 's'\n[search.space]\noptimizer = ['adam', 'rprop']\n{lr}")


SPACES = {
    "lr = 'automatic'": ["search.space.lr must be a list of values or { low", "'automatic'"],
    "lr = [0.1]\nweight_decay = 'auto'": ["search.space.weight_decay must be", "only lr may be 'auto'"],
    "lr = [0.1]\nmodel.lr = 'auto'": ["search.space.model.lr must be", "only lr may be 'auto'"],
    "lr = { low = 0.0, high = 0.1, log = true }": ["search.space.lr.low must be > 0 on a log scale, got 0.0"],
    "lr = { low = -1e-3, high = 0.1, log = true }": ["search.space.lr.low must be > 0 on a log scale, got -0.001"],
    "lr = { low = 0.0, high = 0.1 }": ["search.space.lr must be greater than 0, got 0.0"],
    f"lr = {{ low = 0.1, high = 1{'0' * 400} }}": ["search.space.lr.high must be a finite number, got 1000"],
    "lr = { low = 1e-3, high = 1.0, step = 1e-320 }": ["search.space.lr.step must not be so small", "1e-320"],
    "lr = [0.1]\nx = { low = 0, high = 1, step = 1e-300 }": [
        "search.space.x.step must not be so small",
        "1,000,000,000",
    ],
    "weight_decay = { low = -1e308, high = 1e308 }": ["search.space.weight_decay.high - search.space.weight_decay.low"],
    "lr = [0.1]\n'x[0]' = [1]": ["search.space: each key must be without '[', got 'x[0]'"],
    "optimizer = ['adam']\nlr.by.optimizer = {}": ["search.space.lr.by must name one other parameter and its cases"],
    "lr = { low = 0.1, high = 0.1 }": ["search.space.lr.low must be less than search.space.lr.high", "0.1"],
    "lr = { low = 0.1, high = 1e-3 }": ["search.space.lr.low must be less than search.space.lr.high", "low = 0.1"],
    "lr = { low = 0.1 }": ["search.space.lr must have both low and high"],
    "lr = { low = 1e-3, high = inf }": ["search.space.lr.high must be a finite number, got inf"],
    "lr = { low = 1e-3, hihg = 1.0 }": ["unknown key search.space.lr.hihg", "did you mean 'high'"],
    "lr = { low = 1e-3, high = 1.0, points = 5 }": ["search.space.lr.points applies only to sampler 'grid'"],
    "lr = { low = 1e-3, high = 1.0, log = true, step = 0.1 }": ["search.space.lr.step must be", "log scale"],
    "lr = []": ["search.space.lr must hold at least one value"],
    "lr = [0.1, 0.1]": ["search.space.lr must hold each value once"],
    "lr = [0.1]\nmodel.option = [1, true]": [
        "search.space.model.option must hold no values that are equal",
        "[1, True]",
    ],
    "lr = [0.1]\nmodel.option = [0, 0.0]": ["search.space.model.option must hold no values that are equal", "[0, 0.0]"],
    "model.x = [1, '1']\nlr.by.'model.x'.1 = [0.1]": [
        "search.space.model.x must hold no values that are written alike"
    ],
    "lr = [0.1, nan]": ["search.space.lr must hold finite numbers"],
    "lr = [0.1, -0.1]": ["search.space.lr must be greater than 0, got -0.1"],
    "lr = 0.1": ["search.space.lr must be a list of values or { low"],
    "lr = ['high']": ["search.space.lr is wrong", "number", "'high'"],
    "learning_rate = [0.9]": ["search.space: each key must be one of", "did you mean 'lr'"],
    "momentun = [0.9]": ["search.space: each key must be one of", "did you mean 'momentum'"],
    "'data.flips' = [true]": ["search.space: each key", "data.flip", "did you mean 'data.flip'"],
    "batch_size = { low = 16.5, high = 64 }": ["search.space.batch_size is wrong", "integer", "16.5"],
    "lr = [0.1]\noptimizer = ['adam', 'sdg']": ["search.space.optimizer must be one of", "'sdg'", "did you mean 'sgd'"],
    "momentum = [0.5]\nlr = [0.1]": ["search.space.momentum does not apply to optimizer adam"],
    "lr.by.optimizer.adam = { low = 1e-5, high = 1e-1 }": ["search.space.lr.by.optimizer must be a list"],
    "optimizer = ['adam']\nlr.by.optimizer.sgd = { low = 1e-5, high = 1e-1 }": ["by.optimizer must be one of adam"],
    "optimizer = ['adam', 'sgd']\nlr.by.optimizer.sgd = [0.1]": [
        "training.lr must be set where search.space.lr has no"
    ],
    "lr = [0.1]\ntf32 = [false, true]\nprecision = ['fp32', 'bf16']": [
        "training.precision must be 'fp32' with training.tf32, got 'bf16' (with {",
    ],
    "optimizer = ['adam']\nlr.by = 3": ["search.space.lr.by must name one other parameter"],
    "weight_decay = [0.1]": ["training.lr must be set, or searched as search.space.lr"],
    "epochs = [5, 0]\nlr = [0.1]": ["search.space.epochs must be at least 1, got 0"],
    "": ["search.space must name at least one parameter"],
}


@pytest.mark.parametrize("space", SPACES)
def test_a_mistake_in_the_space_is_one_sentence(space: str) -> None:
    with pytest.raises(UserError) as caught:
        read(f"name = 's'\n[search.space]\n{space}")
    for part in SPACES[space]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "space",
    [
        "lr = [0.1, 0.2]",
        "lr = { low = 0.1, high = 0.9, step = 0.1 }",
        "lr = { low = 1, high = 9 }",
        "momentum = { low = 0.1, high = 0.9 }",
        "lr = { low = 0.1, high = 0.9 }\nmomentum = [0.5, 0.9]",
        "optimizer = ['adam']\nlr.by.optimizer.adam = { low = 1e-5, high = 1e-1 }",
    ],
)
def test_a_race_is_for_one_range_of_learning_rates(space: str) -> None:
    with pytest.raises(UserError, match=r"^search\.space(\.lr\.by)? (must be one range|cannot be used)"):
        read(f"name = 's'\n[search]\nsampler = 'race'\n[search.space]\n{space}")


def test_a_race_spreads_as_many_rates_over_its_range_as_its_budget_allows() -> None:
    few, many = (
        read(MINIMAL, "search.sampler=race", f"search.trainings={trainings}", "training.epochs=50")
        for trainings in (1.8, 9.0)
    )
    assert (few.num_trials, many.num_trials) == (6, 16)
    rates = [float(values["lr"]) for values in fixed_values(many)]
    steps = [math.log10(second / first) for first, second in itertools.pairwise(rates)]
    assert steps == pytest.approx([4 / 16] * 15, abs=1e-4)
    assert math.log10(rates[0] / 1e-5) == pytest.approx(2 / 16, abs=1e-4)
    assert few.differences(many) == ["search.trainings: 1.8 in the study, 9.0 here"]


def test_auto_is_no_grid() -> None:
    with pytest.raises(UserError, match=r"search\.space\.lr must be a list, or low, high and points"):
        read("name = 's'\n[search]\nsampler = 'grid'\n[search.space]\nlr = 'auto'")


def test_auto_is_not_for_a_loop_of_one_s_own() -> None:
    with pytest.raises(UserError, match=r"search\.space\.lr must be a range or a list with .*'auto'"):
        read("name = 's'\n[search.space]\nlr = 'auto'\n[objective]\nfunction = 'loop:train'")


@pytest.mark.parametrize("key", ["epochs", "seed"])
def test_epochs_and_seed_of_a_loop_of_one_s_own_are_no_text(key: str) -> None:
    with pytest.raises(UserError, match=rf"search\.space\.{key} must hold integers, got 'many'"):
        read(f"name = 's'\n[search.space]\n{key} = ['many']\n[objective]\nfunction = 'loop:train'")


@pytest.mark.parametrize("sampler", ["gp", "qmc", "cmaes"])
def test_samplers_that_cannot_search_cases_refuse_them(sampler: str) -> None:
    text = f"""
    name = "s"
    [search]
    sampler = "{sampler}"
    [search.space]
    optimizer = ["adam", "sgd"]
    weight_decay = {{ low = 0.0, high = 0.1 }}
    label_smoothing = {{ low = 0.0, high = 0.1 }}
    lr.by.optimizer = {{ adam = [0.1], sgd = [0.2] }}
    """
    with pytest.raises(UserError, match=r"search\.space\.lr\.by cannot be used with sampler"):
        read(text)


def test_a_file_that_is_absent_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml cannot be read: No such file"):
        StudySpec.from_toml(tmp_path / "nowhere.toml")
    (tmp_path / "torn.toml").write_text("name = ")
    with pytest.raises(UserError, match=r"torn\.toml is not valid TOML"):
        StudySpec.from_toml(tmp_path / "torn.toml")


def test_a_name_is_required_and_fit_for_a_folder() -> None:
    with pytest.raises(UserError, match="name must be set"):
        read(MINIMAL.replace('name = "lr"', ""))
    with pytest.raises(UserError, match=r"name must be letters.*'\.\./x'"):
        read(MINIMAL.replace('"lr"', '"../x"'))


def test_a_spec_is_frozen_and_survives_the_store() -> None:
    spec = read(
        """
        name = "all"
        [search]
        sampler = "tpe"
        trials = 7
        try_first = [{ lr = 1e-3 }]
        [search.space]
        lr = { low = 1e-5, high = 1e-1, log = true }
        model.width = [0.5, 1.0]
        "data.train_samples" = { low = 100, high = 200 }
        [pruner]
        name = "percentile"
        percentile = 30.0
        [model]
        name = "article_cnn"
        width = 0.25
        [data]
        name = "own:data"
        color = "red"
        [training]
        schedule = "multistep"
        milestones = [2, 4]
        """
    )
    again = StudySpec.from_dict(spec.frozen())
    assert again.frozen() == spec.frozen()
    assert again.differences(spec) == []
    assert again.model.options == {"width": 0.25}
    assert again.data.options == {"color": "red"}
    with pytest.raises(Exception, match="frozen"):
        spec.name = "other"


@pytest.mark.parametrize(("stored", "given"), [("true", "1"), ("1", "1.0"), ("0", "-0.0")])
def test_values_that_python_takes_for_equal_are_different_settings(stored: str, given: str) -> None:
    spec, other = (read(MINIMAL, "model.name=own:net", f"model.option={value}") for value in (stored, given))
    assert len(spec.differences(other)) == 1
    assert spec.differences(spec) == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_study_file_from_windows_is_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_bytes(MINIMAL.replace("\n", "\r\n").encode(encoding))
    assert StudySpec.from_toml(path) == read(MINIMAL)


def test_differences_name_what_would_change_a_result_and_nothing_else() -> None:
    spec = read(MINIMAL)
    assert spec.differences(read(MINIMAL, "training.batch_size=64")) == [
        "training.batch_size: 128 in the study, 64 here"
    ]
    assert spec.differences(read(MINIMAL, "data.root=/elsewhere", "data.placement=stream")) == []
    assert spec.differences(read(MINIMAL, "training.checkpoint_epochs=3")) == []


def test_an_older_study_reads_its_images_as_before_and_its_file_may_say_nothing_of_it() -> None:
    file: dict[str, Any] = {"name": "s", "search": {"space": {"lr": [0.1]}}, "data": {"name": "image_folder"}}
    new = StudySpec.from_dict(file)
    assert new.frozen()["data"]["resize"] == "crop"
    assert "validation_fraction" not in new.frozen()["data"]
    assert stored_spec(new.frozen()).data.resize == "crop"
    older_settings = new.frozen()
    older_settings["data"] |= {"validation_fraction": 0.1}  # as all settings were kept
    del older_settings["data"]["resize"]
    older = stored_spec(older_settings)
    assert (older.data.resize, older.data.validation_fraction) == ("squash", 0.1)
    assert older.differences(new) != []
    assert older.differences(adopt_stored_data(new, older)) == []
    named = StudySpec.from_dict({**file, "data": {"name": "image_folder", "resize": "crop"}})
    (difference,) = older.differences(adopt_stored_data(named, older))
    assert difference.startswith("data.resize")
    assert stored_spec({**older_settings, "data": {"name": "cifar10"}}).data.resize is None


def test_how_often_an_older_study_saves_stays_what_it_was() -> None:
    frozen = read(MINIMAL).frozen()
    assert frozen["training"]["checkpoint_epochs"] == "auto"
    older = StudySpec.from_dict({**frozen, "training": {**frozen["training"], "checkpoint_epochs": 1}})
    assert older.training.checkpoint_epochs == older.frozen()["training"]["checkpoint_epochs"] == 1


def test_overrides_are_toml_values_and_bare_words(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(MINIMAL)
    overrides = ["training.optimizer=sgd", "training.epochs=3", "search.space.lr=[0.1, 0.2]", "data.flip=true"]
    spec = StudySpec.from_toml(path, overrides=overrides)
    assert (spec.training.optimizer, spec.training.epochs, spec.data.flip) == ("sgd", 3, True)
    assert spec.search.space == {"lr": [0.1, 0.2]}
    with pytest.raises(UserError, match="--set must be written section"):
        StudySpec.from_toml(path, overrides=["training.epochs"])


def test_files_of_weights_are_relative_to_the_study_file_and_names_are_names(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(MINIMAL + "model.weights = ['a.pt', '/b.pt', 'DEFAULT']\n[model]\nname = 'torchvision:resnet18'")
    assert StudySpec.from_toml(path).search.parameters["model.weights"].extreme_values() == [
        str(tmp_path / "a.pt"),
        "/b.pt",
        "DEFAULT",
    ]
    path.write_text(MINIMAL + "[[compare]]\nname = 'tuned'\nmodel = { weights = 'a/b' }")
    assert [spec.model.weights for spec in StudySpec.all_from_toml(path)] == [None, str(tmp_path / "a" / "b")]
    with pytest.raises(UserError, match=r"search.space.model.weights is wrong: .* valid string, got 3"):
        read(MINIMAL + "model.weights = [3]")


def test_a_trial_gets_the_values_of_the_space_over_the_files() -> None:
    spec = read(MINIMAL + "model.width = [0.5]\ndata.crop = [2]\n[model]\nname = 'article_cnn'\nwidth = 1.0")
    config = spec.trial_config({"lr": 0.01, "model.width": 0.5, "data.crop": 2}, seed=5)
    assert config.training == TrainingConfig(lr=0.01)
    assert config.model.options == {"width": 0.5}
    assert (config.data.crop, config.seed) == (2, 5)


def test_multipliers_of_groups_are_searched_beside_fixed_ones() -> None:
    ranges = "groups.head.lr = { low = 1.0, high = 100.0, log = true }\ngroups.'a.*'.weight_decay = [0, 1]"
    spec = read(MINIMAL + ranges + "\n[training.groups]\nhead = { weight_decay = 0.5 }\nb = { lr = 2 }")
    assert list(spec.search.parameters) == ["lr", "groups.head.lr", "groups.a.*.weight_decay"]
    config = spec.trial_config({"lr": 0.1, "groups.head.lr": 3.0, "groups.a.*.weight_decay": 0}, seed=1)
    assert config.training.groups == {
        "head": {"weight_decay": 0.5, "lr": 3.0},
        "b": {"lr": 2},
        "a.*": {"weight_decay": 0},
    }
    assert spec.training.groups == {"head": {"weight_decay": 0.5}, "b": {"lr": 2.0}}
    assert StudySpec.from_dict(spec.frozen()).frozen() == spec.frozen()


def test_a_grid_is_every_combination_with_those_to_try_first_in_front() -> None:
    spec = read(
        """
        name = "g"
        [search]
        sampler = "grid"
        try_first = [{ lr = 0.1, optimizer = "sgd" }]
        [search.space]
        optimizer = ["adam", "sgd"]
        lr = { low = 1e-3, high = 1e-1, log = true, points = 3 }
        """
    )
    assert spec.search.grid[0] == {"optimizer": "sgd", "lr": 0.1}
    assert sorted((p["optimizer"], p["lr"]) for p in spec.search.grid) == [
        (o, lr) for o in ("adam", "sgd") for lr in (0.001, 0.01, 0.1)
    ]
    assert spec.num_trials == 6
    with pytest.raises(UserError, match=r"search\.trials must be left out or be the grid's size, 6; got 5"):
        StudySpec.from_dict({**spec.frozen(), "search": {**spec.frozen()["search"], "trials": 5}})


def test_a_grid_with_cases_has_each_case_for_its_own_value_only() -> None:
    spec = read(
        """
        name = "g"
        [search]
        sampler = "grid"
        [search.space]
        optimizer = ["adam", "sgd"]
        lr.by.optimizer = { adam = [1e-3, 1e-4], sgd = { low = 0.1, high = 1.0, log = true, points = 3 } }
        """
    )
    assert [(p["optimizer"], p["lr"]) for p in spec.search.grid] == [
        ("adam", 1e-3),
        ("adam", 1e-4),
        ("sgd", 0.1),
        ("sgd", 0.316228),
        ("sgd", 1.0),
    ]


def test_integer_ranges_make_integers() -> None:
    text = "name='g'\n[search]\nsampler='grid'\n[search.space]\nlr=[0.1]\nbatch_size={low=16, high=64, step=16}"
    assert [point["batch_size"] for point in read(text).search.grid] == [16, 32, 48, 64]


def test_a_spec_can_be_built_in_python() -> None:
    from hpo.search.config import SearchSpec

    spec = StudySpec(name="p", search=SearchSpec(space={"lr": [0.1, 0.2]}), training=TrainingConfig(epochs=3))
    assert (spec.num_trials, spec.max_epochs) == (20, 3)
    with pytest.raises(UserError, match=r"training\.epochs must be at least 1"):
        StudySpec(name="p", search=SearchSpec(space={"lr": [0.1]}), training=TrainingConfig(epochs=0))
