"""Optimizers do what torch's own do, and the table can be read without torch."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hpo.errors import UserError
from hpo.train.config import TrainingConfig
from hpo.train.muon import MuonWithAdamW, orthogonalized
from hpo.train.optim import NOT_OPTIONS, OPTIMIZERS, REFUSED_OPTIMIZERS, build_optimizer
from hpo.train.parameter_groups import multipliers_of, parameter_groups

QUINTIC = (3.4445, -4.7750, 2.0315)
ADAM: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01}
BY_HAND: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, ADAM),
    "adamw": (torch.optim.AdamW, ADAM),
    "nadam": (torch.optim.NAdam, ADAM),
    "radam": (torch.optim.RAdam, ADAM),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "eps": 1e-6, "weight_decay": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-6, "weight_decay": 0.01}),
    "adadelta": (torch.optim.Adadelta, {"eps": 1e-6, "weight_decay": 0.01}),
    "adamax": (torch.optim.Adamax, ADAM),
    "adafactor": (torch.optim.Adafactor, {"weight_decay": 0.01}),
    "asgd": (torch.optim.ASGD, {"weight_decay": 0.01}),
    "rprop": (torch.optim.Rprop, {}),
}
# Options other than the defaults, as a study file has them.
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"dampening": 0.5},
    "adam": {"amsgrad": True, "decoupled_weight_decay": True},
    "adamw": {"amsgrad": True},
    "nadam": {"momentum_decay": 0.1, "decoupled_weight_decay": True},
    "radam": {"decoupled_weight_decay": True},
    "rmsprop": {"alpha": 0.5, "centered": True},
    "adagrad": {"lr_decay": 0.5, "initial_accumulator_value": 1.0},
    "adadelta": {"rho": 0.5},
    "adafactor": {"beta2_decay": -0.5, "eps": [0.1, 1.0], "d": 2.0},
    "asgd": {"lambd": 0.1, "alpha": 0.5, "t0": 1.0},
    "rprop": {"etas": [0.4, 1.5], "step_sizes": [1e-4, 0.02]},
    "muon": {
        "momentum": 0.5,
        "nesterov": False,
        "ns_coefficients": [2.0, -1.5, 0.5],
        "ns_steps": 3,
        "adjust_lr_fn": "original",
    },
}


def train(network: torch.nn.Module, optimizer: torch.optim.Optimizer, *, num_steps: int = 3) -> torch.Tensor:
    for step in range(num_steps):
        optimizer.zero_grad()
        network(torch.linspace(-1, 1, 4) + step).square().sum().backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 6), torch.nn.Linear(6, 3))


def after_training(training: TrainingConfig, *, num_steps: int = 3) -> torch.Tensor:
    ours = network()
    return train(ours, build_optimizer(ours.parameters(), training, device_type="cpu"), num_steps=num_steps)


@pytest.mark.parametrize("name", BY_HAND)
def test_optimizer_is_torchs(name: str) -> None:
    torch_class, arguments = BY_HAND[name]
    training = TrainingConfig(
        optimizer=name, lr=0.01, momentum=0.9, nesterov=True, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.01
    )
    for options in ({}, OPTIONS.get(name, {})):
        if name == "sgd" and options:
            training = replace(training, nesterov=False)  # torch's has no dampening
            arguments = arguments | {"nesterov": False}
        theirs = network()
        by_hand = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        expected = train(theirs, torch_class(theirs.parameters(), lr=0.01, **arguments, **by_hand))
        assert torch.equal(after_training(replace(training, optimizer_options=options)), expected)


def test_every_optimizer_of_torch_is_here_with_its_arguments_or_is_refused() -> None:
    classes = {name.lower(): one for name, one in inspect.getmembers(torch.optim, inspect.isclass)}
    classes = {name: one for name, one in classes.items() if issubclass(one, torch.optim.Optimizer)}
    assert classes.keys() - {"optimizer"} == OPTIMIZERS.keys() | REFUSED_OPTIMIZERS.keys()
    for name, entry in OPTIMIZERS.items():
        named = MuonWithAdamW if name == "muon" else classes[name]
        arguments = {one.name: one.default for one in inspect.signature(named).parameters.values()}
        keys = {"betas" if key.startswith("beta") else key for key in entry.keys}
        assert {key: arguments[key] for key in entry.options} == entry.options, name
        assert arguments.keys() - NOT_OPTIONS == {"params", "lr", *keys, *entry.options}, name


def test_muon_is_torchs_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    ours, theirs = network(), network()
    training = TrainingConfig(optimizer="muon", beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.01, lr=0.01)
    muon = build_optimizer(ours.parameters(), training, device_type="cpu")
    hidden = theirs.get_parameter("2.weight")
    rest = [parameter for parameter in theirs.parameters() if parameter is not hidden]
    both = [torch.optim.Muon([hidden], adjust_lr_fn="match_rms_adamw", weight_decay=0.01, lr=0.01)]
    adamw = torch.optim.AdamW(rest, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01, lr=0.01)
    for step in range(3):
        for one, optimizers in ((ours, [muon]), (theirs, [*both, adamw])):
            one.zero_grad()
            one(torch.linspace(-1, 1, 4) + step).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_muon_takes_a_convolution_for_the_matrix_of_its_output_channels() -> None:
    def after(*, flat: bool) -> torch.Tensor:
        torch.manual_seed(0)
        first, hidden, last = torch.ones(2, 2), torch.randn(6, 3, 2, 2), torch.ones(2, 2)
        matrices = [torch.nn.Parameter(one.flatten(1) if flat else one) for one in (first, hidden, last)]
        optimizer = MuonWithAdamW(matrices, lr=0.1)
        matrices[1].grad = torch.linspace(-1, 1, 72).square().view(matrices[1].shape)
        optimizer.step()
        return matrices[1].detach().flatten()

    assert torch.equal(after(flat=False), after(flat=True))
    singular = torch.linalg.svdvals(orthogonalized(torch.randn(6, 12), coefficients=QUINTIC, num_steps=5))
    assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.5


def test_muon_knows_the_first_and_the_last_matrix_in_groups_too() -> None:
    model = network()
    training = TrainingConfig(optimizer="muon", lr=0.01, groups={"2": {"lr": 3.0}, "0": {"lr": 2.0}}, no_decay="auto")
    groups = parameter_groups(model, training, multipliers_of(model, training, num_classes=3))
    train(model, optimizer := build_optimizer(groups, training, device_type="cpu"), num_steps=1)
    by_muon = [name for name, one in model.named_parameters() if "momentum_buffer" in optimizer.state[one]]
    assert by_muon == ["2.weight"]


def test_muon_without_a_hidden_matrix_is_refused() -> None:
    with pytest.raises(UserError, match=r"training.optimizer = 'muon' refuses its settings: Muon trains .* has none"):
        build_optimizer(torch.nn.Linear(4, 3).parameters(), TrainingConfig(optimizer="muon", lr=1), device_type="cpu")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keys_are_those_that_change_the_training(name: str) -> None:
    """A key outside the entry's `keys` has no effect; each key inside has one."""
    plain = TrainingConfig(optimizer=name, lr=0.01, momentum=0.5 if name == "sgd" else 0.0)

    changed: dict[str, Any] = {
        "momentum": 0.9,
        "nesterov": True,
        "beta1": 0.5,
        "beta2": 0.5,
        "eps": 0.1,
        "weight_decay": 0.1,
    }
    for key, value in changed.items():
        # RAdam reads eps and beta2 from the sixth step on.
        settings = [plain, replace(plain, **{key: value})]
        has_effect = not torch.equal(*(after_training(training, num_steps=8) for training in settings))
        assert has_effect == (key in OPTIMIZERS[name].keys), key
    for key, value in OPTIONS.get(name, {}).items():
        both = [replace(plain, weight_decay=0.1 if "decay" in key and "weight_decay" in OPTIMIZERS[name].keys else 0.0)]
        both.append(replace(both[0], optimizer_options={key: value}))
        is_alike = torch.equal(*(after_training(training, num_steps=8) for training in both))
        assert is_alike == (key == "t0"), key  # t0 concerns an average of the weights, which ASGD keeps beside them


def test_eps_none_is_torchs_default() -> None:
    optimizer = build_optimizer(network().parameters(), TrainingConfig(optimizer="adagrad", lr=1), device_type="cpu")
    assert optimizer.defaults["eps"] == 1e-10


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (TrainingConfig(optimizer="adm", lr=1e-3), "training.optimizer must be one of ada.*got 'adm'.*'adam'"),
        (TrainingConfig(optimizer="lbfgs", lr=1), "training.optimizer cannot be 'lbfgs': it calls the network several"),
        (
            TrainingConfig(optimizer="sparseadam", lr=1),
            "training.optimizer cannot be .sparseadam.: it needs sparse",
        ),
        (TrainingConfig(optimizer="adam"), "training.lr must be given"),
        (TrainingConfig(optimizer="sgd", lr=1e-3, nesterov=True), "training.optimizer = 'sgd' refuses.*momentum"),
    ],
)
def test_wrong_optimizer(training: TrainingConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(network().parameters(), training, device_type="cpu")


def test_tables_load_without_torch() -> None:
    code = "import sys, hpo.train.optim, hpo.train.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
