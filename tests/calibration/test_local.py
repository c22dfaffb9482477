import json

import pytest

from auto_round.calibration.local import check_path, read_documents
from auto_round.errors import CalibrationError, ConfigError

CHAT = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        pytest.param(["1", "2"], ["1", "2"], id="strings"),
        pytest.param([{"text": "1", "id": 7}, {"text": "2"}], ["1", "2"], id="text records"),
        pytest.param([{"body": "1"}], ["1"], id="single key records"),
        pytest.param([{"messages": CHAT}, "3"], [CHAT, "3"], id="messages"),
        pytest.param([CHAT], [CHAT], id="bare conversations"),
        pytest.param({"text": "1"}, ["1"], id="one record"),
        pytest.param({"text": ["1", "2"], "id": [7, 8]}, ["1", "2"], id="columns"),
        pytest.param({"data": [{"text": "1"}]}, ["1"], id="records under one key"),
        pytest.param({"a": "1", "b": "2"}, ["1", "2"], id="texts under keys"),
        pytest.param({"messages": CHAT}, [CHAT], id="one conversation"),
        pytest.param("1", ["1"], id="a string"),
    ],
)
def test_json_shapes(tmp_path, content, documents):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    assert read_documents(path) == documents


def test_jsonl_has_one_record_a_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "1\u2028 2"}\n\n"3"\r\n', encoding="utf-8")
    assert read_documents(path) == ["1\u2028 2", "3"]


def test_a_byte_order_mark_is_no_json(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('\ufeff["1"]', encoding="utf-8")
    assert read_documents(path) == ["1"]


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "DATA.TXT"
    path.write_text("one\n\ntwo\n")
    assert read_documents(path) == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.json", "none.json does not exist"),
        ("folder", "folder is a directory. Name one file of it"),
        ("data.csv", r"ends in '.csv'. Local files must be .json, .jsonl, .txt"),
    ],
)
def test_paths_that_are_no_data_file(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.csv").write_text("1")
    with pytest.raises(ConfigError, match=message):
        check_path(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '["1",\n"2",\n}', r"a.json, line 3: not JSON"),
        (
            "a.json",
            '{"text": "1"}\n{"text": "2"}',
            r"a.json, line 2: not JSON .* A file with one record a line is .jsonl",
        ),
        ("a.jsonl", '{"text": "1"}\n\n{"text": 2', r"a.jsonl, line 3: not JSON"),
        ("a.json", "[]", "holds no records"),
        ("a.json", "{}", "holds no records"),
        ("a.jsonl", "", "holds no records"),
        ("a.json", '[{"text": "1"}, {"title": "x", "body": "y"}]', "record 1: no usable text.* keys seen: title, body"),
        ("a.jsonl", '{"text": 5}', "line 1: no usable text.* keys seen: text"),
        ("a.json", '{"a": "1", "b": 2}', "record 0: no usable text.* keys seen: a, b"),
        ("a.json", "[1, 2]", "record 0: a record must be a string.*not 1"),
        ("a.json", "[[]]", r"a record must be a string.*not \[\]"),
    ],
)
def test_unreadable_content_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        read_documents(tmp_path / name)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe1")
    with pytest.raises(CalibrationError, match=r"a\.txt is not UTF-8 text"):
        read_documents(tmp_path / "a.txt")
