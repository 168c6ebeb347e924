"""CUDA graphs, emulated on a CPU: the operations of one run, repeated on the same memory with the numbers of that run.

As in a real graph, whatever the host computed in the first run stays as it was. So a lane trains by replays as the
plain engine does only if all that changes from step to step is on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpo.train.engines.captured import _EagerRunner


class RecordedGraph(TorchDispatchMode):
    """A mode that records operations; `replay` repeats them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again; each result goes where it went in the first run."""
        for function, args, kwargs, result in self._calls:
            given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            again = function(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # no view, and nothing changed in place
                    old.copy_(new)


class ReplayingRunner(_EagerRunner):
    """Runs a lane's functions as `_GraphRunner` does: warm-ups, one recording each, and replays from then on."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._graphs: dict[int | str, RecordedGraph] = {}

    def capture(self, functions: Mapping[int | str, Callable[[], None]], *, before_each: Callable[[], None]) -> None:
        super().capture(functions, before_each=before_each)
        for name, function in functions.items():
            before_each()
            graph = RecordedGraph()
            with graph:
                function()
            self._graphs[name] = graph

    def run(self, name: int | str, function: Callable[[], None]) -> None:
        graph = self._graphs.get(name)
        super().run(name, function if graph is None else graph.replay)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
