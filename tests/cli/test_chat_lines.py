"""Lines of ``edge-vlm chat`` from a pipe: pictures as people write them, and what survives what."""

from __future__ import annotations

import codecs
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PICTURES = Path(__file__).parents[2] / "examples" / "images"
RECEIPT = PICTURES / "receipt-1.png"
pytestmark = pytest.mark.engine
posix = pytest.mark.skipif(os.name == "nt", reason="a backslash is a separator there")


def chat(
    lines: str | bytes, *arguments: str, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Its stdin is ``lines``."""
    result = subprocess.run(
        [sys.executable, "-m", "edge_vlm", "chat", "-m", "demo", "--threads", "1", *arguments],
        input=lines if isinstance(lines, bytes) else lines.encode(),
        capture_output=True,
        cwd=cwd,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )
    assert b"unexpected" not in result.stderr
    out, err = result.stdout.decode(), result.stderr.decode()
    return subprocess.CompletedProcess(result.args, result.returncode, out, err)


@posix
def test_pictures_as_they_are_typed_or_dropped(tmp_path: Path) -> None:
    for name in ("a b.png", "it's.png", "plain.png"):
        shutil.copy(RECEIPT, tmp_path / name)
    shutil.copy(RECEIPT, tmp_path / "no-suffix")
    lines = [
        *("/image a b.png", r"/image a\ b.png", "/image 'a b.png'", '/image "a b.png"'),
        *("/image file://" + str(tmp_path / "a%20b.png"), "/image it's.png", "/image ~/a b.png"),
        *("plain.png", r"a\ b.png", f"'{tmp_path}/a b.png' ", f"'{tmp_path}/it'\\''s.png'"),
        *(f"file://{tmp_path}/plain.png", f"{tmp_path}/no-suffix", "~/plain.png"),
        "/image plain.png 'a b.png' plain.png",
    ]
    asked = "".join(f"/reset\n{line}\nWhat is the total?\n" for line in lines)
    result = chat(asked, cwd=tmp_path, HOME=str(tmp_path))
    assert result.stdout == "43.98\n" * len(lines), result.stderr
    assert result.returncode == 0
    result = chat(f"{RECEIPT} {RECEIPT}\n/images\n", cwd=tmp_path)
    assert "2. " in result.stderr


def test_a_file_url_as_an_argument(tmp_path: Path) -> None:
    result = chat("What is the total?\n", RECEIPT.as_uri(), cwd=tmp_path)
    assert result.stdout == "43.98\n"


@pytest.mark.parametrize(
    "line", ["/image nosuch.png", "nosuch.png", "/nosuch/at/all.png", "/image", "/load nosuch.json"]
)
def test_what_fails_fails_the_next_question(line: str, tmp_path: Path) -> None:
    lines = f"{line}\nWhat is the total?\n/image {RECEIPT}\nWhat is the total?\n"
    result = chat(lines, cwd=tmp_path)
    assert result.stdout == "43.98\n"  # of the second question alone
    assert result.returncode == 2
    assert result.stderr.count("Error: ") == 2
    assert "Error: not asked, as a line before it failed: " in result.stderr
    result = chat(lines, "--json", cwd=tmp_path)
    said = [json.loads(answer) for answer in result.stdout.splitlines()]
    assert [sorted(answer)[:1] for answer in said[:2]] == [["error"], ["error"]]
    assert said[2]["answer"] == "43.98"
    assert len(said) == 3


def test_a_reset_forgets_what_failed_too(tmp_path: Path) -> None:
    lines = f"/image nosuch.png\n/reset\n/image {RECEIPT}\nWhat is the total?\n"
    assert chat(lines, cwd=tmp_path).stdout == "43.98\n"


def test_a_chat_survives_every_command(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    failing = [
        *("/image ~nosuchuser/a.png", "/save ~nosuchuser/x", "/load ~nosuchuser/x"),
        *("/save /nowhere/at/all", "/save folder", "/save a\0b", "/image a\0b", "/load a\0b"),
        *("/image folder", "/load folder", "/save " + "x" * 300, "/image " + "x" * 5000),
        *("/nosuch", "/image", "/save", "/load", "/image 'open", "/load /dev/null"),
    ]
    if os.name == "posix":
        os.mkfifo(tmp_path / "fifo")
        failing += ["/image fifo", "/load fifo"]
    asked = f"/image {RECEIPT}\nWhat is the total?\n"
    lines = asked + "".join(f"{line}\n" for line in failing) + f"/reset\n{asked}"
    result = chat(lines, cwd=tmp_path)
    assert result.stdout == "43.98\n" * 2
    assert result.returncode == 2
    assert result.stderr.count("Error: ") == len(failing), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take names of one encoding")
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_names_that_are_not_utf8(locale: dict[str, str], tmp_path: Path) -> None:
    name = b"caf\xe9.png"
    shutil.copy(RECEIPT, tmp_path / os.fsdecode(name))
    lines = b"/image %s\nWhat is the total?\n/images\n/save caf\xe9.json\n" % name
    environment = {"PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "", **locale}
    result = chat(lines, cwd=tmp_path, **environment)
    assert (result.stdout, result.returncode) == ("43.98\n", 0), result.stderr
    assert "\\udce9" in result.stderr
    assert b"caf\xe9.json" in os.listdir(os.fsencode(tmp_path))
    saved = json.loads((tmp_path / os.fsdecode(b"caf\xe9.json")).read_bytes())
    assert saved["messages"][1]["content"] == "43.98"
    result = chat(b"/load caf\xe9.json\n/retry\n", cwd=tmp_path, **environment)
    assert (result.stdout, result.returncode) == ("43.98\n", 0), result.stderr


def test_marks_in_front(tmp_path: Path) -> None:
    lines = f"/image {RECEIPT}\nWhat is the total?\n"
    result = chat(codecs.BOM_UTF8 + lines.encode(), cwd=tmp_path)
    assert (result.stdout, result.returncode) == ("43.98\n", 0)
    for encoding in ("utf-16", "utf-16-be"):
        mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
        result = chat(mark + lines.encode(encoding), cwd=tmp_path)
        assert (result.stdout, result.returncode) == ("", 2)
        assert "UTF-16" in result.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_no_encoding_ends_a_chat(encoding: str, form: list[str], tmp_path: Path) -> None:
    name = "总.png"
    shutil.copy(RECEIPT, tmp_path / name)
    lines = f"/image {name}\nWhat is the total?\n/images\n"
    result = chat(lines, *form, cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    assert r"\u603b.png" in result.stderr
    assert json.loads(result.stdout)["answer"] == "43.98" if form else result.stdout == "43.98\n"
