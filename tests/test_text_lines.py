"""Which lines give a text, and by what name the others are counted."""

import json

import pytest

from pipeline.text.text_lines import LineParser
from pipeline.text.text_source import Chunk, LongLine


def parse(*lines: bytes, field: str = "text", limit: int = 1000):
    return LineParser(field, limit).parse(Chunk(0, 11, b"\n".join(lines) + b"\n", None, None))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not_json"),
        (b"text", "not_json"),
        (b'{"text": "a"} b', "not_json"),
        (b'{"text": "a", "m": NaN}', "not_json"),
        (b'{"text": 1', "not_json"),
        (b"[" * 900, "not_json"),
        (b'{"other": "a"}', "no_text_field"),
        (b'["text"]', "no_text_field"),
        (b'"text"', "no_text_field"),
        (b'{"text": 1}', "not_a_string"),
        (b'{"text": null}', "not_a_string"),
        (b'{"text": ["a"]}', "not_a_string"),
        (b'{"text": "\xff"}', "invalid_utf8"),
        (b'{"text": "a", "m": "\xff"}', "invalid_utf8"),
        (b'{"text": "\xed\xa0\x80"}', "invalid_utf8"),
        (b'{"text": "\\ud800"}', "invalid_utf8"),
        (b"", "empty"),
        (b" \t\r", "empty"),
        (b'{"text": ""}', "empty"),
        (b'{"text": "' + b"a" * 1000 + b'"}', "too_long"),
    ],
)
def test_a_bad_line_between_good_ones_is_named_by_number_and_reason(line, reason):
    found = parse(b'{"text": "one"}', line, b'{"text": "two"}')
    assert (found.texts, found.lines, found.num_lines) == (["one", "two"], [11, 13], 3)
    assert [(r.line, r.reason, r.bytes) for r in found.rejects] == [(12, reason, len(line))]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "a\\u00e9\\ud83d\\ude00\\n\\u0000"}', "a\u00e9\U0001f600\n\0"),
        ('{"m": {"text": "no"}, "text": "é"}'.encode(), "é"),
        (b'{"text": "a"}\r', "a"),
        (b'\xef\xbb\xbf{"text": "a"}', "a"),
        (b'{"text": "a", "m": "\\ud800"}', "a"),
        (b'{"text": "a", "m": 1e999}', "a"),
        (b'{"text": " "}', " "),
    ],
)
def test_lines_that_hold_a_text_give_it(line, text):
    assert parse(line).texts == [text]


def test_the_texts_are_those_that_the_json_module_reads():
    values = ["".join(chr(code) for code in range(start, start + 90)) for start in (0, 0x80, 0x3040, 0x1F600)]
    lines = [json.dumps({"body": value}, ensure_ascii=ascii_only).encode() for value in values for ascii_only in (True, False)]
    assert parse(*lines, field="body", limit=2000).texts == [value for value in values for _ in range(2)]


def test_a_line_that_was_dropped_while_reading_is_rejected_under_its_number():
    found = LineParser("text", 100).parse(Chunk(3, 7, b"", LongLine(5_000, b"\xc3{"), None))
    assert [tuple(r) for r in found.rejects] == [(7, 3, "too_long", 5_000, "\ufffd{")]
    assert (found.texts, found.num_lines) == ([], 1)
