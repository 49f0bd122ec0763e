"""The page of several trained crosscoders side by side."""

from collections.abc import Sequence
from pathlib import Path

from slurm.record.run_directory import Json
from slurm.record.text_table import figure
from slurm.reporting import charts, page, words
from slurm.reporting.compared import EVALUATION, Measure, Member, Point, cautions, front, measure_of, point_of

MOST_CURVES = 10
"""Crosscoders whose training curves are drawn: more lines would hide one another."""


def html(members: Sequence[Member], path: Path, title: str) -> str:
    """The page at `path`."""
    measure = measure_of(members)
    points = [point_of(member.subject, measure) for member in members]
    on_front = front([(point.l0, point.explained) for point in points])
    specs = _charts(members, points, on_front)
    curves = _curves(members, specs)
    sections = [("verdict", "Verdict"), *([("front", "Sparsity and fidelity")] if "explained" in specs else []), ("table", "All of them")]
    return page.render(
        "compared.html.j2",
        title=title,
        kind=f"{len(members)} trained crosscoders side by side",
        sections=[*sections, *([("training", "Training")] if curves else [])],
        sentences=sentences(members, measure),
        cautions=cautions(members, measure),
        fields=list(dict.fromkeys(name for member in members for name in member.varied)),
        rows=_rows(members, points, on_front, path),
        has_costs=measure is EVALUATION,
        curves=curves,
        curves_note=f"Of the first {MOST_CURVES} of them." if len(members) > MOST_CURVES else "",
        charts=list(specs),
        specs=page.embedded(specs) if specs else "",
        library=page.chart_library() if specs else "",
        charts_script=page.own_file("charts.js"),
    )


def sentences(members: Sequence[Member], measure: Measure) -> list[str]:
    """What came out, and which is good."""
    points = [point_of(member.subject, measure) for member in members]
    known = [(member, point) for member, point in zip(members, points, strict=True) if point.explained is not None]
    first = f"{len(members)} crosscoders, {measure.phrase}"
    first += "." if len(known) == len(members) else f"; {len(members) - len(known)} of them are without these figures yet."
    if not known:
        return [first, "Whether any is good is not known yet."]
    costing = [(member, point) for member, point in known if point.cost is not None]
    if costing:
        best, point = min(costing, key=lambda pair: pair[1].cost or 0.0)
        told = f"The cheapest by cross-entropy is {best.label}: {point.cost:.4f} nats at L0 {_number(point.l0)}. "
        return [first, told + words.verdict_in_short(best.subject.evaluation)]
    best, point = max(known, key=lambda pair: pair[1].explained or 0.0)
    told = f"Most is explained by {best.label}: {point.explained:.4f} of the variance at L0 {_number(point.l0)}; "
    return [first, told + "whether that is good only an evaluation tells, which asks what it costs the language model."]


def _charts(members: Sequence[Member], points: Sequence[Point], on_front: set[int]) -> dict[str, charts.Spec]:
    specs = {}
    cheap = front([(point.l0, None if point.cost is None else -point.cost) for point in points])
    for name, title, chosen in (("explained", "explained variance", on_front), ("cost", "cross-entropy cost [nats]", cheap)):
        rows = [
            {
                "label": member.label,
                "l0": point.l0,
                "value": getattr(point, name),
                "standing": charts.ON_FRONT if place in chosen else charts.BEATEN,
                "varied": _varied(member),
            }
            for place, (member, point) in enumerate(zip(members, points, strict=True))
            if point.l0 is not None and getattr(point, name) is not None and not _is_useless(name, getattr(point, name))
        ]
        if rows:
            specs[name] = charts.front(rows, title)
    return specs


def _curves(members: Sequence[Member], specs: dict[str, charts.Spec]) -> list[tuple[str, str]]:
    found = []
    for heading, title, name in (
        ("Explained variance", "explained variance", "explained_variance"),
        ("L0", "features that fire at a position", "l0"),
        ("Dead features", "share of all features", "dead_fraction"),
    ):
        points = [
            {"tokens": row["tokens"], "series": member.label, "value": row[name]}
            for member in members[:MOST_CURVES]
            for row in charts.thin(member.subject.rows)
            if isinstance(row.get(name), int | float) and not _is_useless(name, row[name])
        ]
        if points:
            specs[f"curve-{name}"] = charts.curve(points, title)
            found.append((f"curve-{name}", heading))
    return found


def _is_useless(name: str, value: float) -> bool:
    """Whether it explains less than the mean alone: how much less would leave the others no room in a chart."""
    return name.startswith("explained") and value < 0


def _rows(members: Sequence[Member], points: Sequence[Point], on_front: set[int], path: Path) -> list[Json]:
    """Of each a row of texts, those on the front first, then by explained variance."""
    order = sorted(range(len(members)), key=lambda place: (place not in on_front, -(points[place].explained or -1.0)))
    rows = []
    for place in order:
        member, point = members[place], points[place]
        own = member.subject.directory / "report.html"
        baseline = None
        if member.subject.evaluation is not None:
            baseline = member.subject.evaluation.headline.get("cross_entropy_difference_of_baseline")
        rows.append(
            {
                "label": member.label,
                "link": page.relative(own, path) if own.exists() else None,
                "is_on_front": place in on_front,
                "numbers": [_number(point.l0), _digits(point.explained)],
                "costs": [_digits(point.cost), _digits(baseline)],
                "varied": {name: figure(value, is_grouped=False) for name, value in member.varied.items()},
                "state": "" if member.state == "finished" else member.state,
            }
        )
    return rows


def _varied(member: Member) -> str:
    return ", ".join(f"{name} {figure(value, is_grouped=False)}" for name, value in member.varied.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
