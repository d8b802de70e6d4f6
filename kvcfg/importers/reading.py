"""From an engine's command line or file to a checked config."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcfg.composition import compose
from kvcfg.errors import ConfigError, Problem
from kvcfg.exporters.engines import find_version
from kvcfg.importers.imported import Imported
from kvcfg.importers.max import flattened
from kvcfg.importers.notes import Notes
from kvcfg.importers.sources import read_source
from kvcfg.importers.tokens import bytes_for
from kvcfg.registry import Registry

IMPORTERS = Registry(
    "engine",
    {
        "vllm": "kvcfg.importers.vllm:import_vllm",
        "sglang": "kvcfg.importers.sglang:import_sglang",
        "max": "kvcfg.importers.max:import_max",
    },
)
"""Names of engines and the functions that take their settings."""

Importer = Callable[[Notes, str], None]


def read_config(
    source: str, engine: str | None = None, version: str | None = None, overrides: Sequence[str] = ()
) -> Imported:
    """Read a command line or a file of an engine.

    Args:
        source: the command line, or the path of the file.
        engine: whose it is; None takes the one that it looks like.
        version: version of the engine; None for the newest that is known.
        overrides: what it does not say, like the devices; they win.

    Raises:
        ConfigError: if it cannot be read, or says what no config of kvcfg can be.
    """
    found = read_source(source)
    name = engine or found.engine
    if name is None:
        rule = "does not show whose settings it holds; say it"
        raise ConfigError(Problem("source", rule, source, "engine=vllm"))
    IMPORTERS.check(name)
    settings = flattened(found.settings) if name == "max" else found.settings
    known = find_version(name, version or ("26.4" if name == "max" and "kv_connector" in settings else None))
    notes = Notes(settings)
    importer: Importer = IMPORTERS.load(name)
    try:
        importer(notes, known.version)
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(Problem("source", f"has a value that {name} would not take: {error}", source)) from error
    said = [*notes.overrides, *overrides]
    experiment = compose(said)
    if notes.tokens is not None:
        size = bytes_for(experiment, notes.tokens, notes.share)
        notes.read_as("max-total-tokens", notes.tokens, "cache.kv_cache_memory_bytes", size, "what so many tokens take")
        said = [*notes.overrides, *overrides]
        experiment = compose(said)
    return Imported(known.engine, known.version, tuple(said), experiment, *notes.finish())
