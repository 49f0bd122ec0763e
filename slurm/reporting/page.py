"""Puts a page together and writes it: one HTML file with all that it needs in it, and the folder of features beside it."""

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.printable import printable
from slurm.reporting import feature_parts
from slurm.reporting.feature_parts import FEATURES_A_PART, FEATURES_AN_INDEX, Contents, script_json
from slurm.watching.feature_store import FeatureStore

TEMPLATES = Path(__file__).parent / "templates"
VEGALITE_VERSION = "6.1"
"""The newest but one that vl-convert-python 1.9 has: in 6.4 the tooltip nearest to the pointer says `undefined` for the name of a curve."""
GENERATOR = b'<meta name="generator" content="crosscoder report">'
"""By it a page is known as one that this wrote."""
INSIDE_BYTES = 1_500_000
"""Of the features in the page itself, at most: beside an index of 12,288 features and 0.9 MB of Vega the page stays under 5 MB."""


def render(template: str, **values: Any) -> str:
    """The page of a template; every text in `values` is escaped, but what is `Markup`, and rid of control characters."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_cleaned,
    )
    written = time.strftime("%Y-%m-%d %H:%M")
    return environment.get_template(template).render(written=written, style=own_file("report.css"), **values)


def _cleaned(value: Any) -> Any:
    """Text without control characters; `Markup` as it is."""
    return printable(value) if type(value) is str else value


def own_file(name: str) -> Any:
    """A file beside the templates, to stand in a page as it is."""
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def embedded(value: Any) -> Any:
    """`value` as JSON for a script of the page."""
    from markupsafe import Markup

    return Markup(script_json(value))


def chart_library() -> Any:
    """The JavaScript of Vega, Vega-Lite and Vega-Embed, from the package vl-convert-python; takes about two seconds."""
    import vl_convert
    from markupsafe import Markup

    bundle = vl_convert.javascript_bundle("globalThis.vegaEmbed = vegaEmbed;", VEGALITE_VERSION)
    # A script ends at its first end tag, even within a string.
    return Markup("(() => {" + bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--") + "})();")


def inside(store: FeatureStore, most: int) -> dict[str, Any]:
    """The `most` features of the strongest activations, as a page opens with them; fewer, where they would take too much room."""
    activations = store.columns(["max_activation"])["max_activation"]
    strongest = sorted(range(len(activations)), key=lambda feature: -activations[feature])
    while True:
        contents = Contents()
        for feature in sorted(strongest[:most]):  # in the store's order, which reads each of its row groups once
            contents.add(store, feature)
        part = contents.part()
        size = len(script_json(part))
        if size <= INSIDE_BYTES:
            return part
        most = int(0.95 * len(part["features"]) * INSIDE_BYTES / size)


def write(path: Path, html: str, store: FeatureStore | None, said: Callable[[int, int], None]) -> None:
    """Writes the folder of features, then the page at `path`, which names it.

    The folder's name holds the store's data id: a page never reads what belongs to another. Folders of earlier pages are removed, and
    nothing else. `path` is as `check_place` wants it.

    said : is told how many parts are written, of how many.
    """
    folder = files_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if store is not None:
        _write_parts(folder / store.data_id[:12], store, said)
    with records.atomic_file(path) as file:
        file.write(html.encode())
    for other in folder.iterdir() if folder.is_dir() else ():
        if (store is None or other.name != store.data_id[:12]) and _is_of_a_page(other):
            shutil.rmtree(other)


def check_place(path: Path) -> None:
    """Raises `UserError` unless a page can be written at `path`, in the place of nothing or of another page."""
    if os.path.lexists(path) and not (path.is_file() and not path.is_symlink() and GENERATOR in path.read_bytes()[:1000]):
        raise UserError(f"{path} is there already and is no page of crosscoder report; name another file with --output")
    for place in (files_of(path), *path.parents):
        if os.path.lexists(place) and not place.is_dir():
            raise UserError(f"{path} can't be written: {place} is no directory; name another file with --output")


def _is_of_a_page(directory: Path) -> bool:
    """Whether it is a folder that `write` made: its name is from a data id, and in it are parts alone."""
    named = re.fullmatch(r"[0-9a-f]{12}", directory.name) is not None and directory.is_dir() and not directory.is_symlink()
    return named and all(re.fullmatch(r"(index-)?[0-9]+\.js", file.name) for file in directory.iterdir())


def _write_parts(directory: Path, store: FeatureStore, said: Callable[[int, int], None]) -> None:
    directory.mkdir(parents=True, exist_ok=True)

    def call(name: str, function: str, place: int, value: Any) -> None:
        with records.atomic_file(directory / name) as file:
            file.write(f"{function}({script_json(store.data_id)}, {place}, {script_json(value)});\n".encode())

    for place, index in enumerate(feature_parts.indices(store)):
        if place:  # the first is in the page
            call(f"index-{place}.js", "crosscoderIndex", place, index)
    total = -(-store.num_features // FEATURES_A_PART)
    for place, part in enumerate(feature_parts.parts(store)):
        call(f"{place:05}.js", "crosscoderPart", place, part)
        said(place + 1, total)


def files_of(path: Path) -> Path:
    """The folder beside the page `path`."""
    return path.with_name(f"{path.stem}.files")


def beside(path: Path, store: FeatureStore) -> dict[str, Any]:
    """What the page's script needs to find the features that are not in it."""
    folder = "/".join(quote(part) for part in (files_of(path).name, store.data_id[:12]))
    return {"data": store.data_id, "folder": folder, "features_a_part": FEATURES_A_PART, "features_an_index": FEATURES_AN_INDEX}


def relative(path: Path, page: Path) -> str:
    """`path` as a link of the page."""
    return quote(os.path.relpath(path, page.parent))
