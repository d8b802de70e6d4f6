"""Words behind a verb that are no overrides of its own: what `import`, `diff` and `rerun` are about.

What follows them is kept for later too (`beside`): it goes with a config that is only known once it was read.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.config.verbs import VERBS
from kvcfg.errors import ConfigError, Problem

POSITIONS: dict[str, tuple[str, ...]] = {"import": ("source",), "diff": ("a", "b"), "rerun": ("fingerprint",)}
"""The options that the first words of a verb stand for, in order."""

EXAMPLES = {
    "import": 'kvcfg import "vllm serve MODEL --block-size 32"',
    "diff": "kvcfg diff cache=fp8 cache=int8",
    "rerun": "kvcfg rerun 3f2a9c",
}


def placed(verb: str, words: Sequence[str]) -> tuple[str, ...]:
    """The words as overrides: the first ones set the options that they stand for, unless those are spelled out.

    Raises:
        ConfigError: if one of them is missing.
    """
    names = POSITIONS.get(verb, ())
    if not names:
        return tuple(words)
    from kvcfg.composition.spelling import quoted

    options = VERBS[verb].model_fields
    own = [word for word in words if "=" in word and word.partition("=")[0] in options]
    rest = [word for word in words if word not in own]
    open_names = [name for name in names if not any(word.startswith(f"{name}=") for word in own)]
    if len(rest) < len(open_names):
        what = "one word" if len(names) == 1 else f"{len(names)} words"
        raise ConfigError(Problem(verb, f"needs {what} behind it", ..., EXAMPLES[verb]))
    heads = [f"{name}={quoted(word)}" for name, word in zip(open_names, rest, strict=False)]
    more = rest[len(open_names) :]
    if more and "beside" not in options:
        rule = f"is one word too many: kvcfg {verb} takes everything else from what it names"
        raise ConfigError(Problem(more[0], rule, ..., EXAMPLES[verb]))
    beside = [f"beside={quoted(more)}"] if more else []
    return (*heads, *own, *beside)
