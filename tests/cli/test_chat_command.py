"""``edge-vlm chat``: on a terminal, from a pipe, Ctrl-C, files, a context that is full."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_vlm import EdgeVLM, MachineSettings
from edge_vlm.machine.memory import peak_rss_bytes
from edge_vlm.prompt.messages import openai_messages, parse_messages

PICTURES = Path(__file__).parents[2] / "examples" / "images"
RECEIPT = str(PICTURES / "receipt-1.png")
COMMAND = shutil.which("edge-vlm", path=str(Path(sys.executable).parent)) or "edge-vlm"
ARGUMENTS = ("chat", "--model", "demo", "--threads", "1")


@pytest.fixture(scope="module")
def vlm() -> Iterator[EdgeVLM]:
    with EdgeVLM.load("demo", settings=MachineSettings(threads=1)) as loaded:
        yield loaded


def pipe(lines: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *ARGUMENTS, *arguments],
        input=lines,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
    )


class Terminal:
    """The command on a pseudo-terminal; ``text`` is what it wrote, without control sequences."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        import pty

        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.environ["TERM"] = "xterm"
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.execv(COMMAND, [COMMAND, *arguments])  # noqa: S606
        self.text = ""

    def type(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def interrupt_until(self, pattern: str) -> None:
        """Ctrl-C, again if need be: Python notices one that comes between the prompt and its wait
        for keys only at the next signal or key.
        """
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.wait_for(pattern, seconds=5)
                return
        raise AssertionError(f"no {pattern!r} in {self.text!r}")

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Wait for output; what comes up to its end is taken."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.text)
            if found:
                self.text = self.text[found.end() :]
                return found
            left = max(0, deadline - time.monotonic())
            if not select.select([self._file], [], [], left)[0]:
                raise AssertionError(f"no {pattern!r} in {self.text!r}")
            try:
                data = os.read(self._file, 4096)
            except OSError:  # the other side has gone
                data = b""
            if not data:
                raise AssertionError(f"ended without {pattern!r}: {self.text!r}")
            text = self.text + data.decode("utf-8", "replace")
            self.text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)

    def exit_code(self) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([self._file], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    os.read(self._file, 4096)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self._file)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it goes on")


needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty module")


@pytest.mark.engine
@needs_pty
def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal(*ARGUMENTS, RECEIPT, cwd=tmp_path)
    terminal.wait_for("> $")
    terminal.type("What is the total?\n")
    terminal.wait_for(r"\r43\.98\r\n> $")
    terminal.type("Which date is printed?\n")
    terminal.wait_for(r"\r15.08.2028\r\n> $")
    terminal.type("/stats\n")
    cached = terminal.wait_for(r"(\d+) tokens prefilled, (\d+) were cached")
    assert int(cached[1]) < 25
    assert int(cached[2]) > 80
    terminal.wait_for("> $")
    terminal.type("\x1b[A\x1b[A\n")  # up, up: the line before
    terminal.wait_for(r"Which date is printed\?\r\n")
    terminal.wait_for(r"\r15.08.2028\r\n> $")
    terminal.type("/nonsense\n")
    terminal.wait_for("no such command")
    terminal.wait_for("> $")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    history = Path(os.environ["XDG_STATE_HOME"]) / "edge-vlm" / "chat_history"
    if sys.platform == "darwin":
        history = next(Path(os.environ["HOME"]).rglob("chat_history"))
    assert "What is the total?" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


@needs_pty
def test_ctrl_c_stops_an_answer_and_not_the_program(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(bundle("tiny-378"), endless)
    manifest = json.loads((endless / "bundle.json").read_bytes())
    manifest["tokens"]["stop"] = [manifest["decoder"]["vocab_size"]]  # an id that never comes
    (endless / "bundle.json").write_text(json.dumps(manifest))
    how = ("--model", str(endless), "--threads", "1", "--no-history")
    terminal = Terminal(
        *("chat", RECEIPT, *how, "--max-tokens", "100000", "--kv-budget", "60MB"), cwd=tmp_path
    )
    terminal.wait_for("> $")
    for question in ("Say something long", "/retry"):
        terminal.type(f"{question}\n")
        terminal.wait_for(f"{question}\r\n")
        terminal.wait_for(r"\r[^\r━]{40}")  # the answer, not the bar of progress
        terminal.type("\x03")
        terminal.wait_for("stopped; /retry")
        terminal.wait_for("> $")
    terminal.type("/images\n")
    terminal.wait_for("1. .*receipt-1.png")
    terminal.wait_for("> $")
    terminal.interrupt_until("Ctrl-C again")
    terminal.wait_for("> $")
    time.sleep(0.5)
    terminal.type("\x03")
    assert terminal.exit_code() == 130
    assert not list(Path(os.environ["HOME"]).rglob("chat_history"))


@pytest.mark.engine
def test_lines_from_a_pipe(tmp_path: Path) -> None:
    result = pipe("What is the total?\n\nWhich date is printed?\n", RECEIPT, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "43.98\n15/08/2028\n")
    result = pipe("What is the total?\n/nope\nAnd?\n", RECEIPT, "--json", cwd=tmp_path)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 2
    assert answers[0]["answer"] == "43.98"
    assert "/nope" in answers[1]["error"]
    assert answers[2]["cached_tokens"] >= answers[0]["prompt_tokens"]


@pytest.mark.engine
def test_undo_retry_and_reset(tmp_path: Path) -> None:
    talk = """What is the total?
/undo
/images
/stats
What is the total?
/retry
/reset
/undo
/retry
"""
    result = pipe(talk, RECEIPT, "-v", cwd=tmp_path)
    assert result.stdout == "43.98\n" * 3
    assert "took back: What is the total?; its pictures go with the next question" in result.stderr
    prefilled = re.findall(r"(\d+) tokens prefilled", result.stderr)
    assert [int(n) for n in prefilled[-2:]] == [1, 1]  # the last position, for its logits
    assert "there is no question to take back" in result.stderr
    assert "there is no question to answer again" in result.stderr


@pytest.mark.engine
def test_a_saved_conversation_goes_on(tmp_path: Path) -> None:
    pipe(f"/image {RECEIPT}\nWhat is the total?\n/save talk.json\n", cwd=tmp_path)
    data = json.loads((tmp_path / "talk.json").read_text())
    assert data["messages"][0]["content"][0]["image_url"]["url"] == RECEIPT
    assert data["messages"][1] == {"role": "assistant", "content": "43.98"}
    assert stat.S_IMODE((tmp_path / "talk.json").stat().st_mode) & 0o077 == 0
    result = pipe(
        "/images\nWhich date is printed?\n/undo\n/undo\n/undo\n",
        "--load",
        "talk.json",
        cwd=tmp_path,
    )
    assert result.stdout == "15/08/2028\n"
    assert result.stderr.count("took back") == 2
    asked = subprocess.run(
        [COMMAND, "ask", "--messages", "talk.json", "Which date is printed?", *ARGUMENTS[1:]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert asked.stdout == "15/08/2028\n"
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.engine
def test_files_that_cannot_be_loaded_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('[{"role": "wizard", "content": "Hi"}]')
    (tmp_path / "bad.json").write_text("[{]")
    missing = {"type": "image_url", "image_url": {"url": "missing.png"}}
    (tmp_path / "gone.json").write_text(
        json.dumps([{"role": "user", "content": [missing]}, {"role": "assistant", "content": "x"}])
    )
    lines = "".join(f"/load {name}\n" for name in ("odd.json", "bad.json", "gone.json", "no.json"))
    result = pipe(
        f"What is the total?\n{lines}/save /nowhere/at/all\n/image missing.png\n/undo\n",
        RECEIPT,
        cwd=tmp_path,
    )
    assert result.stdout == "43.98\n"
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    for words, line in zip(
        ("wizard|role", "not valid JSON", "missing.png", "no such file", "nowhere", "missing.png"),
        errors,
        strict=True,
    ):
        assert re.search(words, line)
    assert "took back" in result.stderr


def test_bad_arguments_end_before_a_model_is_loaded(tmp_path: Path) -> None:
    result = pipe("Hi\n", "missing.png", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error:")]) == 1


@pytest.mark.engine
def test_a_full_context_drops_questions_and_keeps_pictures(tmp_path: Path) -> None:
    long = "Tell me all about every single part of this picture, please. " * 6
    lines = f"What is the total?\n{long}\n{long}\n{long}\n{long}\nWhat is the total?\n/images\n"
    how = (RECEIPT, "--kv-budget", "400kB", "--max-tokens", "20", "--json")
    full = pipe(lines, *how, cwd=tmp_path)
    assert full.returncode == 2
    assert "--drop-oldest forgets" in full.stderr
    result = pipe(lines, *how, "--drop-oldest", cwd=tmp_path)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, result.stderr
    assert "forgot" in result.stderr
    assert len(answers) == 6
    assert all(answer["image_tokens"] == 106 for answer in answers)
    # The picture is in front of what was dropped: it is not prefilled again.
    assert all(answer["cached_tokens"] > 82 for answer in answers[1:])
    assert "1. " in result.stderr


def test_fifty_turns(vlm: EdgeVLM) -> None:
    """Each turn prefills its own tokens alone, and memory does not grow with their number."""
    engine = vlm.engine
    assert engine is not None
    questions = ["What is the total?", "Which date is printed?", "Quel est le total ?"]
    with vlm.chat(regex=r"[0-9.]{1,8}") as chat:
        before: Any = None
        peak = n_resident = 0
        for turn in range(50):
            answer = chat.ask([RECEIPT] if turn == 0 else [], questions[turn % 3])
            if before is not None:
                own = engine.decoder.tokenize(f" User: {questions[turn % 3]} Assistant:")
                n_before = before.prompt_tokens + len(before.token_ids)
                assert answer.prompt_tokens == n_before + len(own)
                assert answer.cached_tokens == n_resident
                # The last token of an answer that no stop token followed was never computed.
                assert n_before - n_resident <= 1
                assert answer.encoded_crops == 0
            if turn == 25:
                peak = peak_rss_bytes()
            context = chat.conversation.context
            assert context is not None
            before, n_resident = answer, context.n_positions
        assert peak_rss_bytes() - peak < 4_000_000


def test_undo_forgets_the_picture_too(vlm: EdgeVLM) -> None:
    """Another picture in the same place is not mistaken for the one that was taken back."""
    other = PICTURES / "table-1.png"
    expected = vlm.ask(other, "What is the price of Flour?")
    with vlm.chat() as chat:
        chat.ask(RECEIPT, "What is the price of Flour?")
        assert [m.role for m in chat.undo()] == ["user", "assistant"]
        answer = chat.ask(other, "What is the price of Flour?")
        assert answer.token_ids == expected.token_ids
        chat.undo()
        again = chat.ask(other, "What is the price of Flour?")
        assert again.cached_tokens == again.prompt_tokens - 1
        assert chat.undo()
        assert chat.undo() == ()


def test_a_retry_that_fails_keeps_the_answer(vlm: EdgeVLM) -> None:
    from edge_vlm import Cancelled, CancelToken

    cancel = CancelToken()
    cancel.set()
    with vlm.chat(temperature=2.0) as chat:
        chat.ask(RECEIPT, "What is the total?", seed=1)
        said = chat.messages
        with pytest.raises(Cancelled), chat.retry(cancel=cancel) as stream:
            list(stream)
        assert chat.messages == said
        with chat.retry(seed=2) as stream:
            list(stream)
        assert len(chat.messages) == 2
        assert chat.messages[0] == said[0]


def test_messages_in_files_are_those_that_are_read() -> None:
    data = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": b"\x89PNG"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "text", "text": "What?"},
            ],
        },
        {"role": "assistant", "content": "Nothing."},
    ]
    written = openai_messages(parse_messages(data, answered=True))
    assert json.loads(json.dumps(written)) == written
    assert openai_messages(parse_messages(written, answered=True)) == written
    assert written[0] == data[0]
    assert written[1]["content"][0]["image_url"]["url"].endswith("base64,iVBORw==")
