"""How large the report of a study is, and how long a browser takes until all of it is drawn.

The study is made up: trials of three optimizers over a learning rate and a batch size, complete, pruned and diverged,
each with its curves. The page is opened from disk, each time in a fresh headless Chromium. It is ready when the last
figure is drawn. Next to the time on the clock the bench prints the processor time of the page's main thread, which
other work on the machine does not lengthen. `make bench-report` runs it.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from hpo.analysis import answer as analysis
from hpo.config.study_spec import StudySpec
from hpo.reports import render as report
from hpo.reports import study_report
from hpo.study.records import Attempt, StudyRecord, TrialRecord

TOPS = {"adam": -3.0, "sgd": -1.2, "rmsprop": -3.4}  # log10 of the best learning rate
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def make_study(trials: int, epochs: int) -> tuple[StudyRecord, list[TrialRecord]]:
    """Return a study of so many trials, trained on eight devices; equal arguments make equal trials."""
    lr = {"low": 1e-5, "high": 1.0, "log": True}
    space = {"lr": lr, "optimizer": list(TOPS), "batch_size": {"low": 32, "high": 256, "log": True}}
    settings = {"search": {"trials": trials, "space": space}, "training": {"epochs": epochs}}
    metadata = {"num_train": 45_000, "num_val": 5_000, "num_classes": 10, "num_parameters": 5_200_000}
    spec = StudySpec.from_dict({"name": "made-up", **settings})
    free = [1.7e9] * 8
    draw = random.Random(0)
    made = [_trial(number, epochs, draw, free) for number in range(trials)]
    return StudyRecord(1, spec.name, spec, metadata | {"uid": "00000000"}, None, None, 1.7e9), made


def _trial(number: int, epochs: int, draw: random.Random, free: list[float]) -> TrialRecord:
    optimizer = draw.choice(list(TOPS))
    lr = 10 ** draw.uniform(-5, 0)
    off = math.log10(lr) - TOPS[optimizer]
    height = 0.9 - 0.09 * off**2 + draw.gauss(0, 0.012)
    state, last = "complete", epochs
    if off > 1.1 + draw.gauss(0, 0.08):
        state, last = "diverged", draw.randint(1, 2)
    elif height < 0.8 and draw.random() < 0.8:
        state, last = "pruned", draw.choice([2, 3, 5, 9])
    values = [max(0.1, height * (1 - math.exp(-0.45 * epoch)) + draw.gauss(0, 0.006)) for epoch in range(1, last + 1)]
    worker = min(range(len(free)), key=lambda index: free[index])
    began, ended = free[worker], free[worker] + last * draw.uniform(25, 40)
    free[worker] = ended + 2
    host, device = f"machine-{worker // 4}", f"cuda:{worker % 4}"
    curves = {"train_loss": [2.3 * (1 - value) for value in values], "val_accuracy": values}
    return TrialRecord(
        number=number,
        state=state,
        value=values[-1] if state != "diverged" else None,
        attempt=1,
        params={"lr": lr, "optimizer": optimizer, "batch_size": draw.choice([32, 64, 128, 256])},
        reason=f"{state} after epoch {last}",
        error=None,
        worker_id=f"worker{worker}",
        attributes={"host": host, "device": device, "versions": {"torch": "2.8.0"}, "git_revision": "0" * 40},
        started=began,
        ended=ended,
        epochs=range(1, last + 1),
        curves=curves | {"test_accuracy": [value - 0.01 for value in values]},
        attempts=[Attempt(1, f"worker{worker}", host, device, began, ended, 0, 0, state, None, None)],
    )


def ready(page_file: Path, chromium: str, *, width: int) -> tuple[float, float]:
    """Return the seconds until every figure of a page is drawn: by the clock, and of the page's main thread."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 900})
        devtools = page.context.new_cdp_session(page)
        devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready-ms]", timeout=120_000)
        took = float(page.evaluate("document.documentElement.dataset.readyMs")) / 1000
        metrics: dict[str, Any] = {
            metric["name"]: metric["value"] for metric in devtools.send("Performance.getMetrics")["metrics"]
        }
        browser.close()
    return took, float(metrics["TaskDuration"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", nargs="+", type=int, default=[30, 1000])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium is not None, "there is no Chromium here"
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        "seconds: median (least to most)"
    )
    print(f"{'trials':>6} {'width':>5} {'MB':>5} {'made':>6}  {'ready':>18}  {'main thread':>18}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for trials in arguments.trials:
            study, made = make_study(trials, arguments.epochs)
            best = analysis.find_best(study, made)
            began = time.perf_counter()
            content = report.render_report(study_report.make_report(study, made, best, storage=""), "html")
            took = time.perf_counter() - began
            path = Path(folder) / "report.html"
            path.write_bytes(content)
            for width in (390, 1280):
                times = [ready(path, chromium, width=width) for _ in range(arguments.times)]
                cells = [
                    f"{statistics.median(some):6.2f} ({min(some):.2f} to {max(some):.2f})"
                    for some in zip(*times, strict=True)
                ]
                print(f"{trials:6} {width:5} {len(content) / 1e6:5.2f} {took:6.2f}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
