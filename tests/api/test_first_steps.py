"""What `hpo init` finds and writes, and that it runs as it is."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import hpo
from hpo.api.first_steps import write_first_study
from hpo.errors import UserError

OWN = {
    "network": "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, num_classes, channels=1): ...\n",
    "images": "def load_data(root='x'):\n    return (1, 2), (3, 4)\n",
    "loop": "def _helper(trial): ...\ndef fit(trial, verbose=False): ...\n",
    "others": "def make(size, num_classes): ...\ndef load(path):\n    return 1, 2\ndef both():\n    return 1, 2\n",
    "broken": "def (:\n",
}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPO_DATA", raising=False)


def write_images(root: Path, *parts: str) -> None:
    for index, name in enumerate(("cat", "dog")):
        for part in parts:
            (root / part / name).mkdir(parents=True)
            for number in range(12):
                Image.new("L", (40, 40), 200 * index + number).save(root / part / name / f"{number}.png")


def modules(*names: str) -> None:
    for name in names:
        Path(f"{name}.py").write_text(OWN[name])


def write_classes_and_parts(classes: str, parts: str) -> None:
    write_images(Path(), classes)
    write_images(Path(parts), "train")


def write_images_and_code(root: Path) -> None:
    write_images(root, ".")
    (root / "src").mkdir()


FOLDERS: dict[str, tuple[Callable[[], object], dict[str, str]]] = {
    "nothing": (lambda: None, {"data.name": "digits", "model.name": "article_cnn"}),
    "images": (lambda: write_images(Path(), "train"), {"data.name": "image_folder", "data.root": "."}),
    "images below": (lambda: write_images(Path("data/pets"), "train", "val"), {"data.root": "data/pets"}),
    "classes": (lambda: write_images(Path(), "photos"), {"data.name": "image_folder", "data.root": "photos"}),
    "classes here": (lambda: write_images(Path(), "."), {"data.name": "image_folder", "data.root": "."}),
    "classes and parts": (lambda: write_classes_and_parts("docs", "photos"), {"data.root": "photos"}),
    "a project": (lambda: write_images_and_code(Path()), {"data.name": "digits"}),
    "cifar10": (lambda: Path("data/cifar10/cifar-10-batches-py").mkdir(parents=True), {"data.name": "cifar10"}),
    "mnist": (lambda: Path("data/MNIST/raw").mkdir(parents=True), {"data.name": "mnist"}),
    "network": (lambda: modules("network", "broken"), {"model.name": "network:Net", "data.name": "digits"}),
    "data": (lambda: modules("images", "network"), {"model.name": "network:Net", "data.name": "images:load_data"}),
    "loop": (lambda: modules("loop"), {"objective.function": "loop:fit"}),
    "no code of ours": (lambda: modules("others"), {"data.name": "digits", "model.name": "article_cnn"}),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_the_study_is_of_what_the_folder_holds(case: str) -> None:
    prepare, expected = FOLDERS[case]
    prepare()
    lines = write_first_study("first")
    assert lines[-1] == "wrote first.toml"
    text = Path("first.toml").read_text()
    settings = tomllib.loads(text)
    for setting, value in expected.items():
        section, _, key = setting.partition(".")
        assert settings[section][key] == value
    assert hpo.StudySpec.from_toml("first").name == "first"
    assert all(len(line) <= 120 for line in text.splitlines())


def test_what_was_seen_is_said() -> None:
    write_images(Path(), "photos")
    assert write_first_study("first") == ["found 2 classes of images in photos: cat, dog", "wrote first.toml"]
    Path("photos").rename("Training")
    write_images(Path(), "Testing")
    told = "found images in . (Testing and Training), but no train: rename the folder of the training images to train"
    assert told in write_first_study("second")


def test_an_example_of_a_loop_uses_nothing_that_is_there() -> None:
    modules("network")
    assert write_first_study("first", examples=["loop"]) == ["wrote own_loop.py", "wrote first.toml"]


RUNS = {"digits": [], "images": [], "classes": [], "model and data": ["model", "data"], "loop": ["loop"]}


@pytest.mark.parametrize(
    "case", [pytest.param("digits", marks=pytest.mark.slow), "images", "classes", "model and data", "loop"]
)
def test_what_is_written_runs_as_it_is(case: str) -> None:
    if case == "images":
        write_images(Path("pets"), "train", "val")
    if case == "classes":
        write_images(Path(), "pets")
    write_first_study("first", examples=RUNS[case])
    few = ["search.trials=1", "training.epochs=1"]
    spec = hpo.StudySpec.from_toml("first", overrides=[*few, *([] if case == "loop" else ["confirm.top=1"])])
    result = hpo.run(spec, executor=hpo.InProcess("cpu"), storage="sqlite:///hpo.db", code_folder=".")
    assert result.best.value > 0


def test_nothing_is_written_over_and_a_request_that_cannot_be_met_writes_nothing() -> None:
    write_first_study("first", examples=["model"])
    written = {path.name: path.read_text() for path in Path().iterdir()}
    for name, examples, message in (
        ("first.toml", [], r"first.toml exists"),
        ("second", ["data", "model"], r"own_model.py exists"),
        ("second", ["loop", "model"], "leave out --model and --data"),
        ("a/b", [], "name must be letters"),
    ):
        with pytest.raises(UserError, match=message):
            write_first_study(name, examples=examples)
    assert {path.name: path.read_text() for path in Path().iterdir()} == written
