"""A loop of a user's own that trains by its study's recipe: exactly as hpo trains without it, also when interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.api import running
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.store.store import Store
from hpo.workers.executors import InProcess
from hpo.workers.preflight import run_preflight
from tests.workers.training import curves, work

LOOP = """
from pathlib import Path

def train(trial):
    recipe = trial.recipe
    while recipe.epoch < trial.epochs:
        for step, (images, labels) in enumerate(recipe.batches()):
            if recipe.epoch == 1 and step == 1 and (crash := Path(__file__).with_name("crash")).exists():
                crash.unlink()
                raise OSError("the power went")
            recipe.step(recipe.loss(recipe.outputs(images), labels))
        metrics = recipe.finish_epoch()
        end = trial.report(recipe.epoch, **metrics, test_accuracy=recipe.test_accuracy)
        recipe.save()
        if end:
            return

def lazy(trial):
    list(trial.recipe.batches())
    trial.recipe.finish_epoch()
"""
OBJECTIVE = {"function": "loop:train", "recipe": True}


def make(*lrs: float, own: bool = True, **settings: Any) -> StudySpec:
    """Return the spec of a study of a small network, with a schedule, dropped learning rates and augmentation."""
    search = {"sampler": "grid", "space": {"lr": list(lrs)}, "retries": 1}
    training = {"epochs": 2, "batch_size": 20, "optimizer": "adam", "schedule": "plateau", "plateau_epochs": 0}
    sections: dict[str, Any] = {
        "name": "own" if own else "ours",
        "search": search,
        "model": {"name": "article_cnn", "width": 0.05},
        "data": {"name": "digits", "train_samples": 100, "validation_fraction": 0.2, "crop": 2},
        "training": training | {"gradient_clip": 1.0, "warmup_epochs": 1, "ema": 0.9},
        **({"objective": OBJECTIVE} if own else {"engine": {"lanes": 1}}),
    }
    return StudySpec.from_dict(sections | settings)


@pytest.fixture
def loop(own_code: Path) -> Path:
    """Write the loop, and return its folder."""
    (own_code / "loop.py").write_text(LOOP)
    return own_code


def test_a_loop_trains_bit_for_bit_as_hpo_does_and_resumes_where_it_crashed(store: Store, loop: Path) -> None:
    expected = work(store, store.studies.create(make(1e-3, 1e30, own=False), metadata={}))
    for crashes in (False, True):
        if crashes:
            (loop / "crash").touch()
        spec = make(1e-3, 1e30, name=f"own-{crashes}")
        fine, diverged = work(store, store.studies.create(spec, metadata={}))
        assert (fine.attempt, fine.state) == (1 + crashes, "complete")
        assert (diverged.state, diverged.reason) == ("diverged", expected[1].reason)
        for trial, ours in zip((fine, diverged), expected, strict=True):
            assert curves(trial) == {name: curve for name, curve in curves(ours).items() if name != "train_accuracy"}


def test_a_range_test_finds_the_range_of_a_loop_with_a_recipe(loop: Path, tmp_path: Path) -> None:
    space = {"lr": "auto"}
    spec = make(search={"sampler": "random", "trials": 2, "space": space}, training={"epochs": 1, "batch_size": 20})
    result = running.run(spec, executor=InProcess("cpu"), storage=f"sqlite:///{tmp_path}/hpo.db", code_folder=loop)
    assert [trial.state for trial in result.trials] == ["complete"] * 2
    assert result.best.range_test is not None


def test_the_preflight_tries_the_network_and_leaves_the_test_set_to_the_loop(loop: Path) -> None:
    metadata = run_preflight(make(1e-3, confirm={"top": 1, "seeds": 2}), ["cpu"])
    assert metadata["num_classes"] == 10
    assert "has_test" not in metadata


def test_a_loop_that_leaves_batches_out_fails_with_a_sentence(store: Store, loop: Path) -> None:
    spec = make(1e-3, objective={"function": "loop:lazy", "recipe": True})
    (trial,) = work(store, store.studies.create(spec, metadata={}))
    assert str(trial.reason).startswith("UserError: recipe.step must be called once for each of the 5 batches")


def test_a_recipe_that_was_not_asked_for_is_a_sentence(
    store: Store, loop: Path, make_spec: Callable[..., StudySpec]
) -> None:
    (trial,) = work(store, store.studies.create(make_spec(0.1), metadata={}))
    assert str(trial.reason).startswith("UserError: trial.recipe needs objective.recipe = true")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": {"lr": 0.1, "mixup": 0.2}}, "training.mixup has no effect with objective.function, whose own"),
        (
            {"objective": {"lightning": "a:b", "recipe": True}},
            "objective.recipe cannot be used with objective.lightning",
        ),
        ({"objective": {"function": "loop:train"}}, "has no effect with objective.function, whose own code decides it"),
    ],
)
def test_settings_that_the_loop_does_not_read_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(1e-3, **settings)
