"""What a model and its layer groups accept, and what follows from them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from kvcfg.config.model import LAYER_KINDS, LayerGroup, ModelConfig
from kvcfg.errors import Problem

VALID: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding_window": {"window": 4096},
    "chunked": {"window": 8192},
    "mla": {"n_kv_heads": 1},
    "linear": {"state_bytes": 65536},
    "shared": {},
}


def group(kind: str, **changes: Any) -> LayerGroup:
    return LayerGroup(**{"kind": kind, "num_layers": 2, "n_kv_heads": 4, "head_dim": 16, **VALID[kind], **changes})


def problems(error: ValidationError) -> tuple[Problem, ...]:
    (only,) = error.errors()
    found: tuple[Problem, ...] = only["ctx"]["problems"]
    return found


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_every_kind_is_accepted_with_what_it_needs(kind: str) -> None:
    assert group(kind).kind == kind


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [
        ("sliding_window", {"window": None}, "window"),
        ("chunked", {"window": None}, "window"),
        ("full", {"window": 4096}, "window"),
        ("mla", {"window": 4096}, "window"),
        ("linear", {"state_bytes": None}, "state_bytes"),
        ("full", {"state_bytes": 1}, "state_bytes"),
        ("mla", {"n_kv_heads": 2}, "n_kv_heads"),
        ("mla", {"value_head_dim": 16}, "value_head_dim"),
        ("full", {"layers": (0, 1, 2)}, "layers"),
        ("full", {"layers": (1, 1)}, "layers"),
    ],
)
def test_what_contradicts_the_kind_is_refused_by_key(kind: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        group(kind, **changes)
    assert [problem.key for problem in problems(caught.value)] == [key]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("chunked", {"window": None}),
        ("linear", {"state_bytes": None}),
        ("full", {"window": 4096}),
        ("mla", {"n_kv_heads": 2}),
        ("full", {"layers": (1, 1)}),
    ],
)
def test_the_offered_fix_is_accepted(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        group(kind, **changes)
    (problem,) = problems(caught.value)
    key, _, value = str(problem.fix).partition("=")
    assert group(kind, **{**changes, key: None if value == "null" else int(value)})


def test_all_contradictions_of_a_group_are_told_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        group("chunked", window=None, state_bytes=4)
    assert [problem.key for problem in problems(caught.value)] == ["window", "state_bytes"]


@pytest.mark.parametrize(
    ("kind", "changes", "elements"),
    [
        ("full", {}, 2 * 4 * (16 + 16)),
        ("full", {"value_head_dim": 8}, 2 * 4 * (16 + 8)),
        ("sliding_window", {}, 2 * 4 * (16 + 16)),
        ("mla", {"head_dim": 576}, 2 * 576),
        ("linear", {}, 0),
        ("shared", {}, 0),
    ],
)
def test_elements_per_token_count_what_the_kind_stores(kind: str, changes: dict[str, Any], elements: int) -> None:
    assert group(kind, **changes).elements_per_token == elements


def test_layers_of_all_groups_are_counted_whether_they_store_or_not() -> None:
    model = ModelConfig(layer_groups=(group("full"), group("linear"), group("shared")))
    assert model.num_layers == 6


def test_weights_take_the_bits_of_the_compute_dtype_by_default() -> None:
    assert ModelConfig(n_params=1000, dtype="float32").weight_bytes == 4000


def test_weights_take_their_own_bits_when_stated() -> None:
    assert ModelConfig(n_params=1000, weight_bits=4.5).weight_bytes == 562


def test_active_weights_are_all_weights_without_a_mixture() -> None:
    assert ModelConfig(n_params=1000).active_weight_bytes == 2000


def test_active_weights_are_fewer_in_a_mixture() -> None:
    assert ModelConfig(n_params=1000, n_active_params=100).active_weight_bytes == 200


def test_more_active_parameters_than_parameters_are_refused() -> None:
    with pytest.raises(ValidationError, match="n_active_params=2000: must be at most n_params"):
        ModelConfig(n_params=1000, n_active_params=2000)


@pytest.mark.parametrize("source", ["path", "id"])
def test_a_wheel_beside_another_place_for_weights_is_refused(source: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**{source: "x"}, package="y==1", layer_groups=(group("full"),))
    assert [problem.fix for problem in problems(caught.value)] == ["package=null"]


def test_a_folder_may_be_the_copy_of_a_model_on_the_hub() -> None:
    assert ModelConfig(path="/copy", id="owner/name", package=None, layer_groups=(group("full"),)).path == "/copy"


@pytest.mark.parametrize("layers", [((0, 1), (1, 2)), ((0, 1), (2, 4))], ids=["twice", "beyond the last"])
def test_groups_that_do_not_name_every_layer_once_are_refused(layers: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValidationError, match="must name every layer once, from 0 to 3"):
        ModelConfig(layer_groups=tuple(group("full", layers=at) for at in layers))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValidationError):
        ModelConfig(layer_groups=())


def test_null_layer_groups_without_a_place_to_read_them_from_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"path=null: must be a folder with a config\.json"):
        ModelConfig(layer_groups=None)


def test_a_model_survives_the_way_through_plain_data() -> None:
    model = ModelConfig(layer_groups=(group("full", layers=(0, 3)), group("linear", layers=(1, 2))))
    assert ModelConfig(**model.model_dump(mode="json")) == model
