"""Trains the demo's language model: a small GPT-2 of Python source, with a byte-level BPE of its own.

    python -m pipeline.demo.standard_library_text data/text/full --tests
    python -m pipeline.demo.train_language_model data/text/full pipeline/demo/model

Kept so that anyone can make the shipped model again (minutes on a GPU; the card beside the weights has the figures of the
one that ships). Documents that the pipeline's tokenize stage would hold out for validation are held out here too, by the
same hash, so `make demo` evaluates on text that neither the language model nor the crosscoder has seen.
"""

import argparse
import gzip
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
import zstandard
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline import records

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 512
VALIDATION_FRACTION = 0.05  # the demo's tokenize.yaml holds out the same share, by the same hash


def read_documents(directory: Path) -> tuple[list[str], list[str]]:
    """(train, validation) texts of every .jsonl, .jsonl.gz and .jsonl.zst in `directory`."""
    train: list[str] = []
    validation: list[str] = []
    for path in sorted(directory.glob("*.jsonl*")):
        opener: dict[str, Any] = {".zst": zstandard.open, ".gz": gzip.open}
        with opener.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                held_out = xxhash.xxh3_64_intdigest(text.encode()) < VALIDATION_FRACTION * 2**64
                (validation if held_out else train).append(text)
    return train, validation


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE as GPT-2's, with 4,096 entries; `<|endoftext|>` is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts' ids in one int64 array, each text followed by the end-of-text id."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return np.concatenate([np.array([*e.ids, end]) for e in tokenizer.encode_batch(texts)])


def cross_entropy(model: GPT2LMHeadModel, ids: np.ndarray, device: str) -> float:
    """Mean over predicted tokens of -log p, in nats, in windows of `CONTEXT` ids."""
    windows = torch.from_numpy(ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(windows), 32):
            window = windows[start : start + 32].to(device)
            logits = model(input_ids=window[:, :-1]).logits.float()
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / (len(windows) * (CONTEXT - 1))


def train(model: GPT2LMHeadModel, ids: np.ndarray, *, steps: int, batch: int, peak: float, device: str, seed: int) -> float:
    """Trains in place on random windows of `ids`; gives the mean loss of the last hundred steps, in nats."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=device == "cuda")
    warm_up = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))))
    )
    stream = torch.from_numpy(ids).to(device)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(CONTEXT + 1, device=device)
    recent: list[torch.Tensor] = []
    started = time.time()
    for step in range(steps):
        starts = torch.randint(len(ids) - CONTEXT, (batch, 1), generator=generator).to(device)
        window = stream[starts + offsets]
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=window[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-99:], loss.detach()]
        if step % 500 == 499:
            print(f"step {step + 1}/{steps}  loss {torch.stack(recent).mean():.3f}  {time.time() - started:.0f} s", flush=True)
    return float(torch.stack(recent).mean())


def complete(model: GPT2LMHeadModel, tokenizer: Tokenizer, prompt: str, device: str) -> str:
    """`prompt` and 80 sampled tokens after it."""
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=True, temperature=0.7, top_k=40, pad_token_id=0
    )
    return str(tokenizer.decode(out[0].tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="directory of JSON lines")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=3_600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()

    torch.manual_seed(a.seed)
    train_texts, validation_texts = read_documents(a.text)
    tokenizer = train_tokenizer(train_texts)
    ids, held_out = encode(tokenizer, train_texts), encode(tokenizer, validation_texts)
    print(f"{len(train_texts)} documents, {len(ids):,} tokens; held out {len(validation_texts)} documents, {len(held_out):,} tokens")
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=a.width,
        n_layer=a.blocks,
        n_head=a.width // 32,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=a.dropout,
        embd_pdrop=a.dropout,
        attn_pdrop=a.dropout,
    )
    model = GPT2LMHeadModel(config).to(a.device)
    last = train(model, ids, steps=a.steps, batch=a.batch, peak=a.learning_rate, device=a.device, seed=a.seed)
    model.half().float()  # measured as it ships: rounded to float16
    figures = {
        "documents": len(train_texts),
        "train_tokens": len(ids),
        "tokens_seen": a.steps * a.batch * CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_cross_entropy_nats": round(last, 4),
        "validation_cross_entropy_nats": round(cross_entropy(model, held_out, a.device), 4),
        "validation_tokens": len(held_out),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(figures, indent=1))
    for prompt in ("def read_", "class Queue", "import os\n", "    def __init__(self"):
        print("-" * 20, complete(model, tokenizer, prompt, a.device), sep="\n")
    save(model, tokenizer, figures, a.output)


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, figures: dict[str, object], directory: Path) -> None:
    """Writes config, float16 weights, tokenizer and card to `directory`, as `from_pretrained` expects them."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous().cpu() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["GPT2LMHeadModel"]
    records.write_json(directory / "config.json", {k: v for k, v in model.config.to_diff_dict().items() if k != "dtype"})
    tokenizer.save(str(directory / "tokenizer.json"))
    records.write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "model_max_length": CONTEXT},
    )
    records.write_json(directory / "training.json", figures)


if __name__ == "__main__":
    main()
