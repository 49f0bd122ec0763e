"""Writes a trained crosscoder into the files of another library, with a model card: `crosscoder export` in a process of its own.

export.json    {"format": "exported-crosscoder/1", "to": "dictionary_learning", "crosscoder": "5d0c...", "layers": [...], ...}
README.md      the model card
...            what the library reads, see the module of each layout
"""

import argparse
import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline import records
from pipeline.config import yaml_file
from pipeline.config.errors import UserError
from pipeline.crosscoder.checkpoint import TrainedCrosscoder, load_crosscoder
from pipeline.crosscoder.folding import fold
from pipeline.exchange import dictionary_learning, hub, plain_tensors, sae_lens
from pipeline.exchange.exported import Exported
from pipeline.exchange.model_card import Card, model_card

EXPORT_FORMAT = "exported-crosscoder/1"


class Layout(NamedTuple):
    """The files of one library."""

    library: str
    """As the hub names it."""
    write: Callable[[Path, Exported], list[str]]
    """Writes them into a directory; gives sentences that whoever reads them has to know."""
    loading: Callable[[Exported], str]
    """Python that loads them."""


LAYOUTS = {
    "dictionary_learning": Layout("dictionary_learning", dictionary_learning.write, dictionary_learning.loading),
    "sae_lens": Layout("saelens", sae_lens.write, sae_lens.loading),
    "safetensors": Layout("safetensors", plain_tensors.write, plain_tensors.loading),
}


def export(
    checkpoint: Path,
    output: Path,
    *,
    to: str,
    evaluation: Path | None = None,
    license: str | None = None,
    repository: str | None = None,
) -> list[str]:
    """Writes the crosscoder at `checkpoint`, a run or a checkpoint of it, to the new directory `output`; gives sentences on it.

    evaluation : a run that evaluated it, for the results on the card.
    repository : where on the hub the files will be, for the card; uploading them is `pipeline.exchange.hub.push`.
    Raises `UserError` for a crosscoder that the layout can't hold, and where something lies at `output`.
    """
    trained = load_crosscoder(checkpoint)
    layout = LAYOUTS[to]
    folded = fold(trained.crosscoder, trained.normalizer, torch.float64)
    exported = Exported(trained, folded, _language_models(_run_of(checkpoint), evaluation), repository)
    with _new_directory(output) as directory:
        remarks = [*layout.write(directory, exported), *_of_layers(trained)]
        records.write_json(directory / "export.json", _facts(trained, to))
        card = Card(
            library=layout.library,
            loading=layout.loading(exported),
            remarks=remarks,
            training=_configuration(_run_of(checkpoint)),
            metrics=None if evaluation is None else _metrics_of(trained, evaluation),
            language_models=list(exported.language_models.values()),
            license=license,
        )
        (directory / "README.md").write_text(model_card(trained, card), encoding="utf-8")
    return [f"step {trained.step:,} of {len(trained.layers)} layers and {trained.num_features:,} features: {output}", *remarks]


def _metrics_of(trained: TrainedCrosscoder, evaluation: Path) -> dict[str, Any] | None:
    """What an evaluation measured; None where it was of another crosscoder, such as a later checkpoint of the same run."""
    metrics: dict[str, Any] = records.read_json(evaluation / "metrics.json")
    return metrics if metrics.get("inputs", {}).get("crosscoder") == trained.identity else None


def _facts(trained: TrainedCrosscoder, to: str) -> dict[str, Any]:
    return {
        "format": EXPORT_FORMAT,
        "to": to,
        "crosscoder": trained.identity,
        "layers": trained.layers,
        "step": trained.step,
        "tokens": trained.tokens_trained,
        "activations_id": trained.activations_id,
        **trained.provenance.facts(),
    }


def _of_layers(trained: TrainedCrosscoder) -> list[str]:
    if trained.crosscoder.groups is None:
        return []
    written = trained.crosscoder.groups.written_L.tolist()
    unwritten = [f"`{layer}`" for layer, is_written in zip(trained.layers, written, strict=True) if not is_written]
    return [f"No feature writes {', '.join(unwritten)}: what is decoded there reconstructs nothing."] if unwritten else []


def _run_of(checkpoint: Path) -> Path:
    """The run directory; that of one of its checkpoints is two levels up."""
    return checkpoint.parent.parent if (checkpoint / "crosscoder.json").exists() else checkpoint


def _configuration(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    return yaml_file.read(path) if path.exists() else {}


def _language_models(run: Path, evaluation: Path | None) -> dict[str, str]:
    """Of `Exported`: what the configuration of either run names; empty where that is a directory, or nothing."""
    configurations = [_configuration(directory) for directory in (run, evaluation) if directory is not None]
    for group in [c.get(key) for c in configurations for key in ("activations", "held_out")] + configurations:
        if not isinstance(group, dict):
            continue
        named = group.get("language_models") or {"": group.get("language_model")}
        found = {name: _on_the_hub(model) for name, model in named.items() if isinstance(model, dict)}
        if known := {name: model for name, model in found.items() if model is not None}:
            return known
    return {}


def _on_the_hub(model: dict[str, Any]) -> str | None:
    name, revision = str(model.get("model", "")), model.get("revision")
    if not name or name.startswith(("/", ".", "~")) or name == "demo":
        return None
    return f"{name}@{revision}" if revision else name


@contextlib.contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory to fill that appears at `output` when the block ends without an error."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already; give the directory of an export a new name, or remove it")
    temporary = output.with_name(f".{output.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if output.exists():
            output.rmdir()
        os.rename(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def main() -> None:
    """`python -m pipeline.exchange.export_crosscoder CHECKPOINT OUTPUT --to LAYOUT`; exit code 1 and a sentence for a user's error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--to", choices=sorted(LAYOUTS), required=True)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--license")
    parser.add_argument("--push-to-hub")
    parser.add_argument("--private", action="store_true")
    options = parser.parse_args()
    try:
        lines = export(
            options.checkpoint,
            options.output,
            to=options.to,
            evaluation=options.evaluation,
            license=options.license,
            repository=options.push_to_hub,
        )
        print("\n".join(lines), flush=True)
        if options.push_to_hub:
            print(hub.push(options.output, options.push_to_hub, private=options.private, message=lines[0].partition(": ")[0]))
    except UserError as error:
        print(f"crosscoder: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
