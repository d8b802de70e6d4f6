"""What must agree between groups: heads and devices, drafters, tiers, lengths; for recipes see `recipe_rules.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from kvcfg.config.cache import KVConnectorType
from kvcfg.config.drafts import all_layers, draft_layers
from kvcfg.config.recipe_rules import RECIPE_RULES
from kvcfg.config.rulebook import DRAFT_KEYS, Rulebook
from kvcfg.errors import Problem

if TYPE_CHECKING:
    from kvcfg.config.experiment import ExperimentConfig

RULES = Rulebook(RECIPE_RULES)


def problems(experiment: ExperimentConfig, refused: Collection[str] = ()) -> list[Problem]:
    """Everything that is wrong between the groups, by the rules that read none of the `refused` keys."""
    return [item for rule in RULES if not rule.reads_any(refused) for item in rule.check(experiment)]


@RULES.rule("devices", "model.layer_groups", "model.num_q_heads")
def heads_split_over_devices(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Tensor parallelism gives every device the same number of heads, or copies of one."""
    devices, tp = experiment.devices, experiment.devices.tensor_parallel_degree
    if _splits(experiment, tp):
        return
    heads = dict.fromkeys(group.n_kv_heads for group in experiment.model.layer_groups if _has_heads(group.kind))
    kv_heads = " or ".join(str(count) for count in heads)
    rule = (
        f"is tensor parallel over {tp} (count / data_parallel_degree), which must divide the "
        f"{experiment.model.num_q_heads} query heads and {kv_heads or 'no'} KV heads of {experiment.model.name}"
    )
    if devices.allow_kv_head_replication and heads:
        rule += " (or be a multiple of the KV heads)"
    yield Problem("devices.count", rule, devices.count, _splitting_devices(experiment, tp))


@RULES.rule(*DRAFT_KEYS, "devices", "model.num_q_heads")
def drafters_split_over_devices(experiment: ExperimentConfig) -> Iterator[Problem]:
    """The heads of a drafter split where those of the model do."""
    tp = experiment.devices.tensor_parallel_degree
    if not _splits(experiment, tp) or _splits(experiment, tp, drafts=True):
        return
    heads = " and ".join(str(group.n_kv_heads) for group in draft_layers(experiment).groups)
    rule = f"has {heads} KV heads, which tensor parallel {tp} does not split into equal shares"
    yield Problem("speculative.draft_layer_groups", rule, ..., _splitting_devices(experiment, tp, drafts=True))


@RULES.rule(*DRAFT_KEYS)
def drafters_are_known(experiment: ExperimentConfig) -> Iterator[Problem]:
    """A drafter that is to be like the model's layers needs some that keep tokens."""
    method, key = experiment.speculative.speculative_method, "speculative.draft_layer_groups"
    if method is not None and not draft_layers(experiment).groups:
        heads = experiment.devices.tensor_parallel_degree
        fix = f"{key}=[{{kind:full,num_layers:1,n_kv_heads:{heads},head_dim:128}}]"
        rule = f"must be told: no layer of {experiment.model.name} keeps tokens, so none says what {method} stores"
        yield Problem(key, rule, ..., fix)


@RULES.rule("cache.kv_connector", "model.layer_groups")
def tiers_find_pages_again(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Pages in a tier are found by their prefix, from which a linear state cannot go on."""
    connector = experiment.cache.kv_connector
    states = any(group.kind == "linear" for group in experiment.model.layer_groups)
    if states and connector not in (None, KVConnectorType.null):
        rule = f"must be null for {experiment.model.name}: the state of a linear layer cannot resume from a page"
        yield Problem("cache.kv_connector", rule, connector, "cache.kv_connector=null")


@RULES.rule("workload.max_seq_len", "model.max_seq_len")
def sequences_fit_the_model(experiment: ExperimentConfig) -> Iterator[Problem]:
    """Sequences are no longer than the context of the model."""
    asked, limit = experiment.workload.max_seq_len, experiment.model.max_seq_len
    if asked is not None and asked > limit:
        rule = f"must be at most {limit}, the context of {experiment.model.name} in tokens (model.max_seq_len)"
        yield Problem("workload.max_seq_len", rule, asked, f"workload.max_seq_len={limit}")


def _has_heads(kind: str) -> bool:
    return kind in ("full", "sliding_window", "chunked")


def _splits(experiment: ExperimentConfig, tp: int, copies: bool | None = None, drafts: bool = False) -> bool:
    copies = experiment.devices.allow_kv_head_replication if copies is None else copies
    layers = all_layers(experiment) if drafts else experiment.model.layer_groups
    groups = [group for group in layers if _has_heads(group.kind)]
    return experiment.model.num_q_heads % tp == 0 and all(
        group.n_kv_heads % tp == 0 or (copies and tp % group.n_kv_heads == 0) for group in groups
    )


def _splitting_devices(experiment: ExperimentConfig, tp: int, drafts: bool = False) -> str:
    """An override under which heads split: copies of them if those help, else fewer devices."""
    if not experiment.devices.allow_kv_head_replication and _splits(experiment, tp, copies=True, drafts=drafts):
        return "devices.allow_kv_head_replication=true"
    fitting = next(degree for degree in range(tp, 0, -1) if _splits(experiment, degree, drafts=drafts))
    return f"devices.count={fitting * experiment.devices.data_parallel_degree}"
