"""Take a screenshot for the README: the report of a study as a browser shows it.

python -m scripts.bench.report_png quickstart --output docs/report.png
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from hpo.api.exporting import report
from scripts.bench.report import FLAGS

WIDTH, HEIGHT = 960, 1110  # of the page, in pixels


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description="Take a screenshot of a study's report.")
    parser.add_argument("study")
    parser.add_argument("--output", required=True, metavar="FILE.png")
    parser.add_argument("--storage", help="URL of the store; default HPO_STORAGE, else sqlite:///hpo.db")
    arguments = parser.parse_args()

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium is not None, "there is no Chromium here"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = report(arguments.study, Path(folder) / "report.html", storage=arguments.storage)
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready-ms]", timeout=60_000)
        page.screenshot(path=arguments.output)
        browser.close()


if __name__ == "__main__":
    main()
