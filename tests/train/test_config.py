"""Configurations compare by value, and seeds derived from one are the same everywhere."""

from __future__ import annotations

from dataclasses import replace

from hpo.train.config import DataConfig, derive_seed


def test_derived_seeds_are_the_same_everywhere() -> None:
    assert derive_seed(0, "data", 1) == derive_seed(0, "data", 1) != derive_seed(0, "data", 2)
    assert derive_seed(1, "2") != derive_seed("1", 2) != derive_seed(12, "")
    seeds = [derive_seed(0, "trial", number) for number in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "data", 1) == 479118118  # a new value would change every study's results


def test_configs_compare_by_value() -> None:
    """The engine keeps the data of trials whose configs are equal."""
    config = DataConfig(options={"a": 1})
    assert config == DataConfig(options={"a": 1}) != replace(config, flip=True)
