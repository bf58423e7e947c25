"""As a service starts programs: an empty environment, the C locale, no home, closed streams."""

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
QUESTION = "What is the total?"
N_QUESTIONS = int(os.environ.get("EDGE_VLM_TEST_QUESTIONS", "5"))
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform == "win32", reason="starts programs as POSIX services do"),
]
# What a service has, and where the code under test is.
BARE = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
ONCE = 'exec "$0" -m edge_vlm ask --no-cache -m demo "$@" <&-'
MANY = """
import sys
from edge_vlm import EdgeVLM
with EdgeVLM.load("demo") as vlm:
    for _ in range(int(sys.argv[3])):
        print(vlm.ask(sys.argv[1], sys.argv[2]), flush=True)
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command],
        env={**BARE, "LC_ALL": "C", **environment},
        cwd="/",
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
    )


def test_every_question_of_a_service_is_answered() -> None:
    line = f"i=0; while [ $i -lt {N_QUESTIONS} ]; do ({ONCE}); i=$((i+1)); done"
    result = run("sh", "-c", line, sys.executable, str(RECEIPT), QUESTION)
    assert (result.stdout, result.stderr) == ("43.98\n" * N_QUESTIONS, "")


def test_every_question_in_one_process_is_answered() -> None:
    line = 'exec "$0" -c "$@" <&-'
    arguments = (MANY, str(RECEIPT), QUESTION, str(N_QUESTIONS))
    result = run("sh", "-c", line, sys.executable, *arguments)
    assert (result.stdout, result.returncode) == ("43.98\n" * N_QUESTIONS, 0), result.stderr


@pytest.mark.parametrize("home", ["/dev/null", "/nonexistent", ""])
def test_a_home_that_is_none_costs_a_line(home: str) -> None:
    result = run(sys.executable, "-m", "edge_vlm", "ask", str(RECEIPT), QUESTION, HOME=home)
    assert (result.stdout, result.returncode) == ("43.98\n", 0)
    said = [line for line in result.stderr.splitlines() if "demo model" not in line]
    assert len(said) <= 1
    assert not said or "not cached" in said[0]


def test_without_a_cache_nothing_is_said_about_it() -> None:
    ask = (sys.executable, "-m", "edge_vlm", "ask", "-m", "demo", "--no-cache")
    result = run(*ask, str(RECEIPT), QUESTION, EDGE_VLM_CACHE="~nosuchuser/cache")
    assert (result.stdout, result.stderr) == ("43.98\n", "")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
def test_no_encoding_loses_an_answer(encoding: str) -> None:
    ask = (sys.executable, "-m", "edge_vlm", "ask", "x", "-m", "demo", "--no-cache")
    variables = {**BARE, "LC_ALL": "C", "PYTHONIOENCODING": encoding}
    plain = subprocess.run([*ask, "--regex", "总é"], env=variables, capture_output=True, timeout=60)
    assert (plain.returncode, plain.stderr) == (0, b"")
    assert plain.stdout == "总é\n".encode(encoding, "backslashreplace")
    whole = run(*ask, "--choices", "总,é,\N{CAT FACE}", "--json", "-v", PYTHONIOENCODING=encoding)
    assert whole.returncode == 0
    found = json.loads(whole.stdout)
    assert set(found["choices"]) == {"总", "é", "\N{CAT FACE}"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take names of one encoding")
@pytest.mark.parametrize("encoding", ["", "utf-8", "latin-1"])
def test_watch_survives_names(encoding: str, tmp_path: Path) -> None:
    for name in ("caf\udce9.png", "总.png", "a\x1b]0;x\x07.png"):
        shutil.copy(RECEIPT, tmp_path / name)
    result = run(
        *(sys.executable, "-m", "edge_vlm", "watch", "-m", "demo", "--existing"),
        *("--dir", str(tmp_path), "--count", "3", QUESTION),
        PYTHONIOENCODING=encoding,
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["answer"] for line in found] == ["43.98"] * 3
    names = {os.path.basename(line["source"]) for line in found}
    assert "总.png" in {name.strip("'") for name in names}
    assert "\x1b" not in result.stdout


def test_marks_in_front_of_what_comes_by_stdin() -> None:
    messages = json.dumps([{"role": "user", "content": "What is a barometer?"}]).encode()
    ask = [sys.executable, "-m", "edge_vlm", "ask", "-m", "demo", "--no-cache"]
    for arguments, data, expected in (
        (["-", QUESTION], RECEIPT.read_bytes(), b"43.98\n"),
        (["--messages", "-"], messages, None),
    ):
        marked, plain = (
            subprocess.run([*ask, *arguments], input=text, capture_output=True, timeout=60)
            for text in (codecs.BOM_UTF8 + data, data)
        )
        assert (marked.returncode, marked.stdout) == (0, plain.stdout)
        assert plain.stdout == (expected or plain.stdout)


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(redirect: str) -> None:
    line = f'exec "$0" -m edge_vlm ask -m demo --no-cache "$@" {redirect}'
    result = run("sh", "-c", line, sys.executable, str(RECEIPT), QUESTION)
    assert result.stdout == ("" if ">&-" in redirect.split() else "43.98\n")
    assert (result.returncode, result.stderr) == (0, "")
