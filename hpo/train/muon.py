"""Muon for the hidden matrices of a network, and AdamW for everything else, as one optimizer.

Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) moves a weight matrix along its orthogonalized momentum.
A convolution's weight counts as the matrix of its output channels by everything else. Biases, scales, and the first and
the last matrix, which read the images and name the classes, are AdamW's. One learning rate serves both, because by
default Muon's steps are scaled to the length of AdamW's (Liu et al., arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

NS_EPS = 1e-7  # keeps the norm of a momentum that is zero from dividing it
# How much longer a step is made, by the numbers of rows and columns; named as torch.optim.Muon has them.
SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW over the parameters of one network, in the network's order; `betas` and `eps` are AdamW's."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        """Take the parameters. Raises ValueError for wrong settings, and where no matrix is left for Muon."""
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum}")
        if not 1 <= ns_steps < 100:
            raise ValueError(f"ns_steps must be at least 1 and less than 100, got {ns_steps}")
        if adjust_lr_fn not in SCALES:
            raise ValueError(f"adjust_lr_fn must be one of {', '.join(SCALES)}; got {adjust_lr_fn!r}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        defaults |= {"nesterov": nesterov, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps}
        super().__init__(params, defaults | {"adjust_lr_fn": adjust_lr_fn})
        self._hidden = {id(matrix) for matrix in hidden_matrices(_in_order(self.param_groups))}
        if not self._hidden:
            raise ValueError(
                "Muon trains the weight matrices between the first and the last, and the network has none there"
            )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the parameters by their gradients; no closure is taken."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if id(parameter) in self._hidden:
                    self._muon_step(parameter, group)
            self._adamw_step([parameter for parameter in trained if id(parameter) not in self._hidden], group)

    def _muon_step(self, matrix: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        flat = update.flatten(1)
        direction = orthogonalized(flat, coefficients=group["ns_coefficients"], num_steps=group["ns_steps"])
        scale = SCALES[group["adjust_lr_fn"]](*flat.shape)
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(direction.view(matrix.shape), alpha=-group["lr"] * scale)

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.tensor(0.0), **averages}
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def hidden_matrices(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the matrices among parameters but the first and the last; what has one row or column is no matrix."""
    matrices = [one for one in parameters if one.ndim > 1 and 1 < len(one) < one.numel()]
    return matrices[1:-1]


def orthogonalized(matrix: Tensor, *, coefficients: tuple[float, float, float], num_steps: int) -> Tensor:
    """Return a matrix with singular values near 1 in place of its own, by a Newton-Schulz iteration in bfloat16."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=NS_EPS)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(matrix.dtype)


def _in_order(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Return the parameters of all groups in the network's order: the groups' own where these tell no `places`."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    places = [place for group in groups for place in group.get("places", ())] or range(len(parameters))
    return [parameter for _, parameter in sorted(zip(places, parameters, strict=True), key=itemgetter(0))]
