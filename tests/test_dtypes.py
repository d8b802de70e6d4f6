from __future__ import annotations

import subprocess
import sys

import pytest

from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import BackendUnavailable, ConfigError


@pytest.mark.parametrize(
    ("name", "bits", "size"),
    [
        ("bool", 8, 1),
        ("int8", 8, 1),
        ("uint64", 64, 8),
        ("bfloat16", 16, 2),
        ("float32", 32, 4),
        ("float8_e8m0fnu", 8, 1),
        ("float6_e3m2fn", 6, 1),
        ("float4_e2m1fn", 4, 1),
    ],
)
def test_sizes_follow_from_the_width(name: str, bits: int, size: int) -> None:
    assert (DType[name].size_in_bits, DType[name].size_in_bytes) == (bits, size)


def test_only_floats_are_floats() -> None:
    assert {dtype for dtype in DType if not dtype.is_float()} == {
        DType.bool, DType.int8, DType.int16, DType.int32, DType.int64,
        DType.uint8, DType.uint16, DType.uint32, DType.uint64,
    }  # fmt: skip


def test_half_is_16_bits_of_float_not_of_integer() -> None:
    assert [dtype for dtype in DType if dtype.is_half()] == [DType.float16, DType.bfloat16]


def test_bool_is_no_integer() -> None:
    assert not DType.bool.is_integral()


def test_to_torch_finds_the_type_of_the_same_name() -> None:
    import torch

    assert DType["float8_e4m3fn"].to_torch() is torch.float8_e4m3fn


def test_to_torch_says_so_where_torch_has_no_such_type() -> None:
    with pytest.raises(BackendUnavailable, match="float6_e2m3fn"):
        DType.float6_e2m3fn.to_torch()


def test_naming_types_does_not_import_torch() -> None:
    code = "import sys; from kvcfg.dtypes import DType; DType['int8'].size_in_bytes; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("text", "device"),
    [("cpu", DeviceRef.CPU()), ("cpu:0", DeviceRef.CPU(0)), ("gpu:3", DeviceRef.GPU(3)), (" GPU:1 ", DeviceRef.GPU(1))],
)
def test_device_is_parsed_from_its_name(text: str, device: DeviceRef) -> None:
    assert DeviceRef.parse(text) == device


def test_device_name_parses_back_to_the_device() -> None:
    assert DeviceRef.parse(str(DeviceRef.GPU(7))) == DeviceRef.GPU(7)


@pytest.mark.parametrize("text", ["", "cuda:0", "gpu:-1", "gpu:x", "gpu0"])
def test_text_that_names_no_device_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cpu or gpu"):
        DeviceRef.parse(text)


def test_device_number_is_not_negative() -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        DeviceRef.GPU(-1)
