"""What a new study learns from earlier ones: where to begin. Their trials are no evidence for its answer."""

from __future__ import annotations

from typing import Any

from hpo.analysis.answer import find_best
from hpo.config.earlier_studies import with_first_points
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.search.space import Conditional
from hpo.store.database import NoStore
from hpo.store.store import Store


def learn(spec: StudySpec, url: str) -> StudySpec:
    """Return the spec with the learning rates that `search.learn_from` recommends among the points to try first.

    Args:
        spec: A study that is not stored yet.
        url: The store, which has the earlier studies.

    Raises:
        UserError: An earlier study is not there or has no answer, or its rate does not fit into the space.
    """
    for name in spec.search.learn_from:
        point = _recommended_by(name, spec, url)
        if point in spec.search.try_first:
            continue
        try:
            spec = with_first_points(spec, [point])
        except UserError as error:
            values = ", ".join(f"{key} = {value}" for key, value in point.items())
            raise UserError(
                f"search.learn_from names {name!r}, which recommends {values}; this cannot be tried first: {error}"
            ) from error
    return spec


def _recommended_by(name: str, spec: StudySpec, url: str) -> dict[str, Any]:
    """Return the learning rate that a study recommends; where it depends on another parameter here, that one, too."""
    setting = f"search.learn_from names {name!r}"
    if name == spec.name:
        raise UserError(f"{setting}, which is this study")
    try:
        store = Store(url)
    except NoStore:
        raise UserError(
            f"{setting}, which must be in the store of this study, and there is no store yet; --storage or HPO_STORAGE "
            "names the one that has it"
        ) from None
    study = store.studies.get(name)
    best = find_best(study, store.trials.get_all(study))
    if best is None or best.lr is None:
        raise UserError(f"{setting}, which recommends no learning rate yet")
    lr = spec.search.parameters["lr"]
    if not isinstance(lr, Conditional):
        return {"lr": best.lr}
    section, _, key = lr.by.rpartition(".")
    case = best.recommended.get(lr.by, study.spec.frozen().get(section or "training", {}).get(key))
    if case is None:
        raise UserError(f"{setting}, which does not say for which {lr.by} it recommends its learning rate")
    return {lr.by: case, "lr": best.lr}
