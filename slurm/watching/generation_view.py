"""What `crosscoder generate` and `crosscoder steer` show: the texts of a run of `generate` (format: `pipeline.generation.samples`).

On a terminal the continuations of a prompt stand side by side; elsewhere below one another. A table of what they cost comes last.
"""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.printable import printable_line
from slurm.record.run_directory import RunDirectory
from slurm.record.text_table import GAP, Column, figure, lay_out
from slurm.watching.feature_store import FeatureStore
from slurm.watching.feature_view import token_text

SET_FORMAT, SHARD_FORMAT = "generations/1", "generations-shard/1"
LEAST_WIDTH, MOST_WIDTH = 36, 100
"""Of a column of text."""
TITLES = {"clean": "the model itself", "reconstruction": "reconstruction", "steered": "steered"}

Row = dict[str, Any]


class Texts:
    """What a finished run of `generate` wrote. Made by `open`."""

    def __init__(self, rows: list[Row], manifest: records.Record) -> None:
        self.rows = rows
        self.summary: list[Row] = manifest["summary"]
        self.settings: Row = manifest["settings"]

    @property
    def features(self) -> list[int]:
        """Those that are edited."""
        steering = self.settings.get("steering")
        return [] if steering is None else list(steering["features"])

    @classmethod
    def open(cls, run: RunDirectory) -> "Texts":
        """Raises `UserError` for a run that has not finished, or whose file is damaged."""
        if run.state() != "finished":
            raise UserError(f"{run.reference} is {run.state()}: it has no texts yet; `crosscoder jobs` shows how it goes")
        directory = run.path / "generations"
        manifest, _ = records.read_data_set(directory, SET_FORMAT, SHARD_FORMAT)
        return cls(_lines(directory / "generations.jsonl"), manifest)


def _lines(path: Path) -> list[Row]:
    # Not splitlines: a text may hold letters that count as line breaks there, and JSON lets them stand.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def text_lines(texts: Texts, width: int | None) -> list[str]:
    """All that is shown, in lines."""
    lines: list[str] = []
    for number in dict.fromkeys(row["prompt"] for row in texts.rows):
        rows = [row for row in texts.rows if row["prompt"] == number]
        lines += [f"prompt {number}", *_indented(rows[0]["prompt_text"]), *_side_by_side([_block(row) for row in rows], width), ""]
    return [*lines, *table(texts, width)]


def edited_features(features: Sequence[int], store: FeatureStore) -> list[str]:
    """A line for each edited feature: how strongly it fires on held-out text, and on what."""
    return [
        f"feature {row['feature']} fires on {100 * row['density']:.3g} % of positions, activation {figure(row['mean_activation'])} on "
        f"average and {figure(row['max_activation'])} at most; strongest on {'  '.join(map(token_text, row['top_tokens'][:6])) or 'none'}"
        for row in store.features(features)
    ]


def table(texts: Texts, width: int | None) -> list[str]:
    """What each kind of text costs, over prompts, and from when on texts break down."""
    cells = [
        [
            TITLES[row["kind"]],
            "" if row["strength"] is None else f"{row['strength']:g}",
            f"{row['kl_per_token']:.3f}",
            f"{row['cross_entropy']:.3f}",
            f"{100 * row['repeated_share']:.0f} %",
            f"{row['broken']} of {row['texts']}",
            "BREAKS DOWN" if 2 * row["broken"] >= row["texts"] else "",
        ]
        for row in texts.summary
    ]
    names = ("strength", "KL a token", "cross-entropy", "repeats", "broken")
    columns = [Column("text"), *(Column(name, is_right=True) for name in names), Column("")]
    rule = texts.settings["breakdown"]
    words = (
        "KL: of the changed model's predictions from the clean model's of the same text, nats. Cross-entropy: of the text under the clean "
        f"model, nats a token. Repeats: {rule['ngram']}-grams of tokens that stood in the text before. A text is broken where its "
        f"cross-entropy is over {rule['cross_entropy_rise']:g} nats above that of the model's own text, or its repeats over "
        f"{100 * rule['repeated_rise']:g} points above; a row BREAKS DOWN where at least half of its texts are."
    )
    return [*lay_out(columns, cells, width).lines, *textwrap.wrap(words, width or MOST_WIDTH)]


def _block(row: Row) -> list[str]:
    """A continuation with its heading, lines not broken."""
    strength = "" if row["strength"] is None else f" {row['strength']:g}"
    cost = f"cross-entropy {row['cross_entropy']:.2f}" + ("" if row["kind"] == "clean" else f", KL {row['kl_per_token']:.3f}")
    breaks = "" if row["breaks"] is None else f", broken: {row['breaks']}"
    return [f"-- {TITLES[row['kind']]}{strength}", f"   {cost}{breaks}", *_clean_lines(row["text"])]


def _clean_lines(text: str) -> list[str]:
    return [printable_line(line) for line in text.expandtabs(4).split("\n")]


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in _clean_lines(text)]


def _side_by_side(blocks: Sequence[list[str]], width: int | None) -> list[str]:
    """The blocks in as many columns as there is room for; below one another where there is room for one, or no width."""
    num_columns = 1 if width is None else max(1, min(len(blocks), (width + len(GAP)) // (LEAST_WIDTH + len(GAP))))
    if width is None or num_columns == 1:
        return [line for block in blocks for line in ["", *block]]
    size = min(MOST_WIDTH, (width + len(GAP)) // num_columns - len(GAP))
    lines: list[str] = []
    for start in range(0, len(blocks), num_columns):
        broken = [_broken(block, size) for block in blocks[start : start + num_columns]]
        height = max(map(len, broken))
        filled = [block + [""] * (height - len(block)) for block in broken]
        lines += ["", *(GAP.join(line.ljust(size) for line in row).rstrip() for row in zip(*filled, strict=True))]
    return lines


def _broken(block: Sequence[str], size: int) -> list[str]:
    """Lines of at most `size` letters; broken anywhere, since indentation and spaces are part of the text."""
    return [line[start : start + size] for line in block for start in range(0, max(len(line), 1), size)]
