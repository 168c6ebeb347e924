"""Executors that cannot run a study refuse it in one sentence."""

from __future__ import annotations

import pytest

import hpo
from hpo.config.study_spec import StudySpec
from hpo.errors import UserError
from hpo.train.imports import ImportAllowlist
from hpo.workers.launching import make_launcher


@pytest.mark.parametrize("executor", [hpo.InProcess("cpu"), hpo.Ray()], ids=["in process", "ray"])
def test_a_trial_on_several_devices_needs_workers_of_this_machine(executor: hpo.InProcess | hpo.Ray) -> None:
    settings = {"name": "s", "search": {"space": {"lr": [0.1]}, "sampler": "grid"}, "engine": {"devices_per_trial": 2}}
    spec = StudySpec.from_dict(settings)
    with pytest.raises(UserError, match=r"engine\.devices_per_trial = 2 needs worker processes of this machine"):
        make_launcher(executor, spec, ImportAllowlist(), url="sqlite:///hpo.db")
    make_launcher(hpo.Local("cpu"), spec, ImportAllowlist(), url="sqlite:///hpo.db")
