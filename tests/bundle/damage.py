"""Ways to damage a bundle, and how it is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_vlm import EdgeVLM
from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME
from edge_vlm.engines import Decoder
from edge_vlm.errors import BundleError

FILES = (VISION_NAME, DECODER_NAME)
Change = Callable[[dict[str, Any]], None]


def edit(folder: Path, change: Change) -> None:
    """Change the manifest."""
    path = folder / "bundle.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def record(folder: Path, name: str) -> None:
    """Enter a file into the manifest as it is now."""
    content = (folder / name).read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(folder, lambda data: data["files"].update({name: entry}))


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ bit]))


def set_in(*path: str, to: Any) -> Change:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def drop(*path: str) -> Change:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def refused(path: str | Path, *words: str, decoder: Decoder | None = None) -> str:
    """The message, of one line, with which a bundle is refused; by default before the decoder."""
    with pytest.raises(BundleError) as caught:
        EdgeVLM.load(path, decoder=decoder)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable()
    assert len(message) < 1000
    for word in words:
        assert word in message
    return message
