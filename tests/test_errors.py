"""What a message suggests for a name that is wrong."""

from __future__ import annotations

import pytest

from hpo.errors import did_you_mean

MODELS = ["article_cnn", "torchvision:NAME", "package.module:factory", "torchvision:resnet18", "timm:resnet18"]


@pytest.mark.parametrize(
    ("value", "valid", "meant"),
    [
        ("resnet18", MODELS, "torchvision:resnet18"),
        ("ResNet18", MODELS, "torchvision:resnet18"),
        ("torchvision.models.resnet18", MODELS, "torchvision:resnet18"),
        ("timm.resnet18", MODELS, "timm:resnet18"),
        ("resnet-18", MODELS, "torchvision:resnet18"),
        ("article_cn", MODELS, "article_cnn"),
        ("nets.small", MODELS, "nets:small"),
        ("nets.resnet18", MODELS, "nets:resnet18"),
        ("./my/nets.py:Small", MODELS, "my.nets:Small"),
        ("../lib/nets.py:Small", MODELS, "nets:Small"),
        ("/home/me/lib/nets:Small", MODELS, "nets:Small"),
        ("nets.py", MODELS, "nets:NAME"),
        ("nonsense", MODELS, None),
        ("torch.optim.Adam", ["adam", "sgd"], "adam"),
        ("nets.small", ["adam", "sgd"], None),
        ("learning_rate", ["lr", "beta1"], "lr"),
        ("torch.optim.lr_scheduler.CosineAnnealingLR", ["cosine", "package.module:name"], "cosine"),
        ("nn.CrossEntropyLoss", ["bce", "cross_entropy", "package.module:name"], "cross_entropy"),
        ("learning_rate", ["epochs"], None),
        ("widht", ["width"], "width"),
    ],
)
def test_a_wrong_name_suggests_the_one_that_is_meant(value: str, valid: list[str], meant: str | None) -> None:
    assert did_you_mean(value, valid) == (f" (did you mean {meant!r}?)" if meant else "")
