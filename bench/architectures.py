"""What models of many architectures do in every stage: tiny ones, through tokenize, cache, train and evaluate by the command line.

    python -m bench.architectures                       # all, 13 minutes on 2 cores that others kept busy
    python -m bench.architectures --only Llama BERT     # some
    python -m bench.architectures --json bench/results/architectures.json

Run in the repository's root. Each model is built from its configuration in transformers (`tests/tiny_architectures.py`), with
random weights and a tokenizer beside it, and saved as a user would have it; a stage is `crosscoder run` in a process of its own.
`ok`, or the sentence with which the stage refuses. Ends with 1 if one does what it should not.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import transformers

from slurm.commands import command_line
from tests.tiny_architectures import ARCHITECTURES, save
from tests.tiny_models import tiny_tokenizer

STAGES = ("tokenize", "cache", "train", "evaluate")
# Processes are forked from one that has imported all of this and done nothing else: a lock that a thread of this process holds at a
# fork, which builds models, would never be free in the child.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [*(f"pipeline.stages.{name}" for name in ("tokenize_text", "cache_activations", "train_crosscoder", "evaluate_crosscoder")), __name__]
)
LIBRARIES = ("transformers", "tokenizers", "torch", "safetensors", "numpy")
TEXTS = [f"def f{i}(x):\n    return x * {i} + {i * i}  # the {i}th of these functions, which nobody calls\n" * 3 for i in range(60)]


class Row(NamedTuple):
    """A line of the table."""

    architecture: str
    blocks: str
    stages: dict[str, str]
    """`ok`, `-` for one that was not begun, or why it was refused."""
    as_expected: bool
    seconds: float


def configurations(name: str, directory: Path) -> dict[str, dict[str, object]]:
    """The four configurations, by stage."""
    blocks = ARCHITECTURES[name].blocks
    model = {"model": str(directory / "model"), "device": "cpu"}
    harvest = {"layers": [f"{blocks}.0", f"{blocks}.2"], "context_tokens": 32, "contexts_per_generation": 64}
    crosscoder = {"num_features": 64, "activation_function": {"kind": "batch_topk", "k": 4}}
    tokens, activations = f"{directory}/tokens", f"{directory}/activations"
    return {
        "tokenize": {
            "sources": [f"{directory}/text.jsonl"],
            "output": tokens,
            "tokenizer": {"name": str(directory / "model")},
            "validation_fraction": 0.2,
            "processes": 1,
        },
        "cache": {"tokens": f"{tokens}/train", "output": activations, "language_model": model, **harvest},
        "train": {
            "activations": {"kind": "disk", "path": activations},
            "crosscoder": crosscoder,
            "loss": {"auxk": {}},
            "optimizer": {"learning_rate": 1e-3},
            "dead_window_tokens": 1000,
            "batch_positions": 64,
            "epochs": 1,
        },
        "evaluate": {
            "crosscoder": f"{directory}/runs/train/tiny",
            "tokens": f"{tokens}/validation",
            "language_model": model,
            "context_tokens": 32,
        },
    }


def taken_through(name: str, directory: Path) -> Row:
    """Builds the model and runs the stages until one refuses."""
    start = time.perf_counter()
    architecture = ARCHITECTURES[name]
    tiny_tokenizer(save(name, directory / "model"))
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (directory / "site.yaml").write_text(f"data: {directory}\nssd: {directory}\nruns: {directory}/runs\n")
    found = dict.fromkeys(STAGES, "-")
    for stage, settings in configurations(name, directory).items():
        config = directory / f"{stage}.yaml"
        config.write_text(json.dumps({"stage": stage, "name": "tiny", **settings}))  # JSON is YAML
        code, output = crosscoder("run", str(config), log=directory / f"{stage}.log")
        found[stage] = "ok" if code == 0 else refusal(output).replace(f"{directory}/", "")
        if code:
            break
    refused = next((said for said in found.values() if said not in ("ok", "-")), None)
    expected = refused is None if architecture.refused is None else refused is not None and architecture.refused in refused
    return Row(name, architecture.blocks, found, expected, time.perf_counter() - start)


def crosscoder(*arguments: str, log: Path) -> tuple[int, str]:
    """Runs the command line in a process that has the libraries imported already; exit code and output."""
    process = PROCESSES.Process(target=_run, args=(arguments, log))
    process.start()
    process.join()
    return process.exitcode or 0, log.read_text()


def _run(arguments: tuple[str, ...], log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["CROSSCODER_SITE"] = str(log.parent / "site.yaml")
    sys.argv = ["crosscoder", *arguments]
    command_line.main()


def refusal(output: str) -> str:
    """The last line of what a failed stage printed; a traceback shows as one."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1].removeprefix("crosscoder: ") if lines else "nothing was printed"
    return f"Traceback: {last}" if "Traceback" in output else last


def printed(row: Row) -> str:
    marks = "  ".join(f"{said if said in ('ok', '-') else 'refused':8}" for said in row.stages.values())
    reasons = [said for said in row.stages.values() if said not in ("ok", "-")]
    return f"{row.architecture:28} {row.blocks:29} {marks} {'' if row.as_expected else ' NOT AS EXPECTED '}{''.join(reasons)}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES), metavar="NAME", help="some of them")
    parser.add_argument("--json", type=Path, help="write the table there, with versions, date and command")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(f"{'architecture':28} {'blocks':29} {'  '.join(f'{stage:8}' for stage in STAGES)}", flush=True)
    rows = []
    for name in options.only:
        with tempfile.TemporaryDirectory() as temporary:
            rows.append(taken_through(name, Path(temporary)))
        print(printed(rows[-1]), flush=True)
    wrong = [row.architecture for row in rows if not row.as_expected]
    refused = sum(ARCHITECTURES[row.architecture].refused is not None for row in rows)
    print(f"{len(rows)} architectures, {refused} of them to be refused; not as expected: {', '.join(wrong) or 'none'}")
    if options.json is not None:
        facts = {
            "command": "python -m bench.architectures " + " ".join(sys.argv[1:]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {"python": platform.python_version(), **{library: metadata.version(library) for library in LIBRARIES}},
            "seconds": round(sum(row.seconds for row in rows), 1),
            "rows": [row._asdict() | {"seconds": round(row.seconds, 1)} for row in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
