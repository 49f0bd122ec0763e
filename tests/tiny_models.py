"""Tiny language models with random weights and a tiny tokenizer, made offline in milliseconds; the texts are made up."""

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.tokens import TokenSet, write_token_set

END_OF_TEXT = "<|endoftext|>"
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i * i}\n" for i in range(40)]


def tiny_tokenizer(directory: Path, *, vocab_size: int = 300) -> Path:
    """Saves a byte-level BPE tokenizer of `vocab_size` ids, end-of-text being id 0, and gives its directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    fast.save_pretrained(directory)
    return directory


def tiny_gpt2(
    directory: Path, *, num_layers: int = 3, d_model: int = 16, vocab_size: int = 300, max_context: int = 64, seed: int = 0
) -> Path:
    """Saves a GPT-2 with random weights and blocks `transformer.h.0` on, and gives its directory."""
    config = transformers.GPT2Config(
        n_layer=num_layers, n_embd=d_model, n_head=2, vocab_size=vocab_size, n_positions=max_context, bos_token_id=0, eos_token_id=0
    )
    return _save(config, directory, seed)


def tiny_llama(directory: Path, *, num_layers: int = 3, d_model: int = 16, vocab_size: int = 300, max_context: int = 64) -> Path:
    """Saves a Llama with random weights and blocks `model.layers.0` on, and gives its directory."""
    config = transformers.LlamaConfig(
        num_hidden_layers=num_layers,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=vocab_size,
        max_position_embeddings=max_context,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(config, directory, seed=0)


def _save(config: transformers.PretrainedConfig, directory: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # Freshly drawn weights are so small that every block hardly changes the residual stream; larger ones make layers differ.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(5.0)
    model.save_pretrained(directory)
    return directory


def tiny_token_set(
    directory: Path, *, num_documents: int = 30, shards: int = 2, vocab_size: int = 300, seed: int = 0, tokenizer_hash: str = ""
) -> TokenSet:
    """Writes documents of 1 to 60 random ids as a sealed token set (end-of-text id 0) and opens it."""
    generator = np.random.default_rng(seed)
    documents = [generator.integers(1, vocab_size, generator.integers(1, 61)) for _ in range(num_documents)]
    by_shard = {f"part-{number:03d}": documents[number::shards] for number in range(shards)}
    return write_token_set(directory, by_shard, vocab_size=vocab_size, end_of_text_id=0, tokenizer_hash=tokenizer_hash)
