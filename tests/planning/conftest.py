"""Experiments as people write them, composed once each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from kvcfg.composition import compose
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.planning import Plan, plan


@cache
def _composed(*overrides: str) -> ExperimentConfig:
    return compose(overrides)


@pytest.fixture(scope="session")
def composed() -> Callable[..., ExperimentConfig]:
    """Words of a command line to an experiment."""
    return _composed


@pytest.fixture(scope="session")
def planned() -> Callable[..., Plan]:
    """Words of a command line to a plan."""
    return lambda *overrides: plan(_composed(*overrides))
