"""A worker's process as a study knows it, and what its death says of its trials."""

from __future__ import annotations

from typing import Literal

Process = tuple[str, int]  # the machine, as hpo.system.processes names it, and the pid
# What a death says of the trials: "crashed" and "killed" count against them, "gone" with a node or when asked does not.
Cause = Literal["crashed", "killed", "gone"]
