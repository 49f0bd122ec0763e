"""The page of `crosscoder report` in a real browser, where there is one: nothing else runs its scripts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_pieces import evaluated, stored, trained

from slurm.reporting import feature_parts, page, run_page
from slurm.reporting.subject import find_subject

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which runs the scripts of the page (apt-get install chromium)")
BAD = "</script><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one feature in it and two beside it."""
    runs = tmp_path_factory.mktemp("runs")
    run = trained(runs)
    evaluated(runs, run.path)
    stored(runs, run.path, [" zero", BAD, "two"])
    subject, path = find_subject(run.reference, runs), run.path / "report.html"
    page.write(path, run_page.html(subject, path, most_inside=1), subject.store, lambda done, total: None)
    return path


def opened(path: Path, fragment: str, profile: Path) -> str:
    """What the page has become once its scripts are through."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    command += [f"--user-data-dir={profile}", f"{path.as_uri()}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout


def test_charts_are_drawn_and_features_listed_the_strongest_first(written: Path, tmp_path: Path) -> None:
    dom = opened(written, "", tmp_path)
    assert len(re.findall(r'<svg[^>]*class="marks"', dom)) == 8
    assert re.findall(r'<a href="#feature-(\d)">\1</a>', dom) == []  # neither silent nor dense: none of the three
    assert "0 of 3 features" in dom


def test_a_feature_beside_the_page_is_read_and_its_text_stays_text(written: Path, tmp_path: Path) -> None:
    dom = opened(written, "#feature-1", tmp_path)
    assert "Fires on 50 % of 8 positions (dense); activation 1 on average, 2 at most." in dom
    assert "&lt;/script&gt;&lt;script&gt;document.title='owned'" in dom
    assert "<title>owned" not in dom
    assert '<a href="#feature-2">2</a> (0.13)' in dom
    assert len(re.findall(r'class="token peak"', dom)) == 2
    assert len(re.findall(r'<svg[^>]*class="marks"', dom)) == 9


def test_a_page_without_its_folder_says_what_is_missing(written: Path, tmp_path: Path) -> None:
    alone = shutil.copy(written, tmp_path / "report.html")
    assert "Feature 0</h3>" in opened(Path(alone), "#feature-0", tmp_path / "one")
    dom = opened(Path(alone), "#feature-1", tmp_path / "two")
    assert re.search(r"The page keeps this feature in report\.files/\w{12}/00000\.js, which is not beside it", dom)


def test_an_index_that_goes_on_beside_the_page_is_read_to_its_end(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_parts, "FEATURES_AN_INDEX", 1)
    monkeypatch.setattr(page, "FEATURES_AN_INDEX", 1)
    run = written.parent
    subject, path = find_subject(str(run), run.parents[2]), tmp_path / "report.html"
    page.write(path, run_page.html(subject, path, most_inside=1), subject.store, lambda done, total: None)
    assert len(list((tmp_path / "report.files").rglob("index-*.js"))) == 2
    dom = opened(path, "#feature-2", tmp_path / "profile")
    assert "0 of 3 features" in dom
    assert "Fires on 0 % of 8 positions (silent)" in dom
    shutil.rmtree(tmp_path / "report.files")
    assert "those from 1 on are in files that are not beside this page" in opened(path, "", tmp_path / "profile")
