"""`crosscoder report`: what the page of a trained crosscoder says, that text in it is text, and how large it is."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import vl_convert
from markupsafe import escape
from report_pieces import (
    CONFIG,
    COSTS,
    embedded,
    evaluated,
    generated,
    make_run,
    report,
    site_without_charts,
    stored,
    trained,
    write_large_store,
)

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.run_directory import RunDirectory
from slurm.reporting import charts, feature_charts, feature_parts, page, words
from slurm.reporting.subject import Evaluation, find_subject
from slurm.watching.feature_store import FeatureStore

BAD = "</script><script>document.title='owned'</script><!--<b>&amp;\u202e\x1b[2J"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return site_without_charts(tmp_path, monkeypatch)


def test_the_verdict_stands_first_with_the_cost_in_nats_beside_the_baseline(site: Path) -> None:
    run = trained(site)
    evaluation = evaluated(site, run.path)
    first, second, third = report(run.reference).splitlines()
    assert first == "A crosscoder of 3 features (relu) over h.0, h.1, trained on 2000 positions of /data/activations/demo."
    assert second == (
        "By cross-entropy it is better at 1 of 2 layers than the strongest baselines: in a layer's place it costs "
        "0.2500 nats at h.0 (affine map of h.9: 0.1250); 0.1250 nats at h.1 (affine map of h.9: 0.2500)."
    )
    assert third == f"Look at it in a browser: {run.path}/report.html"
    html = (run.path / "report.html").read_text()
    order = [
        escape(second),
        "0.1875",
        "strongest baseline 0.1875",
        "In words",
        "the crosscoder costs 0.2500.",
        "What was trained",
        "Training",
    ]
    main = html[html.index("<main") :]
    places = [main.index(text) for text in order]
    assert places == sorted(places)
    assert evaluation.reference in html
    assert 'id="browser"' not in html
    assert report(evaluation.reference).splitlines()[:2] == [first, second]


def test_an_imported_crosscoder_is_one_that_was_trained_elsewhere(site: Path) -> None:
    run = make_run(site, "import", {"stage": "import", "name": "demo", "layout": "sae_lens"})
    evaluated(site, run.path)
    assert report(run.reference).splitlines()[0] == "A crosscoder of 3 features over h.0, h.1, imported from files of sae_lens."
    html = (run.path / "report.html").read_text()
    assert "trained elsewhere" in html
    assert "dead in training" not in html


def test_what_dwarfs_the_other_costs_is_named_and_not_drawn() -> None:
    replaced = [{"layer": "h.0", "by": by, "source": None, "difference": value} for by, value in COSTS["h.0"].items()]
    chart, far = charts.costs({"layers": ["h.0"], "replaced": replaced})
    assert [row["value"] for row in chart["data"]["values"]] == [0.25, 0.125, 0.5]
    assert [(row["by"], row["value"]) for row in far] == [("mean", 4.0), ("zero", 8.0)]


def test_a_run_that_nobody_evaluated_says_so(site: Path) -> None:
    run = trained(site)
    assert report(run.reference).splitlines()[1].startswith("Nobody evaluated it yet")
    html = (run.path / "report.html").read_text()
    assert "explained variance" in html
    assert 'id="reconstruction"' not in html


def test_what_trains_nothing_and_what_is_unfinished_is_refused(site: Path) -> None:
    run = trained(site)
    count = make_run(site, "tokenize", {"stage": "tokenize", "name": "demo", "crosscoder": ""})
    with pytest.raises(UserError, match="trains no crosscoder; name a run of train"):
        find_subject(count.reference, site)
    evaluation = evaluated(site, run.path)
    (evaluation.path / "result.json").unlink()
    with pytest.raises(UserError, match="a report can be made of it once it has finished"):
        find_subject(evaluation.reference, site)


def test_every_chart_is_one_that_vega_lite_accepts(site: Path) -> None:
    run = trained(site)
    evaluated(site, run.path)
    stored(site, run.path)
    report(run.reference)
    specs = embedded((run.path / "report.html").read_text(), "specs")
    assert list(specs) == ["costs", "explained", "curve-0", "curve-1", "curve-2", "density", "norms", "alone", "profile"]
    for spec in specs.values():
        svg = vl_convert.vegalite_to_svg({**spec, "width": 300}, page.VEGALITE_VERSION)
        assert svg.startswith("<svg")
    # Under the pointer the point is one level further down: some versions look for the curve's name above it.
    vega = json.dumps(vl_convert.vegalite_to_vega(specs["curve-0"], page.VEGALITE_VERSION))
    assert r"isValid(datum.datum[\"series\"])" in vega


def test_no_text_of_a_document_becomes_part_of_the_page(site: Path) -> None:
    run = trained(site, CONFIG | {"activations": {"kind": "disk", "path": f"/data/{BAD}"}})
    evaluated(site, run.path)
    stored(site, run.path, [BAD, BAD, BAD])
    generated(site, run.path, BAD)
    report(run.reference, "--inside", "1")
    html = (run.path / "report.html").read_text()
    assert html.lower().count("</script") == html.lower().count("<script") == 7
    assert "<!--" not in html
    assert "<b>" not in html
    assert "&lt;/script&gt;" in html  # of the configuration
    shown = feature_parts.shown(BAD)
    assert embedded(html, "index")["top"][0] == [shown]
    assert embedded(html, "inside")["tokens"] == ["a b", shown, "⏎"]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html)
    (part,) = (run.path / "report.files").rglob("*.js")
    assert "<" not in part.read_text()


def test_a_feature_is_the_same_in_the_page_and_in_its_part_beside_it(site: Path) -> None:
    run = trained(site)
    features = stored(site, run.path)
    report(features.reference, "--inside", "1")
    html = (run.path / "report.html").read_text()
    inside, beside = embedded(html, "inside"), embedded(html, "beside")
    (file,) = (run.path / beside["folder"]).iterdir()
    call = re.fullmatch(r'crosscoderPart\("([0-9a-f]+)", (\d+), (.*)\);\n', file.read_text())
    assert call is not None
    assert (call[1], call[2], file.name) == (beside["data"], "0", "00000.js")
    part = json.loads(call[3])
    assert list(part["features"]) == ["0", "1", "2"]
    assert list(inside["features"]) == ["0"]
    assert part["features"]["0"] == inside["features"]["0"]
    first = inside["features"]["0"]["contexts"][0]
    assert first[:5] == [None, 3, 5, 1, 2.0]
    assert [inside["tokens"][place] for place in first[5]] == ["a b", "zero", "⏎"]
    assert first[6] == [0, 1000, 250]
    index = embedded(html, "index")
    assert (index["density"], index["dead"], index["norms"][1]) == ([0.25, 0.5, 0], [2], [0.5, 0.4, 0.3])
    assert index["promoted"] == [["up0"], ["up1"], ["up2"]]


def test_a_crosscoder_of_two_models_says_what_they_share(site: Path) -> None:
    run = trained(site)
    evaluation = evaluated(site, run.path)
    metrics = records.read_json(evaluation.path / "metrics.json")
    known = {"name": "only_base", "features": 1200, "fraction": 0.25, "nu_error": 0.125, "nu_reconstruction": 0.5, "absent": 7}
    rows = [known, known | {"name": "shared", "features": 0, "fraction": 0.0, "nu_error": None, "nu_reconstruction": None, "absent": None}]
    metrics["model_diffing"] = [{"models": ["base", "tuned"], "sites": ["h.0"], **row} for row in rows]
    records.write_json(evaluation.path / "metrics.json", metrics)
    report(run.reference)
    html = (run.path / "report.html").read_text()
    section = html[html.index('<section id="models">') :]
    assert "<h3>base and tuned</h3>" in section
    cells = re.findall(r'<td class="number">(.*?)</td>', section[: section.index("</table>")])
    assert cells == ["1,200", "25 %", "0.125", "0.500", "7", "0", "0 %", "", "", ""]
    assert re.findall(r'<th scope="row">(.*?)</th>', section[: section.index("</table>")]) == ["only base", "shared"]


def test_what_was_generated_stands_under_its_prompt_with_its_cost(site: Path) -> None:
    run = trained(site)
    stored(site, run.path)
    texts = generated(site, run.path, " loud", num_prompts=8)
    report(texts.reference)
    html = (run.path / "report.html").read_text()
    section = html[html.index('<section id="text">') :]
    assert '(here <a href="#feature-1">1</a>)' in section
    assert '<th scope="row">steered, strength 8</th><td class="number">0.500</td>' in section
    assert '<td class="number">8 of 8</td>' in section
    places = [section.index(text) for text in ("after 0:  loud", "> own<", "broken: repeats", "> loud<", "after 1:", "after 5:")]
    assert places == sorted(places)
    assert "after 6" not in section
    assert f"The first 6 of 8 prompts of {texts.reference}" in section


def test_a_page_written_again_leaves_no_features_of_another_store(site: Path) -> None:
    run = trained(site)
    stored(site, run.path)
    report(run.reference)
    old = run.path / embedded((run.path / "report.html").read_text(), "beside")["folder"]
    stored(site, run.path, ["other", "words", "here"])
    report(stored(site, run.path, ["other", "words", "here"]).reference)
    new = run.path / embedded((run.path / "report.html").read_text(), "beside")["folder"]
    assert old != new
    assert [path.name for path in old.parent.iterdir()] == [new.name]


def test_nothing_of_others_is_deleted_or_written_over(site: Path, tmp_path: Path) -> None:
    """A folder called like that of a page, a file that is no page, a link, and places where no file can be."""
    from slurm.reporting import page

    path = tmp_path / "page.html"
    for name in ("page.files/thesis/ch1.txt", "page.files/0123456789ab/mine.txt", "page.files/ba9876543210/00000.js"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    page.check_place(path)
    page.write(path, '<meta name="generator" content="crosscoder report">', None, lambda done, total: None)
    assert sorted(p.name for p in (tmp_path / "page.files").iterdir()) == ["0123456789ab", "thesis"]
    page.check_place(path)  # a page may be written anew
    (tmp_path / "mine.html").write_text("important")
    (tmp_path / "link.html").symlink_to(path)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "b.files").write_text("x")
    for name in ("mine.html", "link.html", "folder.html", "b.html", "mine.html/page.html"):
        with pytest.raises(UserError, match="name another file with --output"):
            page.check_place(tmp_path / name)


def test_a_page_of_12288_features_stays_under_5_mb_and_holds_the_strongest(tmp_path: Path) -> None:
    write_large_store(tmp_path / "features", 12_288, with_contexts=256)
    store = FeatureStore.open(tmp_path / "features")
    index, inside = next(feature_parts.indices(store)), page.inside(store, 128)
    assert list(inside["features"]) == [str(feature) for feature in range(128)]
    assert len(inside["features"]["0"]["contexts"]) == feature_parts.MOST_STRONGEST + 5 * feature_parts.MOST_OF_A_GROUP
    size = sum(len(text.encode()) for text in (page.chart_library(), feature_parts.script_json(index), feature_parts.script_json(inside)))
    assert size < 4_500_000  # charts, tables and the record need the rest
    assert len(page.inside(store, 12_288)["features"]) < 1000  # however many are wished for


def test_many_layers_are_drawn_and_told_of_together(tmp_path: Path) -> None:
    layers = [f"h.{number}" for number in range(12)]
    rows = [
        {"layer": layer, "by": by, "source": None, "difference": cost, "explained_variance": 0.5}
        for number, layer in enumerate(layers) for by, cost in (("crosscoder", 0.25), ("affine", number / 8))
    ]  # fmt: skip
    metrics = {"layers": layers, "replaced": rows, "reconstruction": rows}
    assert words.verdict_in_short(Evaluation(RunDirectory(tmp_path), metrics, {})) == (
        "By cross-entropy it is better at 9 of 12 layers than the strongest baselines: in a layer's place it costs 0.2500 nats, mean "
        "over 12 layers (strongest baselines: 0.6875); it stands worst at h.0 with 0.2500 (affine map of another layer: 0.0000)."
    )
    shares = {layer: [0.0, 0.5, 1.0] for layer in layers}
    for spec in (charts.costs(metrics)[0], charts.explained(metrics), feature_charts.share_histogram(shares, "share")):
        assert vl_convert.vegalite_to_svg({**spec, "width": 300}, page.VEGALITE_VERSION).startswith("<svg")
    heat = feature_charts.share_histogram(shares, "share")["data"]["values"]
    assert [row["count"] for row in heat if row["layer"] == "h.3" and row["count"]] == [1, 1, 1]


def test_rows_are_thinned_evenly_with_both_ends() -> None:
    rows = [{"tokens": number} for number in range(1001)]
    thinned = [row["tokens"] for row in charts.thin(rows)]
    assert (len(thinned), thinned[0], thinned[-1]) == (charts.MOST_ROWS, 0, 1000)
    assert {b - a for a, b in itertools.pairwise(thinned)} == {2, 3}


def test_the_cheapest_baseline_is_the_one_to_beat() -> None:
    replaced = [{"layer": "h.0", "by": by, "source": "h.1", "difference": value} for by, value in COSTS["h.0"].items()]
    (cost,) = words.layer_costs({"layers": ["h.0"], "replaced": replaced})
    assert (cost.own, cost.baseline, cost.baseline_cost, cost.is_better) == (0.25, "affine map of h.1", 0.125, False)


def test_the_command_is_cheap_until_it_is_used() -> None:
    program = "import slurm.__main__, slurm.commands.report_commands, slurm.reporting.run_page, sys; "
    program += "print(sorted({'torch', 'pyarrow', 'numpy', 'jinja2', 'vl_convert'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"
