"""The dataclasses that Hydra composes into, derived from the pydantic models, and the way back.

Composition wants types that OmegaConf knows, so that a mistyped key or a word where a number belongs fails
at once. They are derived, never written:

    Literal, Enum, Path      str; pydantic knows the choices
    X | None                 Optional; every leaf takes null, and pydantic refuses it where it has no meaning
    a model                  a section with the model's own defaults
    a model | None           a section of null leaves; `to_plain` turns it back into null while it is empty
    tuple, list (of models)  List
    int written with a unit  Union[int, str]
    bool                     Union[bool, str]; as a plain bool OmegaConf would quietly read 12 as true
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import field, make_dataclass
from enum import Enum
from functools import cache
from pathlib import PurePath
from typing import Any, Literal, Optional, Union, get_args, get_origin

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.fields import section_in, takes_null, without_null
from kvcfg.config.verbs import VERBS

SCALARS = (int, float, bool, str)


def register(*verbs: str) -> None:
    """Store `kvcfg_schema`, and `kvcfg_VERB_schema` for some verbs, where Hydra finds schemas."""
    _store("kvcfg_schema", ExperimentConfig)
    for verb in verbs:
        _store(f"kvcfg_{verb}_schema", ExperimentConfig, VERBS[verb])


def _store(name: str, *models: type[BaseModel]) -> None:
    store = ConfigStore.instance()
    if f"{name}.yaml" not in store.repo:  # Hydra 1.4 warns of a second one
        store.store(name=name, node=structured(*models), provider="kvcfg")


@cache
def structured(*models: type[BaseModel]) -> type:
    """The dataclass that holds the fields of all `models`, named after the last."""
    columns = [(name, *_column(info)) for model in models for name, info in model.model_fields.items()]
    return make_dataclass(models[-1].__name__, columns, kw_only=True)


@cache
def nulls(model: type[BaseModel]) -> type:
    """The dataclass of an optional model: the same leaves, all null until one is set."""
    columns = []
    for name, info in model.model_fields.items():
        inner = section_in(info.annotation)
        section = nulls(inner) if inner else None
        kind: Any = Optional[section or _leaf(info)]  # noqa: UP045 (a runtime type)
        columns.append((name, kind, field(default_factory=section) if section else field(default=None)))
    return make_dataclass(f"Optional{model.__name__}", columns, kw_only=True)


def to_plain(model: type[BaseModel], data: Any) -> Any:
    """Composed data as `model` expects it: sections of an optional model that are empty become null again."""
    if not isinstance(data, Mapping):
        return data
    return {key: _section(model.model_fields.get(str(key)), value) for key, value in data.items()}


def _section(info: FieldInfo | None, value: Any) -> Any:
    inner = section_in(info.annotation) if info else None
    if info is None or inner is None or not isinstance(value, Mapping):
        return value
    plain = to_plain(inner, value)
    if not takes_null(info.annotation):
        return plain
    return {key: item for key, item in plain.items() if item is not None} or None


def _column(info: FieldInfo) -> tuple[Any, Any]:
    inner = section_in(info.annotation)
    if inner is not None and takes_null(info.annotation):
        return Optional[nulls(inner)], field(default_factory=nulls(inner))  # noqa: UP045 (a runtime type)
    if inner is not None:
        return structured(inner), field(default_factory=structured(inner))
    kind: Any = Optional[_leaf(info)]  # noqa: UP045 (a runtime type)
    if info.is_required():
        return kind, field(default=MISSING)
    default = _plain_default(info.get_default(call_default_factory=True))
    return kind, field(default_factory=lambda: default) if isinstance(default, list | dict) else field(default=default)


def _leaf(info: FieldInfo) -> Any:
    kind = without_null(info.annotation)
    read_by_validator = any(isinstance(item, BeforeValidator) for item in info.metadata) or _has_before(info.annotation)
    return Union[int, str] if kind is int and read_by_validator else _leaf_type(kind)  # noqa: UP007 (a runtime type)


def _leaf_type(kind: Any) -> Any:
    """What OmegaConf may hold in the place of a value that pydantic reads as `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if hasattr(kind, "__metadata__"):
        return _leaf_type(kind.__origin__)
    if origin is Literal:
        return _union(*(type(item) for item in arguments if item is not None))
    if origin in (list, tuple, set, frozenset):
        return list[_leaf_type(arguments[0])]  # type: ignore[misc]
    if origin is dict:
        return dict[str, _leaf_type(arguments[1])]  # type: ignore[misc]
    if origin in (Union, types.UnionType):
        return _union(*(_leaf_type(item) for item in arguments if item is not type(None)))
    if isinstance(kind, type) and issubclass(kind, Enum | PurePath):
        return str
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return structured(kind)
    if kind is bool:
        return Union[bool, str]  # noqa: UP007 (a runtime type)
    return kind if kind in SCALARS else Any


def _union(*kinds: Any) -> Any:
    distinct = tuple(dict.fromkeys(kinds))
    return Union[distinct] if all(kind in SCALARS for kind in distinct) else Any  # noqa: UP007 (a runtime type)


def _has_before(annotation: Any) -> bool:
    metadata = getattr(annotation, "__metadata__", ())
    return any(isinstance(item, BeforeValidator) for item in metadata) or any(map(_has_before, get_args(annotation)))


def _plain_default(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return structured(type(value))(**{name: _plain_default(item) for name, item in value})
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain_default(item) for item in value]
    return value
