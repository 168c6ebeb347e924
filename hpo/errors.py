"""Errors that a user can mend: one clear sentence with the setting, the rule and the value, never a traceback."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_VALID_NAMES = 30  # that a message lists
OTHER_WORDS = {  # what other libraries call a setting, and what it is called here
    "learning_rate": "lr",
    "lr_scheduler": "schedule",
    "scheduler": "schedule",
    "optim": "optimizer",
    "wd": "weight_decay",
    "bs": "batch_size",
    "criterion": "loss",
    "grad_clip": "gradient_clip",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "n_epochs": "epochs",
    "num_trials": "trials",
    "n_trials": "trials",
    "dataset": "data",
    "subset": "train_samples",
    "max_samples": "train_samples",
    "network": "model",
    "cosineannealinglr": "cosine",
    "cosineannealingwarmrestarts": "cosine_restarts",
    "reducelronplateau": "plateau",
    "crossentropyloss": "cross_entropy",
    "bcewithlogitsloss": "bce",
    "f1": "macro_f1",
    "top1": "val_accuracy",
    "map": "average_precision",
    "min": "low",
    "max": "high",
}
OWN_CODE = "package.module:"  # begins the entry of a list of names that stands for users' own code


class UserError(Exception):
    """A wrong request; the command line prints the message alone and exits with 2."""

    exit_code = 2


class StudyStopped(Exception):
    """A study that could not finish; the command line prints the message alone and exits with 1.

    `can_resume` is true where the same command, given again, has something left to do. `interrupted` is true where
    Ctrl-C or SIGTERM ended the study.
    """

    def __init__(self, message: str, *, can_resume: bool = False, interrupted: bool = False) -> None:
        super().__init__(message)
        self.can_resume = can_resume
        self.interrupted = interrupted


@dataclass(frozen=True)
class Rule:
    """A field's rule in words ("... must be WORDS, got ..."), for fields whose bounds alone do not tell it."""

    words: str


def unknown_name(setting: str, value: object, valid: Iterable[str], *, unlisted: Iterable[str] = ()) -> UserError:
    """Return the error for a name that is not in a table: setting, value, and the names, of many the nearest.

    Args:
        setting: What has the name.
        value: The name.
        valid: The valid names. One that begins with OWN_CODE stands for users' own code.
        unlisted: Further valid names, such as `torchvision:resnet18`, that are suggested but not listed.
    """
    valid, text = sorted(valid), str(value)
    shown = valid
    if len(valid) > MAX_VALID_NAMES:
        shown = difflib.get_close_matches(text, valid, n=MAX_VALID_NAMES, cutoff=0.0)
    names = ", ".join(shown) + (f" ({len(valid)} in all)" if len(valid) > len(shown) else "")
    return UserError(f"{setting} must be one of {names}; got {value!r}{did_you_mean(text, [*valid, *unlisted])}")


def did_you_mean(value: str, valid: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` where it can be told which valid name is meant, else the empty text."""
    near = _meant_name(value, list(valid))
    return f" (did you mean {near!r}?)" if near else ""


def _meant_name(value: str, valid: Sequence[str]) -> str | None:
    """Return the valid name, or users' own `package.module:name`, that a wrong name stands for; None if unknown."""
    # Capitals, and what stands before the last dot or colon, are what people add or forget: torch.optim.Adam, resnet18.
    parts = re.split(r"[.:]", value.lower())
    if (word := OTHER_WORDS.get(parts[-1])) in valid:
        return word
    known = [name for name in valid if not name.startswith(OWN_CODE)]
    same = [name for name in known if name.rpartition(":")[2].lower() == parts[-1]]
    of_origin = [name for name in same if name.startswith(f"{parts[0]}:")]
    if of_origin or (same and parts[0] in ("torch", parts[-1])):
        return [*of_origin, *same][0]
    if any(name.startswith(OWN_CODE) for name in valid) and (own := _own_code_name(value)):
        return own
    of_origin = [name for name in known if ":" in value and name.startswith(f"{parts[0]}:")]
    by_last = {name.rpartition(":")[2].lower(): name for name in reversed(of_origin or known)}
    last = value.lower().removeprefix(f"{parts[0]}:") if of_origin else value.lower()
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.65)
    return by_last[near[0]] if near else None


def _own_code_name(value: str) -> str | None:
    """Return `package.module:name` for `package.module.name`, `package/module.py:name` and the like, else None.

    Of a path that leads elsewhere it is `module:name`, which is found if its folder is on Python's path.
    """
    if re.match(r"\.\./|/|~", value):
        value = value.rpartition("/")[2]
    path = re.fullmatch(r"(?:\./)?([A-Za-z_]\w*(?:[./][A-Za-z_]\w*)*?)(?:\.py)?[.:]([A-Za-z_]\w*)", value)
    if path is None:
        return None
    name = "NAME" if path[2] == "py" else path[2]
    return f"{path[1].replace('/', '.')}:{name}"


def check_keys(section: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Raise `UserError` for the first key of a section that is not valid; the section "" is the file itself."""
    valid = sorted(valid)
    for key in given:
        if key not in valid:
            name = f"{section}.{key}" if section else key
            raise UserError(f"unknown key {name}{did_you_mean(key, valid)}; valid keys: {', '.join(valid)}")
