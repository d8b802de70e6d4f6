"""Tiny random models of the families that the contract is held on, and caches for them."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import transformers

import kvcfg
from kvcfg.integrations.transformers import TransformersCache

PAGE = 16
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral, window": ("MistralConfig", {"sliding_window": 9}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3, q/k norms": ("Qwen3Config", {}),
    "gemma 2, soft cap": ("Gemma2Config", {**HYBRID, "sliding_window": 9, "attn_logit_softcapping": 2.0}),
    "gemma 3": ("Gemma3TextConfig", {**HYBRID, "sliding_window": 9}),
    "phi-3": ("Phi3Config", {"sliding_window": None}),
    "gpt-oss, sinks": ("GptOssConfig", {"sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "deepseek-v3, latents": ("DeepseekV3Config", LATENT),
}


class Tiny(NamedTuple):
    """A model, and the folder of its config.json."""

    model: Any
    folder: str

    def set_attention(self, name: str) -> None:
        """`kvcfg`, or `gathered`: what transformers has for the family."""
        plain = "sdpa" if self.model._supports_sdpa else "eager"
        self.model.set_attn_implementation("kvcfg" if name == "kvcfg" else plain)

    def cache(self, *overrides: str) -> TransformersCache:
        """An empty cache; in float32 unless overrides say otherwise."""
        sizes = ["devices=cpu", "workload.max_batch_size=6", "workload.max_seq_len=80"]
        recipe = overrides or ("cache.kv_cache_format=float32",)
        asked = [*sizes, f"cache.kv_cache_page_size={PAGE}", *recipe]
        experiment = kvcfg.compose(["model=hf", f"model.path={self.folder}", *asked])
        return TransformersCache(kvcfg.build(experiment, self.model))

    def dynamic(self) -> Any:
        """The cache that transformers makes by default."""
        return transformers.DynamicCache(config=self.model.config)


@lru_cache(maxsize=16)
def tiny(family: str, seed: int = 0) -> Tiny:
    """A model whose attention matters: scores are large, so that tokens depend on what is stored."""
    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **changes})
    torch.manual_seed(seed)
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "self_attn" in key and key.endswith("proj.weight"):
                parameter.normal_(std=0.2)
            elif key.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.normal_(std=0.3)
    folder = tempfile.mkdtemp(prefix="kvcfg-tiny-")
    config.save_pretrained(folder)
    return Tiny(model, folder)


def prompts(batch_size: int = 2, num_tokens: int = 37) -> torch.Tensor:
    """Random tokens whose second half repeats the first, so that prompt lookup finds something."""
    tokens = torch.randint(1, 97, (batch_size, num_tokens), generator=torch.Generator().manual_seed(3))
    half = num_tokens // 2
    tokens[:, half : 2 * half] = tokens[:, :half]
    return tokens


def generate(tiny_model: Tiny, cache: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Greedy unless options say otherwise, always twelve tokens."""
    torch.manual_seed(5)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "min_new_tokens": 12, **options}
    settings.setdefault("do_sample", False)
    tokens = tiny_model.model.generate(tokens, past_key_values=cache, **settings)
    return tokens


def padded(side: str) -> torch.Tensor:
    """A mask for two prompts, of which the first is shorter."""
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[0, slice(0, 8) if side == "left" else slice(-5, None)] = 0
    return mask
