"""What the words of a command mean: pictures, the question, and paths as people write them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edge_vlm.cli.main import group
from edge_vlm.cli.questions.words import HINT, as_path, names_pictures, split_words, typed_paths
from edge_vlm.errors import ImageError, InputError

NAMES = ("receipt-1.png", "table-1.png", "a b.png", "it's.png", "é.png", "photo", "notes.txt")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files of these names and a folder of pictures."""
    for name in NAMES:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "question",
    [
        "What is the total?",
        " ".join(["word"] * 60),
        "x" * 256,
        "x" * 100_000,
        "\N{CAT FACE}" * 80,
        "e\N{COMBINING ACUTE ACCENT}" * 120,
        "a/" * 200,
        "/".join(["a" * 300] * 3),
        "and/or",
        "total",
        "What is in Dr. No?",
        "Write a command that makes b.png of a.gif",
        "What\nis it.png",
    ],
)
def test_questions(question: str) -> None:
    assert split_words([question]) == ([], question)
    assert split_words(["receipt-1.png", question]) == (["receipt-1.png"], question)


def test_pictures_that_other_files_judge() -> None:
    words = ["-", "data:image/png;base64,", "http://x/y.png", "pictures", "photo#page=3", "What?"]
    assert split_words(words) == (words[:-1], "What?")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipt-1.png"], "recipt-1.png: no such file (near it: receipt-1.png)"),
        (["RECIPT-1.PNG"], "no such file"),
        (["nothing-like-it.heic"], "nothing-like-it.heic: no such file; a question comes after"),
        (["scan.pdf#page=2"], "no such file"),
        (["a  b.png"], "(near it: a b.png)"),
        (["pictures/recipt.webp"], "no such file"),
        (["pictures"], "no question about pictures"),
        ([".."], "no question about .."),
        (["photo"], "no question about photo"),
        (["receipt-1.png"], "no question about receipt-1.png"),
        (["file://receipt-1.png"], "no question about"),
        (["-"], "no question about -"),
        (["receipt-1.png", "table-1.png"], "no question about table-1.png"),
        (["receipt-1.png", "tabel-1.png"], "(near it: table-1.png)"),
        (["receipt-1.png", "-"], "no question about -"),
        (["receipt-1.png", " "], "the question is empty"),
        (["-", "-", "What?"], "only one of the pictures"),
        ([], "no question"),
    ],
)
def test_words_without_a_question(words: list[str], said: str) -> None:
    with pytest.raises(click.UsageError) as error:
        split_words(words)
    assert said in error.value.message


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["What is the total?", "receipt-1.png"], "What is the total?"),
        (["receipt-1.png", "What", "is", "the", "total?"], "What"),
        (["receipt-1.png", "What is", "the total?"], "What is"),
        (["pictures/receipt", "What?"], "pictures/receipt"),
        (["x" * 300, "What?"], "x" * 300),
        (["a\0b", "What?"], "'a\\x00b'"),
    ],
)
def test_another_order_gets_a_hint(words: list[str], name: str) -> None:
    with pytest.raises(ImageError) as error:
        split_words(words)
    assert str(error.value) == f"{name}: No such file or directory; {HINT}"


def test_a_misspelt_picture_gets_its_neighbours() -> None:
    with pytest.raises(ImageError) as error:
        split_words(["recipt-1.png", "What is the total?"])
    said = "recipt-1.png: No such file or directory (near it: receipt-1.png)"
    assert str(error.value) == said
    with pytest.raises(ImageError, match=r"^gone.png: No such file or directory$"):
        split_words(["receipt-1.png", "gone.png", "What?"])


@pytest.mark.parametrize("command", ["ask", "watch"])
@pytest.mark.parametrize("question", ["- what", "-what", "--what is it", "-1 or -2?"])
def test_a_question_that_begins_like_an_option(command: str, question: str) -> None:
    result = CliRunner().invoke(group, [command, "receipt-1.png", question])
    assert result.exit_code == 2
    assert HINT in result.output
    assert HINT not in CliRunner().invoke(group, [command, "--jsn", question[2:]]).output


def test_urls_of_files(folder: Path) -> None:
    assert as_path(f"file://{folder.as_posix()}/a%20b.png") == str(folder / "a b.png")
    assert as_path("FILE://localhost/x.png") == os.sep + "x.png"
    assert as_path("file://localhost.png") == "localhost.png"
    assert as_path("a%20b.png") == "a%20b.png"
    assert split_words(["file://receipt-1.png", "What?"])[0] == ["receipt-1.png"]


posix = pytest.mark.skipif(os.name == "nt", reason="a backslash is a separator there")


@posix
@pytest.mark.parametrize(
    ("typed", "paths"),
    [
        ("a b.png", ["a b.png"]),
        (r"a\ b.png", ["a b.png"]),
        ("'a b.png'", ["a b.png"]),
        ('"a b.png"', ["a b.png"]),
        ("'a b.png' ", ["a b.png"]),
        ("it's.png", ["it's.png"]),
        (r"'it'\''s.png'", ["it's.png"]),
        ('"it\'s.png"', ["it's.png"]),
        ("file://a%20b.png", ["a b.png"]),
        ("'file://a%20b.png'", ["a b.png"]),
        ("receipt-1.png table-1.png", ["receipt-1.png", "table-1.png"]),
        (r"a\ b.png 'table-1.png'", ["a b.png", "table-1.png"]),
        ("no such.png", ["no such.png"]),
        ("don't.png", ["don't.png"]),
        ("receipt-1.png gone.png", ["receipt-1.png gone.png"]),
    ],
)
def test_paths_as_they_are_typed_or_dropped(typed: str, paths: list[str]) -> None:
    assert typed_paths(typed) == paths


@posix
def test_homes(folder: Path) -> None:
    assert typed_paths("~/a b.png") == [str(folder / "a b.png")]
    assert typed_paths(r"~/a\ b.png") == [str(folder / "a b.png")]
    assert typed_paths("~/no such.png") == [str(folder / "no such.png")]
    with pytest.raises(InputError, match=r"~nosuchuser/a\.png: there is no such home folder"):
        typed_paths("~nosuchuser/a.png")


@posix
@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("receipt-1.png", True),
        ("'a b.png'", True),
        (r"a\ b.png", True),
        ("./photo", True),
        ("{folder}/photo", True),
        ("~/notes.txt", True),
        ("file://anything", True),
        ("recipt-1.png", True),
        ("/home/nobody/my photo.png", True),
        ("receipt-1.png table-1.png", True),
        ("photo", False),
        ("notes.txt", False),
        ("What is in receipt-1.png?", False),
        ("What is in receipt-1.png", False),
        ("Is it 'a b.png'", False),
        ("~ what?", False),
        ("~nosuchuser is who?", False),
        ("pictures", False),
        ("/etc/hosts is what?", False),
        ("don't", False),
        ("x" * 5000, False),
        ("a\0b", False),
    ],
)
def test_lines_that_are_pictures(line: str, is_one: bool, folder: Path) -> None:
    assert names_pictures(line.format(folder=folder)) is is_one


@pytest.mark.skipif(sys.platform == "win32", reason="names are text there")
def test_names_that_are_not_utf8(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (folder / name).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert split_words([name, "What?"])[0] == [name]
    assert names_pictures(name)
    with pytest.raises(ImageError, match="near it: 'caf"):
        split_words([os.fsdecode(b"caff\xe9.png"), "What?"])
