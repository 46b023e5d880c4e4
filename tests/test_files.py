"""Files that are whole or not there, the names that they get, and lines of JSON."""

import unicodedata
from pathlib import Path

import pytest
from cli_runs import listing

from fastdit.files import LONGEST_NAME, cut, distinct_names, folded, moved_when_complete, read_json_lines


@pytest.mark.parametrize("name", ["a" * 251 + ".mp4", "𝒂" * 62 + ".mkv", "r." + "z" * 253, "." + "h" * 254, "short"])
def test_the_longest_names_have_a_temporary_one_too(tmp_path, name):
    assert len(name.encode()) <= LONGEST_NAME
    with moved_when_complete(tmp_path / name) as part:
        assert part.name.endswith(Path(name).suffix[:100]) and len(part.name.encode()) <= LONGEST_NAME
        part.write_text("whole")
    assert listing(tmp_path) == [name] and (tmp_path / name).read_text() == "whole"


def test_an_error_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), moved_when_complete(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert listing(tmp_path) == ["file"] and path.read_text() == "old"


@pytest.mark.parametrize(("text", "size", "left"), [("abc", 2, "ab"), ("猫猫", 4, "猫"), ("a𝒂", 4, "a"), ("é", 1, "")])
def test_no_letter_is_cut_in_two(text, size, left):
    assert cut(text, size) == left


def test_names_are_as_different_as_file_systems_need_them():
    texts = ["a cat", "a cat?", "a cat!", "A dog", "a dog", "café", unicodedata.normalize("NFD", "café"), "b" * 300]
    texts += ["b" * 301, "猫" * 200, "猫" * 199]
    names = distinct_names([*texts, "a bird?"], r"[^\w ]", 100)
    assert (names["a cat"], names["a bird?"]) == ("a cat", "a bird_")  # nothing is added where nothing is needed
    assert len({folded(name) for name in names.values()}) == len(names)
    assert max(len(name.encode()) for name in names.values()) <= 100
    assert distinct_names(reversed([*texts, "a bird?"]), r"[^\w ]", 100) == names  # in whatever order


@pytest.mark.parametrize("end", [b"", b'{"n": "\xe7', b'{"n": ', b"\0\0\0", b'{"n": [[\n'], ids=repr)
def test_a_line_that_was_cut_off_is_none(tmp_path, end):
    path = tmp_path / "lines"
    path.write_bytes('{"n": "a\u2028b"}\r\n\n{"n": "c\x85d"}\n'.encode() + end)
    assert list(read_json_lines(path)) == [(1, {"n": "a\u2028b"}), (3, {"n": "c\x85d"})]


@pytest.mark.parametrize("text", ["my notes\n", "[1]\n", '{"n": 1}\n2\n', "\ufeffhello"])
def test_other_files_are_not_taken_for_lines_of_json(tmp_path, text):
    path = tmp_path / "lines"
    path.write_text(text)
    with pytest.raises(ValueError, match="no JSON object"):
        list(read_json_lines(path))
