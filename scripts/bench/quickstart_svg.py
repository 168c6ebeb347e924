"""Draw the answer of a study for the README: what the terminal shows at its end, as SVG.

python -m scripts.bench.quickstart_svg quickstart --output docs/quickstart.svg
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.terminal_theme import MONOKAI

from hpo.analysis.answer import find_best
from hpo.api.stores import storage_url
from hpo.display.console import PlainConsole
from hpo.display.terminal import heading, print_answer
from hpo.store.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the answer of a study as SVG.")
    parser.add_argument("study")
    parser.add_argument("--output", required=True, metavar="FILE.svg")
    parser.add_argument("--storage", help="URL of the store; default HPO_STORAGE, else sqlite:///hpo.db")
    arguments = parser.parse_args()

    store = Store(storage_url(arguments.storage))
    study = store.studies.get(arguments.study)
    trials = store.trials.get_all(study)
    found = find_best(study, trials)
    assert found is not None, "the study has no complete trial"
    console = PlainConsole(record=True, width=118, file=io.StringIO(), force_terminal=True)
    console.print(heading(study))
    print_answer(
        console,
        study,
        trials,
        found,
        storage=arguments.storage or "sqlite:///hpo.db",
        is_trained=True,
        verbose=False,
        next_steps=[],
    )
    svg = console.export_svg(title=f"hpo run studies/{arguments.study}.toml", theme=MONOKAI)
    # The image must ask no other host for its fonts.
    Path(arguments.output).write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
