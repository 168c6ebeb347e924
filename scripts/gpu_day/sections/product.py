"""`hpo run` itself, where what it needs was carried along: the article's study, from the command to the answer."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from scripts.gpu_day.common import TINY_WIDTH, Section
from scripts.gpu_day.packages import modules_needed
from scripts.gpu_day.sections.article import EPOCHS, LRS, NUM_IMAGES, NUM_VAL
from scripts.gpu_day.stand_in import is_here

STUDY = """
name = "article"

[search]
sampler = "grid"
space = {{ lr = {lrs} }}

[model]
width = {width}

[data]
name = "scripts.gpu_day.noise:study_data"
num_images = {num_images}
num_classes = {num_classes}
validation_fraction = {validation_fraction}

[training]
epochs = {epochs}
"""
ENDING_S = 4.0  # what is left of the section's time when the command is told to stop


def run(section: Section) -> None:
    missing = [name for name in modules_needed() if not is_here(name)]
    if missing:
        section.say("article", f"not run: {', '.join(missing)} is not here; see --packages")
        return
    folder = section.folder / "product"
    folder.mkdir(exist_ok=True)
    (folder / "study.toml").write_text(
        STUDY.format(
            lrs=list(section.pick(LRS, LRS[1:2])),
            width=section.pick(1.0, TINY_WIDTH),
            num_images=section.pick(NUM_IMAGES + NUM_VAL, 40),
            num_classes=section.pick(100, 4),
            validation_fraction=section.pick(NUM_VAL / (NUM_IMAGES + NUM_VAL), 0.5),
            epochs=section.pick(EPOCHS, 1),
        )
    )
    with section.trying("article"):
        start_s = time.monotonic()
        code, output = run_command(section, folder)
        is_whole = code == 0 and not section.is_tiny
        total_s = time.monotonic() - start_s
        section.say("article", {"code": code, "total_s": total_s, "is_whole": is_whole})
        section.say("answer", output[-1500:])
        assert code == 0, f"hpo run ended with {code}; its output is under product.answer"


def run_command(section: Section, folder: Path) -> tuple[int, str]:
    """Run the study; return the exit code and what was printed. Told to stop, the command stops its workers."""
    store = f"sqlite:///{folder}/{time.time():.0f}.db"  # a new one, or a finished study would only be answered
    process = subprocess.Popen(
        [sys.executable, "-m", "hpo", "run", "study.toml", "--devices", "auto"],
        cwd=folder,
        env=section.environment() | {"HPO_STORAGE": store},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, section.left_s() - ENDING_S))
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate(timeout=ENDING_S)
    return process.returncode, output
