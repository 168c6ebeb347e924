"""The tables [search] and [pruner] of a study file, as frozen models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from hpo.search.space import Categorical, Conditional, Parameter, Scalar, grid_points, parse_space


class Section(BaseModel):
    """A table of the study file: frozen, of known keys only."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SearchSpec(Section):
    """What is searched: the sampler, how many trials, and the space (`parameters` is the space, parsed)."""

    sampler: str = "tpe"
    trials: int | None = None
    seed: int = 0
    retries: int = 1  # how often a trial that an exception ended is tried again
    space: dict[str, Any] = Field(default_factory=dict)
    try_first: list[dict[str, Any]] = Field(default_factory=list)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        return parse_space(self.space, grid=self.sampler == "grid")

    @cached_property
    def grid(self) -> list[dict[str, Scalar]]:
        """Every combination of a grid, in the order of the study file with `try_first` in front."""

        def place(point: dict[str, Scalar]) -> int:
            return next(
                (i for i, first in enumerate(self.try_first) if first.items() <= point.items()), len(self.try_first)
            )

        return sorted(grid_points(self.parameters), key=place)

    def listed_values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a trial's values that come from a list, its learning rate and its seed aside."""
        listed = {}
        for key, parameter in self.parameters.items():
            found = (
                parameter.cases.get(str(params.get(parameter.by))) if isinstance(parameter, Conditional) else parameter
            )
            if isinstance(found, Categorical) and key not in ("lr", "seed"):
                listed[key] = params.get(key)
        return listed


class PrunerSpec(Section):
    """Which trials are dropped early. None means the pruner's own default, listed in `hpo.search.pruners.PRUNERS`."""

    name: str = "none"
    startup_trials: int | None = None
    warmup_epochs: int | None = None
    percentile: float | None = None
    min_epochs: int | None = None
    reduction_factor: int | None = None
    patience: int | None = None
    min_delta: float | None = None
    lower: float | None = None
    upper: float | None = None


class SearchSettings(Protocol):
    """What samplers and pruners read of a study's settings; a StudySpec has it."""

    @property
    def name(self) -> str: ...
    @property
    def search(self) -> SearchSpec: ...
    @property
    def pruner(self) -> PrunerSpec: ...
    @property
    def num_trials(self) -> int: ...
    @property
    def max_epochs(self) -> int: ...
