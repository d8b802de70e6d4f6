"""What every test may rely on: time enough on slow machines, and Hydra's globals as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from hypothesis import settings

settings.register_profile("kvcfg", deadline=None)
settings.load_profile("kvcfg")


@pytest.fixture(autouse=True)
def restore_hydra() -> Iterator[None]:
    """Leave Hydra's instance, stored schemas and chosen version as they were found."""
    running, store, base = GlobalHydra.instance().hydra, ConfigStore.instance(), VersionBase.instance()
    stored, chosen = dict(store.repo), base.version_base
    yield
    GlobalHydra.instance().hydra = running
    store.repo, base.version_base = stored, chosen
