from __future__ import annotations

from kvcfg.composition import grid
from kvcfg.config.presets import device_presets


def test_every_preset_is_read_as_it_is_composed() -> None:
    presets = device_presets()
    points = grid(["model=llama-3.1-8b", f"devices={','.join(presets)}"])
    assert len(points) == len(presets) > 20
    for point, devices in zip(points, presets.values(), strict=True):
        assert point.experiment is not None
        assert point.experiment.devices == devices
