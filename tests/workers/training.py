"""Studies that a worker in this process trains, and what is compared of their trials."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hpo.config.study_spec import StudySpec
from hpo.store.store import Store
from hpo.study.records import StudyRecord, TrialRecord
from hpo.workers.worker import Worker


def work(store: Store, study: StudyRecord, *, should_stop: Callable[[], bool] = lambda: False) -> list[TrialRecord]:
    """Run a worker in this thread until it ends, and return the trials."""
    Worker(store, study, device="cpu", torch_device="cpu", should_stop=should_stop).run()
    return store.trials.get_all(study)


@contextmanager
def working(store: Store, study: StudyRecord, **options: Any) -> Iterator[None]:
    """Run a worker in another thread, which has ended after the block."""
    thread = threading.Thread(target=lambda: work(store, study, **options), daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=500)
        assert not thread.is_alive()


def engine_study(
    store: Store,
    *lrs: float,
    name: str = "digits",
    keep_best: int = 1,
    lanes: int | str = 1,
    pruner: dict[str, Any] | None = None,
    **training: Any,
) -> StudyRecord:
    """Create a study of a small network on the digits, with a grid of learning rates."""
    spec = StudySpec.from_dict(
        {
            "name": name,
            "pruner": pruner or {"name": "none"},
            "engine": {"lanes": lanes},
            "search": {"sampler": "grid", "space": {"lr": list(lrs)}},
            "model": {"name": "article_cnn", "width": 0.05},
            "data": {"name": "digits", "train_samples": 100, "validation_fraction": 0.2},
            "training": {"epochs": 2, "optimizer": "adam", "batch_size": 50, **training},
            "checkpoints": {"keep_best": keep_best},
        }
    )
    return store.studies.create(spec, metadata={})


SEVERAL = (1e-4, 3e-4, 1e-3, 3e-3, 1e30)


def curves(trial: TrialRecord) -> dict[str, Any]:
    """Return the trial's curves but the time that its epochs took."""
    return {name: values for name, values in trial.curves.items() if name != "seconds"}


def curves_of(trials: list[TrialRecord]) -> list[Any]:
    """Return for each trial its state, its epochs and its curves."""
    return [(trial.state, trial.epochs, curves(trial)) for trial in trials]


# A loop that stays in its first epoch until there is a file "go".
HELD = """
for epoch in range(1, trial.epochs + 1):
    if trial.report(epoch, val_accuracy=epoch):
        return
    while epoch == 1 and not pathlib.Path(__file__).with_name("go").exists():
        time.sleep(0.01)
"""
