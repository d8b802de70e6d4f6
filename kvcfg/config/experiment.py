"""The root of the configuration: one group a field, checked alone and against each other."""

from __future__ import annotations

from pydantic import Field, model_validator

from kvcfg.config import rules
from kvcfg.config.base import Config, refuse
from kvcfg.config.cache import KVCacheConfig
from kvcfg.config.devices import DevicesConfig
from kvcfg.config.model import ModelConfig
from kvcfg.config.quantization import QuantizationConfig
from kvcfg.config.resolution import Resolution, resolve
from kvcfg.config.speculative import SpeculativeConfig
from kvcfg.config.workload import WorkloadConfig
from kvcfg.params import MultiKVCacheParams


class ExperimentConfig(Config):
    """Everything that was asked for: what a plan, a build or a measurement starts from."""

    cache: KVCacheConfig = Field(default_factory=KVCacheConfig)
    """Pages, their format, prefix caching, the memory they may take and the tiers behind them."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    """What is cached: layer groups, heads and widths, and where the weights are."""

    devices: DevicesConfig = Field(default_factory=DevicesConfig)
    """Where it is cached: how many devices, their memory and bandwidth, tensor and data parallel."""

    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig)
    """The recipe: which numbers share a scale, and what a scale is."""

    speculative: SpeculativeConfig = Field(default_factory=SpeculativeConfig)
    """Draft tokens and the method that makes them; they need slots too."""

    workload: WorkloadConfig = Field(default_factory=WorkloadConfig)
    """Sequences to plan for, text to measure on."""

    @model_validator(mode="after")
    def _groups_agree(self) -> ExperimentConfig:
        if problems := rules.problems(self):
            refuse(*problems)
        return self

    def resolve(self) -> Resolution:
        """What will be built: parameters per layer group, the devices that are there, and why each null became what."""
        return resolve(self)

    def to_params(self) -> MultiKVCacheParams:
        """One `KVCacheParams` per layer group of the model that stores something, then those of its drafter."""
        return self.resolve().params
