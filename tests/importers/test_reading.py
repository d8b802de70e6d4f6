"""Command lines and files of engines as users have them, and what is said of what kvcfg has no word for."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from kvcfg.composition import compose
from kvcfg.errors import ConfigError
from kvcfg.importers import Imported, read_config
from kvcfg.units import GIB

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def left_out(made: Imported) -> list[str]:
    return [item.setting for item in made.left_out]


def test_command_line_of_vllm_is_read_with_its_defaults() -> None:
    made = read_config(f"vllm serve {LLAMA}")
    cache = made.experiment.cache
    assert (made.engine, made.experiment.model.name) == ("vllm", "llama-3.1-8b")
    assert (cache.kv_cache_page_size, cache.device_memory_utilization) == (16, 0.92)
    assert [item.setting for item in made.read_as] == ["block-size", "gpu-memory-utilization"]


def test_short_flags_equals_signs_and_underscores_are_the_same() -> None:
    long = read_config(f"vllm serve {LLAMA} --tensor-parallel-size 2 --block-size 32")
    assert read_config(f"vllm serve {LLAMA} -tp 2 --block_size=32").experiment == long.experiment


def test_fp8_of_vllm_is_e4m3_without_stored_scales() -> None:
    experiment = read_config(f"vllm serve {LLAMA} --kv-cache-dtype fp8").experiment
    assert experiment.cache.kv_cache_format == "float8_e4m3fn" and experiment.quantization.granularity == "tensor"


def test_flag_that_says_nothing_of_the_cache_is_left_out_and_told() -> None:
    made = read_config(f"vllm serve {LLAMA} --port 8000 --enable-lora")
    assert left_out(made) == ["port", "enable_lora"] and "port=8000" in made.table()


def test_format_that_kvcfg_lacks_is_left_out_with_those_it_has() -> None:
    made = read_config(f"vllm serve {LLAMA} --kv-cache-dtype turboquant_k8v4")
    assert "int8_per_token_head" in made.left_out[0].why and made.experiment.cache.kv_cache_format is None


def test_negated_flag_is_false() -> None:
    assert read_config(f"vllm serve {LLAMA} --no-enable-prefix-caching").experiment.cache.enable_prefix_caching is False


def test_json_of_a_flag_is_read() -> None:
    config = shlex.quote(json.dumps({"method": "eagle", "num_speculative_tokens": 3, "model": "drafter"}))
    made = read_config(f"vllm serve {LLAMA} --speculative-config {config}")
    assert made.experiment.speculative.num_speculative_tokens == 3
    assert left_out(made) == ["speculative-config.model"]


def test_skipped_layers_keep_the_models_format() -> None:
    experiment = read_config(
        f"vllm serve {LLAMA} --kv-cache-dtype int8_per_token_head --kv-cache-dtype-skip-layers 0 31"
    ).experiment
    [layers] = experiment.quantization.layers or ()
    assert (layers.layers, layers.format) == ((0, 31), "bfloat16")


@pytest.mark.parametrize(("written", "tokens"), [("32k", 32_000), ("32K", 32_768), ("4096", 4096)])
def test_length_is_read_as_vllm_reads_it(written: str, tokens: int) -> None:
    assert read_config(f"vllm serve {LLAMA} --max-model-len {written}").experiment.workload.max_seq_len == tokens


def test_file_named_on_the_command_line_loses_to_it(tmp_path: Path) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text(f"model: {LLAMA}\nblock-size: 64\nkv-cache-memory-bytes: 8589934592\n")
    cache = read_config(f"vllm serve --config {path} --block-size 32").experiment.cache
    assert (cache.kv_cache_page_size, cache.kv_cache_memory_bytes) == (32, 8 * GIB)


def test_recipe_of_max_is_recognized_by_its_sections(tmp_path: Path) -> None:
    path = tmp_path / "max.yaml"
    path.write_text(
        f"model:\n  model_path: {LLAMA}\n  device_specs: [0, 1]\n  kv_cache:\n    kv_cache_format: float8_e4m3fn\n"
        "    kv_connector_config: {type: rust_tiered, host_offload_max_gb: 50, disk_offload_max_gb: 0}\n"
    )
    made = read_config(str(path))
    assert (made.engine, made.version, made.experiment.devices.count) == ("max", "26.7", 2)
    assert str(made.experiment.cache.kv_connector) == "local"


def test_recipe_with_a_connector_of_its_own_is_of_the_older_max(tmp_path: Path) -> None:
    path = tmp_path / "max.yaml"
    path.write_text(f"model:\n  model_path: {LLAMA}\n  kv_cache: {{kv_connector: null, kv_cache_page_size: 256}}\n")
    assert read_config(str(path)).version == "26.4"


def test_tier_that_max_sizes_itself_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "max.yaml"
    path.write_text(f"model:\n  model_path: {LLAMA}\n  kv_cache:\n    kv_connector_config: {{type: rust_tiered}}\n")
    assert "kv_connector_config" in left_out(read_config(str(path)))


def test_command_line_of_max_is_read() -> None:
    made = read_config(
        f"max serve --model {LLAMA} --devices gpu:0,1,2,3 --data-parallel-degree 2 --kv-cache-page-size 256"
    )
    devices = made.experiment.devices
    assert (devices.count, devices.data_parallel_degree, made.experiment.cache.kv_cache_page_size) == (4, 2, 256)


def test_tokens_of_sglang_become_the_bytes_that_hold_them() -> None:
    line = f"python -m sglang.launch_server --model-path {LLAMA} --page-size 64 --max-total-tokens 65536"
    made = read_config(line, overrides=["devices=h100"])
    from kvcfg.planning import plan

    assert plan(made.experiment).num_tokens == 65536


def test_overrides_beside_it_win() -> None:
    made = read_config(f"vllm serve {LLAMA} --block-size 32", overrides=["cache.kv_cache_page_size=64", "devices=h100"])
    assert (made.experiment.cache.kv_cache_page_size, made.experiment.devices.memory_gib) == (64, 80)


def test_overrides_of_an_import_compose_its_config() -> None:
    made = read_config(
        f"vllm serve {LLAMA} -tp 2 --kv-cache-dtype fp8 --kv-offloading-size 8", overrides=["devices=h100x8"]
    )
    assert compose(made.overrides) == made.experiment


@pytest.mark.parametrize(
    ("source", "engine", "part"),
    [
        ("vllm", None, "stands in quotes"),
        ("nowhere.yaml", None, "is no file"),
        ("vllm serve 'open", None, "cannot be read as a command line"),
        (f"vllm serve {LLAMA} --block-size many", None, "would not take"),
        (f"vllm serve {LLAMA} --block-size 0", None, "kv_cache_page_size"),
        (f"vllm serve {LLAMA}", "trtllm", "engine=trtllm"),
    ],
)
def test_what_cannot_be_read_is_one_error(source: str, engine: str | None, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(source, engine)
    assert part in str(caught.value)


def test_file_of_nobody_asks_for_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_text("port: 8000\n")
    with pytest.raises(ConfigError, match="engine=vllm"):
        read_config(str(path))
