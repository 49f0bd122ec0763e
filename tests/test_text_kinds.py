"""Files of another kind than JSON lines are told by their first bytes, at submission and when the stage opens them, by name."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from token_fixtures import json_lines, make_texts, make_tokenizer, tokenize

from pipeline import records
from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from pipeline.config.text_files import find_sources
from pipeline.config.text_kinds import faults_of
from slurm.submission import input_preflight

LINES = json_lines(make_texts(20))
TEXT = "".join(line + "\n" for line in LINES.decode().splitlines())


def archive(kind: str) -> bytes:
    """The lines in a zip or tar archive."""
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as file:
            file.writestr("a.jsonl", LINES)
    else:
        with tarfile.open(fileobj=packed, mode="w") as tar:
            entry = tarfile.TarInfo("a.jsonl")
            entry.size = len(LINES)
            tar.addfile(entry, io.BytesIO(LINES))
    return packed.getvalue()


def numbers() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(9))
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"
ARRAY = json.dumps([{"text": "a"}, {"text": "b"}])
OTHER_KINDS = {
    "one-line-array.json": (ARRAY.encode(), "is a JSON array, not JSON lines; .*`cat one-line-array.json | jq -c "),
    "indented-array.jsonl": (json.dumps(json.loads(ARRAY), indent=1).encode(), "is a JSON array"),
    "a-line-an-element.json": (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "is a JSON array"),
    "array-packed.json.gz": (gzip.compress(ARRAY.encode()), "is a JSON array inside, .*`zcat array-packed.json.gz | jq"),
    "array-packed.jsonl.zst": (zstandard.ZstdCompressor().compress(ARRAY.encode()), "is a JSON array inside, .*`zstdcat "),
    "indented-object.json": (json.dumps({"text": "a", "n": 1}, indent=1).encode(), "is JSON over several lines"),
    "gzip-called.jsonl": (gzip.compress(LINES), r"is gzip, but its name does not end in \.gz; rename it"),
    "zstandard-called.jsonl": (zstandard.ZstdCompressor().compress(LINES), r"is zstandard, but its name does not end in \.zst"),
    "zstandard-called.jsonl.gz": (zstandard.ZstdCompressor().compress(LINES), r"is zstandard, but .* \.zst; rename it"),
    "plain-called.jsonl.gz": (LINES, r"is plain text, though its name ends in \.gz; rename it, .* to plain-called\.jsonl"),
    "plain-called.jsonl.zst": (LINES, r"is plain text, though its name ends in \.zst"),
    "packed-twice.jsonl.gz": (gzip.compress(gzip.compress(LINES)), "is gzip inside, not JSON lines; it was packed twice"),
    "bytes-called.jsonl.gz": (bytes(range(128, 250)), "is not gzip, as its name says: it begins with "),
    "a.jsonl.bz2": (bz2.compress(LINES), "is bzip2, not JSON lines; unpack it: `bzcat a.jsonl.bz2 > a.jsonl`"),
    "a.jsonl.xz": (lzma.compress(LINES), "is xz, not JSON lines; unpack it: `xzcat"),
    "a.jsonl.lzma": (lzma.compress(LINES, format=lzma.FORMAT_ALONE), "is lzma"),
    "bzip2-called.jsonl": (bz2.compress(LINES), "is bzip2"),
    "zip-called.jsonl": (archive("zip"), "is zip, not JSON lines; unpack it: `unzip -p"),
    "tar-called.jsonl": (archive("tar"), "is a tar archive"),
    "tar.json.gz": (gzip.compress(archive("tar")), "is a tar archive inside"),
    "parquet-called.jsonl": (b"PAR1\x15\x04\x15\x10" + bytes(60) + b"PAR1", "is Parquet, .*read_parquet"),
    "parquet-called.jsonl.gz": (b"PAR1\x15\x04\x15\x10" + bytes(60) + b"PAR1", "is Parquet, .*read_parquet"),
    "arrow-called.json": (b"\xff\xff\xff\xff\x10\x02\0\0" + bytes(50), "is Arrow"),
    "numbers.json": (numbers(), "is a NumPy array"),
    "utf-16-called.jsonl": (TEXT.encode("utf-16"), "is UTF-16, .*iconv -f utf-16 -t utf-8"),
    "utf-16-without-mark.jsonl": (TEXT.encode("utf-16-le"), "is UTF-16"),
    "utf-16-packed.jsonl.gz": (gzip.compress(TEXT.encode("utf-16")), "is UTF-16 inside, .*`zcat utf-16-packed.jsonl.gz | iconv"),
    "utf-32-called.jsonl": (TEXT.encode("utf-32"), "is UTF-32"),
    "pointer.jsonl": (LFS, "is a Git LFS pointer, not the file that it stands for.*`git lfs pull`"),
    "pointer.jsonl.zst": (LFS, "is a Git LFS pointer, not the file that it stands for.*`git lfs pull`"),
    "annexed.jsonl": (b"/annex/objects/SHA256E-s12--abc.jsonl\n", "is a git-annex pointer"),
    "page.jsonl.gz": (PAGE, "is HTML or XML, as of an error page, not JSON lines; download it again"),
    "zeros.jsonl": (bytes(5000), "is nothing but zeros where it begins"),
    "table.jsonl": (b"text,label\nhello,1\n", "is not JSON lines: no line of its beginning is a JSON object; it begins with 'text,label"),
    "python.jsonl": (b"{'text': 'a'}\n{'text': 'b'}\n", "is not JSON lines: no line"),
    "cut-off.jsonl.gz": (b"", "has 0 bytes, but even an empty text has 20 as gzip: it was cut off"),
    "cut-off.jsonl.zst": (b"", "has 0 bytes, but even an empty text has 9 as zstandard: it was cut off"),
    "begun.jsonl.gz": (gzip.compress(LINES)[:15], "ends in the middle of its compressed data"),
    "a name with 'quotes' and spaces.json": (ARRAY.encode(), "is a JSON array"),
}
JSON_LINES = {
    "plain.jsonl": LINES,
    "marked.jsonl": b"\xef\xbb\xbf" + LINES,
    "packed.jsonl.gz": gzip.compress(LINES),
    "packed.jsonl.zst": zstandard.ZstdCompressor().compress(LINES),
    "after-frames-to-skip.jsonl.zst": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.ZstdCompressor().compress(LINES),
    "begins-blank.jsonl": b"\n \n" + LINES,
    "begins-badly.jsonl": b'{\n{"text"\n' + LINES,
    "rest-of-a-line.jsonl": b'of a document"}\n' + LINES,
    "rest-of-a-long-line.jsonl": b"x" * 3_000_000 + b'"}\n' + LINES,
    "one-long-line.jsonl": json.dumps({"text": "x" * 300_000}).encode(),
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "empty.jsonl": b"",
    "empty.jsonl.gz": gzip.compress(b""),
}


def settings(directory: Path) -> dict[str, object]:
    return {"stage": "tokenize", "name": "x", "sources": [str(directory / "*.js*")], "output": str(directory / "tokens")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"name": str(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_file_of_another_kind_is_named_at_submission_and_by_the_stage_with_one_sentence(
    tmp_path: Path, tokenizer: dict[str, str], name: str
) -> None:
    content, sentence = OTHER_KINDS[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(LINES)
    config = load.from_values({**settings(tmp_path), "tokenizer": tokenizer}, where="x.yaml", site=Site())
    (fault,) = input_preflight.faults_of(config, tmp_path)
    assert fault.startswith(f"sources: {tmp_path / name} ")
    with pytest.raises(UserError, match=sentence) as refused:
        tokenize(tmp_path, sources=[str(tmp_path / "*.js*")], tokenizer=tokenizer, max_bad_fraction=1.0)
    assert fault == f"sources: {refused.value}"
    assert fault.isprintable()
    assert not (tmp_path / "tokens/train/manifest.json").exists()


@pytest.mark.parametrize("name", JSON_LINES)
def test_json_lines_in_every_form_are_let_through(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(JSON_LINES[name])
    assert faults_of(find_sources([tmp_path / name])) == []


def test_of_many_files_of_another_kind_the_first_are_named_and_the_others_counted(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02d}.jsonl").write_bytes(LFS)
    faults = faults_of(find_sources([tmp_path]))
    assert [fault.partition(" is a Git LFS")[0] for fault in faults[:5]] == [str(tmp_path / f"0{number}.jsonl") for number in range(5)]
    assert faults[5:] == ["25 more of the 30 sources are refused too"]


def test_a_directory_s_packed_files_are_named_rather_than_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(LINES))
    (tmp_path / "README.md").write_text("# text")
    (fault,) = faults_of(find_sources([tmp_path]))
    assert "b.jsonl.xz is xz" in fault


def lines(*objects: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in objects)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("text_field", "objects", "fault"),
    [
        (
            "contents",
            [{"id": "1", "content": "a b"}] * 3,
            (
                "none of its first 3 documents has a text in 'contents' (text_field); the first has the fields id, content; "
                "text_field=content would name one"
            ),
        ),
        (
            "text",
            [{"id": "1", "meta": {"n": 1, "body": "longest"}}],
            (
                "its one document does not have a text in 'text' (text_field); the first has the fields id, meta; text_field=meta.body "
                "would name one"
            ),
        ),
        (
            "text",
            [{"text": ["a"]}, {"text": ["b"]}],
            (
                "none of its first 2 documents has a text in 'text', where there is a list (text_field); the first has the fields text; "
                "give JSON lines with a text in each"
            ),
        ),
        ("a.b", [{"a": {"b": "x"}}, {}], None),
        ("a.b", [{"a.b": "x"}, {}], None),
        ("text", [{"header": 1}, {"text": ""}], None),
    ],
)
def test_a_text_field_that_no_first_document_has_is_refused_at_submission(
    tmp_path: Path, text_field: str, objects: list[object], fault: str | None, packed: bool
) -> None:
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(lines(*objects)) if packed else lines(*objects))
    values = {**settings(tmp_path), "tokenizer": {"name": "demo"}, "text_field": text_field}
    config = load.from_values(values, where="x.yaml", site=Site())
    assert input_preflight.faults_of(config, tmp_path) == ([f"sources: {path}: {fault}"] if fault else [])
    assert input_preflight.faults_of(config.model_copy(update={"max_bad_fraction": 1.0}), tmp_path) == []


def test_a_first_line_alone_does_not_tell_where_the_text_stands(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"header": 1}, {"text": "x" * 3_000_000}))
    assert faults_of(find_sources([tmp_path]), "text") == []


def test_what_is_no_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(UserError, match=r"dir\.jsonl names no file called \.jsonl, .* \(it holds nothing\)"):
        find_sources([tmp_path / "dir.jsonl"])
    (tmp_path / "dir.jsonl/a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"it holds a\.parquet"):
        find_sources([tmp_path / "dir.jsonl"])
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(UserError, match=r"link\.jsonl is a link to gone\.jsonl, which does not exist"):
        find_sources([tmp_path / "li*.jsonl"])
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl is a pipe or a device, not a file"):
        find_sources([tmp_path / "pipe.jsonl"])


def test_text_is_looked_at_without_torch_or_tokenizers() -> None:
    program = "import slurm.submission.data_preflight, sys; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# -- by the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["submit", "--dry-run", "--executor", "local"], ["submit", "--executor", "debug"], ["run"]])
def test_the_command_line_names_the_file_before_anything_is_made(tmp_path: Path, tokenizer: dict[str, str], command: list[str]) -> None:
    (tmp_path / "array.json").write_text(ARRAY)
    lines = {**settings(tmp_path), "tokenizer": f"{{name: {tokenizer['name']}}}", "sources": f"[{tmp_path / 'array.json'}]"}
    (tmp_path / "x.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    (tmp_path / "site.yaml").write_text(f"runs: {tmp_path / 'runs'}\n")
    done = subprocess.run(
        [sys.executable, "-m", "slurm", *command, str(tmp_path / "x.yaml")],
        env=os.environ | {"CROSSCODER_SITE": str(tmp_path / "site.yaml")},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"{tmp_path / 'array.json'} is a JSON array, not JSON lines; write a JSON object a line" in done.stderr
    assert not (tmp_path / "tokens").exists()


# -- sets without a document ------------------------------------------------------------------------------------------


def test_a_set_of_no_documents_is_never_sealed(tmp_path: Path, tokenizer: dict[str, str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n{"text": 1}\n\n')
    with pytest.raises(
        UserError, match=r"a\.jsonl: none of 2 lines gives a document .*; give JSON lines with the text in the field 'text'"
    ):
        tokenize(tmp_path, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"train would hold no document, so it is not sealed: of 3 lines 2 are empty, 1 rejected \(see "):
        tokenize(tmp_path, tokenizer=tokenizer, max_bad_fraction=1.0)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match=r"validation would hold none of the 20 documents, .*; set another validation_fraction \(0 makes"):
        tokenize(tmp_path, tokenizer=tokenizer, validation_fraction=1e-9, output=str(tmp_path / "other"))
    assert not list(tmp_path.rglob(records.MANIFEST))


def test_an_empty_file_among_others_is_no_fault_and_only_empty_ones_are(tmp_path: Path, tokenizer: dict[str, str]) -> None:
    values = {**settings(tmp_path), "tokenizer": tokenizer}
    (tmp_path / "a.jsonl").write_bytes(b"")
    config = load.from_values(values, where="x.yaml", site=Site())
    assert input_preflight.faults_of(config, tmp_path) == [
        f"sources: every file there has 0 bytes (1, such as {tmp_path}/a.jsonl); name files that hold text"
    ]
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert input_preflight.faults_of(config, tmp_path) == []
    made = tokenize(tmp_path, tokenizer=tokenizer)
    assert made["sets"]["train"]["documents"] + made["sets"]["validation"]["documents"] == 20
