"""The page of one trained crosscoder."""

import time
from pathlib import Path

from slurm.record import record_view
from slurm.record.run_directory import Json
from slurm.record.text_table import figure
from slurm.reporting import charts, feature_charts, feature_parts, generated_text, page, words
from slurm.reporting.subject import Subject

SURVIVING = 0.5
"""A feature lives on in a layer where so much of its firings are left when that layer alone is encoded."""

Specs = dict[str, charts.Spec]


def html(subject: Subject, path: Path, *, most_inside: int) -> str:
    """The page at `path`, which holds `most_inside` features whole; the others are read from the folder beside it."""
    specs: Specs = {}
    values = (
        _verdict(subject, specs)
        | _training(subject, specs)
        | _features(subject, specs)
        | generated_text.section(subject)
        | _models(subject)
    )
    if subject.store is not None:
        values |= _browser(subject, path, most_inside)
    sections = [("verdict", "Verdict"), ("trained", "What was trained")]
    sections += [("training", "Training")] if values["curves"] else []
    sections += [("reconstruction", "Reconstruction")] if values["explained"] else []
    sections += [("models", "Models")] if values["model_pairs"] else []
    sections += [("features", "Features"), ("browser", "Feature browser")] if subject.store is not None else []
    sections += [("text", "Generated text")] if values["prompts"] else []
    return page.render(
        "run.html.j2",
        title=subject.named.reference,
        kind="A trained crosscoder",
        sections=sections,
        trained=words.trained_on(subject),
        facts=_facts(subject),
        record=record_view.as_text(subject.named.run, task=subject.named.task),
        specs=page.embedded(specs) if specs else "",
        library=page.chart_library() if specs else "",
        charts_script=page.own_file("charts.js"),
        browser_script=page.own_file("browser.js"),
        **{"index": "", "inside": "", "beside": "", "browser_note": ""} | values,
    )


def _verdict(subject: Subject, specs: Specs) -> Json:
    evaluation = subject.evaluation
    values: Json = {"verdict": words.verdict_in_short(evaluation), "tiles": words.tiles(subject), "far": ""}
    if evaluation is None:
        return values | {"costs": False, "explained": False, "paragraphs": [], "stands": []}
    specs["costs"], far = charts.costs(evaluation.metrics)
    specs["explained"] = charts.explained(evaluation.metrics)
    told = [f"{row['name']} at {row['layer']} {row['value']:.4g}" for row in far]
    return values | {
        "costs": True,
        "explained": bool(specs["explained"]["data"]["values"]),
        "far": f" Beyond its edge: {', '.join(told)}." if told else "",
        "paragraphs": words.verdict_paragraphs(evaluation),
        "stands": _stands(evaluation.metrics),
    }


def _stands(metrics: Json) -> list[Json]:
    """Of each stand-in for a layer its numbers as texts."""
    losses = {(row["layer"], row["by"], row["source"]): row for row in metrics["replaced"]}
    rows = []
    for row in metrics["reconstruction"]:
        if row["layer"] not in metrics["layers"]:
            continue
        loss = losses.get((row["layer"], row["by"], row["source"]), {})
        numbers = [
            loss.get("difference"),
            loss.get("kl"),
            loss.get("recovered_against_zero"),
            row["explained_variance"],
            row["median_error"],
        ]
        texts = ["" if number is None else f"{number:.4f}" for number in numbers]
        rows.append({"layer": row["layer"], "name": words.stand_name(row["by"], row["source"]), "numbers": texts})
    return sorted(rows, key=lambda row: metrics["layers"].index(row["layer"]))


def _models(subject: Subject) -> Json:
    """Of a crosscoder of several language models, by pair, a row of texts for each class of features."""
    pairs: dict[str, list[Json]] = {}
    rows = [] if subject.evaluation is None else subject.evaluation.metrics.get("model_diffing", [])
    for row in rows:
        numbers = [row["nu_error"], row["nu_reconstruction"]]
        texts = [f"{row['features']:,}", words.share(row["fraction"]), *("" if number is None else f"{number:.3f}" for number in numbers)]
        texts.append("" if row["absent"] is None else f"{row['absent']:,}")
        pairs.setdefault(" and ".join(row["models"]), []).append({"name": row["name"].replace("_", " "), "texts": texts})
    return {"model_pairs": pairs}


def _facts(subject: Subject) -> list[tuple[str, str]]:
    """What the record says in short; all of it stands below in full."""
    run = subject.named.run
    facts = [("run directory", str(subject.directory)), ("frozen", _when(run.submitted))]
    for field, entry in subject.named.record.inputs().items():
        identity = entry.get("data_id") or entry.get("content")
        facts.append((field, f"{entry.get('path') or entry.get('name', '')} {str(identity or '')[:12]}".strip()))
    if subject.evaluation is not None:
        held_out = subject.evaluation.metrics["held_out"]
        facts.append(("evaluated by", f"{subject.evaluation.run.reference}, {figure(held_out['positions'])} held-out positions"))
    if subject.store is not None and subject.store_run is not None:
        facts.append(("features from", f"{subject.store_run.reference}, {figure(subject.store.num_positions)} positions"))
    return facts


def _training(subject: Subject, specs: Specs) -> Json:
    curves = []
    for number, (heading, spec) in enumerate(charts.training_curves(subject.rows, subject.layers)):
        specs[f"curve-{number}"] = spec
        curves.append((f"curve-{number}", heading))
    shown = len(charts.thin(subject.rows))
    note = (
        f"{shown:,} of the {len(subject.rows):,} rows of metrics.jsonl" if shown < len(subject.rows) else f"{shown:,} rows of metrics.jsonl"
    )
    return {"curves": curves, "curves_note": f"{note}; each is a mean over the training steps since the one before."}


def _features(subject: Subject, specs: Specs) -> Json:
    store = subject.store
    if store is None:
        return {"feature_charts": [], "features_sentence": "", "index": ""}
    table = store.columns(["density", "relative_norms", "survives_alone", "is_dead_eval", "is_dense"])
    alive = [feature for feature, is_dead in enumerate(table["is_dead_eval"]) if not is_dead]

    def by_layer(name: str) -> dict[str, list[float]]:
        return {layer: [table[name][feature][number] for feature in alive] for number, layer in enumerate(store.layers)}

    norms, alone = by_layer("relative_norms"), by_layer("survives_alone")
    specs["density"] = feature_charts.density_histogram(table["density"])
    shown = {store.layers[-1]: norms[store.layers[-1]]} if len(store.layers) == 2 else norms
    specs["norms"] = feature_charts.share_histogram(shown, "relative decoder norm")
    specs["alone"] = feature_charts.share_histogram(alone, "share of firings left on one layer alone")
    specs["profile"] = feature_charts.layer_profile()
    silent = store.num_features - len(alive)
    drawn = [
        ("density", "Density.", f"How often features fire; {silent:,} never do here and are left out."),
        ("norms", "Relative decoder norms.", _norms_caption(store.layers)),
        ("alone", "What is shared.", _shared_sentence(alone)),
    ]
    sentence = (
        f"{store.num_features:,} features over {store.num_positions:,} positions: {silent:,} silent, {sum(table['is_dense']):,} dense."
    )
    return {"feature_charts": drawn, "features_sentence": sentence}


def _norms_caption(layers: list[str]) -> str:
    if len(layers) == 2:
        return f"Norm in {layers[1]} over the sum of both: near 0 a feature writes {layers[0]} alone, near 1 {layers[1]} alone."
    return "Of each layer, how much of a feature's decoder norms is its own."


def _shared_sentence(alone: dict[str, list[float]]) -> str:
    """How many of the features that fire live on in one layer, in none, in all."""
    rows = list(zip(*alone.values(), strict=True))
    if not rows:
        return "No feature fires here."
    everywhere = sum(all(value >= SURVIVING for value in row) for row in rows) / len(rows)
    nowhere = sum(all(value < SURVIVING for value in row) for row in rows) / len(rows)
    return (
        f"Decoder norms alone mislead. Of the features that fire, {words.share(everywhere)} keep half of their firings whichever layer "
        f"alone is encoded; {words.share(nowhere)} lose more than half of them on any layer alone."
    )


def _browser(subject: Subject, path: Path, most_inside: int) -> Json:
    store = subject.store
    assert store is not None
    held = page.inside(store, most_inside)
    num_held = len(held["features"])
    rest = "" if num_held == store.num_features else f"; the others are read from {page.files_of(path).name}, which belongs beside it"
    note = (
        f"The page itself holds {num_held:,} features{rest}. Search looks at the tokens that a feature fires most strongly on and those "
        "that it promotes. Of a token's color: the darker, the stronger the feature is there. "
        f"`crosscoder features {store_reference(subject)}` shows every context kept."
    )
    values = {"index": next(feature_parts.indices(store)), "inside": held, "beside": page.beside(path, store)}
    return {name: page.embedded(value) for name, value in values.items()} | {"browser_note": note}


def store_reference(subject: Subject) -> str:
    """What `crosscoder features` takes for the store."""
    return subject.named.reference if subject.store_run is None else subject.store_run.reference


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
