"""What a training step calls, seen on a CPU: which operations would make a GPU wait, and which launch kernels there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that read a value to the host, or whose result has a size that depends on values.
WAITING = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "repeat_interleave", "unique_consecutive", "unique_dim",
}  # fmt: skip
# Operations that launch no kernel: they look at memory in another way, or reserve some.
FREE = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "expand", "movedim", "new_empty_strided",
    "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold",
    "unsqueeze", "view",
}  # fmt: skip


class Calls(TorchDispatchMode):
    """A mode that notes each operation with all that is no value of a tensor: what a captured graph would keep."""

    def __init__(self, *, on_host: Callable[[Tensor], bool] = lambda tensor: False) -> None:
        """Note operations, but for reading a value of a tensor that a GPU's trial keeps on the host."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_host = on_host
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.__name__.split(".")[0]
        if name == "_local_scalar_dense" and self._on_host(args[0]):
            return function(*args)
        leaves = tree_leaves((args, kwargs or {}))
        given = [(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
        self.seen.append((name, tuple(given)))
        return function(*args, **(kwargs or {}))

    @property
    def waiting(self) -> list[str]:
        """Return the operations that make the host wait for the device."""
        by_mask = {"index", "index_put", "index_put_"}
        return [
            name
            for name, given in self.seen
            if name in WAITING or (name in by_mask and any(torch.bool in leaf for leaf in given[1:] if len(leaf) == 2))
        ]

    @property
    def launches(self) -> list[str]:
        """Return the operations that launch kernels."""
        return [name for name, _ in self.seen if name not in FREE]
