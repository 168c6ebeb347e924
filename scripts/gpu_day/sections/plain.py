"""The plain engine on the GPU against itself on the CPU: fp32 with and without TF32, bf16, fp16, and what diverges."""

from __future__ import annotations

from typing import Any

from scripts.gpu_day.common import (
    CPU,
    Section,
    Trained,
    difference,
    on_gpu,
    plain_engine,
    small_trial,
    train,
    with_training,
)

DIVERGING_LRS = (0.3, 1e30)


def run(section: Section) -> None:
    epochs = section.pick(3, 2)
    config = small_trial(section)
    cpu = train(plain_engine(CPU), config, epochs=epochs)
    section.say("cpu", {"train_losses": train_losses(cpu)})

    def compare(key: str, **training: Any) -> None:
        with section.trying(key):
            trained = train(plain_engine(), with_training(config, **training), epochs=epochs)
            section.say(key, difference(config, cpu, trained) | {"train_losses": train_losses(trained)})

    if not on_gpu():
        section.say("gpu", "nothing to compare on a CPU but the engine with itself")
    compare("fp32_without_tf32")
    compare("fp32_without_tf32_again")
    compare("fp32_with_tf32", tf32=True)
    compare("bf16", precision="auto")
    if plain_engine().device.type == "cuda":  # also where a test pretends that there is a GPU
        compare("fp16", precision="fp16")
    for lr in DIVERGING_LRS:
        with section.trying(f"diverged.{lr:g}"):
            diverging = with_training(small_trial(section, model="article_cnn"), lr=lr, precision="auto")
            ends = {
                name: train(plain_engine(there), diverging, epochs=1) for name, there in (("cpu", CPU), ("gpu", None))
            }
            section.say(f"diverged.{lr:g}", {name: end.results[0].diverged for name, end in ends.items()})


def train_losses(trained: Trained) -> list[float]:
    """Return the training loss of each epoch."""
    return [result.train_loss for result in trained.results]
