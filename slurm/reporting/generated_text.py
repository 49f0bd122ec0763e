"""The part of a page that shows what the language model writes with the crosscoder in it: clean, reconstructed, steered."""

from slurm.record.run_directory import Json, RunDirectory
from slurm.reporting.subject import Subject
from slurm.watching.generation_view import TITLES, Row, Texts

MOST_PROMPTS, MOST_TEXTS, MOST_LETTERS = 6, 8, 2000
"""Of one run that a page shows: prompts, texts of each, letters of a text."""


def section(subject: Subject) -> Json:
    """What the template takes; no prompts where nothing was generated."""
    if subject.texts is None or subject.texts_run is None:
        return {"prompts": [], "costs_of_text": [], "text_note": "", "steered": []}
    rows = subject.texts.rows
    numbers = list(dict.fromkeys(row["prompt"] for row in rows))
    prompts = [_prompt([row for row in rows if row["prompt"] == number]) for number in numbers[:MOST_PROMPTS]]
    steering = subject.texts.settings.get("steering") or {}
    return {
        "prompts": prompts,
        "costs_of_text": [_cost(row) for row in subject.texts.summary],
        "text_note": _note(subject.texts, subject.texts_run, len(numbers)),
        "steered": list(steering.get("features", [])),
    }


def _prompt(rows: list[Row]) -> Json:
    texts = [{"title": _title(row), "cost": _words(row), "is_broken": row["breaks"] is not None, "text": _cut(row["text"])} for row in rows]
    return {"text": _cut(rows[0]["prompt_text"]), "texts": texts[:MOST_TEXTS], "left_out": max(0, len(texts) - MOST_TEXTS)}


def _title(row: Row) -> str:
    return TITLES[row["kind"]] + ("" if row["strength"] is None else f", strength {row['strength']:g}")


def _words(row: Row) -> str:
    kl = "" if row["kind"] == "clean" else f", KL {row['kl_per_token']:.3f} a token"
    return f"cross-entropy {row['cross_entropy']:.2f}{kl}" + ("" if row["breaks"] is None else f"; broken: {row['breaks']}")


def _cost(row: Row) -> Json:
    numbers = [f"{row['kl_per_token']:.3f}", f"{row['cross_entropy']:.3f}", f"{100 * row['repeated_share']:.0f} %"]
    return {"title": _title(row), "numbers": [*numbers, f"{row['broken']} of {row['texts']}"]}


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + " ..."


def _note(texts: Texts, run: RunDirectory, num_prompts: int) -> str:
    rule = texts.settings["breakdown"]
    shown = f"The first {MOST_PROMPTS} of {num_prompts:,} prompts of" if num_prompts > MOST_PROMPTS else "From"
    return (
        f"{shown} {run.reference}; `crosscoder generate {run.reference}` shows all. KL: of the changed model's predictions from the clean "
        "model's, nats a token. Cross-entropy: of the text under the clean model. A text is broken where its cross-entropy is over "
        f"{rule['cross_entropy_rise']:g} nats above that of the model's own, or its repeats over {100 * rule['repeated_rise']:g} points."
    )
