"""A small random model with a tokenizer and a text of its own, for verbs that run one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = [f"word{index}" for index in range(60)]

SaveModel = Callable[[Path, int], Path]


@pytest.fixture
def save_model() -> SaveModel:
    """Writes a random model of so many layers, and a tokenizer that knows 60 words, to a folder."""
    import torch

    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    def save(folder: Path, num_layers: int) -> Path:
        words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0]))
        words.pre_tokenizer = Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": num_layers}
        config = transformers.LlamaConfig(
            **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=256
        )
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of 400 words that the tokenizer knows."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[index * index % 59] for index in range(400)))
    return path
