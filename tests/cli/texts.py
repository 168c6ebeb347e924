"""A study in which every text that a user, a loop, a machine or a store can choose is the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from click.testing import CliRunner, Result
from hypothesis import strategies as st

from hpo.cli.app import main
from hpo.config.study_spec import StudySpec
from hpo.store.schema import studies_table
from hpo.store.store import Store
from hpo.study.records import StudyRecord

# Any text, half characters too, and often what rich, a terminal, a page or a writing direction obeys.
TRAPS = (
    "[/conv]",
    "[conv]",
    "[bold]",
    ":smile:",
    "<img src=x>",
    "%{x}",
    "$x$",
    "```",
    "_a_",
    "&lt;",
    "\x1b[31m",
    "\x1b]0;t\x07",
)
TURNS = ("\u202e", "\u2066", "\ud800", "\r\n", "\t", "\x9b2J", "\u2028", "\0", "\ufeff", "\x7f")
texts = st.lists(
    st.one_of(
        st.text(st.characters(), max_size=4), st.characters(max_codepoint=0x9F), st.sampled_from([*TRAPS, *TURNS])
    ),
    min_size=1,
    max_size=6,
).map("".join)


@dataclass
class Texts:
    """The store of such a study, in a folder of its own; `spec_text` is what of the text a study file can hold."""

    folder: Path
    text: str

    def __post_init__(self) -> None:
        self.spec_text = self.text.encode(errors="replace").decode()
        self.key = "k" + self.spec_text.replace("[", "(")
        self.url = f"sqlite:///{self.folder}/texts.db"
        self.store = Store(self.url, create=True)
        self.study = self._study()

    def hpo(self, *arguments: str, charset: str = "utf-8") -> Result:
        environment: Mapping[str, str] = {"HPO_STORAGE": self.url}
        return CliRunner(charset=charset).invoke(main, arguments, prog_name="hpo", env=environment)

    def _study(self) -> StudyRecord:
        settings = {
            "name": "s",
            "search": {"sampler": "grid", "retries": 0, "space": {"lr": [0.1, 0.2, 0.3], self.key: [self.spec_text]}},
            "training": {"epochs": 1},
            "objective": {"function": "loop:train", "metric": f"m{self.spec_text}"},
        }
        spec, store = StudySpec.from_dict(settings), self.store
        study = store.studies.create(spec, metadata={})
        worker = store.workers.add(study.study_id, device=self.spec_text, host=self.spec_text)
        names = ("host", "device", "git_revision")
        for end in ("complete", "failed", "running"):
            claim = store.trials.claim(study, worker)
            assert claim is not None
            store.trials.suggest(claim, spec, attributes=lambda _: dict.fromkeys(names, self.text) | {"seed": 1})
            store.trials.note(claim, self.text)
            metrics = {spec.metric: 0.5, self.text: 0.25}
            store.trials.report(claim, spec, epoch=1, metrics=metrics, value=0.5, may_prune=False)
            if end == "complete":
                store.trials.finish(claim, "complete", reason=self.text)
            elif end == "failed":
                store.trials.fail(claim, spec, reason=self.text, error=self.text, failure_key="k")
        store.workers.count_device_failure(study, device=self.text, host=self.text, reason=self.text)
        with store.database.transaction() as connection:
            connection.execute(sa.update(studies_table).values(stop="failure", stop_reason=self.spec_text))
        return store.studies.get("s")
