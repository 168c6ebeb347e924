"""Exceptions in training: their message, what they say of memory and of the device, whether two are the same failure.

The words are those of torch 2.14 (`c10/cuda`, `ATen/cuda`, `torch/cuda/__init__.py`), of CUDA 13's `cudaGetErrorString`
and of Triton 3.8, with the names that CuPy, JAX and Numba give to the same errors.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

from hpo.errors import UserError

OWN_CODE_FOLDER = Path(__file__).parents[1]  # our own code

OUT_OF_MEMORY = "out of memory"  # the failure key of every trial that ran out of memory, on whichever line

# "memory": the memory of the host or of a device ran out; as a rule, the process can go on.
# "broken": the device's hardware failed; no trial is to blame.
# "unusable": no process can use the device, or this one cannot.
# "poisoned": no later kernel of this process will run. The trial may be the cause, such as by a label out of range, or
# the device; only a new process can tell.
FailureKind = Literal["memory", "broken", "unusable", "poisoned"]

# In lower case. The first table with words that fit decides.
MEMORY_WORDS = (
    "out of memory",  # of the CUDA, HIP and MPS allocators, of cudaGetErrorString, of XLA
    "can't allocate memory",  # torch on a CPU
    "cannot allocate memory",  # the kernel (ENOMEM)
    "not enough memory: you tried to allocate",  # torch on a CPU, elsewhere than on Linux
    "_alloc_failed",  # CUBLAS_STATUS_, CUDNN_STATUS_, CUSOLVER_STATUS_ and CUSPARSE_STATUS_, CUFFT_
    "allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, and _HOST_
    "cudaerrormemoryallocation",
)
BROKEN_WORDS = (
    "ecc error",
    "uncorrectable nvlink error",
    "peer gpu memory over nvlink or a hardware error",
    "gpu is lost",
    "fallen off the bus",
)
UNUSABLE_WORDS = (
    "no cuda gpus are available",
    "found no nvidia driver",
    "nvidia driver on your system is too old",
    "unexpected error from cudagetdevicecount",
    "cuda unknown error - this may be due to an incorrectly set up environment",
    "cuda driver version is insufficient",
    "cuda driver is a stub library",
    "no cuda-capable device is detected",
    "busy or unavailable",
    "system has unsupported display driver",
    "system not yet initialized",
    "forward compatibility was attempted on non supported hw",
    "no kernel image is available",
    "invalid device ordinal",
    "gpu access blocked by the operating system",
    "mps client failed to connect",
    "mps server is not ready",
    "resources required to create mps client have been exhausted",
)
POISONED_WORDS = (
    "cuda error",
    "cuda driver error",
    "hip error",
    "cudnn error",
    "cublas_status_",
    "cusolver error",
    "cusparse_status_",
    "cufft error",
    "triton error [cuda]",
    "triton error [hip]",
    "device-side assert",
    "cudaerror",  # CuPy: "cudaErrorIllegalAddress: an illegal memory access was encountered"
    "cuda_error_",  # the driver's names: JAX, Numba, CuPy
)


def failure_key(error: BaseException) -> str:
    """Return a text that is equal for two exceptions of the same type raised at the same place."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY  # wherever it ran out
    frame: TracebackType | None = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame is not None else ""
    return f"{type(error).__name__} {place}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of the host or of a device ran out."""
    return failure_kind(error) == "memory"


def failure_kind(error: BaseException) -> FailureKind | None:
    """Return what an exception says of memory and of the device; None where it says nothing of them.

    A device's error is looked for in what the exception was raised from, or while handling, too: a user's loop may wrap
    it, and no later kernel would run all the same.
    """
    own = _own_kind(error)
    if own is not None:
        return own
    kinds = [_own_kind(cause) for cause in _causes(error)]
    return next((kind for kind in kinds if kind not in (None, "memory")), None)


def error_message(error: BaseException) -> str:
    """Return the text of an exception, or nothing where it cannot give one."""
    try:
        return str(error)
    except Exception:  # the exception's own class is the user's code, which may raise one itself
        return ""


def failure_text(error: BaseException) -> str:
    """Return an exception with its traceback; of a UserError the message and the lines of the user's own code."""
    if not isinstance(error, UserError):
        return "".join(traceback.format_exception(error))
    tracebacks = [raised.__traceback__ for raised in (error.__cause__, error) if raised is not None]
    frames = [frame for trace in tracebacks for frame in traceback.extract_tb(trace)]
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(OWN_CODE_FOLDER)]
    return "".join([*traceback.format_list(own), error_message(error), "\n"])


def first_line(error: BaseException) -> str:
    """Return the type of an exception and the first line of its text."""
    return f"{type(error).__name__}: {error_message(error)}".split("\n")[0]


def _own_kind(error: BaseException) -> FailureKind | None:
    text = error_message(error).lower()
    if isinstance(error, MemoryError) or any(words in text for words in MEMORY_WORDS):
        return "memory"
    if "torch not compiled with cuda enabled" in text:
        return "unusable"  # an AssertionError
    # Libraries raise RuntimeError for a device. A ValueError that mentions CUDA is somebody's check of arguments.
    if isinstance(error, RuntimeError):
        if any(words in text for words in BROKEN_WORDS):
            return "broken"
        if any(words in text for words in UNUSABLE_WORDS):
            return "unusable"
        if any(words in text for words in POISONED_WORDS):
            return "poisoned"
    # torch's own type for whatever an accelerator reports
    return "poisoned" if any(base.__name__ == "AcceleratorError" for base in type(error).__mro__) else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions behind this one, the nearest first."""
    seen = {id(error)}
    cause = error.__cause__ or error.__context__
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
