"""How the model types of the Hugging Face library name their blocks: known here without loading a model."""

from pipeline.config.sites import SiteName

BLOCKS = {
    "transformer.h": ("gpt2", "gpt_neo", "gptj", "bloom", "falcon", "codegen", "gpt_bigcode", "ctrl", "openai-gpt"),
    "transformer.blocks": ("mpt",),
    "gpt_neox.layers": ("gpt_neox",),
    "model.decoder.layers": ("opt",),
    "backbone.layers": ("mamba", "mamba2", "falcon_mamba"),
    "rwkv.blocks": ("rwkv",),
    "model.language_model.layers": ("gemma3", "gemma4"),
    "model.layers": (
        *("llama", "mistral", "ministral3", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text"),
        *("gemma", "gemma2", "gemma3_text", "gemma4_text", "recurrent_gemma", "vaultgemma", "phi", "phi3", "phimoe"),
        *("olmo", "olmo2", "olmo3", "olmoe", "stablelm", "starcoder2", "cohere", "cohere2", "granite", "granitemoe", "smollm3"),
        *("glm", "glm4", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text", "jamba", "xglm", "persimmon", "exaone4"),
        *("falcon_h1", "helium", "seed_oss", "apertus", "ernie4_5", "bamba", "nemotron_h", "lfm2"),
    ),
}
"""The module path before the number, by model type."""


def prefix_of(model_type: str | None) -> str | None:
    """What stands before a block's number in models of that type; None for a type that is not known here."""
    return next((prefix for prefix, types in BLOCKS.items() if model_type in types), None)


def layer_fault(layer: str, model: str, model_type: str | None, num_blocks: int | None) -> str | None:
    """Why the model has no block called `layer`, as far as that can be known from its type and its number of blocks."""
    path, _, number = SiteName.parse(layer).block.rpartition(".")
    prefix = prefix_of(model_type)
    is_number = number.isdigit() and number == str(int(number))
    if prefix is not None and (path != prefix or not is_number):
        last = "N" if num_blocks is None else num_blocks - 1
        hint = f"; did you mean {prefix}.{number}?" if is_number and (num_blocks is None or int(number) < num_blocks) else ""
        return f"but the blocks of {model} ({model_type}) are {prefix}.0 to {prefix}.{last}{hint}"
    if num_blocks is not None and number.isdigit() and int(number) >= num_blocks:
        return f"but {model} has blocks 0 to {num_blocks - 1}; use a smaller number"
    return None
