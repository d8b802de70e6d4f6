"""Overrides to experiments: presets, values, files, presets of one's own, and a Hydra that is already running."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from omegaconf import OmegaConf

from kvcfg.composition import compose, overrides_of, validate
from kvcfg.composition.composer import VERSION_BASE
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import ConfigError


def test_nothing_given_is_the_default_model_on_this_machine() -> None:
    experiment = compose()
    assert (experiment.model.name, experiment.devices.kind) == ("smollm2-135m", "auto")


def test_yaml_defaults_are_the_defaults_of_the_models() -> None:
    assert compose() == ExperimentConfig()


def test_preset_and_value_are_composed() -> None:
    experiment = compose(["model=llama-3.1-8b", "cache=fp8", "cache.kv_cache_page_size=64"])
    assert (experiment.model.num_layers, experiment.cache.kv_cache_format, experiment.cache.kv_cache_page_size) == (
        32,
        "float8_e4m3fn",
        64,
    )


def test_override_wins_over_an_experiment_and_the_experiment_over_a_default() -> None:
    experiment = compose(["experiment=chat_h100", "cache=page16"])
    assert (experiment.model.name, experiment.cache.kv_cache_page_size) == ("llama-3.1-8b", 16)


def test_values_inside_a_list_can_be_overridden() -> None:
    assert compose(["model=llama-3.1-8b", "model.layer_groups.0.num_layers=4"]).model.num_layers == 4


def test_whole_list_can_be_overridden() -> None:
    layers = "model.layer_groups=[{kind:full,num_layers:2,n_kv_heads:3,head_dim:8}]"
    assert compose([layers]).model.num_layers == 2


def test_size_is_written_with_a_unit() -> None:
    assert compose(["cache.kv_cache_memory_bytes=8GiB"]).cache.kv_cache_memory_bytes == 2**33


def test_connector_is_composed_from_single_values() -> None:
    overrides = ["cache.kv_connector=local", "cache.kv_connector_config.host_kvcache_swap_space_gb=4"]
    settings = compose(overrides).cache.kv_connector_config
    assert settings is not None
    assert settings.host_kvcache_swap_space_gb == 4


def test_connector_that_is_not_set_up_is_null() -> None:
    assert compose().cache.kv_connector_config is None


def test_value_may_be_computed_from_another() -> None:
    assert compose(["workload.max_seq_len=${model.max_seq_len}"]).workload.max_seq_len == 8192


def test_keys_of_a_verb_are_taken_at_its_root() -> None:
    assert compose(["output=json"], config_name="plan") == ExperimentConfig()


def test_presets_of_ones_own_are_found(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [llama-3.1-8b, _self_]\nname: mine\n")
    assert compose(["model=mine"], config_dir=tmp_path).model.num_layers == 32


def test_folder_of_presets_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a folder with presets"):
        compose(config_dir=tmp_path / "nowhere")


@pytest.fixture
def cache_file(tmp_path: Path) -> str:
    path = tmp_path / "cache.yaml"
    path.write_text("kv_cache_page_size: 32\nkv_cache_format: int8\ndevice_memory_utilization: 0.5\n")
    return str(path)


def test_file_wins_over_defaults(cache_file: str) -> None:
    cache = compose([f"cache.config_file={cache_file}"]).cache
    assert (cache.kv_cache_page_size, cache.device_memory_utilization) == (32, 0.5)


def test_override_wins_over_the_file(cache_file: str) -> None:
    assert compose([f"cache.config_file={cache_file}", "cache.kv_cache_page_size=64"]).cache.kv_cache_page_size == 64


def test_override_that_repeats_the_default_wins_over_the_file(cache_file: str) -> None:
    assert compose([f"cache.config_file={cache_file}", "cache.kv_cache_page_size=128"]).cache.kv_cache_page_size == 128


def test_preset_wins_over_the_file(cache_file: str) -> None:
    assert compose(["cache=fp8", f"cache.config_file={cache_file}"]).cache.kv_cache_format == "float8_e4m3fn"


def test_composing_inside_a_running_hydra_leaves_it_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "host.yaml").write_text("lr: 0.1\n")
    older = {"version_base": "1.2"} if VERSION_BASE else {}
    with initialize_config_dir(str(tmp_path), **older):
        running, base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
        assert compose(["cache=int8"]).cache.kv_cache_format == "int8"
        assert (GlobalHydra.instance().hydra, VersionBase.instance().version_base) == (running, base)
        assert hydra_compose("host").lr == 0.1


def test_validate_takes_plain_groups_without_a_schema() -> None:
    config = OmegaConf.create({"cache": {"kv_cache_page_size": 16}})
    assert validate(config).cache.kv_cache_page_size == 16


def test_validate_names_keys_as_the_host_does() -> None:
    config = OmegaConf.create({"cache": {"kv_cache_page_size": 0}})
    with pytest.raises(ConfigError, match=r"^train\.kv\.cache\.kv_cache_page_size=0: .*Try: train\.kv\.cache\."):
        validate(config, prefix="train.kv")


def test_validate_lets_the_hosts_override_win_over_a_file(cache_file: str) -> None:
    config = OmegaConf.create({"cache": {"config_file": cache_file, "kv_cache_page_size": 128}})
    overrides = ["kv.cache.kv_cache_page_size=128"]
    assert validate(config, prefix="kv", overrides=overrides).cache.kv_cache_page_size == 128
    assert validate(config, prefix="kv").cache.kv_cache_page_size == 32


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=llama-3.1-8b", "devices=h100x8", "cache=int8", "workload=chat"],
        ["model=gemma-3-1b", "cache=offload", "speculative=eagle"],
        ["model.name='my \\'model\\''", "workload.text='/a b/c,d (1).txt'"],
        ["model.layer_groups=[{kind:full,num_layers:2,n_kv_heads:3,head_dim:8,layers:[0,1]}]"],
        ["cache.kv_connector=dkv", "cache.kv_connector_config.block_store_endpoint='tcp://h:1'"],
        ["cache.kv_cache_memory_bytes=8GiB", "quantization.scale_dtype=float16", "cache=fp8"],
    ],
    ids=lambda overrides: " ".join(overrides)[:40],
)
def test_overrides_of_an_experiment_compose_it_again(overrides: list[str]) -> None:
    experiment = compose(overrides)
    assert compose(overrides_of(experiment)) == experiment
