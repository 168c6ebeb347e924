"""What a worker process is told by whoever starts it, through its environment."""

from __future__ import annotations

import json
from dataclasses import dataclass

from hpo.trust import Allowed

ASSIGNMENT = "HPO_WORKER"  # environment variable with the Assignment; not on the command line, where anyone reads it


@dataclass(frozen=True)
class Assignment:
    """What a worker process is started with."""

    storage: str
    study: str
    device: str  # as users name it, and as it is recorded
    torch_device: str  # as torch names it in the worker's process
    threads: int
    allowed: Allowed  # whose code it may import


def read_assignment(text: str) -> Assignment:
    """The inverse of `json.dumps(dataclasses.asdict(assignment))`."""
    values = json.loads(text)
    modules, folders = (tuple(values["allowed"][key]) for key in ("modules", "folders"))
    return Assignment(**{**values, "allowed": Allowed(modules, folders)})
