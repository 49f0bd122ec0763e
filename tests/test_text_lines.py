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


@pytest.mark.parametrize(
    "field", ["body", "été", "a field", 'q"uote', "back\\slash", "tab\there", "", ".", "a..b", "dotted.name", "三.四", "$ref", "text"]
)
def test_a_field_of_any_name_is_found_however_its_line_is_written(field):
    values = ["one", "zwei 😀", "три"]
    lines = [json.dumps({"other": 1, field: value}, ensure_ascii=ascii_only).encode() for value in values for ascii_only in (True, False)]
    found = parse(*lines, b'{"other": 1}', json.dumps({field: 7}).encode(), json.dumps({field: ""}).encode(), field=field)
    assert found.texts == [value for value in values for _ in range(2)]
    assert [reject.reason for reject in found.rejects] == ["no_text_field", "not_a_string", "empty"]


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        (b'{"a": {"b": "x"}}', "x"),
        (b'{"a": {"n": 1, "b": "x", "m": {"b": 2}}, "b": "y"}', "x"),
        (b'{"a.b": "y", "a": {"b": "x"}}', "y"),
        (b'{"a": {"b": "x"}, "a.b": "y"}', "y"),
        (b'{"a": "no object", "a.b": "y"}', "y"),
        (b'{"a": {"b": "x", "m": "\\ud800"}}', "x"),
        (b'{"a.b": 1, "a": {"b": "x"}}', "not_a_string"),
        (b'{"a": {"b": 1}}', "not_a_string"),
        (b'{"a": {"b": {"c": "x"}}}', "not_a_string"),
        (b'{"a": {"c": "x"}}', "no_text_field"),
        (b'{"a": "x"}', "no_text_field"),
        (b'{"a": ["b"]}', "no_text_field"),
        (b'{"b": "x"}', "no_text_field"),
        (b"{}", "no_text_field"),
        (b'{"a": {"b": ""}}', "empty"),
        (b'{"a": {"b": "x"}', "not_json"),
    ],
)
def test_a_nested_field_is_reached_by_its_path_and_one_called_like_the_path_comes_first(line, outcome):
    found = parse(line, field="a.b")
    assert [*found.texts, *(reject.reason for reject in found.rejects)] == [outcome]


def test_a_path_may_go_deeper():
    assert parse(b'{"a": {"b": {"c d": {"\xc3\xa9": "x"}}}}', field="a.b.c d.é").texts == ["x"]


def test_blank_lines_are_counted_apart_from_texts_that_are_empty():
    found = parse(b"", b" \t\r", b'{"text": ""}', b"\xef\xbb\xbf", b'{"text": "a"}', b"x")
    assert (found.num_blank, [reject.reason for reject in found.rejects]) == (3, ["empty"] * 4 + ["not_json"])


def test_a_line_that_was_dropped_while_reading_is_rejected_under_its_number():
    found = LineParser("text", 100).parse(Chunk(3, 7, b"", LongLine(5_000, b"\xc3{"), None))
    assert [tuple(r) for r in found.rejects] == [(7, 3, "too_long", 5_000, "\ufffd{")]
    assert (found.texts, found.num_lines) == ([], 1)
