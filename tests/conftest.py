"""What every test may rely on: time enough on slow machines, and Hydra's global as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings

settings.register_profile("kvcfg", deadline=None)
settings.load_profile("kvcfg")


@pytest.fixture(autouse=True)
def restore_hydra() -> Iterator[None]:
    """Leave Hydra's global instance as it was found."""
    running = GlobalHydra.instance().hydra
    yield
    GlobalHydra.instance().hydra = running
