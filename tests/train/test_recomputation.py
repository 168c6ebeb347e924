"""Activations are computed again for less memory; names, gradients, buffers and random numbers are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from hpo.train.models import article_cnn
from hpo.train.recomputation import buffers_kept, recompute_activations


def small_vgg() -> nn.Module:
    """Return layers with dropout, and a head whose first layer changes its input in place."""
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout2d(0.2)]
    body += [nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(inplace=True), nn.AdaptiveAvgPool2d(2)]
    head = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(32, 10))
    return nn.Sequential(nn.Sequential(*body), nn.Flatten(), nn.Linear(32, 32), head)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "article": lambda: article_cnn(channels=3, num_classes=10, width=0.1),
    "in place": small_vgg,
    "resnet18": lambda: get_model("resnet18", num_classes=10),
    "mobilenet": lambda: get_model("mobilenet_v3_small", num_classes=10),
    "timm:test_vit": lambda: timm.create_model("test_vit", num_classes=10, img_size=32, drop_rate=0.1),
    "timm:test_efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=10),
}


def gradients(make: Callable[[], nn.Module], *, recomputed: bool) -> tuple[int, dict[str, Tensor]]:
    """Return the bytes that are kept for the backward pass, and all that a step changes."""
    torch.manual_seed(0)
    model, images = make(), torch.randn(4, 3, 32, 32)
    if recomputed:
        recompute_activations(model, name="network")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(images), torch.arange(4))
    with buffers_kept(model if recomputed else None):
        loss.backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == len(weights)
    found |= {"loss": loss.detach(), "random": torch.rand(3), **dict(model.named_buffers())}
    return sum(size for place, size in kept.items() if place not in weights), found


@pytest.mark.parametrize("name", NETWORKS)
def test_less_is_kept_and_every_digit_is_the_same(name: str) -> None:
    kept_bytes, expected = gradients(NETWORKS[name], recomputed=False)
    fewer_bytes, found = gradients(NETWORKS[name], recomputed=True)
    assert fewer_bytes < 0.75 * kept_bytes
    assert list(found) == list(expected)
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_validation_computes_nothing_again() -> None:
    model, calls = article_cnn(channels=3, num_classes=10, width=0.1), list[int]()
    recompute_activations(model, name="network")
    for layer in model:
        layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert len(calls) == len(model)
