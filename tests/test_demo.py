"""What the demo ships: its text, its tokenizer and its language model."""

import json
from pathlib import Path

import torch
import transformers

from pipeline.demo import standard_library_text

MODEL = Path(standard_library_text.__file__).parent / "model"


def test_the_text_is_pile_shaped_and_the_same_every_time(tmp_path: Path) -> None:
    written = standard_library_text.write(tmp_path / "one")
    standard_library_text.write(tmp_path / "two")
    for path, documents in written:
        assert documents > 50
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "one/stdlib-00.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["text"].strip() and row["meta"]["pile_set_name"] == "python-stdlib" for row in rows)
    paths = {row["meta"]["path"] for row in rows}
    assert len(paths) == len(rows)
    assert not any("test" in path.split("/") for path in paths)


def test_the_model_and_its_tokenizer_are_under_8_mb() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 8_000_000


def test_the_model_knows_python() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)

    def nats(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))

    python = "    def __init__(self, name, value=None):\n        self.name = name\n        self.value = value\n"
    assert nats(python) < 60
    assert nats(python) < 0.5 * nats(python.replace("self.name = name", "name.self = self").replace("def __init__", "fed __tini__"))
    out = model.generate(torch.tensor([tokenizer("import os\nimport ")["input_ids"]]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    compile(
        tokenizer.decode(out[0]).rsplit("\n", 1)[0], "completion", "exec"
    )  # its greedy completion, up to the last whole line, is Python
