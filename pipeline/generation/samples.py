"""The file of a run of `generate`: a line of JSON for every continuation, and a manifest that sums them up, `generations/1`.

    generations.jsonl       a line a continuation, by prompt, in the order clean, reconstruction, steered (by strength)
        prompt int, prompt_text, prompt_ids     number, text and ids (beginning-of-text among them) of the prompt
        kind                clean: the model's own; reconstruction: layers replaced by it; steered: features edited
        strength            of a steered one, null of one that takes none
        token_ids, text     of the continuation; text and ids have the end of text where it came
        kl, cross_entropies     of each token, in nats: of the changed prediction from the clean one; -log p of the clean model
        kl_per_token, cross_entropy, repeated_share     means over its tokens; n-grams that stood in it before
        breaks              why it counts as broken, cross-entropy or repeats; null: it does not
    generations.json        its record
    manifest.json           data id, and under `summary` means over prompts for each kind and strength

One line reads, in part: {"prompt": 0, "kind": "steered", "strength": 8.0, "text": " return", "kl_per_token": 0.41, "breaks": null}.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.generate_text import Breakdown
from pipeline.generation.continuation import Continuation

SET_FORMAT, SHARD_FORMAT, STEM = "generations/1", "generations-shard/1", "generations"
CLEAN, RECONSTRUCTION, STEERED = "clean", "reconstruction", "steered"
MEANS = ("kl_per_token", "cross_entropy", "repeated_share")

Row = dict[str, Any]


def row(kind: str, strength: float | None, found: Continuation, own: Continuation, breakdown: Breakdown) -> Row:
    """What is kept of a continuation but for its prompt and its text. `own`: the model's own continuation of the same prompt."""
    share = found.repeated_share(breakdown.ngram)
    own_means = {"own_cross_entropy": own.cross_entropy, "own_repeated_share": own.repeated_share(breakdown.ngram)}
    return {
        "kind": kind,
        "strength": strength,
        "token_ids": found.token_ids,
        "kl": found.kl,
        "cross_entropies": found.cross_entropies,
        "kl_per_token": found.kl_per_token,
        "cross_entropy": found.cross_entropy,
        "repeated_share": share,
        "breaks": None if kind == CLEAN else breakdown.reason(found.cross_entropy, share, **own_means),
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Of each kind and strength, in their order: means over prompts, and how many of its texts are broken."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for one in rows:
        groups.setdefault((one["kind"], one["strength"]), []).append(one)
    return [
        {"kind": kind, "strength": strength, "texts": len(group), "broken": sum(one["breaks"] is not None for one in group)}
        | {name: sum(one[name] for one in group) / len(group) for name in MEANS}
        for (kind, strength), group in groups.items()
    ]


def write(directory: Path, rows: Sequence[Row], facts: records.Record) -> records.Record:
    """Writes the lines, their record and the manifest, which it gives."""
    directory.mkdir(parents=True, exist_ok=True)
    with records.atomic_file(directory / f"{STEM}.jsonl") as file:
        file.write("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows).encode())
    record = records.commit_shard(directory, STEM, SHARD_FORMAT, [f"{STEM}.jsonl"], {"continuations": len(rows)}, {})
    return records.write_manifest(directory, SET_FORMAT, {STEM: record}, {**facts, "summary": summary(rows)})
