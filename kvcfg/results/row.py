"""One measured experiment: its figures, and all that is needed to run it again."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from kvcfg.errors import GateError, KvcfgError
from kvcfg.results.stored_error import StoredError
from kvcfg.results.task_score import TaskScore


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """What one cache cost, lost and took, on one model and one text. Its fields are the keys of a JSONL row."""

    fingerprint: str
    """sha256 of the requested config, kvcfg's version, the model's weights and the text."""
    model: str
    """Name of the model."""
    device: str
    """Where it ran: cpu, or the name of the GPU."""
    format: str
    """Element format; keys/values where they differ, and `+` between those of different layers, unless
    there are more than three."""
    recipe: str
    """How pages are stored, in words."""
    attention: str | None = None
    """What read the cache: `kernels`, over pages where they lie, or `gathered`, the model's own attention over keys and
    values that were copied out of them; both where kernels know the pages of some layers. None in rows of versions
    that did not say."""
    page_size: int
    """Tokens of a page."""
    bytes_per_token_planned: float
    """Bytes of one more token of context, over all layers that grow, scales included, as planned."""
    bytes_per_token_allocated: float
    """The same, measured on the tensors that were allocated."""
    bits_per_element: float
    """Bits that one number of a closed page takes: elements, scales, zeros, means and sinks."""
    bits_effective: float
    """The same over all pages that the row's context held, the open one included."""
    num_predictions: int
    """Next-token predictions that the figures below are means of."""
    ppl: float
    """Perplexity with this cache."""
    ppl_reference: float
    """Perplexity with the full-precision cache, in the same run."""
    kl: float
    """Mean KL divergence, full-precision cache to this one, in nats per prediction."""
    kl_ci: tuple[float, float]
    """95 % bootstrap interval of `kl`, over blocks of neighbouring predictions."""
    kl_p99: float
    """KL that one prediction in a hundred exceeds."""
    kl_by_depth: list[float] | None = None
    """Mean KL of eighths of the windows, their beginnings first; fewer parts where a window has fewer predictions. None
    in rows of versions that did not say."""
    noise_floor: float
    """Mean KL of the full-precision cache against itself, fed in another shape."""
    top1: float
    """Share of predictions whose most likely token is the same, 0 to 1."""
    clip_rate: float | None = None
    """Share of the numbers that were cut off where scales do not follow them, of the worst group; else 0. None in
    rows of versions that did not count."""
    experimental: bool = False
    """Whether the recipe is none of those that kvcfg has measured."""
    first_token_ms: float | None = None
    """Milliseconds from the last window as a prompt to the token that follows it, at batch 1. None in rows of versions
    that did not time it."""
    peak_cache_bytes: int | None = None
    """Bytes of the pages that a whole window holds, at its end. None in rows of versions that did not say."""
    tasks: dict[str, TaskScore] | None = None
    """Scores of retrieval tasks by name; None where none were asked for."""
    stored_error: StoredError | None = None
    """What storing does to the first window's keys and values, by layer and head; None where it was not asked for."""
    decode_tokens_per_s: float
    """Tokens generated per second at batch 1 after the last window, by the median step."""
    text_sha: str
    """sha256 of the text."""
    overrides: tuple[str, ...]
    """What was asked for, as `kvcfg eval` takes it."""
    config: dict[str, Any]
    """The requested config, every value."""
    versions: dict[str, str]
    """Versions of Python, kvcfg and the libraries that the figures depend on."""
    created: str
    """When the row was made, UTC, ISO 8601."""

    def require(self, *, max_kl: float | None = None) -> ResultRow:
        """Return the row if it is good enough, for use as a gate in training or CI.

        Args:
            max_kl: largest mean KL allowed, in nats; None sets no limit.

        Raises:
            GateError: if the row exceeds a limit or a figure is not a number.
        """
        if max_kl is not None and not self.kl <= max_kl:
            low, high = self.kl_ci
            raise GateError(
                f"{self.format} on {self.model}: KL {self.kl:.3g} [{low:.3g}, {high:.3g}] is above the gate {max_kl:g}"
            )
        return self

    def to_json(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str, source: str = "row") -> ResultRow:
        """The row that one line of JSON holds; what later versions add is left out, what earlier ones lack defaulted.

        Raises:
            KvcfgError: if the line is no JSON object or lacks a key.
        """
        try:
            data = json.loads(line)
            known = {
                field.name: data[field.name] for field in fields(cls) if field.name in data or field.default is MISSING
            }
            if tasks := known.get("tasks"):
                known["tasks"] = {name: TaskScore(**score) for name, score in tasks.items()}
            if error := known.get("stored_error"):
                known["stored_error"] = StoredError(**error)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise KvcfgError(f"{source} is no result row: {error!r}") from error
        known |= {"overrides": tuple(known["overrides"]), "kl_ci": tuple(known["kl_ci"])}
        return cls(**known)
