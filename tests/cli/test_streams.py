"""What commands write: nothing of it drives a terminal, none of it is lost, no stream is missed."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from edge_vlm.cli.display import Steps
from edge_vlm.cli.main import main
from edge_vlm.cli.session import Session
from edge_vlm.cli.streams import prepare, say, say_error, write, write_answer, write_json
from edge_vlm.errors import DecoderError, harmless
from edge_vlm.machine.process import llama_log, set_logs
from tests.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
OSC = "\x1b]52;c;aGk=\x07"  # fills the clipboard
LINK = "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\"
EVIL = f"a{OSC}b{LINK}c\rd\x9b2Je\x7ff\x08\x0b\x00g"
ESCAPED = (
    r"a\x1b]52;c;aGk=\x07b\x1b]8;;http://evil\x1b\click\x1b]8;;\x1b\c\rd\x9b2Je\x7ff\x08\x0b\x00g"
)
BIDI = "\u202egnp.exe\u2066"


class Stream(io.TextIOWrapper):
    """Stands for stdout or stderr."""

    def __init__(self, *, terminal: bool = False, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def said(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


Streams = Callable[..., tuple[Stream, Stream]]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """``streams(terminal=..., encoding=...)`` puts new ones in place and returns them."""

    def put(**how: Any) -> tuple[Stream, Stream]:
        found = Stream(**how), Stream(**how)
        monkeypatch.setattr(sys, "stdout", found[0])
        monkeypatch.setattr(sys, "stderr", found[1])
        prepare()
        return found

    return put


def test_control_characters_are_escaped() -> None:
    assert harmless(EVIL) == ESCAPED
    assert harmless(BIDI) == r"\u202egnp.exe\u2066"
    assert harmless("\udc9b\udce9") == "\\udc9b\udce9"
    plain = "Ünïcödé 总 \N{CAT FACE}\N{ZERO WIDTH JOINER}\n\tשלום"
    assert harmless(plain) == plain


def test_an_answer_is_escaped_on_a_terminal_alone(streams: Streams) -> None:
    out, _ = streams(terminal=True)
    for piece in EVIL:  # however it is cut into pieces
        write_answer(piece)
    write_answer(BIDI)  # languages of both directions need it
    assert out.said() == ESCAPED + BIDI
    out, _ = streams()
    for piece in EVIL:
        write_answer(piece)
    assert out.said() == EVIL


@pytest.mark.parametrize("terminal", [True, False])
def test_other_text_is_escaped_everywhere(streams: Streams, terminal: bool) -> None:
    out, err = streams(terminal=terminal)
    write(EVIL + BIDI)
    say(EVIL + BIDI)
    assert out.said() == err.said() == ESCAPED + harmless(BIDI) + "\n"


def test_errors_are_one_line(streams: Streams) -> None:
    _, err = streams()
    say_error(f"one\ntwo\r\n{OSC}")
    assert err.said() == f"Error: one two {harmless(OSC)}\n"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_json_is_valid_everywhere(streams: Streams, terminal: bool, encoding: str) -> None:
    out, _ = streams(terminal=terminal, encoding=encoding)
    value = {"answer": f"总é\N{CAT FACE}{EVIL}{BIDI}", "source": os.fsdecode(b"caf\xe9.png")}
    write_json(value)
    line = out.said()
    assert json.loads(line) == value
    assert line == harmless(line)
    assert ("总" in line) == (encoding == "utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_encoding_loses_an_answer(streams: Streams, encoding: str) -> None:
    out, err = streams(encoding=encoding)
    write_answer("总 = 5")
    say(os.fsdecode(b"caf\xe9.png"))
    assert out.said() == ("总" if encoding == "utf-8" else r"\u603b") + " = 5"
    assert err.said() == "caf\\udce9.png\n"


def test_progress_names_are_escaped(streams: Streams) -> None:
    _, err = streams(terminal=True)
    with Steps() as steps:
        steps.show(f"[red]{OSC}.bin", 1, 2)
        steps.say(OSC)
    assert OSC not in err.said()
    assert harmless(OSC) in err.said()


def test_what_engines_log_is_escaped(streams: Streams) -> None:
    _, err = streams()
    set_logs(True)
    try:
        llama_log(2, OSC.encode() + b"\n", None)
    finally:
        set_logs(False)
    assert err.said() == harmless(OSC) + "\n"


def test_errors_of_engines_are_escaped_also_with_details(streams: Streams) -> None:
    _, err = streams(terminal=True)
    session = Session()
    session.verbose = True
    error = DecoderError(f"cannot load it: {OSC}")
    try:
        raise ValueError(OSC)
    except ValueError as cause:
        error.__cause__ = cause
    assert session.report(error) == 1
    assert "Traceback" in err.said()
    assert OSC not in err.said()
    assert err.said().count(harmless(OSC)) >= 2


def command(*arguments: str | os.PathLike[str]) -> int:
    """Runs one in this process; its exit code."""
    with pytest.raises(SystemExit) as end:
        main([os.fspath(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
@pytest.mark.parametrize("terminal", [True, False])
def test_names_of_files_and_folders(
    fake: FakeEngine, tmp_path: Path, streams: Streams, terminal: bool, monkeypatch: Any
) -> None:
    folder = tmp_path / f"b{OSC}\r\x9b{BIDI}"
    fake.bundle.rename(folder)
    monkeypatch.setenv("EDGE_VLM_CONFIG", str(tmp_path / "settings"))
    out, err = streams(terminal=terminal)
    assert command("use", folder) == 0
    assert command("info", folder) == 0
    assert command("info", folder, "--json") == 0
    assert command("use", f"{folder}x") == 2
    assert command("tiles", f"{folder}.png", "-o", f"{folder}.jpg") == 2
    assert command("ask", f"{folder}.png", "What?") == 2
    assert command("ask", "x", "--messages", folder) == 2
    assert command("ask", f"{OSC}.png") == 2
    assert command("plan", f"1x1{OSC}") == 2
    assert command("ask", f"-{OSC}") == 2
    assert command(f"no{OSC}") == 2
    said = (out.said() + err.said()).replace(click.style("Error:", fg="red"), "Error:")
    assert said == harmless(said)
    assert r"\x1b]52" in said


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_a_path_for_a_program_is_its_bytes(tmp_path: Path, monkeypatch: Any, streams: Any) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9\x1b")
    monkeypatch.setenv("EDGE_VLM_CACHE", str(folder))
    out, _ = streams()
    assert command("cache", "path") == 0
    assert out.buffer.getvalue() == os.fsencode(folder / "pictures") + b"\n"
    out, _ = streams(terminal=True)
    assert command("cache", "path") == 0
    assert (
        out.said()
        == str(folder / "pictures").replace("\udce9", "\\udce9").replace("\x1b", "\\x1b") + "\n"
    )


def test_a_picture_is_not_written_to_a_terminal(streams: Streams) -> None:
    out, err = streams(terminal=True)
    picture = ROOT / "examples" / "images" / "receipt-1.png"
    assert command("tiles", picture, "-o", "-") == 2
    assert out.said() == ""
    assert "stdout is a terminal" in err.said()
    out, _ = streams()
    assert command("tiles", picture, "-o", "-", "--model", "jina-vlm") == 0
    assert out.buffer.getvalue().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform == "win32", reason="closes descriptors in a shell")
@pytest.mark.parametrize(
    ("redirect", "arguments", "code", "stdout", "stderr"),
    [
        (">&-", "plan 100x100 --model jina-vlm", 0, "", ""),
        ("2>&-", "plan 100x100 --model jina-vlm", 0, "image tokens", ""),
        ("<&-", "plan 100x100 --model jina-vlm", 0, "image tokens", ""),
        ("<&- >&- 2>&-", "plan 100x100 --model jina-vlm", 0, "", ""),
        ("2>&-", "ask nosuch.png What?", 2, "", ""),
        (">&-", "ask nosuch.png What?", 2, "", "nosuch.png"),
        ("<&-", "tiles - -o x.png --model jina-vlm", 2, "", "the image: is empty"),
        ("<&-", "ask --messages -", 2, "", "not valid JSON"),
        ("<&- 2>&-", "chat nosuch.png", 2, "", ""),
        (">&- 2>&-", "use no-such-model", 2, "", ""),
    ],
)
def test_closed_streams(
    redirect: str, arguments: str, code: int, stdout: str, stderr: str, tmp_path: Path
) -> None:
    line = f'exec "$0" -m edge_vlm {arguments} {redirect}'
    result = subprocess.run(
        ["sh", "-c", line, sys.executable], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert result.returncode == code, result.stderr
    assert stdout in result.stdout
    assert stderr in result.stderr
    assert bool(result.stdout) == bool(stdout)
    assert "unexpected" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="closes descriptors in a shell")
def test_a_closed_stream_is_not_another_file(tmp_path: Path) -> None:
    """What a library prints would otherwise go into the next file that is opened."""
    code = (
        "import os; from edge_vlm.cli.streams import prepare; prepare();"
        " file = open('precious', 'w'); os.write(1, b'noise'); os.write(2, b'noise');"
        " import subprocess; subprocess.run(['sh', '-c', 'echo noise; echo noise >&2'], check=True)"
    )
    line = 'exec "$0" -c "$1" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", line, sys.executable, code], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "precious").read_bytes() == b""


@pytest.mark.engine
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty module")
@pytest.mark.parametrize(
    ("form", "escaped"),
    [
        (["--regex", r"\x1b\]52;c;aGk=\x07"], harmless(OSC)),
        (["--choices", f"{OSC},\x9b2J", "-v"], harmless(OSC)),
    ],
)
def test_an_answer_on_a_terminal(form: list[str], escaped: str) -> None:
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_vlm", "ask", "x", "-m", "demo", "--no-cache", *form],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "EDGE_VLM_THREADS": "1", "NO_COLOR": "1", "TERM": "dumb"},
    )
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 4096):
            said += piece
    except OSError:  # Linux says so that the other side has gone
        pass
    os.close(ours)
    assert process.wait(60) == 0
    text = said.decode().replace("\r\n", "\n")
    assert escaped in text
    assert "\x07" not in text
    assert "\x9b" not in text
    assert "\x1b]" not in text


def test_nothing_else_writes_to_the_streams() -> None:
    """``streams`` is the one place; bars are drawn by ``display``."""
    folders = [ROOT / "edge_vlm" / "cli", ROOT / "export" / "edge_vlm_export" / "cli"]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "click.echo", "click.secho") or called.endswith(".write"):
                    found.append((path.name, called))
    assert len(paths) > 20
    assert set(found) == {
        ("streams.py", "click.echo"),
        ("streams.py", "sys.stdout.write"),
        ("streams.py", "sys.stderr.write"),
        ("streams.py", "sys.stdout.buffer.write"),
    }
