"""The networks are what they are said to be, and what cannot work is refused in one sentence."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo.errors import UserError
from hpo.train.config import ModelConfig
from hpo.train.models import (
    MODELS,
    article_cnn,
    build_model,
    check_fresh,
    check_model,
    fit_memory_format,
    named_tensors,
)

OWN_MODELS = """
import torch
from torch import nn

def small(num_classes, channels, hidden=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 32 * 32, hidden), nn.Linear(hidden, num_classes))

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))

def not_a_module(**options):
    return "a string"

def broken(num_classes):
    raise RuntimeError("no luck")

constant = 3
"""


@pytest.fixture
def own_models(own_code: Path) -> str:
    """Write a module of the user's and return its name."""
    (own_code / "own_models_under_test.py").write_text(OWN_MODELS)
    (own_code / "own_needs_missing.py").write_text("import a_package_that_is_not_there")
    (own_code / "own_syntax_error.py").write_text("def f(:")
    return "own_models_under_test"


def build(name: str, *, channels: int = 3, num_classes: int = 10, image_size: int = 32, **options: Any) -> nn.Module:
    config = ModelConfig(name=name, options=options)
    return build_model(config, channels=channels, num_classes=num_classes, image_size=image_size)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Viewing(nn.Module):
    """Flattens with `view`, as many a tutorial's network does, which channels_last does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 32 * 32, 10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(images).view(len(images), -1))
        return scores


class Broken(Viewing):
    """Raises whatever the format."""

    def forward(self, images: Tensor) -> Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize("kind", [Viewing, lambda: article_cnn(channels=3, num_classes=10), Broken])
def test_the_memory_format_is_one_in_which_the_network_computes(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    random.seed(0)
    given = kind()
    images = torch.rand(2, 3, 32, 32).to(memory_format=torch.channels_last)
    states = torch.get_rng_state(), random.getstate()
    model = fit_memory_format(given, images)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model is given
    assert all(parameter.grad is None for parameter in model.parameters())
    if kind is Broken:
        with pytest.raises(ZeroDivisionError):
            model(images)
        return
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last) == (kind is not Viewing)
    assert torch.isfinite(model(images)).all()
    assert list(copy.deepcopy(model).state_dict()) == list(kind().state_dict())


def test_article_cnn_is_the_articles_network() -> None:
    model = article_cnn(channels=3, num_classes=100)
    layers = [
        (layer.in_channels, layer.out_channels, layer.stride[0]) if isinstance(layer, nn.Conv2d) else type(layer)
        for layer in model
    ]
    relu, pool = nn.ReLU, nn.MaxPool2d
    blocks = [
        [(3, 16, 2), relu, (16, 64, 1), relu, pool],
        [(64, 128, 1), relu, (128, 256, 1), relu, pool],
        [(256, 512, 1), relu, (512, 512, 1), relu, pool],
        [(512, 256, 1), relu, nn.Flatten, nn.Linear],
    ]
    assert layers == [layer for block in blocks for layer in block]
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    assert all(layer.kernel_size == (3, 3) and layer.padding == (1, 1) for layer in convolutions)
    assert isinstance(model[-1], nn.Linear)
    assert (model[-1].in_features, model[-1].out_features) == (1024, 100)
    assert num_parameters(model) == 5_201_124


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "num_classes", "width"), [(1, 10, 0.25), (3, 100, 1.0), (4, 2, 0.01)])
def test_built_in_models_fit_the_data(name: str, channels: int, num_classes: int, width: float) -> None:
    model = build(name, channels=channels, num_classes=num_classes, width=width)
    check_model(model, batch=torch.rand(2, channels, 32, 32), num_classes=num_classes)


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_model(channels: int) -> None:
    model = build("torchvision:resnet18", channels=channels, num_classes=7)
    model.train()
    check_model(model, batch=torch.rand(2, channels, 32, 32), num_classes=7)
    assert model.training


def test_torchvision_options() -> None:
    assert isinstance(build("torchvision:resnet18", norm_layer=nn.InstanceNorm2d), nn.Module)


def test_torchvision_models_with_auxiliary_outputs_give_a_tensor() -> None:
    model = build("torchvision:googlenet")
    assert model.train()(torch.rand(2, 3, 64, 64)).shape == (2, 10)


def test_own_model_gets_what_its_signature_takes(own_models: str) -> None:
    model = build(f"{own_models}:small", channels=1, num_classes=5, hidden=9)
    check_model(model, batch=torch.rand(2, 1, 32, 32), num_classes=5)
    assert num_parameters(model) == (32 * 32 + 1) * 9 + (9 + 1) * 5
    assert num_parameters(build(f"{own_models}:fixed")) == 7 * (3 * 32 * 32 + 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("article_cn", {}, "model.name must be one of article_cnn, .*got 'article_cn'.*did you mean 'article_cnn'"),
        ("article_cnn", {"width": 0}, "model.width must be > 0, got 0"),
        ("article_cnn", {"depth": 2}, "model.depth is not an option of .*article_cnn.* takes width"),
        ("torchvision:resnet81", {}, "torchvision.*resnet18.*got 'resnet81'"),
        ("timm:test_resnot", {}, "after 'timm:' must be one of test_resnet, .* in all.; got.* mean 'test_resnet'"),
        ("timm:test_resnet", {"pretrained": True}, "model.pretrained is model.weights here, .*got True"),
        ("torchvision:resnet18", {"depth": 2}, "model.name = 'torchvision:resnet18' failed when called with .*depth=2"),
        ("own_models_under_test:smal", {}, "model.name.*small; got 'smal'.*did you mean 'small'"),
        ("own_models_under_test:small", {"depth": 2}, "model.depth is not an option.*takes hidden"),
        ("own_models_under_test:not_a_module", {}, "must return a torch.nn.Module, got str"),
        ("own_models_under_test:broken", {}, "failed when called with .*RuntimeError: no luck"),
        ("own_models_under_test:constant", {}, "must name a function or a class, got int"),
        ("own_needs_missing:f", {}, "model.name.*cannot be imported.*a_package_that_is_not_there"),
        ("own_syntax_error:f", {}, "model.name.*cannot be imported: SyntaxError"),
    ],
)
def test_wrong_models(own_models: str, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **options)


def test_the_data_set_gives_the_classes() -> None:
    config = ModelConfig(options={"num_classes": 2})
    with pytest.raises(UserError, match=r"model.num_classes comes from the data set and cannot be set, got 2"):
        build_model(config, channels=3, num_classes=10, image_size=32)


def test_article_cnn_refuses_other_sizes() -> None:
    with pytest.raises(UserError, match=r"article_cnn' takes 32x32 images, got 64x64 .data.image_size"):
        build("article_cnn", image_size=64)


def test_torchvision_refuses_other_channels() -> None:
    with pytest.raises(UserError, match=r"1 or 3 channels, got 4"):
        build("torchvision:resnet18", channels=4)


def test_check_model_says_expected_and_got(own_models: str) -> None:
    with pytest.raises(UserError, match=r"shape \(2, 10\).*10 classes.*got \(2, 7\) of torch.float32"):
        check_model(build(f"{own_models}:fixed"), batch=torch.rand(2, 3, 32, 32), num_classes=10)
    with pytest.raises(UserError, match=r"takes images of shape \(2, 1, 32, 32\).*it raised RuntimeError: .*mat1"):
        check_model(build(f"{own_models}:fixed"), batch=torch.rand(2, 1, 32, 32), num_classes=7)


OWN_NETWORKS = """
import copy, functools, numpy, torch
from torch import nn

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

NETWORK = network()
BODY = nn.Linear(64, 4)
FROZEN = nn.Linear(64, 4).requires_grad_(False)
WEIGHTS = copy.deepcopy(NETWORK.state_dict())

def shared(num_classes): return NETWORK
def part(num_classes): return nn.Sequential(nn.Flatten(), BODY, nn.Linear(4, 3))
kept = functools.lru_cache(network)
def cached(num_classes): return kept()
def unseeded(num_classes):
    made = network()
    nn.init.constant_(made[1].weight, float(numpy.random.default_rng().normal()))
    return made

def fresh(num_classes): return network()
def copied(num_classes): return copy.deepcopy(NETWORK)
def loaded(num_classes):
    made = network()
    made.load_state_dict(WEIGHTS)
    return made
def frozen(num_classes): return nn.Sequential(nn.Flatten(), FROZEN, nn.Linear(4, 3))
"""
ONE_OF_AN_EARLIER = "returned one with the weights of an earlier one"


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("shared", ONE_OF_AN_EARLIER),
        ("part", ONE_OF_AN_EARLIER),
        ("cached", ONE_OF_AN_EARLIER),
        ("unseeded", "weights follow from the seed .* two of the same seed differ in 1.weight"),
        ("fresh", None),
        ("copied", None),
        ("loaded", None),
        ("frozen", None),
    ],
)
def test_a_network_that_goes_on_from_an_earlier_one_is_refused(
    factory: str, message: str | None, own_code: Path
) -> None:
    (own_code / "own_networks.py").write_text(OWN_NETWORKS)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return build_model(ModelConfig(name=f"own_networks:{factory}"), channels=1, num_classes=3, image_size=8)

    trained = build()
    begun = {name: tensor.clone() for name, tensor in named_tensors(trained).items()}
    trained(torch.randn(4, 1, 8, 8))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    refused = nullcontext() if message is None else pytest.raises(UserError, match=message)
    with refused:
        check_fresh(build(), begun, trained=trained, name=f"own_networks:{factory}")
