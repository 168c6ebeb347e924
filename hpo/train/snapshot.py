"""Snapshots: copies of a trial that cost the thread which trains little, and become checkpoints in another thread.

On a GPU the trial's tensors are packed into one buffer there, which is copied into pinned memory on a stream of its
own. The training thread launches that and goes on; whoever writes the checkpoint waits for it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hpo.train.checkpoint import Checkpoint, copy_to_cpu

PACKED_DEVICES = frozenset({"cuda"})  # kinds of device whose tensors are packed; from others each is copied at once
ALIGNMENT = 16  # bytes, of each tensor in the buffer: the size of the largest number, complex128


class Snapshot:
    """A trial after its last epoch, which later training does not change.

    The training thread takes it. Any other thread may then call `checkpoint`, one at a time.
    """

    def __init__(self, checkpoint: Checkpoint, packing: Packing) -> None:
        """Start to copy what is to be packed.

        Args:
            checkpoint: The trial, with the tensors that `packing.add` returned; they are not filled yet.
            packing: What its tensors were added to.
        """
        self.epoch = checkpoint.epoch
        self._checkpoint = checkpoint
        self._packing: Packing | None = packing
        packing.start()

    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint when all of it is in the host's memory; raise what copying it raised."""
        if self._packing is not None:
            self._packing.finish()
            self._packing = None  # frees the buffers
        return self._checkpoint


class Packing:
    """Tensors on one device that are copied to the CPU together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sources: list[Tensor] = []
        self._targets: list[tuple[Tensor, int]] = []  # on the CPU, and at which byte of the buffer each begins
        self._num_bytes = 0
        self._copy: HostCopy | None = None

    def add(self, tensor: Tensor) -> Tensor:
        """Return a copy on the CPU with the same strides; one that is packed holds nothing before `finish`."""
        is_plain = tensor.layout == torch.strided and not tensor.is_quantized
        if self._device.type not in PACKED_DEVICES or tensor.device != self._device or not is_plain:
            return copy_to_cpu(tensor)
        target = torch.empty_like(tensor, device="cpu", requires_grad=False)
        self._sources.append(tensor.detach())
        self._targets.append((target, self._num_bytes))
        self._num_bytes += -(-target.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
        return target

    def start(self) -> None:
        """Pack the tensors as they are now, and start to copy them; nothing waits for the device."""
        if not self._num_bytes:
            return
        try:
            packed = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
            for source, (target, start) in zip(self._sources, self._targets, strict=True):
                _place(packed, start, like=target).copy_(source)
            self._copy = HostCopy(packed)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            # No room on the device, or none that can be pinned on the host, costs time and not the trial. A device that
            # is of no use any more raises again.
            for source, (target, _) in zip(self._sources, self._targets, strict=True):
                target.copy_(source)
        self._sources.clear()

    def finish(self) -> None:
        """Wait for the copy, and fill the tensors that `add` returned."""
        if self._copy is not None:
            packed = self._copy.wait()
            for target, start in self._targets:
                target.copy_(_place(packed, start, like=target))


class HostCopy:
    """A copy of a buffer on a GPU into pinned memory, on a stream of its own."""

    def __init__(self, packed: Tensor) -> None:
        stream = _side_stream(packed.device)
        self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        # Blocking, or the thread that waits would keep a core busy.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(packed.device))
        with torch.cuda.stream(stream):
            self._host.copy_(packed, non_blocking=True)
            self._done.record(stream)
        packed.record_stream(stream)  # until it is copied, nothing else gets its memory

    def wait(self) -> Tensor:
        """Return the buffer in pinned memory when it is there."""
        self._done.synchronize()
        return self._host


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # Of another pool than streams of the usual priority, so that no trial is trained on it.
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def _place(packed: Tensor, start: int, *, like: Tensor) -> Tensor:
    """Return the part of a buffer that begins at a byte, as a tensor like another one."""
    num_bytes = like.untyped_storage().nbytes()
    return packed[start : start + num_bytes].view(like.dtype).as_strided(like.shape, like.stride())
