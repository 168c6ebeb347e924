"""Update rules of the optimizers for K trials at once, each with its own learning rate, momentum and other settings.

Each is the rule of the torch.optim class of the same name, written over rows: row k of every tensor belongs to lane k.
What depends only on the settings and the step is computed on the host in double precision, as torch.optim does it.
Shapes: K lanes, P parameters of a network. This module does not import torch, because reading a study file loads it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hpo.train.config import TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor

Factors: TypeAlias = "Mapping[str, Tensor]"  # each (K, 1)
Moments: TypeAlias = "Mapping[str, Tensor]"  # each (K, P), changed in place

RMSPROP_ALPHA = 0.99  # torch's defaults; a trial with others has no update rule
ADADELTA_RHO = 0.9
NADAM_MOMENTUM_DECAY = 4e-3


@dataclass(frozen=True, kw_only=True)
class Update:
    """One optimizer's update rule.

    `factors(training, lr, step)` returns a lane's numbers for a step counted from 1; `training.eps` must be set.
    `apply(params_KP, grads_KP, moments, factors)` makes the step in place; it may overwrite the gradients.
    """

    moments: tuple[str, ...]  # named as in torch.optim, zero before the first step
    factors: Callable[[TrainingConfig, float, int], dict[str, float]]
    apply: Callable[[Tensor, Tensor, Moments, Factors], None]


def _sgd_factors(training: TrainingConfig, lr: float, step: int) -> dict[str, float]:
    of_gradient, of_buffer = (1.0, training.momentum) if training.nesterov else (0.0, 1.0)
    shares = {"of_gradient": of_gradient, "of_buffer": of_buffer}
    return {"weight_decay": training.weight_decay, "momentum": training.momentum, "step_size": -lr, **shares}


def _sgd(params_KP: Tensor, grads_KP: Tensor, moments: Moments, factors: Factors) -> None:
    grads_KP.addcmul_(params_KP, factors["weight_decay"])
    buffer = moments["momentum_buffer"]
    buffer.mul_(factors["momentum"]).add_(grads_KP)
    grads_KP.mul_(factors["of_gradient"]).addcmul_(buffer, factors["of_buffer"])
    params_KP.addcmul_(grads_KP, factors["step_size"])


def _adam_factors(training: TrainingConfig, lr: float, step: int) -> dict[str, float]:
    return {
        "weight_decay": training.weight_decay,
        **_average_factors(training),
        "correction": math.sqrt(1 - training.beta2**step),
        "step_size": -lr / (1 - training.beta1**step),
    }


def _adam(params_KP: Tensor, grads_KP: Tensor, moments: Moments, factors: Factors) -> None:
    grads_KP.addcmul_(params_KP, factors["weight_decay"])
    _adam_step(params_KP, grads_KP, moments, factors)


def _adamw_factors(training: TrainingConfig, lr: float, step: int) -> dict[str, float]:
    return _adam_factors(training, lr, step) | {"keep": 1 - lr * training.weight_decay}


def _adamw(params_KP: Tensor, grads_KP: Tensor, moments: Moments, factors: Factors) -> None:
    params_KP.mul_(factors["keep"])
    _adam_step(params_KP, grads_KP, moments, factors)


def _adam_step(params_KP: Tensor, grads_KP: Tensor, moments: Moments, factors: Factors) -> None:
    average, square = _averages(grads_KP, moments, factors)
    scale = square.sqrt().div_(factors["correction"]).add_(factors["eps"])
    params_KP.addcdiv_(average * factors["step_size"], scale)


def _average_factors(training: TrainingConfig) -> dict[str, float]:
    assert training.eps is not None
    return {
        "new_average": 1 - training.beta1,
        "old_square": training.beta2,
        "new_square": 1 - training.beta2,
        "eps": training.eps,
    }


def _averages(grads_KP: Tensor, moments: Moments, factors: Factors) -> tuple[Tensor, Tensor]:
    """Update the running averages of the gradient and of its square, and return both."""
    average, square = moments["exp_avg"], moments["exp_avg_sq"]
    average.lerp_(grads_KP, factors["new_average"])
    square.mul_(factors["old_square"]).addcmul_(grads_KP * factors["new_square"], grads_KP)
    return average, square


def _nadam_factors(training: TrainingConfig, lr: float, step: int) -> dict[str, float]:
    product, following = (nadam_momentum_product(training.beta1, step) for step in (step, step + 1))
    return {
        "weight_decay": training.weight_decay,
        **_average_factors(training),
        "correction": 1 - training.beta2**step,
        "of_gradient": -lr * (1 - _nadam_momentum(training.beta1, step)) / (1 - product),
        "of_average": -lr * _nadam_momentum(training.beta1, step + 1) / (1 - following),
    }


def _nadam_momentum(beta1: float, step: int) -> float:
    return beta1 * (1 - 0.5 * math.pow(0.96, step * NADAM_MOMENTUM_DECAY))


def nadam_momentum_product(beta1: float, step: int) -> float:
    """Return the product of NAdam's momenta of the steps 1 to `step`, which torch.optim keeps as `mu_product`."""
    products = _nadam_products(beta1)
    while len(products) <= step:
        products.append(products[-1] * _nadam_momentum(beta1, len(products)))
    return products[step]


@functools.cache
def _nadam_products(beta1: float) -> list[float]:
    """Return the products of 0 steps, 1 step..., as many as were needed so far; the caller appends to them."""
    return [1.0]


def _nadam(params_KP: Tensor, grads_KP: Tensor, moments: Moments, factors: Factors) -> None:
    grads_KP.addcmul_(params_KP, factors["weight_decay"])
    average, square = _averages(grads_KP, moments, factors)
    scale = square.div(factors["correction"]).sqrt_().add_(factors["eps"])
    params_KP.addcdiv_(grads_KP.mul_(factors["of_gradient"]), scale)
    params_KP.addcdiv_(average * factors["of_average"], scale)


def _radam_factors(training: TrainingConfig, lr: float, step: int) -> dict[str, float]:
    bias = 1 - training.beta2**step
    longest = 2 / (1 - training.beta2) - 1
    length = longest - 2 * step * training.beta2**step / bias
    rectified, of_square = 1.0, 0.0  # too few steps for a variance: use the average of gradients alone
    if length > 5:
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        rectified, of_square = math.sqrt(ratio) * math.sqrt(bias), 1.0
    return {
        "weight_decay": training.weight_decay,
        **_average_factors(training),
        "step_size": -lr / (1 - training.beta1**step) * rectified,
        "of_square": of_square,
        "of_one": 1 - of_square,
    }


def _radam(params_KP: Tensor, grads_KP: Tensor, moments: Moments, factors: Factors) -> None:
    grads_KP.addcmul_(params_KP, factors["weight_decay"])
    average, square = _averages(grads_KP, moments, factors)
    scale = square.sqrt().add_(factors["eps"]).mul_(factors["of_square"]).add_(factors["of_one"])
    params_KP.addcdiv_(average * factors["step_size"], scale)


def _adamax_factors(training: TrainingConfig, lr: float, step: int) -> dict[str, float]:
    assert training.eps is not None
    return {
        "weight_decay": training.weight_decay,
        "new_average": 1 - training.beta1,
        "old_largest": training.beta2,
        "eps": training.eps,
        "step_size": -lr / (1 - training.beta1**step),
    }


def _adamax(params_KP: Tensor, grads_KP: Tensor, moments: Moments, factors: Factors) -> None:
    grads_KP.addcmul_(params_KP, factors["weight_decay"])
    average, largest = moments["exp_avg"], moments["exp_inf"]
    average.lerp_(grads_KP, factors["new_average"])
    largest.mul_(factors["old_largest"]).clamp_(min=grads_KP.abs_().add_(factors["eps"]))
    params_KP.addcdiv_(average * factors["step_size"], largest)


def _rmsprop_factors(training: TrainingConfig, lr: float, step: int) -> dict[str, float]:
    assert training.eps is not None
    return {
        "weight_decay": training.weight_decay,
        "eps": training.eps,
        "momentum": training.momentum,
        "step_size": -lr,
    }


def _rmsprop(params_KP: Tensor, grads_KP: Tensor, moments: Moments, factors: Factors) -> None:
    grads_KP.addcmul_(params_KP, factors["weight_decay"])
    square, buffer = moments["square_avg"], moments["momentum_buffer"]
    square.mul_(RMSPROP_ALPHA).addcmul_(grads_KP, grads_KP, value=1 - RMSPROP_ALPHA)
    scale = square.sqrt().add_(factors["eps"])
    buffer.mul_(factors["momentum"]).addcdiv_(grads_KP, scale)
    params_KP.addcmul_(buffer, factors["step_size"])


def _ada_factors(training: TrainingConfig, lr: float, step: int) -> dict[str, float]:
    assert training.eps is not None
    return {"weight_decay": training.weight_decay, "eps": training.eps, "step_size": -lr}


def _adagrad(params_KP: Tensor, grads_KP: Tensor, moments: Moments, factors: Factors) -> None:
    grads_KP.addcmul_(params_KP, factors["weight_decay"])
    total = moments["sum"]
    total.addcmul_(grads_KP, grads_KP)
    scale = total.sqrt().add_(factors["eps"])
    params_KP.addcdiv_(grads_KP.mul_(factors["step_size"]), scale)


def _adadelta(params_KP: Tensor, grads_KP: Tensor, moments: Moments, factors: Factors) -> None:
    grads_KP.addcmul_(params_KP, factors["weight_decay"])
    square, travelled = moments["square_avg"], moments["acc_delta"]
    square.mul_(ADADELTA_RHO).addcmul_(grads_KP, grads_KP, value=1 - ADADELTA_RHO)
    delta = travelled.add(factors["eps"]).sqrt_().div_(square.add(factors["eps"]).sqrt_()).mul_(grads_KP)
    travelled.mul_(ADADELTA_RHO).addcmul_(delta, delta, value=1 - ADADELTA_RHO)
    params_KP.addcmul_(delta, factors["step_size"])


_AVERAGES = ("exp_avg", "exp_avg_sq")

SGD = Update(moments=("momentum_buffer",), factors=_sgd_factors, apply=_sgd)
ADAM = Update(moments=_AVERAGES, factors=_adam_factors, apply=_adam)
ADAMW = Update(moments=_AVERAGES, factors=_adamw_factors, apply=_adamw)
NADAM = Update(moments=_AVERAGES, factors=_nadam_factors, apply=_nadam)
ADAMAX = Update(moments=("exp_avg", "exp_inf"), factors=_adamax_factors, apply=_adamax)
RADAM = Update(moments=_AVERAGES, factors=_radam_factors, apply=_radam)
RMSPROP = Update(moments=("square_avg", "momentum_buffer"), factors=_rmsprop_factors, apply=_rmsprop)
ADAGRAD = Update(moments=("sum",), factors=_ada_factors, apply=_adagrad)
ADADELTA = Update(moments=("square_avg", "acc_delta"), factors=_ada_factors, apply=_adadelta)
