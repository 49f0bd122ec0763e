"""Puts a page together and writes it: one HTML file with all that it needs in it, and the folder of features beside it."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline import records
from slurm.record.printable import printable
from slurm.reporting import feature_parts
from slurm.reporting.feature_parts import FEATURES_A_PART, FEATURES_AN_INDEX, Contents, script_json
from slurm.watching.feature_store import FeatureStore

TEMPLATES = Path(__file__).parent / "templates"
VEGALITE_VERSION = "6.1"
"""The newest but one that vl-convert-python 1.9 has: in 6.4 the tooltip nearest to the pointer says `undefined` for the name of a curve."""
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

    The folder's name holds the store's data id: a page never reads what belongs to another. Folders of earlier pages are removed.

    said : is told how many parts are written, of how many.
    """
    folder = files_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if store is not None:
        _write_parts(folder / store.data_id[:12], store, said)
    with records.atomic_file(path) as file:
        file.write(html.encode())
    for other in folder.iterdir() if folder.is_dir() else ():
        if store is None or other.name != store.data_id[:12]:
            shutil.rmtree(other)


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
