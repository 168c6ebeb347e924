"""What the preflight finds of a study; tests of the command line hold what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store.store import Store
from hpo.system.devices import Device
from hpo.train.config import ModelConfig
from hpo.train.device_proof import proofs_of
from hpo.train.models import build_model
from hpo.workers.preflight import check_devices, judge_random_images, run_preflight
from tests.workers.sick_gpu import needs_no_gpu, tells_why


def digits_spec(**training: object) -> StudySpec:
    """Return a study of a small network on the digits."""
    return StudySpec.from_dict(
        {
            "name": "digits",
            "search": {"sampler": "grid", "space": {"lr": [1e-3]}},
            "model": {"name": "article_cnn", "width": 0.05},
            "data": {"name": "digits", "train_samples": 200, "validation_fraction": 0.2},
            "training": {"epochs": 1, **training},
        }
    )


def test_the_preflight_finds_the_data_and_the_network_and_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    metadata = run_preflight(digits_spec(), {"cpu"})
    assert torch.equal(torch.random.get_rng_state(), before)
    sizes = {key: metadata[key] for key in ("num_train", "num_val", "num_classes", "channels", "image_size")}
    assert sizes == {"num_train": 200, "num_val": 288, "num_classes": 10, "channels": 1, "image_size": 32}
    assert metadata["num_parameters"] > 0
    assert 0.1 <= metadata["guess_accuracy"] < 0.11  # the digits' classes are about as large as each other
    assert "guess_value" not in metadata


@pytest.mark.parametrize(
    ("training", "guess"),
    [
        ({"metric": "auroc"}, 0.5),
        ({"metric": "val_loss"}, math.log(10)),
        ({"metric": "val_loss", "loss": "bce"}, 0.325),
    ],
)
def test_the_preflight_finds_what_guessing_is_worth_in_the_metric(training: dict[str, str], guess: float) -> None:
    assert run_preflight(digits_spec(**training), {"cpu"})["guess_value"] == pytest.approx(guess, abs=0.02)


def test_a_study_does_not_go_on_with_another_file_of_weights_or_another_table_of_groups(own_code: Path) -> None:
    model = {"name": "article_cnn", "width": 0.05}
    table, weights = own_code / "groups.csv", own_code / "start.pt"

    def write(split: int, seed: int) -> None:
        table.write_text("index,group\n" + "".join(f"{index},{index // split}\n" for index in range(1438)))
        torch.manual_seed(seed)
        network = build_model(ModelConfig(options={"width": 0.05}), channels=1, num_classes=10, image_size=32)
        torch.save(network.state_dict(), weights)

    settings = digits_spec().frozen() | {"model": model | {"weights": str(weights)}}
    spec = StudySpec.from_dict(settings | {"data": settings["data"] | {"groups": "groups.csv", "train_samples": 1000}})
    write(3, 0)
    store = Store(f"sqlite:///{own_code}/hpo.db", create=True)
    study = store.studies.create(spec, metadata=run_preflight(spec, {"cpu"}))
    store.studies.check_joins(study, spec, metadata=run_preflight(spec, {"cpu"}))
    for split, seed, changed in ((3, 1, "weights_digest is"), (4, 0, "groups_digest is")):
        write(split, seed)
        with pytest.raises(UserError, match=f"exists in .* with other settings.*{changed}"):
            store.studies.check_joins(study, spec, metadata=run_preflight(spec, {"cpu"}))


SEVERAL = """
import numpy

def data():
    random = numpy.random.default_rng(0)
    return (random.integers(0, 255, (80, 1, 32, 32), dtype="uint8"), random.random((80, 3)) < [0.5, 0.25, 0.1]), None
"""


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"loss": "bce", "metric": "average_precision"}, None),
        ({"loss": "bce", "mixup": 0.2}, None),
        ({}, "training.loss must be 'bce', or a function of your own, where images have a label for each class"),
        ({"loss": "bce", "metric": "top5"}, "training.metric must be one of auroc, average_precision, macro_f1"),
        ({"loss": "bce", "class_weights": [1.0, 2.0, 3.0]}, None),
        ({"loss": "bce", "class_weights": [1.0, 2.0]}, "training.class_weights must have one number for each of the 3"),
    ],
)
def test_images_of_several_classes_are_found_and_what_does_not_fit_is_one_sentence(
    training: dict[str, Any], message: str | None, own_code: Path
) -> None:
    (own_code / "own_several_classes.py").write_text(SEVERAL)
    spec = StudySpec.from_dict(digits_spec(**training).frozen() | {"data": {"name": "own_several_classes:data"}})
    if message is None:
        found = run_preflight(spec, {"cpu"})
        assert (found["num_classes"], found["has_several_labels"]) == (3, True)
        assert 0.6 < found["guess_accuracy"] < 0.9
        return
    with pytest.raises(UserError, match=message):
        run_preflight(spec, {"cpu"})


def test_the_preflight_says_what_is_loaded_of_weights_and_keeps_a_digest_of_them(tmp_path: Path) -> None:
    model = {"name": "article_cnn", "width": 0.05}
    ten, two = (
        build_model(ModelConfig(options={"width": 0.05}), channels=1, num_classes=n, image_size=32) for n in (10, 2)
    )
    torch.save(ten.state_dict(), tmp_path / "ten.pt")
    torch.save(two.state_dict(), tmp_path / "two.pt")
    settings = digits_spec().frozen() | {"model": model | {"weights": str(tmp_path / "ten.pt")}}
    metadata = run_preflight(StudySpec.from_dict(settings), {"cpu"})
    assert metadata["weights"] == "16 of 16 tensors from ten.pt; the head too"
    settings["search"]["space"]["model"] = {"weights": [str(tmp_path / "ten.pt"), str(tmp_path / "two.pt")]}
    searched = run_preflight(StudySpec.from_dict(settings | {"model": model}), {"cpu"})
    assert searched["weights"].endswith("; 14 of 16 tensors from two.pt; the head is new (18.weight, 18.bias)")
    assert searched["weights_digest"].startswith(f"{metadata['weights_digest']}; ")


@pytest.mark.parametrize("given", [{"freeze": ["layer9"]}, {"groups": {"layer9": {"lr": 2.0}}}, {}])
def test_a_pattern_that_names_nothing_is_found_before_training(given: dict[str, Any]) -> None:
    settings = digits_spec(**given).frozen()
    if not given:
        settings["search"]["space"]["groups"] = {"layer9": {"lr": [1.0, 2.0]}}
    with pytest.raises(UserError, match="'layer9' names no module of the network"):
        run_preflight(StudySpec.from_dict(settings), {"cpu"})


def test_a_precision_that_a_device_lacks_is_found_before_training() -> None:
    with pytest.raises(UserError, match="bf16"):
        run_preflight(digits_spec(precision="bf16"), {"cpu"})


@pytest.mark.parametrize("searched", [False, True])
def test_a_network_that_cannot_compute_its_activations_again_is_found_before_training(
    searched: bool, own_code: Path
) -> None:
    (own_code / "flat.py").write_text(FLAT)
    settings = digits_spec(activation_checkpointing=not searched).frozen()
    if searched:
        settings["search"]["space"]["activation_checkpointing"] = [False, True]
    run_preflight(StudySpec.from_dict(settings), {"cpu"})
    with pytest.raises(UserError, match=r"needs a network with an nn\.Sequential of several layers.*'flat:network'"):
        run_preflight(StudySpec.from_dict(settings | {"model": {"name": "flat:network"}}), {"cpu"})


FLAT = """
from torch import nn

class Flat(nn.Linear):
    def forward(self, images):
        return super().forward(images.flatten(1))

def network(*, channels, num_classes):
    return Flat(1024 * channels, num_classes)
"""


def test_a_users_function_is_imported_and_not_called(
    make_spec: Callable[..., StudySpec], loop: Callable[[str], None]
) -> None:
    loop("raise ValueError('called')")
    assert run_preflight(make_spec(0.1), {"cpu"}) == {}


CPU = Device("cpu", "cpu", "a CPU", None)
SICK = Device("cuda:0", "cuda", "NVIDIA H100", None, uuid="GPU-aaaa0000")


@pytest.mark.slow
@needs_no_gpu
def test_a_device_that_cannot_be_used_is_found_before_training_and_the_others_do_without_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with proofs_of([SICK, CPU], precisions=["fp32"]) as proofs:
        check_devices([SICK, CPU], proofs)
    assert "the device cuda:0 cannot be used, so the others train its trials" in caplog.text
    with (
        proofs_of([SICK], precisions=["fp32"]) as proofs,
        pytest.raises(UserError, match="must name a device that can be used, and none can: cuda:0: ") as caught,
    ):
        check_devices([SICK], proofs)
    assert tells_why(str(caught.value))


def test_an_image_of_the_test_set_that_cannot_be_read_is_found_before_training(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 30)).save(tmp_path / part / name / f"{index}.png")
    spec = digits_spec()
    settings = {**spec.frozen(), "data": {"name": "image_folder", "root": str(tmp_path), "validation_fraction": 0.5}}
    assert run_preflight(StudySpec.from_dict(settings), {"cpu"})["images"] == "8 of 40x30 pixels, RGB 8"
    confirmed = StudySpec.from_dict({**settings, "confirm": {"top": 2, "seeds": 2}})
    (tmp_path / "test" / "dog" / "4.heic").write_bytes(b"")
    assert run_preflight(confirmed, {"cpu"})["images"].endswith(
        "RGB 8; for the test: 8 of 40x30 pixels, RGB 8; left out: 1 files that are not images (.heic 1)"
    )
    (tmp_path / "test" / "dog" / "3.png").write_bytes(b"half a download")
    run_preflight(StudySpec.from_dict(settings), {"cpu"})  # a study without a confirmation never measures it
    with pytest.raises(UserError, match=r"data\.root holds an image that cannot be read: .*test/dog/3\.png"):
        run_preflight(confirmed, {"cpu"})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model": {"name": "carries:network"}}, "model.name = 'carries:network' must build a new network"),
        ({"data": {"name": "carries:images"}}, "data.name = 'carries:images' must give the same images and labels"),
    ],
)
def test_what_carries_state_from_trial_to_trial_is_refused(
    setting: dict[str, Any], message: str, own_code: Path
) -> None:
    (own_code / "carries.py").write_text(CARRIES)
    with pytest.raises(UserError, match=message):
        run_preflight(StudySpec.from_dict({**digits_spec().frozen(), **setting}), {"cpu"})


def test_a_new_study_of_random_images_is_refused_and_an_older_one_goes_on(
    own_code: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (own_code / "draws.py").write_text(DRAWS)
    for factory, is_refused in (("data", True), ("val", True), ("still", False)):
        spec = StudySpec.from_dict({**digits_spec().frozen(), "data": {"name": f"draws:{factory}"}})
        metadata = run_preflight(spec, {"cpu"})
        with (
            pytest.raises(UserError, match=f"'draws:{factory}' transforms its images at random.*leave random")
            if is_refused
            else nullcontext()
        ):
            judge_random_images(spec, metadata, is_new=True)
        caplog.clear()
        judge_random_images(spec, metadata, is_new=False)  # such as one that an earlier version has made
        assert ("keep their first random version" in caplog.text) is is_refused


DRAWS = """
import numpy, torch

class Images(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.targets, self.transform = [index % 3 for index in range(60)], transform
    def __len__(self):
        return 60
    def __getitem__(self, index):
        image = torch.full((1, 32, 32), 4 * index, dtype=torch.uint8)
        return self.transform(image), index % 3

def noisy(image):
    return image + torch.randint(2, image.shape, dtype=torch.uint8)

def still():
    return Images(torch.clone), None
def data():
    return Images(noisy), None
def val():
    return Images(torch.clone), Images(noisy), None
"""


CARRIES = """
import numpy
from torch import nn

NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
IMAGES, LABELS = numpy.zeros((60, 1, 32, 32), "uint8"), numpy.arange(60) % 3

def network():
    return NETWORK

def images():
    global IMAGES
    IMAGES = IMAGES + numpy.uint8(1)
    return (IMAGES, LABELS), None
"""
