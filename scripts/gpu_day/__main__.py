"""Measure everything that a GPU should tell, in one command and eight minutes.

python -m scripts.gpu_day --out DIR                  # on a machine with a GPU and torch alone
python3 scripts/gpu_day --out DIR --tiny             # on a CPU: that every section works
python3 scripts/gpu_day --out DIR --only rates       # again, one section
python3 scripts/gpu_day --out DIR --only             # the table of what is there
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a folder, which is then the first place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.gpu_day.day import BUDGET_S, SECTIONS, Day, run_day
from scripts.gpu_day.figures import Figures
from scripts.gpu_day.stand_in import provide_annotated_types


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_day", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for figures.jsonl, gpu_day.json and the logs")
    parser.add_argument("--tiny", action="store_true", help="run every section at its smallest, also on a CPU")
    parser.add_argument("--only", nargs="*", choices=[*SECTIONS], metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help="seconds for all (default: 470)")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="what `hpo run` needs; docs/contributing/gpu.md")
    parser.add_argument("--section", choices=[*SECTIONS], help=argparse.SUPPRESS)  # run this one, in this process
    parser.add_argument("--started-at", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    folder = arguments.out.resolve()
    packages = arguments.packages and arguments.packages.resolve()
    if arguments.section:
        if packages is not None:
            sys.path.append(str(packages))  # behind this machine's own
            provide_annotated_types()
        from scripts.gpu_day.common import Section, run_section

        run_section(
            Section(
                figures=Figures(folder, arguments.section),
                is_tiny=arguments.tiny,
                folder=folder,
                packages=packages,
                started_at=arguments.started_at or time.time(),
                limit_s=arguments.budget,
            )
        )
        return
    sections = [name for name in SECTIONS if arguments.only is None or name in arguments.only]
    run_day(
        Day(
            folder=folder,
            sections=sections,
            is_tiny=arguments.tiny,
            packages=packages,
            budget_s=arguments.budget,
        )
    )


if __name__ == "__main__":
    main()
