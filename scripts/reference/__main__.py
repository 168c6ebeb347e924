"""Write docs/reference/ from the code.

python -m scripts.reference            # write the pages
python -m scripts.reference --check    # exit with 1 where a page is not what the code says
"""

from __future__ import annotations

import argparse
import sys

from scripts.reference.render import FOLDER, render_pages


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/reference/ from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    is_check = parser.parse_args().check
    is_outdated = False
    for name, text in render_pages().items():
        path = FOLDER / name
        if path.exists() and path.read_text() == text:
            continue
        is_outdated = True
        if is_check:
            print(f"{path} is not what the code says; run: python -m scripts.reference")
        else:
            path.write_text(text)
            print(f"wrote {path}")
    sys.exit(1 if is_check and is_outdated else 0)


if __name__ == "__main__":
    main()
