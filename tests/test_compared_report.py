"""`crosscoder report` of several crosscoders: which numbers are compared, which is on the front, what the page says."""

from pathlib import Path

import pytest
import vl_convert
from report_pieces import CONFIG, embedded, evaluated, make_run, report, site_without_charts, trained

from pipeline.config.errors import UserError
from slurm.reporting import charts, compared, page


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return site_without_charts(tmp_path, monkeypatch)


def test_the_front_holds_what_no_other_point_beats() -> None:
    points = [(10.0, 0.5), (20.0, 0.75), (20.0, 0.5), (30.0, 0.75), (5.0, None), (40.0, 0.875), (20.0, 0.75), (None, 1.0)]
    assert compared.front(points) == {0, 1, 5, 6}

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    known = [(place, (first, second)) for place, (first, second) in enumerate(points) if first is not None and second is not None]
    slowly = {place for place, point in known if not any(beats(other, point) for _, other in known)}
    assert compared.front(points) == slowly


def test_runs_stand_side_by_side_with_what_sets_them_apart(site: Path, tmp_path: Path) -> None:
    crosscoder = CONFIG["crosscoder"]
    assert isinstance(crosscoder, dict)
    runs = [trained(site, CONFIG | {"crosscoder": crosscoder | {"num_features": size}, "resources": {"cpus": size}}) for size in (3, 4, 5)]
    for run, (l0, explained, cost) in zip(runs, [(8.0, 0.75, 0.25), (16.0, 0.5, 0.5), (4.0, 0.5, 0.375)], strict=True):
        evaluated(site, run.path, {"l0": l0, "explained_variance": explained, "cross_entropy_difference": cost})
    references = [run.reference for run in runs]
    with pytest.raises(UserError, match="a page of 3 runs belongs to none of them: say where it goes, with --output"):
        report(*references)
    report(references[2])
    path = tmp_path / "page.html"
    first, second, third = report(*references, "-o", str(path)).splitlines()
    labels = [f"demo {run.id[-4:]}" for run in runs]
    assert first == "3 crosscoders, measured by their evaluations."
    assert second.startswith(
        f"The cheapest by cross-entropy is {labels[0]}: 0.2500 nats at L0 8.0. By cross-entropy it is better at 1 of 2"
    )
    assert third == f"Look at it in a browser: {path}"
    html = path.read_text()
    assert [row["standing"] == charts.ON_FRONT for row in embedded(html, "specs")["explained"]["data"]["values"]] == [True, False, True]
    assert [row["varied"] for row in embedded(html, "specs")["cost"]["data"]["values"]] == [
        "num_features 3",
        "num_features 4",
        "num_features 5",
    ]
    table = html[html.index("<tbody>") :]
    places = [table.index(f">{labels[place]}<") for place in (0, 2, 1)]
    assert places == sorted(places)
    assert f'<a href="runs/train/demo/{runs[2].id}/report.html">{labels[2]}</a>' in html
    assert f"<a>{labels[0]}" not in html
    with pytest.raises(UserError, match="is named twice; name each crosscoder once"):
        report(references[0], references[0], "-o", str(path))
    for spec in embedded(html, "specs").values():
        assert vl_convert.vegalite_to_svg({**spec, "width": 300}, page.VEGALITE_VERSION).startswith("<svg")


def test_figures_of_two_kinds_are_never_compared(site: Path, tmp_path: Path) -> None:
    runs = [trained(site) for _ in range(3)]
    path = tmp_path / "page.html"
    evaluated(site, runs[0].path)
    first = report(*(run.reference for run in runs), "-o", str(path)).splitlines()[0]
    assert first == "3 crosscoders, measured at the end of training, on what they were trained on."
    assert "nats more" not in path.read_text()
    evaluated(site, runs[1].path)
    first = report(*(run.reference for run in runs), "-o", str(path)).splitlines()[0]
    assert first == "3 crosscoders, measured by their evaluations; 1 of them are without these figures yet."


def test_what_was_measured_on_other_text_is_told_of(site: Path) -> None:
    runs = [trained(site) for _ in range(2)]
    one, other = (evaluated(site, run.path) for run in runs)
    members = compared.gather([run.reference for run in runs], site)
    assert compared.cautions(members, compared.EVALUATION) == []
    text = (other.path / "metrics.json").read_text()
    (other.path / "metrics.json").write_text(text.replace('"positions": 8', '"positions": 9'))
    members = compared.gather([run.reference for run in runs], site)
    (caution,) = compared.cautions(members, compared.EVALUATION)
    assert "different numbers of held-out positions" in caution
    assert one.path != other.path


def test_a_sweep_of_evaluations_shows_what_they_measured(site: Path) -> None:
    runs = [trained(site) for _ in range(2)]
    sweep = make_run(site, "sweep", {"stage": "sweep", "name": "demo", "members": [{"crosscoder": str(run.path)} for run in runs]})
    (sweep.path / "tasks").mkdir()
    sweep.write_job(sweep.job() | {"num_tasks": 2})
    for task, run in enumerate(runs):
        evaluated(site, run.path, {"cross_entropy_difference": 0.5 - task / 4}).path.rename(sweep.path / "tasks" / str(task))
    first, second, third = report(sweep.reference).splitlines()
    assert first == "2 crosscoders, measured by their evaluations."
    assert second.startswith(f"The cheapest by cross-entropy is demo {runs[1].id[-4:]}: 0.2500 nats")
    assert third.endswith(f"{sweep.path}/report.html")
    assert "better at 1 of 2 layers" in report(runs[0].reference)
