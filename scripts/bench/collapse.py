"""Measure how far apart a network's outputs are when it is drawn, slow, learning and dead: the basis of `SAME_OUTPUT`.

    python -m scripts.bench.collapse                                  # the small CNN on the scanned digits, a minute
    python -m scripts.bench.collapse --width 1 --data image_folder --root FOLDER_OF_CIFAR10

Prints, for each learning rate of Adam, the output spread after each epoch, as the module `divergence` defines it.
"""

from __future__ import annotations

import argparse

from hpo.train.config import DataConfig, ModelConfig, TrainingConfig, TrialConfig
from hpo.train.engines.divergence import output_spread
from hpo.train.engines.plain import PlainEngine

LEARNING_RATES = (1e-9, 1e-5, 1e-4, 1e-3, 5e-3, 1e-2, 1e-1)


def main() -> None:
    """Train at each learning rate with each seed, and print a line for each."""
    parser = argparse.ArgumentParser(description="Measure output spreads of living and dead networks.")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-samples", type=int, default=1000)
    arguments = parser.parse_args()

    engine = PlainEngine(device="cpu")
    print(f"{'lr':>8} {'seed':>4}  output spread after each epoch (verdict)")
    for lr in LEARNING_RATES:
        for seed in range(arguments.seeds):
            lane = engine.admit(
                TrialConfig(
                    model=ModelConfig(options={"width": arguments.width}),
                    data=DataConfig(name=arguments.data, root=arguments.root, train_samples=arguments.train_samples),
                    training=TrainingConfig(lr=lr, batch_size=64, epochs=arguments.epochs),
                    seed=seed,
                )
            )
            cells = []
            for _ in range(arguments.epochs):
                (result,) = engine.run_epoch()
                trained = engine._lane
                assert trained is not None
                spread = output_spread(trained.model, trained.data)
                if result.diverged:
                    cells.append(f"{spread:.2g} ({result.diverged})")
                    break
                cells.append(f"{spread:.2g}")
            engine.evict(lane)
            print(f"{lr:>8.0e} {seed:>4}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
