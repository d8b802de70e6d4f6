"""llama.cpp: an environment file for `llama-server`, whose LLAMA_ARG_* names are its flags.

Checked against the server's own README and `llama-cpp-python` 0.3.36, which runs the KV types. It has no pages: every
slot gets an equal part of one context.
"""

from __future__ import annotations

import shlex

from kvcfg.config.recipes import resolve_recipe
from kvcfg.exporters.exported import Export
from kvcfg.exporters.memory import budget_key, how_planned
from kvcfg.exporters.sheet import Sheet
from kvcfg.exporters.stored import Stored, fix_for, nearest_stored, plain, refuse_layers, stored_as
from kvcfg.exporters.tiers import tiers_of
from kvcfg.formats import SideRecipe
from kvcfg.planning.plans import Plan
from kvcfg.units import MIB

VERSIONS = ("0.3.36",)

BLOCK = 32
"""Numbers along head_dim that share a scale in q8_0 and q4_0."""

FORMATS = {
    plain("float32"): "f32",
    plain("float16"): "f16",
    plain("bfloat16"): "bf16",
    Stored("int8", f"block of {BLOCK} in float16"): "q8_0",
    Stored("int4", f"block of {BLOCK} in float16"): "q4_0",
}

FLAGS = {
    "LLAMA_ARG_CTX_SIZE": "-c",
    "LLAMA_ARG_N_PARALLEL": "-np",
    "LLAMA_ARG_CACHE_TYPE_K": "-ctk",
    "LLAMA_ARG_CACHE_TYPE_V": "-ctv",
    "LLAMA_ARG_FLASH_ATTN": "-fa",
    "LLAMA_ARG_SPLIT_MODE": "-sm",
    "LLAMA_ARG_CACHE_RAM": "--cache-ram",
}
"""The same settings as flags."""


def export_llamacpp(plan: Plan, version: str) -> Export:
    """The settings of `llama-server` for a planned cache.

    Raises:
        ConfigError: if llama.cpp cannot store it so.
    """
    sheet = Sheet("llamacpp", version, plan)
    sheet.lose("cache.kv_cache_page_size", "no pages", "every slot has one piece of the context")
    refuse_layers(sheet)
    _formats(sheet)
    _context(sheet)
    on = sheet.experiment.cache.enable_prefix_caching
    sheet.say("cache.enable_prefix_caching", LLAMA_ARG_CACHE_PROMPT=int(on))
    if on:
        why = "a prompt goes on from the longest common prefix in one slot; slots share no pages"
        sheet.lose("cache.enable_prefix_caching", "prefixes within a slot", why)
    tp = plan.resolution.devices.tensor_parallel_degree
    if tp > 1:
        sheet.say(LLAMA_ARG_SPLIT_MODE="tensor")
    sheet.say("devices.count")
    tiers = tiers_of(sheet.experiment.cache)
    if tiers is not None and tiers.host_gib is not None:
        mebibytes = tiers.host_bytes // MIB
        sheet.say("cache.kv_connector", LLAMA_ARG_CACHE_RAM=mebibytes)
        why = "whole prompts are kept there, not pages"
        sheet.lose("cache.kv_connector", f"--cache-ram {mebibytes}", why)
    sheet.need("MODEL.gguf: the weights as GGUF.")
    flags = [word for name, value in sheet.settings.items() if name in FLAGS for word in (FLAGS[name], str(value))]
    flags += [] if on else ["--no-cache-prompt"]
    return sheet.finish("llamacpp.env", ("llama-server", "-m", "MODEL.gguf", *map(shlex.quote, flags)), "")


def _formats(sheet: Sheet) -> None:
    recipe = resolve_recipe(sheet.experiment)
    sheet.say("cache.kv_cache_format")
    keys, values = (_type(sheet, side) for side in (recipe.keys, recipe.values))
    sheet.say(LLAMA_ARG_CACHE_TYPE_K=keys, LLAMA_ARG_CACHE_TYPE_V=values)
    if values is not None and values.startswith("q"):
        sheet.say(LLAMA_ARG_FLASH_ATTN="on")
    if keys != values:
        sheet.need("A build with all pairs of KV types (GGML_CUDA_FA_ALL_QUANTS) on GPUs: llama.cpp issue 28524.")


def _type(sheet: Sheet, side: SideRecipe) -> str | None:
    asked = stored_as(side, resolve_recipe(sheet.experiment))
    if asked not in FORMATS:
        nearest = nearest_stored(asked, FORMATS)
        fix = fix_for(sheet.experiment, nearest)
        rule = f"llama.cpp has no {asked}; nearest is {FORMATS[nearest]}, blocks of {BLOCK} along head_dim"
        sheet.refuse("cache.kv_cache_format", rule, fix)
    return FORMATS.get(asked)


def _context(sheet: Sheet) -> None:
    plan = sheet.plan
    slots = min(plan.max_batch_size, max(1, plan.max_sequences))
    tokens = slots * plan.max_seq_len
    if not plan.max_sequences:
        tokens = plan.num_tokens
    slotted = f"{slots:,} × {plan.max_seq_len:,} tokens of the {plan.num_tokens:,} that fit"
    how = f"{how_planned(plan)}; {slotted if plan.max_sequences else 'all tokens that fit'}"
    sheet.convert(budget_key(plan), "LLAMA_ARG_CTX_SIZE", tokens, how)
    sheet.say("workload.max_batch_size", "workload.max_seq_len", LLAMA_ARG_CTX_SIZE=tokens, LLAMA_ARG_N_PARALLEL=slots)
