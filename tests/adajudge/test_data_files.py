"""Files: every record gives one value in place; what is wrong with the file as a whole raises and names the path."""

import gzip
import io
import json
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest
from adajudge.data import DataFileError, Row, RowError, read_rows
from adajudge.data.json_text import RepeatedKeyError, parse_json

RECORDS = [{"id": f"r{i}", "prompt": f"q{i} 🙂", "response": "a\u2028b"} for i in range(5)]


def lines(records) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def errors(path) -> list[RowError]:
    return [row for row in read_rows(path) if isinstance(row, RowError)]


@pytest.fixture(params=["jsonl", "jsonl.gz", "json", "parquet"])
def sound_file(request, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    if request.param == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    else:
        content = lines(RECORDS) if "jsonl" in request.param else json.dumps(RECORDS).encode()
        path.write_bytes(gzip.compress(content) if request.param.endswith("gz") else content)
    return path


def test_every_format_gives_the_same_rows(sound_file):
    assert [(row.id, row.prompt[0].content, row.responses[0]) for row in read_rows(sound_file)] == [
        (record["id"], record["prompt"], record["response"]) for record in RECORDS
    ]


def test_total_is_the_number_of_records(sound_file):
    assert read_rows(sound_file).total() == len(RECORDS)


def test_standard_input_is_json_lines(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines(RECORDS))))
    assert [row.id for row in read_rows("-")] == [record["id"] for record in RECORDS]


def test_nested_messages_come_out_of_parquet_as_they_went_in(tmp_path):
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet")
    assert (row.prompt[0].content, row.responses) == ("q", ("a",))


def test_a_messy_file_loses_nothing_and_names_each_fault(tmp_path):
    messy = b"\r\n".join(
        [
            b'\xef\xbb\xbf{"id": "a", "prompt": "byte-order mark", "response": "fine"}',
            b"",
            '{"prompt": "emoji 🙂", "response": "👍🏽"}'.encode(),
            b'{"id": "c", "prompt": "no response"}',
            b'{"id": "d", "prompt": "q", "response": 3}',
            b'{"id": "e", "prompt": "q", "response": ""}',
            b'{"id": "a", "prompt": "q", "response": "again"}',
            b'{"id": "f", "prompt": ',
            b'{"id": "g", "prompt": "\xff", "response": "r"}',
            b'{"prompt": "q", "chosen": "a", "rejected": "b", "margin": NaN}',
            b'"text"',
            b'{"id": "last", "prompt": "no newline behind", "response": "fine"}',
        ]
    )
    reader = read_rows(write(tmp_path / "rows.jsonl", messy))
    rows = list(reader)
    assert [row.line for row in rows] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert [row.id for row in rows if isinstance(row, Row)] == ["a", "3", "last"]
    assert [(row.line, row.field, row.reason.split(":")[0]) for row in rows if isinstance(row, RowError)] == [
        (4, "response", "missing field"),
        (5, "response", "expected a string or a list of messages, got a number"),
        (6, "response", "empty"),
        (7, "id", "duplicate id 'a'"),
        (8, "row", "invalid JSON at column 22"),
        (9, "row", "not UTF-8"),
        (10, "margin", "expected a finite number, got nan"),
        (11, "row", "expected an object, got a string"),
    ]
    assert (reader.counts.rows, reader.counts.errors) == (3, 8)


@pytest.mark.parametrize(
    ("encode", "hint"),
    [
        (lambda text: text.encode("utf-16"), "not UTF-8: .*; the file is UTF-16, expected UTF-8"),
        (
            lambda text: text.replace("\n", "\r").encode(),
            "invalid JSON .*; a carriage return alone ends no line",
        ),
    ],
    ids=["UTF-16", "carriage-returns"],
)
def test_the_usual_strange_encodings_are_recognized(tmp_path, encode, hint):
    content = encode('{"prompt": "q", "response": "a"}\n' * 2)
    first = errors(write(tmp_path / "rows.jsonl", content))[0]
    assert re.fullmatch(f"{hint}.*", first.reason)


def test_a_duplicate_id_names_the_first_line(tmp_path):
    (error,) = errors(write(tmp_path / "rows.jsonl", lines([RECORDS[0], RECORDS[1], RECORDS[0]])))
    assert error == RowError(3, "r0", "id", "duplicate id 'r0': first at line 1")


def test_an_id_belongs_to_the_first_record_that_carries_it_even_a_malformed_one(tmp_path):
    content = lines([{"id": "x", "prompt": "q"}, {"id": "x", "prompt": "q", "response": "a"}])
    assert [error.field for error in errors(write(tmp_path / "rows.jsonl", content))] == ["response", "id"]


@pytest.mark.parametrize("records", [[{}, {}, {"id": "2"}], [{}, {"id": "3"}, {}]], ids=["later", "earlier"])
def test_of_an_explicit_id_and_an_equal_line_number_the_later_is_the_error(tmp_path, records):
    content = lines([{**record, "prompt": "q", "response": "a"} for record in records])
    (error,) = errors(write(tmp_path / "rows.jsonl", content))
    assert (error.line, error.field) == (3, "id")
    later = "line 2 has no id and goes by its number" if "id" in records[-1] else "first at line 2"
    assert later in error.reason


def test_the_line_number_of_an_empty_line_is_free_as_an_id(tmp_path):
    content = b'{"prompt":"q","response":"a"}\n\n{"id":"2","prompt":"q","response":"a"}\n'
    assert not errors(write(tmp_path / "rows.jsonl", content))


TIES = [
    {"context": "q", "response1": "a", "response2": "b", "overall_preference": preference}
    for preference in (0, 2, 0)
]


def test_ties_are_left_out_and_counted(tmp_path):
    reader = read_rows(write(tmp_path / "rows.jsonl", lines(TIES)))
    assert [row.id for row in reader] == ["2"]
    assert reader.counts.ties == 2


def test_ties_come_with_weight_zero_on_request(tmp_path):
    reader = read_rows(write(tmp_path / "rows.jsonl", lines(TIES)), keep_ties=True)
    assert [row.weight for row in reader] == [0.0, 2**0.5, 0.0]


def test_a_reader_can_be_read_again(sound_file):
    reader = read_rows(sound_file)
    assert list(reader) == list(reader)
    assert reader.counts.rows == len(RECORDS)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_are_read_as_they_are_asked_for(tmp_path, name):
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_bytes(lines(RECORDS) + b"\x00" * 10)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS * 200), path, row_group_size=100)
    assert next(iter(read_rows(path))).id == "r0"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.jsonl", None, "no such file"),
        ("rows.csv", b"a,b", r"unknown extension '\.csv'; expected .*\.jsonl"),
        ("rows", b"", r"unknown extension '\(none\)'"),
        ("rows.parquet", b"not parquet", "expected a parquet file"),
        ("rows.json", b'{"a": 1}', "expected one JSON list"),
        ("rows.json", b'{"a": 1}\n{"a": 2}', r"named \.jsonl"),
        ("rows.jsonl.gz", b"plain text", "expected a complete gzip file"),
        ("rows.jsonl.gz", gzip.compress(lines(RECORDS) * 50)[:-12], "expected a complete gzip file"),
    ],
)
def test_an_unreadable_file_raises_and_names_the_path(tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataFileError, match=expected) as raised:
        list(read_rows(path))
    assert str(path) in str(raised.value)


def test_a_directory_is_no_data_file(tmp_path):
    with pytest.raises(DataFileError, match="is a directory"):
        read_rows(tmp_path)


def test_a_repeated_key_among_many_is_found_at_once():
    text = json.dumps({str(i): i for i in range(200_000)})[:-1] + ', "199999": 0}'
    with pytest.raises(RepeatedKeyError, match="'199999' comes twice"):
        parse_json(text)


def test_the_line_number_of_an_unreadable_line_is_free_as_an_id(tmp_path):
    content = b'{"id":"0","prompt":"q","response":"a"}\n{\n{"id":"2","prompt":"q","response":"a"}\n'
    assert [error.line for error in errors(write(tmp_path / "rows.jsonl", content))] == [2]


def test_a_key_that_comes_twice_is_an_error_not_a_guess(tmp_path):
    text = '{"prompt": "a", "response": "b", "response": "c"}'
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(text + '\n{"prompt": "a", "response": "b"}\n')
    bad, good = read_rows(lines)
    assert (bad.line, bad.field) == (1, "response")
    assert "comes twice" in bad.reason
    assert good.responses == ("b",)
    whole.write_text(f"[{text}]")
    with pytest.raises(DataFileError, match="the key 'response' comes twice"):
        list(read_rows(whole))
