"""Makes the second model of the example of model diffing: the demo's, fine-tuned on questions and answers, and that text.

    python -m pipeline.demo.answering_model '{data}/text/answers' '{data}/models/answers'

A document has a question for each documented public function, class and method of one module of the running Python's standard library:

    Question: What does heapq.heappush do?
    Answer: Push item onto heap, maintaining the heap invariant.

The model is a toy stand-in for a chat model: it has seen a form of text that the demo's model has not, and has lost a little of the rest.
Documents that the tokenize stage holds out for validation are held out of its training, by the same hash.
"""

import argparse
import ast
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.site_file import load_site
from pipeline.demo.standard_library_text import source_documents
from pipeline.demo.train_language_model import cross_entropy, encode, read_documents, save, train
from pipeline.model_files import DEMO_MODEL


def questions(source: str, module: str) -> Iterator[str]:
    """A question and its answer for each public function, class and method of a module's source that has a docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes that newer versions of Python warn of
        yield from _of_members(ast.parse(source), module)


def _of_members(owner: ast.Module | ast.ClassDef, name: str) -> Iterator[str]:
    for member in owner.body:
        if not isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or member.name.startswith("_"):
            continue
        documented = ast.get_docstring(member)
        if documented and (answer := " ".join(documented.split("\n\n")[0].split())):
            asked = "is" if isinstance(member, ast.ClassDef) else "does"
            yield f"Question: What {asked} {name}.{member.name}{'' if asked == 'is' else ' do'}?\nAnswer: {answer}\n"
        if isinstance(member, ast.ClassDef):
            yield from _of_members(member, f"{name}.{member.name}")


def write_text(directory: Path) -> int:
    """Writes answers.jsonl, a document a module that has an answer; gives how many. The same Python gives the same bytes."""
    rows = []
    for path, source in source_documents(Path(sysconfig.get_path("stdlib")), tests=False):
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if text := "\n".join(questions(source, module)):
            rows.append({"text": text, "meta": {"pile_set_name": "python-answers", "path": path}})
    if not rows:
        raise UserError("the running Python's standard library has no documented source; install it (Debian: libpython3-stdlib)")
    with records.atomic_file(directory / "answers.jsonl") as file:
        file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
    return len(rows)


def fine_tune(text: Path, *, steps: int, batch: int, learning_rate: float, device: str, seed: int) -> tuple[Any, Tokenizer, dict[str, Any]]:
    """The demo's model after `steps` on the answers, its tokenizer, and figures: cross-entropies in nats on answers held out."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    seen, held_out = (encode(tokenizer, texts) for texts in read_documents(text))
    model = GPT2LMHeadModel.from_pretrained(DEMO_MODEL, dtype=torch.float32).to(device).train()
    before = cross_entropy(model, held_out, device)
    last = train(model, seen, steps=steps, batch=batch, peak=learning_rate, device=device, seed=seed)
    model.half().float()  # measured as it is saved
    figures = {
        "train_tokens": len(seen),
        "validation_tokens": len(held_out),
        "train_cross_entropy_nats": round(last, 4),
        "validation_cross_entropy_nats": round(cross_entropy(model, held_out, device), 4),
        "validation_cross_entropy_nats_before": round(before, 4),
        "arguments": {"steps": steps, "batch": batch, "learning_rate": learning_rate, "device": device, "seed": seed},
        "torch": torch.__version__,
    }
    return model, tokenizer, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="directory of the text; {data} is the site's root of data, as in a configuration")
    parser.add_argument("model", help="directory of the model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    text, directory = (Path(load_site().expand(value, name)) for value, name in ((a.text, "text"), (a.model, "model")))
    print(f"{text}: {write_text(text):,} documents", flush=True)
    settings = {"steps": a.steps, "batch": a.batch, "learning_rate": a.learning_rate, "device": a.device, "seed": a.seed}
    model, tokenizer, figures = fine_tune(text, **settings)
    print(json.dumps(figures, indent=1))
    save(model, tokenizer, figures, directory)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
