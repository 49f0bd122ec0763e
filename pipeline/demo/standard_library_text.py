"""Writes the running Python's standard library as JSON lines in the Pile's shape.

    python -m pipeline.demo.standard_library_text '{data}/text/demo'

A document is the source of a module, docstrings included, or, for a module that has no Python source (`math`, `sys`),
the docstrings of its functions and classes. The documents go to three files, one of each form the pipeline reads:

    stdlib-00.jsonl  stdlib-01.jsonl.gz  stdlib-02.jsonl.zst
    {"text": "\"\"\"Heap queue algorithm...", "meta": {"pile_set_name": "python-stdlib", "path": "heapq.py"}}
"""

import argparse
import gzip
import importlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import xxhash
import zstandard

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.site_file import load_site
from pipeline.run import byte_size

TEST_FOLDERS = {"test", "tests", "idle_test", "__phello__"}
NOT_STANDARD = {"site-packages", "dist-packages", "__pycache__"}


def source_documents(root: Path, *, tests: bool) -> Iterator[tuple[str, str]]:
    """(path, text) of each module's source below `root`, in the order of their paths; tests only if asked for."""
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if NOT_STANDARD.intersection(parts) or (not tests and TEST_FOLDERS.intersection(parts)):
            continue
        # Some test modules are written in another encoding, or in none, on purpose.
        text = file.read_bytes().decode("utf-8", errors="replace")
        if text.strip() and "\ufffd" not in text:
            yield "/".join(parts), text


def built_in_documents() -> Iterator[tuple[str, str]]:
    """(name, docstrings) of each module that is compiled into the interpreter."""
    for name in sorted(sys.builtin_module_names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a few modules warn that they are deprecated as they are imported
            module = importlib.import_module(name)
        yield name, "\n\n".join([f"{name}: {module.__doc__}", *_docstrings(module, name)]) + "\n"


def _docstrings(owner: object, name: str) -> Iterator[str]:
    """`name.member(signature)` and docstring of every public function and class, a class's methods after it."""
    for key, member in sorted(vars(owner).items()):
        if key.startswith("_") or not callable(member) or not isinstance(member.__doc__, str):
            continue
        signature = getattr(member, "__text_signature__", None)
        yield f"{name}.{key}{signature if isinstance(signature, str) else ''}\n{member.__doc__}"
        if isinstance(member, type):
            yield from _docstrings(member, f"{name}.{key}")


def write(directory: Path, *, tests: bool = False) -> list[tuple[Path, int]]:
    """Writes the three files and gives each one's path and number of documents. The same Python gives the same bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [*source_documents(root, tests=tests), *built_in_documents()]
    if len(documents) < 100:
        raise UserError(
            f"{root} holds only {len(documents)} Python source files; install the standard library's source (Debian: libpython3-stdlib)"
        )
    lines: list[list[bytes]] = [[], [], []]
    for path, text in documents:
        row = {"text": text, "meta": {"pile_set_name": "python-stdlib", "path": path}}
        lines[xxhash.xxh3_64_intdigest(path.encode()) % 3].append(json.dumps(row, ensure_ascii=False).encode())
    plain, gz, zst = (b"".join(line + b"\n" for line in part) for part in lines)
    contents = {
        "stdlib-00.jsonl": plain,
        "stdlib-01.jsonl.gz": gzip.compress(gz, compresslevel=6, mtime=0),
        "stdlib-02.jsonl.zst": zstandard.ZstdCompressor(level=6).compress(zst),
    }
    for name, content in contents.items():
        with records.atomic_file(directory / name) as file:
            file.write(content)
    return [(directory / name, len(part)) for name, part in zip(contents, lines, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="where to; {data} is the site's root of data, as in a configuration")
    parser.add_argument("--tests", action="store_true", help="the library's tests too, three times as much text")
    parser.add_argument("--if-missing", action="store_true", help="leave a directory that is there as it is")
    arguments = parser.parse_args()
    directory = Path(load_site().expand(arguments.directory, "directory"))
    if arguments.if_missing and directory.exists():
        return
    for path, documents in write(directory, tests=arguments.tests):
        print(f"{path}: {documents} documents, {byte_size(path.stat().st_size)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
