"""What the preflight finds of a study; tests of the command line hold what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.workers.preflight import run_preflight


def digits_spec(**training: object) -> StudySpec:
    """Return a study of a small network on the digits."""
    return StudySpec.from_dict(
        {
            "name": "digits",
            "search": {"sampler": "grid", "space": {"lr": [1e-3]}},
            "model": {"name": "article_cnn", "width": 0.05},
            "data": {"name": "digits", "train_samples": 200, "validation_fraction": 0.2},
            "training": {"epochs": 1, **training},
        }
    )


def test_the_preflight_finds_the_data_and_the_network_and_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    metadata = run_preflight(digits_spec(), {"cpu"})
    assert torch.equal(torch.random.get_rng_state(), before)
    sizes = {key: metadata[key] for key in ("num_train", "num_val", "num_classes", "channels", "image_size")}
    assert sizes == {"num_train": 200, "num_val": 288, "num_classes": 10, "channels": 1, "image_size": 32}
    assert metadata["num_parameters"] > 0


def test_a_precision_that_a_device_lacks_is_found_before_training() -> None:
    with pytest.raises(UserError, match="bf16"):
        run_preflight(digits_spec(precision="bf16"), {"cpu"})


def test_a_users_function_is_imported_and_not_called(
    make_spec: Callable[..., StudySpec], loop: Callable[[str], None]
) -> None:
    loop("raise ValueError('called')")
    assert run_preflight(make_spec(0.1), {"cpu"}) == {}
