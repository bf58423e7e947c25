"""SIGTERM, a terminal that goes away, kill -9: nothing runs on and nothing half done stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from edge_vlm_export.checkpoint.new_folder import new_folder, scratch_folder

from tests.conftest import GOLDEN, GoldenModel

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
RECEIPT = Path(__file__).parents[2] / "examples" / "images" / "receipt-1.png"
SIGHUP = getattr(signal, "SIGHUP", signal.SIGTERM)
EDGE_VLM = (sys.executable, "-m", "edge_vlm")


_started: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _end_all() -> Iterator[None]:
    """Nothing that a test started runs on, whatever became of the test."""
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()


def start(*command: Any, **how: Any) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [os.fspath(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "EDGE_VLM_THREADS": "1"},
        **how,
    )
    _started.append(process)
    return process


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def ended(process: subprocess.Popen[bytes], number: int) -> float:
    """Signals it; seconds until it ended as it should."""
    started = time.perf_counter()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.splitlines()[-1:]) == (128 + number, [b"stopped"])
    assert b"Traceback" not in errors
    return time.perf_counter() - started


@pytest.mark.parametrize(
    ("number", "delay"), [(signal.SIGTERM, 1.5), (signal.SIGTERM, 4.0), (SIGHUP, 4.0)]
)
def test_ask_ends_at_once(
    bundle: Callable[..., Path],
    golden: dict[str, GoldenModel],
    number: int,
    delay: float,
    tmp_path: Path,
) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(bundle("tiny-378"), endless)
    manifest = json.loads((endless / "bundle.json").read_bytes())
    manifest["tokens"]["stop"] = [manifest["decoder"]["vocab_size"]]  # an id that never comes
    (endless / "bundle.json").write_text(json.dumps(manifest))
    page = golden["tiny-378"].cases["image_page"].images[0]
    how = ("--max-tokens", "100000", "--kv-budget", "60MB", "--model", endless)
    process = start(*EDGE_VLM, "ask", page, "Go on.", *how)
    time.sleep(delay)
    assert ended(process, number) < 5


@pytest.mark.engine
def test_chat_ends_while_it_waits_for_a_question() -> None:
    process = start(*EDGE_VLM, "chat", "-m", "demo", RECEIPT, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"What is the total?\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"43.98\n"
    assert ended(process, signal.SIGTERM) < 5


@pytest.mark.engine
def test_watch_ends_what_its_command_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = tmp_path / "slow.sh"
    script.write_text(f"sleep 1000 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; sleep 1000\n")
    process = start(*EDGE_VLM, "watch", "-m", "demo", "--command", f"sh {script}", "What?")
    wait_for(pids.exists)
    assert ended(process, signal.SIGTERM) < 5
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: not is_running(pid), 5)


def is_running(pid: int) -> bool:
    """Zombies, which nobody may wait for in a container, do not count."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # no /proc
        return True
    return state not in "ZX"


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_export_takes_its_folder_back(tmp_path: Path, number: int) -> None:
    checkpoint = GOLDEN / "tiny-378" / "checkpoint"
    process = start(
        *(*EDGE_VLM, "export", checkpoint, "--out", tmp_path / "new", "--vision", "int8"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: [*tmp_path.glob(".new.partial-*/vision.onnx*")])
    ended(process, number)
    assert [*tmp_path.iterdir()] == []


def run_python(code: str, *arguments: Any) -> subprocess.Popen[bytes]:
    """A program that says when it is ready."""
    process = start(sys.executable, "-c", code, *arguments)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


HOLD = """
import sys, time
from pathlib import Path
from edge_vlm_export.checkpoint.new_folder import new_folder
with new_folder(Path(sys.argv[1]), False) as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_goes_with_the_next_folder(tmp_path: Path) -> None:
    alive, killed = run_python(HOLD, tmp_path / "a"), run_python(HOLD, tmp_path / "b")
    foreign = tmp_path / ".b.partial-0123456789ab"  # nothing tells that it was one of ours
    foreign.mkdir()
    killed.kill()
    killed.wait()
    assert len([*tmp_path.glob(".b.partial-*/weights")]) == 1
    with new_folder(tmp_path / "c", overwrite=False) as folder:
        (folder / "x").write_text("x")
        assert not [*tmp_path.glob(".b.partial-*/weights")]
        assert len([*tmp_path.glob(".a.partial-*/weights")]) == 1
    alive.kill()
    alive.wait()
    with scratch_folder(tmp_path / "d"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "c"]


@pytest.mark.parametrize("had_appeared", [True, False])
def test_a_kill_between_two_names_is_mended(tmp_path: Path, had_appeared: bool) -> None:
    """A bundle is replaced by two changes of names; the old one stays until the second."""
    for name in (".b.old-0123456789ab", *(["b"] if had_appeared else [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bundle.json").write_text(name)
    (tmp_path / ".b.partial-0123456789ab.lock").write_bytes(b"")
    with scratch_folder(tmp_path / "other"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    expected = "b" if had_appeared else ".b.old-0123456789ab"
    assert (tmp_path / "b" / "bundle.json").read_text() == expected


SLOW_END = """
import time, click
from edge_vlm.cli.main import run
@click.command()
def command():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(float(%r))
run(command, "slow")
"""


def test_a_second_signal_ends_at_once() -> None:
    process = run_python(SLOW_END % 60)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As nohup leaves SIGHUP."""
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + SLOW_END % 0
    process = run_python(code)
    process.send_signal(SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    assert ended(process, signal.SIGTERM) < 5
