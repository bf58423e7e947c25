"""Forked children, threads that outlive the main one, models closed under a call: each in a process
of its own, because what must not happen is that it crashes or hangs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "examples" / "images" / "receipt-1.png"
BEGIN = f"""
import asyncio, gc, io, os, sys, threading, time
import multiprocessing as mp
from edge_vlm import AsyncEdgeVLM, DecoderError, EdgeVLM, EdgeVLMError, MachineSettings
R, Q = {os.fspath(PICTURE)!r}, "What is the total?"
settings = MachineSettings(cache=None, threads=int(os.environ.get("N_THREADS", "2")))
def load(**how):
    return EdgeVLM.load("demo", settings=settings, **how)
def tried(work):
    try:
        return str(work())
    except EdgeVLMError as error:
        return f"{{type(error).__name__}}: {{error}}"
"""
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


def run(code: str, timeout: float = 50, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program; one that hangs is an error."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


def lines_of(code: str, **environment: str) -> list[str]:
    """What a program printed that ended well and complained of nothing."""
    result = run(code, **environment)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout.splitlines()


IN_CHILD = """
def refused(name, work):
    said = tried(work)
    print(name, "spawn" in said and said.startswith("DecoderError") or said)
def child():
    async def ask(model):
        return await model.ask(R, Q)
    async def load_and_ask():
        async with await AsyncEdgeVLM.load("demo") as model:
            return await ask(model)
    refused("ask", lambda: vlm.ask(R, Q))
    refused("text", lambda: vlm.ask((), "Hello"))
    refused("begun", lambda: list(begun))
    refused("waiting", lambda: list(waiting))
    refused("chat", lambda: chat.ask("And the date?"))
    refused("another chat", lambda: vlm.chat())
    refused("retry", lambda: chat.retry().result())
    refused("encode", lambda: vlm.encode(R))
    refused("load", load)
    refused("another", lambda: other.ask(R, Q))
    refused("async", lambda: asyncio.run(ask(AsyncEdgeVLM(vlm))))
    refused("async load", lambda: asyncio.run(load_and_ask()))
    vlm.close()
    print("closed", tried(lambda: vlm.ask(R, Q))[:12], flush=True)
"""


@fork
def test_a_child_of_a_process_that_used_a_model_is_told() -> None:
    said = lines_of(
        IN_CHILD
        + """
other, vlm = load(), load()
chat, begun, waiting = vlm.chat(), vlm.stream(R, Q), vlm.stream(R, Q)
print(chat.ask(R, Q), next(begun), flush=True)
process = mp.get_context("fork").Process(target=child)
process.start()
process.join(30)
print(process.exitcode, "".join(begun), vlm.ask(R, Q))
"""
    )
    assert said[0] == "43.98 4"
    assert len(said[1:-2]) == 12
    assert all(line.endswith(" True") for line in said[1:-2]), said
    assert said[-2:] == ["closed DecoderError", "0 3.98 43.98"]


@fork
def test_a_fork_in_the_middle_of_an_answer() -> None:
    """Locks that other threads hold are held for ever in the child; and so in its own child."""
    said = lines_of(
        """
from concurrent.futures import ProcessPoolExecutor
vlm = load()
vlm.ask(R, Q)
chat, leave = vlm.chat(), threading.Event()
def work():
    while not leave.is_set():
        chat.ask(R, Q)
        chat.undo()
        vlm.encode(R)
def child(deeper):
    found = [tried(lambda: vlm.ask(R, Q)), tried(lambda: chat.ask(R, Q)), tried(load)]
    if deeper:
        with ProcessPoolExecutor(1, mp.get_context("fork")) as pool:
            found += pool.submit(child, False).result(20)
    chat.close()
    vlm.close()
    return found
thread = threading.Thread(target=work)
thread.start()
for _ in range(4):
    time.sleep(0.05)
    with ProcessPoolExecutor(1, mp.get_context("fork")) as pool:
        print(["spawn" in said for said in pool.submit(child, True).result(20)])
leave.set()
thread.join()
print(vlm.ask(R, Q))
"""
    )
    assert said == [*[str([True] * 6)] * 4, "43.98"]


@fork
def test_a_model_may_be_loaded_before_a_fork() -> None:
    """As a server does that loads first and forks its workers then."""
    said = lines_of(
        """
vlm = load()
def child(number):
    print(number, vlm.ask(R, Q), vlm.ask(R, "Which date is printed?"), flush=True)
    vlm.close()
for number in range(2):
    process = mp.get_context("fork").Process(target=child, args=(number,))
    process.start()
    process.join(30)
    print(process.exitcode, flush=True)
print(vlm.ask(R, Q))
"""
    )
    assert said == ["0 43.98 15/08/2028", "0", "1 43.98 15/08/2028", "0", "43.98"]


@fork
def test_a_child_ends_without_the_parents_threads() -> None:
    """One that is left by sys.exit tears everything down: session, contexts and weights."""
    said = lines_of(
        """
vlm = load()
chat, begun = vlm.chat(), vlm.stream(R, Q)
print(chat.ask(R, Q), next(begun), flush=True)
if not (pid := os.fork()):
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "".join(begun), chat.ask(Q))
""",
        N_THREADS="8",
    )
    assert said == ["43.98 4", "7 3.98 43.98"]


def test_spawned_children_answer(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        BEGIN
        + """
def ask(question):
    with load() as vlm:
        return str(vlm.ask(R, question))
if __name__ == "__main__":
    print(ask(Q))
    with mp.get_context("spawn").Pool(1) as pool:
        print(pool.map_async(ask, [Q]).get(timeout=40)[0])
"""
    )
    result = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert result.stdout.split() == ["43.98", "43.98"], result.stderr


@pytest.mark.parametrize("seconds", [0.05, 0.3])
def test_closing_while_a_large_picture_is_read(seconds: float) -> None:
    said = lines_of(
        f"""
import numpy as np
from PIL import Image
file = io.BytesIO()
Image.fromarray(np.zeros((4000, 6000, 3), np.uint8)).save(file, "PNG")
vlm = load()
thread = threading.Thread(target=lambda: print(tried(lambda: vlm.ask(file.getvalue(), Q))))
thread.start()
time.sleep({seconds})
vlm.close()
thread.join()
"""
    )
    assert said == ["DecoderError: the model was closed"]


def test_closing_a_chat_while_it_generates() -> None:
    """From another thread, at whatever moment; and what else cannot be done meanwhile."""
    said = lines_of(
        """
vlm = load()
for what in ("close", "restart", "undo", "retry"):
    for i in range(4):
        chat, found = vlm.chat(max_tokens=300, regex="[a-z]{290}"), []
        begun = threading.Event()
        def work():
            found.append(tried(lambda: chat.ask("Hello", progress=lambda _: begun.set())))
        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        time.sleep(0.01 * i)
        found.append(tried(getattr(chat, what)))
        if what != "close":
            chat.close()
        thread.join()
        print(*sorted(found), sep="; ")
print(vlm.ask(R, Q))
vlm.close()
"""
    )
    closed, busy = "DecoderError: the chat was closed", "already answering"
    assert said[:4] == [f"{closed}; None"] * 4
    assert len(said) == 17
    assert all(closed in line and busy in line for line in said[4:16]), said
    assert said[16] == "43.98"


def test_what_was_made_before_closing() -> None:
    said = lines_of(
        """
vlm = load()
chat, text, stream, begun = vlm.chat(), vlm.chat(), vlm.stream(R, Q), vlm.stream(R, Q)
encoded = vlm.encode(R)
text.ask("What is 2+2?")
next(begun)
vlm.close()
for work in (
    lambda: chat.ask(R, Q),
    lambda: text.ask("And 3+3?"),
    lambda: "".join(stream),
    lambda: "".join(begun),
    lambda: vlm.ask(encoded, Q),
    lambda: asyncio.run(AsyncEdgeVLM(vlm).ask(R, Q)),
):
    print(tried(work))
with load() as again:
    print(again.ask(encoded, Q))
decoder = load().engine.decoder
decoder.close()
for work in (lambda: decoder.tokenize("a"), lambda: decoder.piece(1), lambda: decoder.context(1)):
    print(tried(work))
"""
    )
    closed = "DecoderError: the model was closed"
    assert said == [*[closed] * 6, "43.98", *[closed] * 3]


DAEMONS = {
    "ask": "vlm.ask(R, Q)",
    "encode": "vlm.encode(numbers.integers(0, 256, (900, 900, 3), np.uint8))",
    "text": "vlm.ask((), 'Hello', regex='[a-z]{200}', max_tokens=300)",
    "stream": "list(vlm.stream(R, Q))",
    "chat": "vlm.chat().ask(R, Q)",
    "async": "asyncio.run(AsyncEdgeVLM(vlm).ask(R, Q))",
    "load": "load().ask(R, Q)",
}


@pytest.mark.parametrize(
    ("what", "seconds"),
    [*(("ask", seconds) for seconds in (0.1, 0.6, 1.0)), *((what, 0.3) for what in DAEMONS)],
)
def test_the_program_ends_while_a_daemon_thread_works(what: str, seconds: float) -> None:
    result = run(
        f"""
import numpy as np
numbers = np.random.default_rng(0)
vlm = load()
def work():
    while True:
        {DAEMONS[what]}
threading.Thread(target=work, daemon=True).start()
time.sleep({seconds})
print("leaving")
"""
    )
    assert (result.returncode, result.stdout) == (0, "leaving\n"), result.stderr
    if what not in ("async", "load"):  # asyncio and pools say that Python has ended them
        assert result.stderr == ""


ENDINGS = ["", "sys.exit(0)"]
if os.name == "posix":
    ENDINGS.append("os.kill(os.getpid(), signal.SIGINT)")


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_program_ends_with_everything_open(ending: str, tmp_path: Path) -> None:
    result = run(
        f"""
import signal
settings = MachineSettings(cache={os.fspath(tmp_path)!r})
vlm, other = load(), load()
chat, begun, waiting = vlm.chat(), vlm.stream(R, Q), vlm.stream(R, Q)
encoded = vlm.encode(R)
print(chat.ask(R, Q), next(begun), other.ask(encoded, Q), flush=True)
{ending}
"""
    )
    assert result.stdout == "43.98 4 43.98\n"
    if "SIGINT" in ending:
        assert result.returncode == -signal.SIGINT
        assert result.stderr.splitlines()[-1] == "KeyboardInterrupt"
    else:
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("residency", ["together", "in-turns"])
def test_threads_that_outlive_the_main_one_are_answered(residency: str, tmp_path: Path) -> None:
    """Python allows no pool of threads any more then."""
    said = lines_of(
        f"""
settings = MachineSettings(cache={os.fspath(tmp_path)!r}, residency={residency!r})
vlm = load()
def work():
    threading.main_thread().join()
    print(vlm.ask(R, Q))
threading.Thread(target=work).start()
"""
    )
    assert said == ["43.98"]
    assert list(tmp_path.glob("pictures/entries/*.prefix"))
