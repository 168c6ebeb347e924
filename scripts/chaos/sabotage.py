"""Faults of the product itself, one for each verdict, put in on purpose: `--sabotage NAME` must end in a violation.

A verdict that cannot fail would prove nothing. Each is Python that a worker runs after worker_side.py.
"""

SABOTAGE = {
    # 1: a trial that has ended is given out once more.
    "counts": """
import os
from hpo.store.schema import slots_table
from hpo.store.trials import Trials
finish = Trials.finish
def again(self, claim, state, **rest):
    finish(self, claim, state, **rest)
    if claim.number == 1 and not os.path.exists("given out again"):
        open("given out again", "x").close()
        with self._database.transaction() as connection:
            connection.execute(slots_table.update().where(slots_table.c.number == 1).values(state="waiting"))
Trials.finish = again
""",
    # 2: one parameter of each checkpoint is read as the next larger number.
    "bits": """
import torch
from hpo.train.checkpoint import CheckpointFolder
load = CheckpointFolder.load
def changed(self, config):
    found, passed_over = load(self, config)
    if found is not None:
        parameter = next(iter(found.state["model"].values())).view(-1)[:1]
        torch.nextafter(parameter, torch.full_like(parameter, torch.inf), out=parameter)
    return found, passed_over
CheckpointFolder.load = changed
""",
    # 3: no checkpoint is found.
    "redone": """
from hpo.train.checkpoint import CheckpointFolder
CheckpointFolder.load = lambda self, config: (None, [])
""",
    # 4: whoever has ever had a slot may write to it.
    "stale": """
from hpo.store import ledger
ledger.is_held = lambda claim: (
    (ledger.slots_table.c.study_id == claim.study_id) & (ledger.slots_table.c.number == claim.number)
)
""",
    # 4: workers leave processes behind.
    "left": """
import os, subprocess, sys
from hpo.store.trials import Trials
finish = Trials.finish
def leave_one(self, claim, state, **rest):
    finish(self, claim, state, **rest)
    environment = {**os.environ, "HPO_WORKER": "left behind", "PYTHONPATH": ""}
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment, start_new_session=True)
Trials.finish = leave_one
""",
}
