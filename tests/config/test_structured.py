"""The dataclasses that Hydra composes into: derived types, and the way back to the models."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from kvcfg.config.base import ByteCount, Config
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.structured import register, structured, to_plain
from kvcfg.config.verbs import VERBS


class Colour(StrEnum):
    red = "red"


class Inner(Config):
    width: int = 3
    flag: bool = False


class Outer(Config):
    needed: int
    mode: Literal["slow", "fast"] = "slow"
    colour: Colour = Colour.red
    size: ByteCount | None = None
    ratio: float = 0.5
    inner: Inner = Field(default_factory=Inner)
    maybe: Inner | None = None
    rows: tuple[Inner, ...] = (Inner(width=7),)


def config(**values: Any) -> DictConfig:
    return OmegaConf.merge(OmegaConf.structured(structured(Outer)), values)  # type: ignore[return-value]


def test_default_of_every_leaf_is_the_default_of_the_model() -> None:
    data = to_plain(Outer, OmegaConf.to_container(config(needed=1)))
    assert Outer.model_validate(data) == Outer(needed=1)


def test_required_field_is_missing() -> None:
    assert OmegaConf.missing_keys(config()) == {"needed"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("needed", "three"),
        ("needed", 3.5),
        ("inner.width", "wide"),
        ("inner.flag", 12),
        ("ratio", "half"),
        ("size", 1.5),
    ],
)
def test_wrong_type_is_refused_when_composed(key: str, value: object) -> None:
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.update(config(), key, value)


@pytest.mark.parametrize("key", ["neded", "inner.widht", "maybe.widht", "rows.0.widht"])
def test_unknown_key_is_refused_when_composed(key: str) -> None:
    tree = config()
    OmegaConf.set_struct(tree, True)
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.update(tree, key, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("mode", "fast"), ("colour", "red"), ("size", "8GiB"), ("size", 1024), ("inner.flag", True), ("ratio", 1)],
)
def test_right_type_is_kept(key: str, value: object) -> None:
    tree = config()
    OmegaConf.update(tree, key, value)
    assert OmegaConf.select(tree, key) == value


def test_size_with_a_unit_becomes_bytes() -> None:
    assert Outer.model_validate(to_plain(Outer, OmegaConf.to_container(config(needed=1, size="8GiB")))).size == 2**33


def test_null_is_composed_everywhere_and_left_to_pydantic() -> None:
    assert config(needed=None, rows=None, inner={"width": None}).needed is None


def test_optional_section_is_null_leaves() -> None:
    assert OmegaConf.to_container(config().maybe) == {"width": None, "flag": None}


def test_empty_optional_section_becomes_null() -> None:
    assert to_plain(Outer, OmegaConf.to_container(config()))["maybe"] is None


def test_optional_section_with_one_value_takes_defaults_for_the_rest() -> None:
    data = to_plain(Outer, OmegaConf.to_container(config(needed=1, maybe={"width": 9})))
    assert Outer.model_validate(data).maybe == Inner(width=9, flag=False)


def test_optional_section_can_be_null_itself() -> None:
    assert to_plain(Outer, OmegaConf.to_container(config(maybe=None)))["maybe"] is None


def test_list_of_models_is_typed_and_its_items_have_defaults() -> None:
    assert OmegaConf.to_container(config(rows=[{"flag": True}]).rows) == [{"width": 3, "flag": True}]


def test_list_of_models_refuses_a_wrong_item() -> None:
    with pytest.raises(OmegaConfBaseException):
        config(rows=[{"width": "wide"}])


def test_default_lists_are_not_shared() -> None:
    first, second = config(), config()
    first.rows[0].width = 99
    assert second.rows[0].width == 7


def test_experiment_survives_the_way_there_and_back() -> None:
    data = OmegaConf.to_container(OmegaConf.structured(structured(ExperimentConfig)))
    assert ExperimentConfig.model_validate(to_plain(ExperimentConfig, data)) == ExperimentConfig()


def test_register_stores_the_schema_and_those_of_verbs() -> None:
    ConfigStore.instance().repo.clear()
    register("plan", "eval")
    assert set(ConfigStore.instance().repo) == {"kvcfg_schema.yaml", "kvcfg_plan_schema.yaml", "kvcfg_eval_schema.yaml"}


def test_register_twice_keeps_what_is_stored() -> None:
    register()
    stored = ConfigStore.instance().repo["kvcfg_schema.yaml"]
    register()
    assert ConfigStore.instance().repo["kvcfg_schema.yaml"] is stored


@pytest.mark.parametrize("verb", VERBS)
def test_schema_of_a_verb_holds_groups_and_its_own_keys(verb: str) -> None:
    keys = set(OmegaConf.structured(structured(ExperimentConfig, VERBS[verb])))
    assert keys == {*ExperimentConfig.model_fields, *VERBS[verb].model_fields}


def test_no_verb_has_a_key_that_is_a_group() -> None:
    assert not any(set(options.model_fields) & set(ExperimentConfig.model_fields) for options in VERBS.values())
