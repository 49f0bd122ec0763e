"""Tiny models of many architectures, from the configurations of transformers; weights are random, a model is made in milliseconds.

Each has three blocks of width 32, a vocabulary of 300 and, where it has a limit, contexts of 64 tokens.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

IDS: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **IDS}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
DENSE: dict[str, Any] = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 64, **IDS}
GROUPED: dict[str, Any] = {**DENSE, "num_key_value_heads": 2}
HEADS_OF_8: dict[str, Any] = {**GROUPED, "head_dim": 8}
WINDOW: dict[str, Any] = {"sliding_window": 16}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OPT: dict[str, Any] = {**SIZES, "ffn_dim": 64, "max_position_embeddings": 64, **IDS}
DEEPSEEK: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8}
DEEPSEEK |= {"q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
BART: dict[str, Any] = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_ffn_dim": 64}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "max_position_embeddings": 64}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
VISION: dict[str, Any] = {**SIZES, "intermediate_size": 64, "image_size": 28, "patch_size": 14}
GEMMA3: dict[str, Any] = {"text_config": HEADS_OF_8 | WINDOW, "vision_config": VISION, "mm_tokens_per_image": 4}
GEMMA3 |= {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297}


class Architecture(NamedTuple):
    config: str
    """The class of transformers."""
    blocks: str
    """What stands before a block's number."""
    settings: dict[str, Any]
    refused: str | None = None
    """Part of the sentence with which the pipeline refuses it."""


ARCHITECTURES = {
    "Llama": Architecture("LlamaConfig", "model.layers", GROUPED),
    "Mistral": Architecture("MistralConfig", "model.layers", GROUPED | WINDOW),
    # As many experts as blocks, so that the lists of modules can't be told apart by their lengths.
    "Mixtral": Architecture("MixtralConfig", "model.layers", GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "Qwen2": Architecture("Qwen2Config", "model.layers", GROUPED),
    "Qwen2-MoE": Architecture("Qwen2MoeConfig", "model.layers", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "Qwen3": Architecture("Qwen3Config", "model.layers", HEADS_OF_8),
    "Qwen3-MoE": Architecture("Qwen3MoeConfig", "model.layers", HEADS_OF_8 | EXPERTS),
    "Gemma": Architecture("GemmaConfig", "model.layers", HEADS_OF_8),
    "Gemma 2": Architecture("Gemma2Config", "model.layers", HEADS_OF_8 | WINDOW),
    "Gemma 3 (text)": Architecture("Gemma3TextConfig", "model.layers", HEADS_OF_8 | WINDOW),
    "Gemma 3 (text and pictures)": Architecture("Gemma3Config", "model.language_model.layers", GEMMA3),
    "Phi": Architecture("PhiConfig", "model.layers", DENSE),
    "Phi-3": Architecture("Phi3Config", "model.layers", GROUPED),
    "GPT-2": Architecture("GPT2Config", "transformer.h", GPT),
    "GPT-BigCode": Architecture("GPTBigCodeConfig", "transformer.h", GPT),
    "GPT-Neo": Architecture(
        "GPTNeoConfig",
        "transformer.h",
        {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]], "window_size": 16}
        | {"hidden_size": 32, "max_position_embeddings": 64, **IDS},
    ),
    "GPT-NeoX": Architecture("GPTNeoXConfig", "gpt_neox.layers", DENSE),
    "GPT-J": Architecture("GPTJConfig", "transformer.h", GPT | {"rotary_dim": 4}),
    "GPT-OSS": Architecture("GptOssConfig", "model.layers", HEADS_OF_8 | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GPT (2018)": Architecture("OpenAIGPTConfig", "transformer.h", GPT),
    "CodeGen": Architecture("CodeGenConfig", "transformer.h", GPT | {"n_ctx": 64, "rotary_dim": 4}),
    "CTRL": Architecture("CTRLConfig", "transformer.h", GPT | {"dff": 64}),
    "OPT": Architecture("OPTConfig", "model.decoder.layers", OPT | {"word_embed_proj_dim": 32}),
    "OPT (350M's form)": Architecture(
        "OPTConfig", "model.decoder.layers", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
    ),
    "XGLM": Architecture(
        "XGLMConfig",
        "model.layers",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 64, **IDS},
    ),
    "BLOOM": Architecture("BloomConfig", "transformer.h", {"hidden_size": 32, "n_layer": 3, "n_head": 4, **IDS}),
    "Falcon": Architecture("FalconConfig", "transformer.h", SIZES | IDS | {"max_position_embeddings": 64}),
    "Falcon (ALiBi)": Architecture("FalconConfig", "transformer.h", SIZES | IDS | {"max_position_embeddings": 64, "alibi": True}),
    "MPT": Architecture("MptConfig", "transformer.blocks", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, **IDS}),
    "StableLM": Architecture("StableLmConfig", "model.layers", GROUPED),
    "StarCoder2": Architecture("Starcoder2Config", "model.layers", GROUPED),
    "OLMo": Architecture("OlmoConfig", "model.layers", GROUPED),
    "OLMo 2": Architecture("Olmo2Config", "model.layers", GROUPED),
    "OLMoE": Architecture("OlmoeConfig", "model.layers", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "SmolLM3": Architecture("SmolLM3Config", "model.layers", GROUPED),
    "Cohere": Architecture("CohereConfig", "model.layers", GROUPED),
    "Granite": Architecture("GraniteConfig", "model.layers", GROUPED),
    "GLM": Architecture("GlmConfig", "model.layers", HEADS_OF_8),
    "DeepSeek-V3": Architecture(
        "DeepseekV3Config", "model.layers", GROUPED | DEEPSEEK | {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
    ),
    "Llama 4 (text)": Architecture("Llama4TextConfig", "model.layers", HEADS_OF_8 | {"num_local_experts": 2, "intermediate_size_mlp": 64}),
    "Mamba": Architecture("MambaConfig", "backbone.layers", {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, **IDS}),
    "Mamba 2": Architecture(
        "Mamba2Config",
        "backbone.layers",
        {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 2, **IDS},
    ),
    "RecurrentGemma": Architecture("RecurrentGemmaConfig", "model.layers", GROUPED | {"lru_width": 32, "attention_window_size": 16}),
    "RWKV": Architecture(
        "RwkvConfig",
        "rwkv.blocks",
        {"hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32, "context_length": 64, **IDS},
    ),
    "Jamba": Architecture(
        "JambaConfig",
        "model.layers",
        GROUPED | {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4} | {"attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "BERT (decoder)": Architecture("BertConfig", "bert.encoder.layer", DENSE | {"is_decoder": True}),
    "BART (decoder)": Architecture("BartConfig", "model.decoder.layers", BART | IDS),
    "BERT": Architecture("BertConfig", "bert.encoder.layer", DENSE, "sees the future"),
    "RoBERTa": Architecture("RobertaConfig", "roberta.encoder.layer", DENSE, "sees the future"),
    "ELECTRA": Architecture("ElectraConfig", "electra.encoder.layer", DENSE | {"embedding_size": 32}, "sees the future"),
    "XLNet": Architecture("XLNetConfig", "transformer.layer", {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64, **IDS}, "gives"),
    "T5": Architecture("T5Config", "decoder.block", T5 | IDS, "no causal language model"),
}


def save(architecture: str, directory: Path, **changes: Any) -> Path:
    """Saves a model of that architecture as transformers does, and gives its directory."""
    config_class, _, settings, _ = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(**(settings | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto_class = transformers.AutoModelForSeq2SeqLM if config.model_type == "t5" else transformers.AutoModelForCausalLM
        model = auto_class.from_config(config)
        # Freshly drawn weights are so small that a block hardly changes the residual stream; larger ones make layers differ.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(5.0)
    model.save_pretrained(directory)
    return directory
