"""First steps: a study file for the data and the code in the working directory, and examples of code to change.

Nothing is imported, and no file is written over.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpo.config.checks import check_name
from hpo.config.study_file import examples_folder
from hpo.errors import UserError
from hpo.train.data.datasets import TORCHVISION_FOLDERS
from hpo.train.data.folders import (
    PARTS,
    class_names,
    is_hidden_name,
    is_image,
    listed,
    misnamed_parts,
    validation_folder,
)

EXAMPLES = {"model": "own_model:small_resnet", "data": "own_data:load", "loop": "own_loop:train"}
KIND_WORDS = {"model": "a network", "data": "a data set", "loop": "a training loop"}
COMMENT_COLUMN = 45


@dataclass(frozen=True)
class FirstSteps:
    """What a first study trains with, and on what."""

    found: list[str] = field(default_factory=list)  # what was found, a sentence each
    code: dict[str, str] = field(default_factory=dict)  # `module:name` of a "model", of "data" and of a "loop"
    data: list[str] = field(default_factory=list)  # the lines of [data]


def write_first_study(name: str, *, examples: Collection[str] = ()) -> list[str]:
    """Write NAME.toml for what the working directory holds, and examples of users' own code.

    Args:
        name: The study.
        examples: Which examples to write and to use: some of "model" and "data", or "loop".

    Returns:
        What was found and written, a sentence each.

    Raises:
        UserError: The name is none of a study, a file exists, or the examples exclude each other.
    """
    name = name.removesuffix(".toml")
    check_name(name)
    if "loop" in examples and len(examples) > 1:
        raise UserError("--loop writes a training loop, which has its own model and data: leave out --model and --data")
    steps = _look_around(Path())
    if "loop" in examples:
        steps = FirstSteps()  # a loop has its own model and data
    elif examples:
        steps.code.pop("loop", None)
    files = {}
    for kind in examples:
        steps.code[kind] = EXAMPLES[kind]
        file = f"{EXAMPLES[kind].partition(':')[0]}.py"
        files[file] = (examples_folder() / file).read_text(encoding="utf-8")
    files[f"{name}.toml"] = "\n".join(_study_lines(name, steps)) + "\n"
    for file in files:
        if os.path.lexists(file):
            way_out = (
                "give another NAME" if file == f"{name}.toml" else "leave out the option that writes it, to use it"
            )
            raise UserError(f"{file} exists, and hpo init overwrites no file: remove it, or {way_out}")
    for file, text in files.items():
        with open(file, "x", encoding="utf-8") as writing:
            writing.write(text)
    return [*(f"found {text}" for text in steps.found), *(f"wrote {file}" for file in files)]


# What there is


def _look_around(folder: Path) -> FirstSteps:
    """Return what a folder holds to train with: its modules, a folder of images, data sets of torchvision's."""
    code = _own_code(folder)
    found = [f"{name}, {KIND_WORDS[kind]} of your own" for kind, name in code.items()]
    if "loop" in code or "data" in code:
        return FirstSteps(found, code)
    folders = list(_folders(folder))
    for root in folders:
        if len(classes := class_names(root / "train")) > 1:
            found.append(f"{len(classes)} classes of images in {root / 'train'}: {listed(dict.fromkeys(classes))}")
            is_split = validation_folder(root) is not None
            return FirstSteps(found, code, _image_lines(root, "ROOT/train/<class>/", is_split=is_split))
    for root in reversed(folders):
        if misnamed := misnamed_parts(root):
            found.append(
                f"images in {root} ({' and '.join(misnamed)}), but no {root / 'train'}: "
                "rename the folder of the training images to train"
            )
        elif len(classes := _classes_of_a_folder(root)) > 1:
            found.append(f"{len(classes)} classes of images in {root}: {listed(dict.fromkeys(classes))}")
            return FirstSteps(found, code, _image_lines(root, "ROOT/<class>/", is_split=False))
    for name, subfolder in TORCHVISION_FOLDERS.items():
        for base in (Path(os.environ.get("HPO_DATA", "data")), Path("data")):
            if any((root / subfolder).is_dir() for root in (base, base / name)):
                found.append(f"{name} in {base}")
                few = _setting("train_samples", 5000, "for a first answer soon; leave it out to train on all")
                return FirstSteps(found, code, [f'name = "{name}"', few])
    found.append("no data, so the study trains on scikit-learn's scanned digits")
    return FirstSteps(found, code, ['name = "digits"', "validation_fraction = 0.2"])


def _folders(folder: Path) -> Iterator[Path]:
    """Yield a folder, those in it, and those in its folder data/."""
    yield folder
    for parent in (folder, folder / "data"):
        if parent.is_dir():
            yield from sorted(path for path in parent.iterdir() if path.is_dir() and not is_hidden_name(path.name))


def _classes_of_a_folder(root: Path) -> list[str]:
    """Return the folders in a folder that is no part of a data set, if each of them holds an image itself."""
    if root.name.casefold() in PARTS:
        return []
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden_name(path.name)]
    have_images = all(any(is_image(file) for file in path.iterdir()) for path in folders)
    return [path.name for path in folders] if have_images else []


def _own_code(folder: Path) -> dict[str, str]:
    """Return `module:name` of the first network, data set and training loop that modules of a folder define."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        if not path.stem.isidentifier() or path.stem.startswith("test_"):
            continue
        try:
            module = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in module.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            if (kind := _kind_of(node)) is not None:
                found.setdefault(kind, f"{path.stem}:{node.name}")
    return found


def _kind_of(node: ast.ClassDef | ast.FunctionDef) -> str | None:
    """Return whether a definition makes a network or data, or is a training loop; None where it looks like neither."""
    if isinstance(node, ast.ClassDef):
        constructors = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        arguments = [_argument_names(one) for one in constructors]
        return "model" if any(_makes_network(required[1:], optional) for required, optional in arguments) else None
    required, optional = _argument_names(node)
    if _makes_network(required, optional):
        return "model"
    if required == ["trial"]:
        return "loop"
    returned = [one.value for one in ast.walk(node) if isinstance(one, ast.Return)]
    is_split = bool(returned) and all(isinstance(one, ast.Tuple) and len(one.elts) in (2, 3) for one in returned)
    return "data" if is_split and not required and {"data", "load"} & set(node.name.lower().split("_")) else None


def _argument_names(function: ast.FunctionDef) -> tuple[list[str], list[str]]:
    """Return the names of the arguments that a call must give, and of those that it may give."""
    given = function.args
    positional = [one.arg for one in (*given.posonlyargs, *given.args)]
    num_required = len(positional) - len(given.defaults)
    keywords = dict(zip([one.arg for one in given.kwonlyargs], given.kw_defaults, strict=True))
    required = positional[:num_required] + [name for name, default in keywords.items() if default is None]
    return required, positional[num_required:] + [name for name, default in keywords.items() if default is not None]


def _makes_network(required: Collection[str], optional: Collection[str]) -> bool:
    """Return whether a function with these arguments takes the number of classes, and needs no more than hpo gives."""
    return "num_classes" in {*required, *optional} and set(required) <= {"channels", "num_classes"}


# What is written


def _setting(key: str, value: object, comment: str) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return f"{f'{key} = {text}':<{COMMENT_COLUMN}}  # {comment}"


def _image_lines(root: Path, layout: str, *, is_split: bool) -> list[str]:
    """Return the lines of [data] for a folder of images; `is_split` where it has validation images of its own."""
    lines = [_setting("name", "image_folder", f"the images in {layout}")]
    lines += [_setting("root", str(root), "relative to this file"), "image_size = 32"]
    return lines if is_split else [*lines, _setting("validation_fraction", 0.2, "of the training images")]


def _study_lines(name: str, steps: FirstSteps) -> Iterator[str]:
    """Yield the lines of a study file."""
    code, is_own_loop = steps.code, "loop" in steps.code
    yield f"# Which learning rate should this network be trained with? The answer: hpo run {name}.toml"
    yield f'name = "{name}"'
    yield from ("", "[search]")
    yield _setting("trials", 12, "how many times the network is trained; more trials narrow the answer")
    yield from ("", "[search.space]")
    low_high = "lr = { low = 1e-5, high = 1e-1, log = true }"
    yield f"{low_high:<{COMMENT_COLUMN}}  # the learning rates to search; a warning says if the range is too narrow"
    if not is_own_loop:
        yield '# optimizer = ["adam", "sgd"]                  # any other setting can be searched, too'
    yield from ("", "[pruner]")
    yield _setting("name", "median", "drops trials that are worse than half of the others")
    yield "startup_trials = 4"
    if is_own_loop:
        yield from ("", "[objective]")
        yield _setting("function", code["loop"], "called once a trial; the values are in trial.params")
        yield f"{'# guess = 0.1':<{COMMENT_COLUMN}}  # the value of guessing: of an accuracy, 1 / classes"
        yield from ("", "[training]")
        yield _setting("epochs", 20, "trial.epochs")
        return
    yield from ("", "[model]")
    if "model" in code:
        yield _setting("name", code["model"], "called for each trial; further keys here are its options")
    else:
        yield _setting("name", "article_cnn", 'a small network for images of 32x32; or "torchvision:resnet18",')
        yield _setting("width", 0.25, 'or "module:name" for one of your own (hpo init --model)')
    yield from ("", "[data]")
    if "data" in code:
        yield _setting("name", code["data"], "called without arguments; further keys here are its options")
    yield from steps.data if "data" not in code else ()
    yield from ("", "[training]")
    yield from ("epochs = 8", "batch_size = 64", 'optimizer = "adam"')
    yield from ("", "[confirm]")
    yield _setting("top", 2, "train this many of the best rates again, to be sure,")
    yield _setting("seeds", 3, "each on this many fresh seeds; the winner is then tested")
