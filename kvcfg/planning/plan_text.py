"""A plan for people: what fits in one sentence, then where the memory goes, how fast it can be, and why."""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.errors import ConfigError, show
from kvcfg.params import Memory
from kvcfg.planning.layout import aligned, counted, paragraph
from kvcfg.planning.plans import Plan
from kvcfg.units import ceil_div, readable_bytes, readable_count

LAYER_NAMES = {
    "full": "full attention",
    "sliding_window": "sliding window",
    "chunked": "chunks",
    "mla": "latent (MLA)",
    "linear": "linear",
    "shared": "shared",
}

LEGEND = (
    "Per token, pages, tokens and sequences are of one replica; cache and free of one device; "
    "tokens/s is the bound for all replicas."
)


def plan_text(plan: Plan) -> str:
    """The whole plan; sections are separated by an empty line."""
    sections = [_headline(plan), _memory(plan), _layers(plan), _decoding(plan), _choices(plan), _notices(plan)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def plan_table(points: Sequence[tuple[Sequence[str], Plan | ConfigError]]) -> str:
    """One row a point of a sweep: the overrides that differ between points, then what each of them gives.

    Args:
        points: the overrides of a point and its plan, or the error that says why there is none.
    """
    values = [dict(override.partition("=")[::2] for override in overrides) for overrides, _ in points]
    keys = [key for key in dict.fromkeys(key for row in values for key in row) if _varies(key, values)]
    names = [_short(key, keys) for key in keys]
    head = [*names, "per token", "pages", "tokens", "sequences", "cache", "free", "tokens/s", "fits"]
    rows = [
        [*(row.get(key, "") for key in keys), *_row(result)] for row, (_, result) in zip(values, points, strict=True)
    ]
    align = "<" * len(keys) + ">" * 7 + "<"
    refused = dict.fromkeys(
        f"refused: {problem}" for _, result in points if isinstance(result, ConfigError) for problem in result.problems
    )
    notes = [line for note in (*refused, LEGEND) for line in paragraph(note)]
    return "\n".join([*aligned([head, *rows], align, indent=0), "", *notes])


def where(plan: Plan) -> str:
    """The devices in words: `8 × h100`, `h100`."""
    devices = plan.resolution.devices
    return devices.name if devices.count == 1 else f"{devices.count} × {devices.name}"


def _headline(plan: Plan) -> list[str]:
    model, replicas = plan.experiment.model.name, plan.resolution.devices.data_parallel_degree
    if plan.shortfall is not None:
        return [
            *paragraph(f"{model} on {where(plan)} does not fit: {plan.shortfall.why}."),
            *_remedies(plan.shortfall.overrides),
        ]
    each = f" on each of {replicas} replicas" if replicas > 1 else ""
    sequences = f"{counted(plan.max_batch_size, 'sequence')} of {plan.max_seq_len:,} tokens"
    if plan.capacity.requested_batch_size is None:
        holds = f"{counted(plan.num_tokens, 'token')} fit{each}, enough for {sequences}"
    else:
        more = plan.max_sequences - plan.max_batch_size
        verb = "fits" if plan.max_batch_size == 1 else "fit"
        holds = f"{sequences} {verb}{each}{f', and {more:,} more would' if more else ''}"
    return paragraph(f"{model} on {where(plan)}: {holds}. {_unit_costs(plan)}")


def _unit_costs(plan: Plan) -> str:
    params = plan.resolution.params
    per_sequence = params.bytes_per_sequence(plan.max_seq_len)
    if not params.grows:
        return f"A sequence takes {readable_bytes(per_sequence)}, however long it gets."
    fixed = per_sequence - plan.capacity.pages_per_sequence * params.bytes_per_block
    beside = f", a sequence {readable_bytes(fixed)} besides" if fixed else ""
    drafts = sum(group.bytes_per_token for group in params.draft_groups)
    of_drafts = f" ({readable_bytes(drafts)} of it for drafts)" if drafts else ""
    return (
        f"A token takes {readable_bytes(plan.bytes_per_token)}{of_drafts}, "
        f"a page of {params.page_size} tokens {readable_bytes(plan.bytes_per_page)}{beside}."
    )


def _remedies(overrides: Sequence[str]) -> list[str]:
    if not overrides:
        return ["No setting of this workload alone mends that; `kvcfg fit` looks at formats, weights and devices."]
    return ["Any one of these mends it; `kvcfg fit` knows more:", *(f"    {override}" for override in overrides)]


def _memory(plan: Plan) -> list[str]:
    devices, budget, fits = plan.resolution.devices, plan.budget, plan.fits
    memory = plan.capacity.planned if fits else plan.capacity.needed
    cache = ceil_div(memory.total, devices.tensor_parallel_degree)
    free = budget.available - cache
    entries = [("device", budget.memory, "")]
    if budget.held_back:
        entries.append(("− held back", budget.held_back, _limit(plan)))
    entries.append(("− weights", budget.weights, _weights_note(plan)))
    if budget.reserved:
        entries.append(("− reserved", budget.reserved, "devices.reserved_gib"))
    entries.append(("− cache" if fits else "− cache, as needed", cache, ""))
    entries += [
        (f"    {name}", ceil_div(size, devices.tensor_parallel_degree), note)
        for name, size, note in _items(plan, memory)
        if size
    ]
    entries.append(("= free", free, "") if free >= 0 else ("= missing", -free, ""))
    if devices.count == 1:
        rows = [("memory", "", ""), *((f"  {name}", readable_bytes(size), note) for name, size, note in entries)]
        return aligned(rows, "<><", indent=0)
    head = ("memory", "per device", f"all {devices.count}", "")
    rows4 = [
        (f"  {name}", readable_bytes(size), readable_bytes(size * devices.count), note) for name, size, note in entries
    ]
    return aligned([head, *rows4], "<>><", indent=0)


def _items(plan: Plan, memory: Memory) -> list[tuple[str, int, str]]:
    params, included = plan.resolution.params, plan.included()
    page_size, batch = params.page_size, plan.max_batch_size
    pages = plan.num_pages if plan.fits else batch * plan.capacity.pages_per_sequence
    notes = [f"{pages:,} × {page_size} tokens"]
    if included["scales"] and plan.fits:
        notes.append(f"scales {readable_bytes(included['scales'] // params.tensor_parallel_degree)}")
    if included["draft_slack"]:
        notes.append(f"room for drafts {readable_bytes(included['draft_slack'] // params.tensor_parallel_degree)}")
    return [
        ("pages", memory.pages, ", ".join(notes)),
        ("draft pages", memory.draft_pages, "the drafter's part of each page"),
        ("open pages", memory.open_pages, f"{batch:,} × what is being filled"),
        ("windowed pages", memory.windowed, f"{batch:,} × what windows reach"),
        ("linear states", memory.states, f"{batch:,} × one state a layer"),
        ("null pages", memory.null_pages, "never read; they pad page tables"),
        ("page tables", memory.page_tables, ""),
    ]


def _weights_note(plan: Plan) -> str:
    devices, model = plan.resolution.devices, plan.experiment.model
    if devices.tensor_parallel_degree == 1:
        return "a copy on each device" if devices.count > 1 else ""
    shared = f"{readable_bytes(model.weight_bytes)} over {devices.tensor_parallel_degree} devices"
    return shared if devices.data_parallel_degree == 1 else f"{shared}, {devices.data_parallel_degree} replicas"


def _limit(plan: Plan) -> str:
    if plan.budget.explicit is not None:
        return "beyond cache.kv_cache_memory_bytes"
    return f"beyond cache.device_memory_utilization={plan.experiment.cache.device_memory_utilization:g}"


def _layers(plan: Plan) -> list[str]:
    rows = [("layers", "", "KV heads", "each takes", "per sequence", "")]
    groups = plan.layer_groups()
    formats_differ = len({group["format"] for group in groups if group["format"]}) > 1
    for group in groups:
        name = LAYER_NAMES[group["kind"]]
        other = "" if group["value_head_dim"] in (0, group["head_dim"]) else f"+{group['value_head_dim']}"
        heads = "" if group["kind"] in ("linear", "shared") else f"{group['n_kv_heads']} × {group['head_dim']}{other}"
        window = f" of {group['window']:,}" if group["window"] else ""
        if group["bytes_per_token"]:
            cost = f"{readable_bytes(group['bytes_per_token'] / group['num_layers'])} per token"
        elif group["bytes_per_sequence"]:
            cost = f"{readable_bytes(group['bytes_per_sequence'] / group['num_layers'])} per sequence"
        else:
            cost = "nothing"
        whose = ", of the drafter" if group["role"] == "draft" else ""
        whose += f" in {group['format']}" if formats_differ and group["format"] else ""
        copies = _copies(plan, group)
        total = readable_bytes(group["bytes_per_sequence"]) if group["bytes_per_sequence"] else ""
        rows.append((f"  {group['num_layers']}", f"{name}{window}{whose}", heads, cost, total, copies))
    return aligned(rows, "<<<<><", indent=0)


def _copies(plan: Plan, group: dict[str, object]) -> str:
    tp = plan.resolution.params.tensor_parallel_degree
    heads = group["n_kv_heads"]
    if group["kind"] in ("linear", "shared") or not isinstance(heads, int) or heads >= tp:
        return ""
    return f"{tp // heads} copies of each head" if heads > 1 else f"a copy on each of {tp} devices"


def _decoding(plan: Plan) -> list[str]:
    bound = plan.roofline
    step, rate = bound.min_step_ms, bound.max_tokens_per_s
    if not plan.fits or step is None or rate is None or bound.bytes_per_second is None:
        return []
    drafts = f" with all drafts accepted ({bound.tokens_per_step} tokens a step)" if bound.tokens_per_step > 1 else ""
    return paragraph(
        f"decoding {counted(bound.batch_size, 'sequence')} of {bound.seq_len:,} tokens: "
        f"at least {step:.3g} ms a step, at most {readable_count(rate)} tokens/s{drafts}; a device reads "
        f"{readable_bytes(bound.weight_bytes)} of weights and {readable_bytes(bound.kv_bytes)} of cache "
        f"at {bound.bytes_per_second / 1e9:,.0f} GB/s"
    )


def _choices(plan: Plan) -> list[str]:
    if not plan.choices:
        return []
    rows = [
        (f"  {choice.key}", f"{_brief(choice.requested)} → {_brief(choice.resolved)}", choice.why)
        for choice in plan.choices
    ]
    return aligned([("requested → resolved", "", "why"), *rows], "<<<", indent=0)


def _notices(plan: Plan) -> list[str]:
    return [line for notice in plan.notices for line in paragraph(f"Note: {notice}")]


def _brief(value: object) -> str:
    """A value as it would be written in an override; of layer groups only how many layers they are."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return counted(sum(item["num_layers"] for item in value), "layer")
    return show(value)


def _row(result: Plan | ConfigError) -> list[str]:
    if isinstance(result, ConfigError):
        return [""] * 7 + ["refused"]
    lack, rate = result.shortfall, result.roofline.max_tokens_per_s
    return [
        readable_bytes(result.bytes_per_token),
        f"{result.num_pages:,}",
        f"{result.num_tokens:,}",
        f"{result.max_sequences:,}",
        readable_bytes(result.kv_bytes_per_device),
        readable_bytes(result.free_bytes_per_device) if lack is None else "",
        "" if rate is None or lack is not None else f"{rate:,.0f}",
        "yes" if lack is None else f"no: {readable_bytes(lack.missing)} missing",
    ]


def _varies(key: str, rows: Sequence[dict[str, str]]) -> bool:
    return len({row.get(key) for row in rows}) > 1


def _short(key: str, keys: Sequence[str]) -> str:
    leaf = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == leaf for other in keys) > 1 else leaf
