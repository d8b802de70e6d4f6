"""Replays for people: one in full, several as a table of hit rates and what each comes to at one capacity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kvcfg.evaluation.replay import CapacityRow, Replay
from kvcfg.planning.layout import paragraph
from kvcfg.planning.plan_text import where
from kvcfg.results.table import aligned
from kvcfg.units import readable_bytes, readable_count

WIDTH = 120

_COVERED = {
    "model": ("model",),
    "devices": ("devices",),
    "page": ("cache.kv_cache_page_size",),
    "format": ("cache.kv_cache_format",),
    "policy": ("cache.eviction",),
    "trace": ("workload.trace",),
}
"""Columns that say what differs between replays, and the overrides they speak for."""


def replay_text(replay: Replay) -> str:
    """One replay: what was replayed, a line a capacity, notes."""
    tiers = [name for name in replay.rows[0].hit_rates if len(replay.rows[0].hit_rates) > 1]
    head = ["capacity", "tokens", "bytes", "hit rate %", *tiers, "tokens saved", "evictions", "peak pages"]
    cells = [
        [row.capacity, *_size(row), _percent(row.hit_rate), *_by_tier(row, tiers), *_counts(row)] for row in replay.rows
    ]
    return "\n".join([*_headline(replay), "", *aligned([head, *cells], num_left=1), "", *_footer([replay])])


def replay_table(points: Sequence[tuple[Sequence[str], Replay]]) -> str:
    """A sweep: hit rates by capacity, a line a point; then each point in full at the last of its capacities.

    Args:
        points: the overrides of a point and its replay.
    """
    replays = [replay for _, replay in points]
    labels = point_labels(points)
    names = list(labels[0])
    lead = [list(label.values()) for label in labels]
    traces = ", ".join(dict.fromkeys(map(_trace, replays)))
    lines = [*paragraph(f"hit rate, % of prompt tokens, by capacity ({traces})", width=WIDTH), ""]
    for capacities in _columns(replays, lead, names):
        rates = [{row.capacity: _percent(row.hit_rate) for row in replay.rows} for replay in replays]
        cells = [[*mine, *(rate.get(name, "") for name in capacities)] for mine, rate in zip(lead, rates, strict=True)]
        lines += [*aligned([[*names, *capacities], *cells], num_left=len(names)), ""]
    lasts = [replay.rows[-1] for replay in replays]
    tiers = [name for name in dict.fromkeys(name for row in lasts for name in row.hit_rates) if _has_tiers(lasts)]
    gains = _gains(points)
    compared = any(gains)
    head = [*names, "capacity", "tokens", "bytes", "hit %", *tiers, *(["vs wider"] if compared else []), "KL"]
    cells = [
        [
            *mine, row.capacity, *_size(row), _percent(row.hit_rate), *_by_tier(row, tiers),
            *([gain] if compared else []), _kl(replay), *_counts(row),
        ]
        for mine, replay, row, gain in zip(lead, replays, lasts, gains, strict=True)
    ]  # fmt: skip
    head += ["saved", "evictions", "peak"]
    lines += [*aligned([head, *cells], num_left=len(names) + 1), "", *_footer(replays)]
    if compared:
        told = "vs wider: points of hit rate beside the widest format, all else alike. KL: nats, where it was measured."
        lines += paragraph(told, width=WIDTH)
    return "\n".join(lines)


def point_labels(points: Sequence[tuple[Sequence[str], Replay]]) -> list[dict[str, str]]:
    """For each point what tells it from the others, by column; the page size where nothing does."""
    facts = [_facts(replay) for _, replay in points]
    values = [dict(override.partition("=")[::2] for override in overrides) for overrides, _ in points]
    spoken_for = {key for keys in _COVERED.values() for key in keys}
    others = dict.fromkeys(key for row in values for key in row if key not in spoken_for)
    columns = [name for name in _COVERED if len({fact[name] for fact in facts}) > 1]
    more = [key for key in others if len({row.get(key, "") for row in values}) > 1]
    labels = [
        {name: fact[name] for name in columns} | {key.rpartition(".")[2]: row.get(key, "") for key in more}
        for fact, row in zip(facts, values, strict=True)
    ]
    return labels if labels[0] else [{"page": fact["page"]} for fact in facts]


def _facts(replay: Replay) -> dict[str, str]:
    job = replay.job
    return {
        "model": job.experiment.model.name,
        "devices": where(job.plan),
        "page": str(job.page_size),
        "format": job.format,
        "policy": job.experiment.cache.eviction,
        "trace": replay.path.rpartition("/")[2],
    }


def _columns(replays: Sequence[Replay], lead: Sequence[Sequence[str]], names: Sequence[str]) -> Iterator[list[str]]:
    """Capacities of all replays, in parts that fit beside the leading columns."""
    capacities = list(dict.fromkeys(row.capacity for replay in replays for row in replay.rows))
    room = WIDTH - sum(max(map(len, column)) + 2 for column in zip(names, *lead, strict=True))
    part: list[str] = []
    for name in capacities:
        if part and sum(max(len(item), 5) + 2 for item in [*part, name]) > room:
            yield part
            part = []
        part.append(name)
    yield part


def _gains(points: Sequence[tuple[Sequence[str], Replay]]) -> list[str]:
    """Of each point how much more it finds than the one that differs in nothing but a wider format."""
    keys = [{name: value for name, value in label.items() if name != "format"} for label in point_labels(points)]
    gains = []
    for mine, (_, replay) in zip(keys, points, strict=True):
        alike = [
            other for key, (_, other) in zip(keys, points, strict=True) if _same_but_format(key, mine, other, replay)
        ]
        widest = max(alike, key=lambda item: item.job.bytes_per_page)
        gain = 100 * (replay.rows[-1].hit_rate - widest.rows[-1].hit_rate)
        gains.append(f"{gain:+.2f}" if widest.job.bytes_per_page > replay.job.bytes_per_page else "")
    return gains


def _same_but_format(key: Mapping[str, str], mine: Mapping[str, str], other: Replay, replay: Replay) -> bool:
    return key == mine and other.rows[-1].capacity == replay.rows[-1].capacity


def _headline(replay: Replay) -> list[str]:
    job = replay.job
    cache = job.experiment.cache
    how = f"{cache.eviction}, {job.options.running} at a time" if job.options.running > 1 else cache.eviction
    each = f"{readable_bytes(job.bytes_per_page)} a page"
    kl = "" if job.row is None else f", KL {_kl(replay)}"
    tiers = "".join(f", {tier.name} {tier.num_pages:,} pages" for tier in job.tiers)
    return [
        _trace(replay),
        f"{job.experiment.model.name} on {where(job.plan)}: pages of {job.page_size} tokens in {job.format} "
        f"({each}{kl}), {how}{tiers}",
    ]


def _trace(replay: Replay) -> str:
    name, trace = replay.path.rpartition("/")[2], replay.trace
    return f"{name}: {len(trace.requests):,} requests, {readable_count(trace.input_tokens)} prompt tokens"


def _size(row: CapacityRow) -> list[str]:
    return [readable_count(row.num_tokens), readable_bytes(row.num_bytes)]


def _counts(row: CapacityRow) -> list[str]:
    return [readable_count(row.saved_tokens), readable_count(row.evictions), f"{row.peak_pages:,}"]


def _by_tier(row: CapacityRow, tiers: Sequence[str]) -> list[str]:
    return [_percent(row.hit_rates[name]) if name in row.hit_rates else "" for name in tiers]


def _has_tiers(rows: Sequence[CapacityRow]) -> bool:
    return any(len(row.hit_rates) > 1 for row in rows)


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}"


def _kl(replay: Replay) -> str:
    return "–" if replay.job.row is None else f"{replay.job.row.kl:.2e}"


def _footer(replays: Sequence[Replay]) -> list[str]:
    """What the figures count, and the notes, each once."""
    first = replays[0].job
    order = "first" if first.head_first else "last"
    counted = (
        f"Capacity: of one replica. Hit rate: tokens of pages found over all prompt tokens, a page counted whole; "
        f"answers are not counted. A prompt that is done gives up its {order} page first."
    )
    tiers = "A page counts for the first tier that has it; each tier is lru and sees every use."
    notes = dict.fromkeys(note for replay in replays for note in replay.notes)
    told = [counted, *([tiers] if any(replay.job.tiers for replay in replays) else []), *notes]
    return [line for note in told for line in paragraph(note, width=WIDTH)]
