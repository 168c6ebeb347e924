"""Folders of images, a folder for each class: which files are images, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpo.errors import UserError
from hpo.train.data.images import FileImages
from hpo.train.data.progress import ReadingProgress

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jif",
        ".jfif",
        ".jp2",
        ".j2k",
        ".png",
        ".apng",
        ".bmp",
        ".dib",
        ".gif",
        ".webp",
        ".avif",
        ".tif",
        ".tiff",
        ".tga",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pcx",
        ".ico",
        ".sgi",
    ]
)
VALIDATION_FOLDERS = ("val", "valid", "validation")
PARTS = frozenset(["train", "training", "test", "testing", "dev", "eval", *VALIDATION_FOLDERS])  # not names of classes
UNUSED_BITS = (
    2  # of white: where files of 16 bits leave so many unused, at most 64 of 256 levels are left, and it is said
)
MAX_NAMES = 5  # that are listed of suffixes, folders and modes


@dataclass(frozen=True)
class FoundImages:
    """The images of a folder by their class, in order, and what is left out, a few words each."""

    images: Mapping[str, Sequence[Path]]
    left_out: Sequence[str]


def scan_folder(folder: Path) -> FoundImages:
    """Find the images of FOLDER/<class>/ and its sub-folders, as torchvision's ImageFolder does; hidden files are none.

    A class without an image is left out. Raises UserError where a folder cannot be read.
    """
    try:
        return _scan(folder)
    except OSError as error:
        raise UserError(f"data.root holds a folder that cannot be read: {error.filename} ({error.strerror})") from error


def _scan(folder: Path) -> FoundImages:
    images, empty, others = dict[str, list[Path]](), list[str](), list[Path]()
    for class_folder in _class_folders(folder):
        files = sorted(files_below(class_folder))
        found = [path for path in files if is_image(path)]
        others += [path for path in files if not is_image(path)]
        if found:
            images[class_folder.name] = found
        else:
            empty.append(class_folder.name)
    outside = [path for path in folder.iterdir() if is_image(path) and path.is_file()]
    left_out = []
    if others:
        suffixes = Counter(path.suffix.lower() or "no ending" for path in others)
        left_out.append(f"{len(others)} files that are not images ({listed(suffixes)})")
    if outside:
        left_out.append(f"{len(outside)} images outside the folders of the classes")
    if empty:
        left_out.append(f"folders without an image ({listed(dict.fromkeys(empty))})")
    return FoundImages(images, left_out)


def describe_images(images: FileImages) -> str:
    """Return how many images there are, of what sizes and modes, and what was left out; read the head of each file."""
    sizes, modes, brightest = Counter[tuple[int, int]](), Counter[str](), 0
    progress = ReadingProgress("the sizes of", len(images.paths))
    for path in images.paths:
        size, mode = images.read_head(path)
        sizes[size] += 1
        modes[mode] += 1
        if mode.startswith("I;16"):
            brightest = max(brightest, images.brightest(path))
        progress.add(1)
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    pixels = " to ".join(dict.fromkeys(f"{width}x{height}" for width, height in (by_area[0], by_area[-1])))
    text = f"{len(images.paths):,} of {pixels} pixels, {listed(modes)}"
    needed_bits = max(9, brightest.bit_length())
    if brightest and needed_bits <= images.bits - UNUSED_BITS:
        text += (
            f"; the largest value in images of 16 bits is {brightest:,}: set data.bits = {needed_bits} if that is white"
        )
    return f"{text}; left out: {'; '.join(images.left_out)}" if images.left_out else text


def listed(counts: Mapping[str, int | None]) -> str:
    """Return the names with their counts, the most frequent first, and how many more there are."""
    names = sorted(counts, key=lambda name: (-(counts[name] or 0), name))
    shown = [f"{name} {counts[name]:,}" if counts[name] else name for name in names[:MAX_NAMES]]
    return ", ".join(shown + ([f"and {len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []))


def training_folder(root: Path) -> Path | None:
    """Return the folder that holds the folders of the classes: ROOT/train, or else ROOT; None where neither does."""
    if (root / "train").is_dir():
        return root / "train"
    return root if len(class_names(root)) > 1 and not misnamed_parts(root) else None


def class_names(folder: Path) -> list[str]:
    """Return the names of the folders in a folder that hold an image, also in their sub-folders."""
    return [path.name for path in _class_folders(folder) if any(is_image(file) for file in files_below(path))]


def misnamed_parts(root: Path) -> list[str]:
    """Return the folders in a ROOT without train/ that are parts of the data by their names and their classes."""
    parts = [path for path in _class_folders(root) if path.name.casefold() in PARTS]
    if any(path.name == "train" for path in parts):
        return []
    return [path.name for path in parts if len(class_names(path)) > 1]


def _class_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder but for hidden ones; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden_name(path.name))


def is_image(path: Path) -> bool:
    """Return whether a file's name ends as that of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def validation_folder(root: Path) -> str | None:
    """Return the name of the folder beside train/ that has the validation images, or None where there is none.

    Raises UserError where there are several.
    """
    found = [name for name in VALIDATION_FOLDERS if (root / name).is_dir()]
    if len(found) > 1:
        raise UserError(f"data.root must hold one folder of validation images, got {' and '.join(found)} in {root}")
    return found[0] if found else None


def other_folders(root: Path, used: Sequence[str] = ("train", "test")) -> list[str]:
    """Return what is left out of a folder that has others than those that are used, in a few words."""
    others = [path.name for path in _class_folders(root) if path.name not in used]
    return [f"folders next to {' and '.join(used)} ({listed(dict.fromkeys(others))})"] if others else []


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its sub-folders, also behind links, each folder once.

    Pipes and devices are no files: to open a pipe would wait for ever. A link to nothing is one, which cannot be read.
    Raises OSError where a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    visited = set[str]()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not is_hidden_name(name)]
        files = (Path(parent, name) for name in names if not is_hidden_name(name))
        yield from (path for path in files if path.is_file() or not path.exists())


def is_hidden_name(name: str) -> bool:
    """Return whether a file or a folder of this name is hidden."""
    return name.startswith(".")
