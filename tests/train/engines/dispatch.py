"""What a step would cost a GPU, seen on a CPU: the operations that it calls, those that wait and those that launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that read a value to the host, or whose result has a size that depends on values.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
# Operations that launch no kernel: they look at memory in another way, or reserve some.
FREE = {
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "expand",
    "movedim",
    "new_empty_strided",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsqueeze",
    "view",
}


class Calls(TorchDispatchMode):
    """A mode that notes each operation with all that is no value of a tensor: what a captured graph would keep.

    Operations on `on_host` alone are left out: they are on the host on a GPU's machine, too.
    """

    def __init__(self, *, on_host: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, tuple[Any, ...]]] = []
        self._on_host = {tensor.data_ptr() for tensor in on_host}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.__name__.split(".")[0]
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        given = [(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
        is_profiling = name.startswith("_record_function")
        if not is_profiling and (not tensors or any(tensor.data_ptr() not in self._on_host for tensor in tensors)):
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
