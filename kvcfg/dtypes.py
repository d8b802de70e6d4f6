"""Element types and devices by name, without importing what implements them."""

from __future__ import annotations

import builtins
import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal

from kvcfg.errors import BackendUnavailable, ConfigError, Problem

if TYPE_CHECKING:
    import torch


class DType(Enum):
    """The type of one element, named as in the reference: `DType["int8"]`, `DType.bfloat16`."""

    bool = "bool"
    int8 = "int8"
    int16 = "int16"
    int32 = "int32"
    int64 = "int64"
    uint8 = "uint8"
    uint16 = "uint16"
    uint32 = "uint32"
    uint64 = "uint64"
    float4_e2m1fn = "float4_e2m1fn"
    float6_e2m3fn = "float6_e2m3fn"
    float6_e3m2fn = "float6_e3m2fn"
    float8_e4m3fn = "float8_e4m3fn"
    float8_e4m3fnuz = "float8_e4m3fnuz"
    float8_e5m2 = "float8_e5m2"
    float8_e5m2fnuz = "float8_e5m2fnuz"
    float8_e8m0fnu = "float8_e8m0fnu"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"

    @property
    def size_in_bits(self) -> int:
        """Bits of one element."""
        width = re.search(r"\d+", self.name)
        return 8 if width is None else int(width[0])

    @property
    def size_in_bytes(self) -> int:
        """Bytes of one element that stands alone; elements below 8 bits take a whole byte."""
        return -(-self.size_in_bits // 8)

    def is_float(self) -> builtins.bool:
        """Whether elements are floating point numbers of any width."""
        return "float" in self.name

    def is_float8(self) -> builtins.bool:
        """Whether elements are 8-bit floating point numbers, powers of two included."""
        return self.name.startswith("float8")

    def is_half(self) -> builtins.bool:
        """Whether elements are 16-bit floating point numbers."""
        return self.is_float() and self.size_in_bits == 16

    def is_integral(self) -> builtins.bool:
        """Whether elements are integers; bool is none."""
        return "int" in self.name

    def to_torch(self) -> torch.dtype:
        """The same type in torch.

        Raises:
            BackendUnavailable: if the installed torch has no such type.
        """
        import torch

        found = getattr(torch, self.name, None)
        if not isinstance(found, torch.dtype):
            raise BackendUnavailable(f"torch {torch.__version__} has no {self.name}; pack such elements into uint8")
        return found

    def __repr__(self) -> str:
        return f"DType.{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class DeviceRef:
    """A device by type and number, whether or not it is there: `gpu:0`."""

    device_type: Literal["cpu", "gpu"]
    id: int = 0

    def __post_init__(self) -> None:
        if self.device_type not in ("cpu", "gpu") or isinstance(self.id, bool) or not isinstance(self.id, int):
            raise ConfigError(Problem("device", "must be cpu or gpu and a number, like gpu:0", str(self)))
        if self.id < 0:
            raise ConfigError(Problem("device", "must have a number of at least 0, like gpu:0", str(self)))

    @classmethod
    def CPU(cls, id: int = 0) -> DeviceRef:
        """The CPU."""
        return cls("cpu", id)

    @classmethod
    def GPU(cls, id: int = 0) -> DeviceRef:
        """The GPU of that number."""
        return cls("gpu", id)

    @classmethod
    def parse(cls, text: str) -> DeviceRef:
        """A device from its name: `gpu:1`, `cpu`.

        Raises:
            ConfigError: if the text names no device.
        """
        match = re.fullmatch(r"(cpu|gpu)(?::(\d+))?", text.strip().lower())
        if match is None:
            raise ConfigError(Problem("device", "must be cpu or gpu and a number, like gpu:0", text))
        return cls("cpu" if match[1] == "cpu" else "gpu", int(match[2] or 0))

    def is_cpu(self) -> bool:
        """Whether this is a CPU."""
        return self.device_type == "cpu"

    def is_gpu(self) -> bool:
        """Whether this is a GPU."""
        return self.device_type == "gpu"

    def __str__(self) -> str:
        return f"{self.device_type}:{self.id}"
