"""Rules between groups: each refuses what it must, keeps quiet otherwise, and offers an override that works."""

from __future__ import annotations

import pytest

from kvcfg.composition import compose
from kvcfg.config import rules
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import ConfigError

DRAFTS = "speculative.draft_layer_groups"
LAYER = "kind:full,num_layers:1,head_dim:64"
UNCOPIED = ("model=llama-3.1-8b", "devices.count=8", "devices.allow_kv_head_replication=false")
BLOCKS = ("cache=int8", "quantization.granularity=block", "quantization.quantization_granularity=32")
BALANCE = "quantization.balance_rope=true"
LINEAR = "{kind:linear,num_layers:2,head_dim:64,state_bytes:4096}"

REFUSED = [
    (["quantization.key_format=int7"], "quantization.key_format", "quantization.key_format=int8"),
    (["quantization.value_format=zzz"], "quantization.value_format", "quantization.value_format=bfloat16"),
    (["cache=int8", "quantization.key_format=bfloat16"], "quantization.key_format", "cache.kv_cache_format=null"),
    (["cache=int8", "quantization=none"], "quantization.granularity", "quantization.granularity=token_head"),
    (["cache=fp8", "quantization=none"], "quantization.granularity", "quantization.granularity=tensor"),
    (["quantization.granularity=token_head"], "quantization.granularity", "quantization.granularity=null"),
    (["quantization.scale_source=dynamic"], "quantization.scale_source", "quantization.scale_source=null"),
    (["quantization.scale_dtype=float16"], "quantization.scale_dtype", "quantization.scale_dtype=null"),
    (
        ["cache=int8", "quantization.granularity=head", "quantization.scale_source=dynamic"],
        "quantization.scale_source",
        "quantization.scale_source=unit",
    ),
    (
        ["cache=int8", "quantization.granularity=channel", "quantization.scale_source=unit"],
        "quantization.scale_source",
        "quantization.scale_source=dynamic",
    ),
    (
        ["cache.kv_cache_format=gauss4", "quantization.granularity=tensor"],
        "quantization.granularity",
        "quantization.granularity=token_head",
    ),
    (
        ["cache.kv_cache_format=uint4", "quantization.scale_dtype=float8_e8m0fnu"],
        "quantization.scale_dtype",
        "quantization.scale_dtype=null",
    ),
    (
        ["quantization.value_format=int4", "model.layer_groups=[{kind:full,num_layers:30,n_kv_heads:3,head_dim:20}]"],
        "quantization.value_format",
        "quantization.value_format=int8",
    ),
    (
        ["cache=int8", "quantization.granularity=block"],
        "quantization.quantization_granularity",
        "quantization.quantization_granularity=32",
    ),
    (
        ["cache=int8", "quantization.quantization_granularity=32"],
        "quantization.quantization_granularity",
        "quantization.quantization_granularity=null",
    ),
    (
        ["cache=int8", "quantization.granularity=block", "quantization.quantization_granularity=48"],
        "quantization.quantization_granularity",
        "quantization.quantization_granularity=32",
    ),
    (
        ["model=deepseek-v3", "quantization=fp8", "quantization.value_format=int8"],
        "quantization.value_format",
        "quantization.value_format=null",
    ),
    (["model=deepseek-v3", BALANCE], "quantization.balance_rope", "quantization.balance_rope=null"),
    (["devices.count=2"], "devices.count", "devices.count=1"),
    (["devices=h100x8"], "devices.count", "devices.count=3"),
    (["model=llama-3.1-8b", "devices.count=64"], "devices.count", "devices.count=32"),
    (
        ["model=llama-3.1-8b", "devices.count=16", "devices.allow_kv_head_replication=false"],
        "devices.count",
        "devices.allow_kv_head_replication=true",
    ),
    (
        ["model=llama-3.1-8b", "devices.count=6", "devices.data_parallel_degree=2"],
        "devices.count",
        "devices.count=4",
    ),
    (
        ["model=llama-3.1-8b", "devices.count=4", "speculative=eagle", f"{DRAFTS}=[{{{LAYER},n_kv_heads:6}}]"],
        DRAFTS,
        "devices.count=2",
    ),
    (
        [*UNCOPIED, "speculative=eagle", f"{DRAFTS}=[{{{LAYER},n_kv_heads:2}}]"],
        DRAFTS,
        "devices.allow_kv_head_replication=true",
    ),
    (
        [f"model.layer_groups=[{LINEAR}]", "speculative=mtp"],
        DRAFTS,
        f"{DRAFTS}=[{{kind:full,num_layers:1,n_kv_heads:1,head_dim:128}}]",
    ),
    (
        [*BLOCKS, "speculative=eagle", f"{DRAFTS}=[{{kind:full,num_layers:1,head_dim:48}}]"],
        "quantization.quantization_granularity",
        "quantization.quantization_granularity=16",
    ),
    (["model=qwen3-next-80b-a3b", "cache=offload"], "cache.kv_connector", "cache.kv_connector=null"),
    (["workload.max_seq_len=9000"], "workload.max_seq_len", "workload.max_seq_len=8192"),
]

ALLOWED = [
    ["cache=int8"],
    ["cache=fp8", "quantization.scale_source=unit"],
    ["quantization=none"],
    ["quantization=fp8_unit"],
    ["quantization=int8", "cache.kv_cache_format=INT8"],
    ["quantization.key_format=int8", "quantization.value_format=bfloat16"],
    ["cache=int8", "quantization.granularity=block", "quantization.quantization_granularity=32"],
    ["cache.kv_cache_format=uint4", "quantization.granularity=channel", "quantization.scale_dtype=float16"],
    ["cache.kv_cache_format=float4_e2m1fn", *BLOCKS[1:], "quantization.scale_dtype=float8_e4m3fn"],
    ["devices.count=3"],
    ["devices.count=9"],
    ["model=llama-3.1-8b", "devices.count=16"],
    ["model=llama-3.1-8b", "devices=h100x8_dp2tp4"],
    ["model=deepseek-v3", "devices=h100x8"],
    ["workload.max_seq_len=8192"],
    ["model=qwen3-next-80b-a3b", "devices=h100x8", BALANCE],
    ["model=llama-3.1-8b", "devices.count=8", "speculative=eagle", f"{DRAFTS}=[{{{LAYER},n_kv_heads:2}}]"],
    ["model=deepseek-v3", "devices=h200x8", "speculative=mtp"],
]


def mended(overrides: list[str], fix: str) -> list[str]:
    """The overrides with one more that replaces any of the same key."""
    key = fix.partition("=")[0]
    return [*(item for item in overrides if item.partition("=")[0] != key), fix]


@pytest.mark.parametrize(("overrides", "key", "fix"), REFUSED, ids=lambda value: str(value))
def test_conflict_is_refused_with_a_fix(overrides: list[str], key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert (key, fix) in [(problem.key, problem.fix) for problem in caught.value.problems]


@pytest.mark.parametrize(("overrides", "key", "fix"), REFUSED, ids=lambda value: str(value))
def test_fix_is_accepted(overrides: list[str], key: str, fix: str) -> None:
    try:
        compose(mended(overrides, fix))
    except ConfigError as error:
        assert key not in [problem.key for problem in error.problems]


@pytest.mark.parametrize("overrides", ALLOWED, ids=" ".join)
def test_what_goes_together_is_accepted(overrides: list[str]) -> None:
    assert isinstance(compose(overrides), ExperimentConfig)


def test_conflict_of_formats_names_both_keys() -> None:
    with pytest.raises(ConfigError, match=r"quantization\.key_format=float8_e4m3fn: .*cache\.kv_cache_format=int8"):
        compose(["cache=int8", "quantization=fp8"])


def test_heads_are_told_in_numbers() -> None:
    with pytest.raises(ConfigError, match=r"tensor parallel over 8 .* 9 query heads and 3 KV heads of smollm2-135m"):
        compose(["devices=h100x8"])


def wrong_experiment() -> ExperimentConfig:
    whole = ExperimentConfig()
    return whole.model_copy(
        update={
            "workload": whole.workload.model_copy(update={"max_seq_len": 10**9}),
            "quantization": whole.quantization.model_copy(update={"granularity": "block", "key_format": "nothing"}),
            "devices": whole.devices.model_copy(update={"count": 2}),
        }
    )


def test_every_rule_that_reads_no_refused_key_speaks() -> None:
    keys = {problem.key for problem in rules.problems(wrong_experiment(), refused={"devices.count"})}
    assert "workload.max_seq_len" in keys
    assert "devices.count" not in keys


@pytest.mark.parametrize("refused", ["model", "model.layer_groups", "model.layer_groups.0.n_kv_heads", "devices"])
def test_rule_is_silent_when_a_key_around_or_inside_is_refused(refused: str) -> None:
    assert "devices.count" not in {problem.key for problem in rules.problems(wrong_experiment(), refused={refused})}


def test_every_rule_reads_the_keys_it_complains_about() -> None:
    for rule in rules.RULES:
        for problem in rule.check(wrong_experiment()):
            assert rule.reads_any([problem.key]), rule.check.__name__
