"""Pictures on the command line: pipes, parts, transparency, and what is said about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Run, assert_one_line
from tests.picture_files import encoded, photo

PNG = encoded(photo(300, 200), "PNG")
ASK = ("--max-tokens", "2", "--json")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.png"
    path.write_bytes(encoded(photo(1600, 1200), "PNG"))
    return path


def test_a_part_and_the_line_about_small_print(run: Run, large: Path) -> None:
    whole = run("ask", large, "What?", *ASK)
    (use,) = json.loads(whole.stdout)["images"]
    assert use["size"] == [1600, 1200]
    used = "x".join(map(str, use["used"]))
    line = f"used at {used} of 1600x1200: small print may be lost; try --crop or --max-tiles\n"
    assert whole.stderr.decode().count(line) == 1
    part = run("ask", "--crop", "50%,0%,10%,10%", large, "What?", *ASK)
    assert b"small print" not in part.stderr
    (use,) = json.loads(part.stdout)["images"]
    assert (use["size"], use["crop"]) == ([160, 120], [800, 0, 160, 120])
    crop = ("--crop", "1500,0,200,200")
    for command in (("ask", large, "What?"), ("tiles", large, "-o", "-"), ("plan", large)):
        assert_one_line(run(*command, *crop), 2, "reaches beyond the picture", "1600x1200")
    assert_one_line(run("plan", "1600x1200", *crop), 2, "which is 1600x1200")
    assert_one_line(run("ask", large, "What?", "--crop", "1,2,3"), 2, "X,Y,W,H")
    plan = json.loads(run("plan", large, "--crop", "0,0,10%,10%", "--json").stdout)
    assert plan["size"] == [160, 120]


def test_hidden_pixels_are_told(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "ink.png"
    rgba = np.zeros((60, 80, 4), np.uint8)
    rgba[20:40, ::7, 3] = 255
    path.write_bytes(encoded(Image.fromarray(rgba), "PNG"))
    for how, environment, alpha, words in (
        ((), {}, "white", b"white behind hidden pixels"),
        (("--alpha", "drop"), {}, "drop", b"hidden pixels as stored"),
        ((), {"EDGE_VLM_ALPHA": "drop"}, "drop", b"hidden pixels as stored"),
    ):
        result = run("ask", path, "What?", "-v", *ASK, *how, **environment)
        assert json.loads(result.stdout)["images"][0]["alpha"] == alpha
        assert words in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes in folders")
def test_pipes_are_read(run: Run, bundle: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    expected = json.loads(run("ask", path, "What?", *ASK).stdout)["answer"]
    for name in ("-", "/dev/stdin"):
        assert json.loads(run("ask", name, "What?", *ASK, stdin=PNG).stdout)["answer"] == expected
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    threading.Thread(target=fifo.write_bytes, args=(PNG,), daemon=True).start()
    assert json.loads(run("ask", fifo, "What?", *ASK).stdout)["answer"] == expected
    assert run("tiles", "-", "-o", "-", stdin=PNG).stdout[1:4] == b"PNG"
    line = f"{sys.executable} -m edge_vlm ask <(cat {path}) 'What?' {' '.join(ASK)}"
    environment = {**os.environ, "EDGE_VLM_MODEL": str(bundle("tiny-126-tied"))}
    found = subprocess.run(
        ["bash", "-c", line], capture_output=True, check=True, env=environment, timeout=60
    )
    assert json.loads(found.stdout)["answer"] == expected


def test_a_large_file_of_messages_is_refused_before_it_is_read(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    with path.open("wb") as file:
        file.truncate(129 << 20)
    assert_one_line(run("ask", "--messages", path), 2, "is larger than 128 MiB")
