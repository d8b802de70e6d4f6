"""The command line apart: the verb, overrides, and options that are Hydra's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcfg.cli.positions import placed
from kvcfg.config.verbs import VERBS
from kvcfg.errors import ConfigError, Problem, nearest, one_of

HELP = """\
kvcfg: one config for an LLM's KV cache: what it costs, what it loses, how fast it is.

usage: kvcfg VERB [GROUP=CHOICE | KEY=VALUE]… [-m] [--config-dir DIR]

verbs
  plan       what a cache costs: bytes, pages, tokens, sequences, bounds on speed
  fit        what would make a workload fit; with quantization=auto the formats that suit each layer
  eval       what a cache loses and how fast it is, measured on a real model
  bench      how fast pages are read and written here, and a model decodes with the cache
  replay     what a prefix cache is worth on a trace of requests: hit rates by capacity
  calibrate  measure a model's keys on a text, for recipes that weigh them
  export     the config as an engine takes it (vllm, sglang, trtllm, max, …), and what is lost
  import     an engine's command line or file as a config
  diff       what differs between two configs, files or measured rows
  rerun      measure a row again, and say whether its figures repeat
  fetch      bring a model's weights to this machine

groups: cache, model, devices, quantization, speculative, workload, experiment
  kvcfg plan --help lists the choices of each, and every key with its default

examples
  kvcfg plan model=llama-3.1-8b devices=h100x8 cache.kv_cache_page_size=64
  kvcfg plan model=qwen3-8b,llama-3.1-8b cache=fp8,int8 -m      every combination, one table
  kvcfg fit model=llama-3.1-8b devices=rtx4090 workload=rag
  kvcfg fit quantization=auto gate.max_kl=0.005                 formats of each layer, measured
  kvcfg eval cache=int8 gate.max_kl=0.01                        exit code 1 if it loses more
  kvcfg export engine=vllm model=llama-3.1-8b devices=h100 quantization=fp8_unit out=vllm.yaml
  kvcfg diff cache=fp8 "vllm serve MODEL --kv-cache-dtype fp8" devices=h100

output=json prints JSON alone; --cfg job shows the composed config; -m is Hydra's --multirun."""

WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp", "--config-name", "-cn")


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a command line asks for.

    Attributes:
        verb: what to do; None to show the help.
        overrides: group choices and values, in order.
        is_sweep: whether comma lists are run through.
        config_dir: folder with presets of the user's own, or None.
        hydra_options: options that only Hydra answers, like `--cfg job`.
    """

    verb: str | None
    overrides: tuple[str, ...] = ()
    is_sweep: bool = False
    config_dir: str | None = None
    hydra_options: tuple[str, ...] = ()


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Tell verb, overrides and options apart.

    Raises:
        ConfigError: if there is no such verb, or an option lacks its value.
    """
    words: list[str] = []
    hydra_options: list[str] = []
    config_dir, is_sweep = None, False
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if word in ("-m", "--multirun"):
            is_sweep = True
        elif name in ("--config-dir", "-cd"):
            config_dir = value if equals else _value_of(name, rest)
        elif name in WITH_VALUE and not equals:
            hydra_options += [word, _value_of(name, rest)]
        elif word.startswith("-"):
            hydra_options.append(word)
        else:
            words.append(word)
    if not words or words[0] == "help":
        return Arguments(None)
    verb = _verb(words[0])
    return Arguments(verb, placed(verb, words[1:]), is_sweep, config_dir, tuple(hydra_options))


def _value_of(option: str, rest: object) -> str:
    value = next(rest, None)  # type: ignore[call-overload]
    if value is None:
        raise ConfigError(Problem(option, "needs a value"))
    return str(value)


def _verb(word: str) -> str:
    if word in VERBS:
        return word
    if "=" in word:
        raise ConfigError(Problem(word, f"needs a verb before it ({', '.join(VERBS)})", fix=f"kvcfg plan {word}"))
    close = nearest(word, list(VERBS))
    raise ConfigError(Problem(word, f"is no verb; it {one_of(list(VERBS))}", fix=f"kvcfg {close}" if close else None))
