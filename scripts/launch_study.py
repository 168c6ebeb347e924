"""Launch a study from Python: build its spec, run it, use its answer.

    python scripts/launch_study.py                        # the scanned digits, a minute or two on two cores
    python scripts/launch_study.py --data mnist --storage sqlite:///mnist.db

`hpo.run` does what `hpo run` does, with the same checks and workers. Run again, it answers from the store.
"""

from __future__ import annotations

import argparse

import hpo


def main() -> None:
    parser = argparse.ArgumentParser(description="Search Adam's learning rate for a small CNN.")
    parser.add_argument("--data", default="digits", help="digits, mnist, cifar10, ...")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--storage", help="URL of the store; default HPO_STORAGE, else sqlite:///hpo.db")
    arguments = parser.parse_args()

    spec = hpo.StudySpec.from_dict(
        {
            "name": f"script-{arguments.data}",
            "search": {
                "sampler": "tpe",
                "trials": arguments.trials,
                "space": {"lr": {"low": 1e-5, "high": 1e-1, "log": True}},
            },
            "pruner": {"name": "median", "warmup_epochs": 2},
            "model": {"name": "article_cnn", "width": 0.25},
            "data": {"name": arguments.data, "validation_fraction": 0.2, "train_samples": 1000},
            "training": {"epochs": arguments.epochs, "batch_size": 64, "optimizer": "adam"},
        }
    )
    result = hpo.run(spec, storage=arguments.storage)
    print(f"train with lr = {result.best.lr:.2e}, the answer of all trials together")
    value = f"validation accuracy {result.best.value:.1%}"
    print(f"best single trial: #{result.best.trial}, {value} (optimistic: the best of many)")
    for trial in result.trials:
        print(f"  trial {trial.number}: lr {trial.params['lr']:.2e} {trial.state}: {trial.reason}")


if __name__ == "__main__":
    main()
