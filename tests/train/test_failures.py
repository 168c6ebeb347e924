"""When two exceptions are the same failure, and what an exception says of memory and of the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hpo.train.failures import OUT_OF_MEMORY, error_message, failure_key, failure_kind, is_out_of_memory


class MuteError(Exception):
    """An exception of the user's, which cannot give its text."""

    def __str__(self) -> str:
        raise ZeroDivisionError


def fail_here(error: BaseException) -> None:
    raise error


def fail_there(error: BaseException) -> None:
    raise error


def raised(error: BaseException, place: Callable[[BaseException], None]) -> BaseException:
    """Return the exception after it was raised at a place."""
    with pytest.raises(type(error)) as caught:
        place(error)
    return caught.value


def test_failures_are_the_same_where_type_and_place_are_whatever_their_text() -> None:
    key = failure_key(raised(ValueError("3 images"), fail_here))
    assert key == failure_key(raised(ValueError("4 images"), fail_here))
    assert key != failure_key(raised(TypeError("3 images"), fail_here))
    assert key != failure_key(raised(ValueError("3 images"), fail_there))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_running_out_of_memory_is_one_failure_wherever_it_happens(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert failure_key(raised(error, fail_here)) == failure_key(raised(error, fail_there)) == OUT_OF_MEMORY


class CompilerError(RuntimeError):
    """An exception of a library that wraps what a device has raised."""


def accelerator_error(text: str) -> BaseException:
    """Return torch's exception of a device; its name alone says what it is."""
    error_type: type[BaseException] = getattr(torch, "AcceleratorError", type("AcceleratorError", (RuntimeError,), {}))
    return error_type(text)


ECC = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported"
KINDS = [
    # The memory of a device or of the host
    (MemoryError(), "memory"),
    (OSError(12, "Cannot allocate memory"), "memory"),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "memory",
    ),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"), "memory"),
    (accelerator_error("CUDA error: out of memory"), "memory"),
    (RuntimeError("CUDA driver error: out of memory"), "memory"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "memory"),
    (RuntimeError("CUDA ran out of memory outside PyTorch's allocator."), "memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "memory"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "memory"),
    (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), "memory"),
    # The device's hardware
    (accelerator_error(ECC), "broken"),
    (RuntimeError(ECC), "broken"),
    (RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"), "broken"),
    (RuntimeError("CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error"), "broken"),
    # A device that no process can use, or that this one cannot
    (RuntimeError("No CUDA GPUs are available"), "unusable"),
    (RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"), "unusable"),
    (RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."), "unusable"),
    (RuntimeError("CUDA error: CUDA driver version is insufficient for CUDA runtime version"), "unusable"),
    (AssertionError("Torch not compiled with CUDA enabled"), "unusable"),
    (RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment, e.g."), "unusable"),
    (RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"), "unusable"),
    (accelerator_error("CUDA error: no CUDA-capable device is detected"), "unusable"),
    (accelerator_error("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "unusable"),
    (accelerator_error("CUDA error: no kernel image is available for execution on the device"), "unusable"),
    (accelerator_error("CUDA error: invalid device ordinal"), "unusable"),
    (RuntimeError("CUDA error: system has unsupported display driver / cuda driver combination"), "unusable"),
    (RuntimeError("CUDA error: MPS client failed to connect to the MPS control daemon or the MPS server"), "unusable"),
    # A process that the error has left unable to compute
    (RuntimeError("CUDA error: device-side assert triggered"), "poisoned"),
    (accelerator_error("CUDA error: an illegal memory access was encountered"), "poisoned"),
    (accelerator_error("of another wording"), "poisoned"),
    (RuntimeError("CUDA error: unspecified launch failure"), "poisoned"),
    (RuntimeError("CUDA driver error: unknown error"), "poisoned"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "poisoned"),
    (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`"), "poisoned"),
    (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate`"), "poisoned"),
    (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "poisoned"),
    (RuntimeError("HIP error: unspecified launch failure"), "poisoned"),
    (RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered"), "poisoned"),
    (CompilerError("backend='inductor' raised: RuntimeError: Triton Error [CUDA]: misaligned address"), "poisoned"),
    # What is of none of these kinds
    (ValueError("device must be cpu or cuda, got 'CUDA error'"), None),
    (ValueError("no kernel image is available"), None),
    (KeyError("cuda:0"), None),
    (AssertionError("CUDA error"), None),
    (RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu!"), None),
    (RuntimeError("Cannot re-initialize CUDA in forked subprocess."), None),
    (RuntimeError("GET was unable to find an engine to execute this computation"), None),
    (MuteError(), None),
]


@pytest.mark.parametrize(("error", "kind"), KINDS)
def test_what_an_exception_says_of_memory_and_of_the_device(error: BaseException, kind: str | None) -> None:
    assert failure_kind(error) == kind
    assert is_out_of_memory(error) == (kind == "memory")


def test_a_devices_error_is_found_behind_the_exception_that_it_was_wrapped_in() -> None:
    def wrapped(cause: BaseException, *, explicitly: bool) -> BaseException:
        try:
            try:
                raise cause
            except BaseException as caught:
                if explicitly:
                    raise ValueError("the epoch failed") from caught
                raise ValueError("the file could not be closed")  # noqa: B904
        except ValueError as error:
            return error

    assert_error = RuntimeError("CUDA error: device-side assert triggered")
    assert failure_kind(wrapped(assert_error, explicitly=True)) == "poisoned"
    assert failure_kind(wrapped(assert_error, explicitly=False)) == "poisoned"
    # Memory that ran out and was handled is not what failed later.
    assert failure_kind(wrapped(torch.OutOfMemoryError("CUDA out of memory."), explicitly=False)) is None
    assert failure_kind(wrapped(KeyError("lr"), explicitly=False)) is None


def test_an_exception_that_cannot_give_its_text_has_none() -> None:
    assert error_message(MuteError()) == ""
    assert not is_out_of_memory(MuteError())
