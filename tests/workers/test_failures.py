"""When two exceptions are the same failure, and when memory ran out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hpo.store.ledger import OUT_OF_MEMORY
from hpo.workers.failures import error_message, failure_key, is_out_of_memory


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


def test_an_exception_that_cannot_give_its_text_has_none() -> None:
    assert error_message(MuteError()) == ""
    assert not is_out_of_memory(MuteError())
