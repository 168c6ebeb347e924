"""Weights to start from: the body is loaded, the head fits the classes, and what does not fit is one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.train.checkpoint import CheckpointFolder, config_digest
from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.data.loading import DatasetCache
from hpo.train.engines.plain import PlainEngine
from hpo.train.models import build_model
from hpo.train.modules import head_of, named_network
from hpo.train.weight_files import ImagesOfWeights, find_weights, images_of_weights, weights_digest
from hpo.train.weights import fit_weights
from hpo.workers.preflight import run_preflight

SMALL = {"width": 0.05}
HEAD = "18"  # of article_cnn


def build(weights: Path | str | None = None, *, name: str = "article_cnn", num_classes: int = 10) -> nn.Module:
    options = SMALL if name == "article_cnn" else {}
    config = ModelConfig(name=name, weights=None if weights is None else str(weights), options=options)
    return build_model(config, channels=3, num_classes=num_classes, image_size=32)


def wrapped(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "a.safetensors": save_file,
    "a.pt": torch.save,
    "a.pth": lambda tensors, path: torch.save({"epoch": 3, "state_dict": wrapped(tensors, "module.")}, path),
    "a.bin": lambda tensors, path: torch.save({"model": wrapped(tensors, "model.")}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_body_is_loaded_and_the_head_where_the_classes_are_as_many(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    given = dict(build().state_dict())
    WRITERS[name](given, tmp_path / name)
    same = build(tmp_path / name).state_dict()
    assert all(torch.equal(same[key], tensor) for key, tensor in given.items())
    other = build(tmp_path / name, num_classes=7)
    assert {key for key, tensor in given.items() if torch.equal(other.state_dict()[key], tensor)} == {
        key for key in given if not key.startswith(f"{HEAD}.")
    }
    fitted = fit_weights(other, ModelConfig(weights=str(tmp_path / name), options=SMALL), num_classes=7)
    assert fitted.text == f"14 of 16 tensors from {name}; the head is new ({HEAD}.weight, {HEAD}.bias)"


def test_a_checkpoint_of_a_trial_is_a_file_of_weights(tmp_path: Path) -> None:
    config = TrialConfig(
        model=ModelConfig(options=SMALL), data=DataConfig(train_samples=60), training=TrainingConfig(lr=0.1), seed=1
    )
    engine = PlainEngine(device="cpu")
    checkpoint = engine.checkpoint(engine.admit(config))
    CheckpointFolder(str(tmp_path), identity={"trial": 1}).save(checkpoint)
    file = ModelConfig(weights=str(tmp_path / "epoch-000000.ckpt"), options=SMALL)
    model = build_model(file, channels=1, num_classes=10, image_size=32)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in checkpoint.state["model"].items())


def test_the_head_is_the_last_layer_with_an_output_for_each_class_whatever_its_name() -> None:
    heads = {
        "resnet18": "fc",
        "mobilenet_v3_small": "classifier.3",
        "squeezenet1_1": "classifier.1",
        "vit_b_32": "heads.head",
        "densenet121": "classifier",
    }
    from torchvision import models

    with torch.device("meta"):
        networks = {name: models.get_model(name, num_classes=11) for name in heads}
    assert {name: head_of(network, num_classes=11) for name, network in networks.items()} == heads
    assert head_of(nn.Linear(3, 11), num_classes=11) == ""
    assert head_of(nn.Linear(3, 12), num_classes=11) is None


def test_images_of_one_channel_use_weights_for_three(tmp_path: Path) -> None:
    name = "torchvision:squeezenet1_1"
    given = build(name=name).state_dict()
    torch.save(given, tmp_path / "a.pt")
    config = ModelConfig(name=name, weights=str(tmp_path / "a.pt"))
    network = named_network(build_model(config, channels=1, num_classes=10, image_size=32))
    assert all(torch.equal(network.state_dict()[key], tensor) for key, tensor in given.items())


def changed(**tensors: Tensor) -> Callable[[Path], None]:
    return lambda path: torch.save({**build().state_dict(), **tensors}, path)


WRONG: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a.pt", lambda path: None, r"must be a file, and there is none at /.*/a\.pt on "),
    ("a.pt", lambda path: path.write_text("no"), r"a\.pt cannot be read as one: "),
    ("a.ckpt", lambda path: path.write_text("no"), r"a\.ckpt cannot be read as one: it is not a checkpoint of hpo's"),
    ("a.safetensors", lambda path: path.write_text("no"), r"a\.safetensors cannot be read as one: "),
    ("a.pt", lambda path: torch.save(build(), path), "objects other than tensors are in it"),
    ("a.pt", lambda path: torch.save({"epoch": 3}, path), "must be a file of tensors by name"),
    ("a.pt", lambda path: torch.save({"b": torch.ones(1)}, path), r"such as 0\.weight, .* and 12 more; got b$"),
    (
        "a.pt",
        changed(**{"2.weight": torch.ones(4, 3)}),
        r"the tensor 2\.weight has the shape \(4, 3\), and the network of model\.name = 'article_cnn' needs \(3, 1",
    ),
    ("DEFAULT", lambda path: None, r"must be a file \(\.safetensors, .*\): model.name = 'article_cnn' has no weights"),
]


@pytest.mark.parametrize(("name", "write", "sentence"), WRONG)
def test_what_cannot_be_loaded_is_one_sentence(
    tmp_path: Path, name: str, write: Callable[[Path], Any], sentence: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=sentence) as caught:
        build(name if name == "DEFAULT" else tmp_path / name)
    assert "\n" not in str(caught.value)


def test_weights_of_torchvision_are_looked_for_in_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(url: str, *_: Any, **__: Any) -> None:
        raise OSError(f"no network for {url}")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    config = ModelConfig(name="torchvision:squeezenet1_1", weights="DEFAULT")
    file = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    with pytest.raises(UserError, match=rf"looked for {file}\) and cannot be downloaded from https.*no network for"):
        find_weights(config)
    with pytest.raises(UserError, match=r"model.weights must be one of DEFAULT, IMAGENET1K_V1; got 'IMAGENET'"):
        find_weights(replace(config, weights="IMAGENET"))
    with pytest.raises(UserError, match=r"model.name after 'torchvision:' .*did you mean 'squeezenet1_1'"):
        images_of_weights(replace(config, name="torchvision:squeezenet11"))
    torch.save(build(name=config.name, num_classes=1000).state_dict(), file)
    model = build_model(config, channels=3, num_classes=10, image_size=32)
    text = fit_weights(model, config, num_classes=10).text
    assert text.startswith(
        f"50 of 52 tensors from {file.name}; the head is new (classifier.1.weight, classifier.1.bias)"
    )


def test_images_are_normalised_as_named_weights_want_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "torchvision:squeezenet1_1"
    file = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.parent.mkdir(parents=True)
    torch.save(build(name=name, num_classes=1000).state_dict(), file)
    data = DataConfig(train_samples=20, validation_fraction=0.1)
    config = TrialConfig(
        model=ModelConfig(name=name, weights="DEFAULT"), data=data, training=TrainingConfig(lr=0.1), seed=1
    )
    plain = replace(config, model=ModelConfig(name=name, weights=str(file)))
    cache = DatasetCache(device=torch.device("cpu"))
    own, fitted = cache.for_trial(plain), cache.for_trial(config)
    assert cache.for_trial(config) is fitted
    assert own.train.source is fitted.train.source
    mean, std = 0.449, 0.226  # of three channels, for images of one
    assert [*fitted.mean, *fitted.std] == pytest.approx([mean, std])
    assert fitted.test is not None
    assert own.test is not None
    for part in ("train", "val", "test"):
        own_images, _ = next(getattr(own, part).batches(4))
        images, _ = next(getattr(fitted, part).batches(4))
        pixels = own_images * own.std[0] + own.mean[0]
        assert torch.allclose(images, (pixels - mean) / std, atol=1e-4)
    assert config_digest(config) != config_digest(plain)
    assert PlainEngine(device="cpu", dataset_cache=cache).admit(config) == 0

    space = {"name": "s", "search": {"space": {"lr": [0.1]}}, "data": {"train_samples": 20}}
    found = run_preflight(StudySpec.from_dict({**space, "model": {"name": name, "weights": "DEFAULT"}}), {"cpu"})
    assert found["weights"].endswith(
        "; images are normalised as theirs (mean 0.449, deviation 0.226); they were trained on images of 224x224, "
        "and these are 32x32"
    )


def test_a_trial_is_another_one_with_other_weights_and_the_same_wherever_they_are(tmp_path: Path) -> None:
    first, second, copy = (tmp_path / name for name in ("a.pt", "b.pt", "c.pt"))
    torch.save({"b": torch.ones(1)}, first)
    torch.save({"b": torch.zeros(1)}, second)
    copy.write_bytes(first.read_bytes())

    def digest(path: Path | None) -> str:
        model = ModelConfig(weights=None if path is None else str(path))
        return config_digest(TrialConfig(model=model, data=DataConfig(), training=TrainingConfig(), seed=0))

    assert len({digest(None), digest(first), digest(second)}) == 3
    before = digest(first)
    assert digest(copy) == before
    assert weights_digest(ModelConfig()) is None
    first.write_bytes(second.read_bytes())
    os.utime(first, ns=(1, 1))  # where the clock of the files has not gone on
    assert digest(first) == digest(second) != before


def test_timm_has_networks_and_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    import huggingface_hub

    name, head = "timm:test_resnet", "fc."
    torch.manual_seed(1)
    given = dict(build(name=name, num_classes=1000).state_dict())
    save_file(given, tmp_path / "model.safetensors")
    asked: list[tuple[str, str]] = []

    def cached(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    tensors = build("DEFAULT", name=name).state_dict()
    assert {key for key, tensor in given.items() if torch.equal(tensors[key], tensor)} == {
        key for key in given if not key.startswith(head)
    }
    assert set(asked) == {("timm/test_resnet.r160_in1k", "model.safetensors")}
    assert images_of_weights(ModelConfig(name=name, weights="r160_in1k")) == ImagesOfWeights(
        160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    )
    with pytest.raises(UserError, match="must be one of DEFAULT, r160_in1k; got 'r160'"):
        build("r160", name=name)
    with pytest.raises(UserError, match=r"model.name after 'timm:' .*did you mean 'test_resnet'"):
        images_of_weights(ModelConfig(name="timm:test_resnt", weights="DEFAULT"))
    monkeypatch.undo()

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"was not found .*test_resnet.* cannot be downloaded .no network"):
        build("DEFAULT", name=name)
