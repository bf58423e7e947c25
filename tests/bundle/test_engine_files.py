"""What stands between strangers' files and the engines, with the engines themselves."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_vlm import EdgeVLM
from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Bundle
from edge_vlm.decoder.decoder import LlamaDecoder
from edge_vlm.errors import BundleError
from tests.bundle.damage import record

MODEL = "tiny-126-tied"
Make = Callable[..., Path]


@pytest.fixture
def folder(bundle: Make, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return shutil.copytree(bundle(MODEL), tmp_path / "bundle")


def test_an_undamaged_copy_answers(folder: Path) -> None:
    with EdgeVLM.load(folder) as vlm:
        assert vlm.ask((), "Hello", max_tokens=1).prompt_tokens > 1


FLIP = """
import random, sys
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import BundleError
from edge_vlm.pictures.tower import OnnxTower
bundle = Bundle.open(sys.argv[1])
path = bundle.file("vision.onnx")
good = path.read_bytes()
for seed in range(100):
    rng = random.Random(seed)
    damaged = bytearray(good)
    damaged[rng.randrange(10_000)] ^= 1 << rng.randrange(8)  # nodes come before weights
    path.write_bytes(damaged)
    try:
        OnnxTower(bundle).load()
        print("loaded")
    except BundleError as error:
        print("refused", error)
"""


def test_flipped_bits_in_a_graph_that_nothing_compares(folder: Path) -> None:
    """As if a stranger had made the bundle: an error, or a tower with the right interface."""
    found = subprocess.run(
        [sys.executable, "-c", FLIP, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = found.stdout.splitlines()
    assert len(lines) == 100
    refusals = [line for line in lines if line != "loaded"]
    assert len(refusals) > 50
    assert all(line.startswith(f"refused {folder / VISION_NAME}: ") for line in refusals)


def bad_ggufs(good: bytes) -> Iterator[tuple[str, bytes]]:
    def u64(at: int, value: int) -> bytes:
        return good[:at] + struct.pack("<Q", value) + good[at + 8 :]

    yield "empty", b""
    yield "magic", b"XXXX" + good[4:]
    yield "other byte order", good[:4] + struct.pack(">I", 3) + good[8:]
    for version in (0, 1, 99, 2**31):
        yield f"version {version}", good[:4] + struct.pack("<I", version) + good[8:]
    for count in (0, 1, 2**20, 2**31, 2**63 - 1, 2**64 - 1):
        yield f"{count} tensors", u64(8, count)
    for count in (0, 1, 5, 2**20, 2**63 - 1, 2**64 - 1):
        yield f"{count} keys", u64(16, count)
    for cut in (4, 10, 23, 24, 30, 100, 1000, 20_000, len(good) // 2, len(good) - 1):
        yield f"cut at {cut}", good[:cut]
    yield "long key", u64(24, 2**63)
    yield "architecture", good.replace(b"qwen3", b"qwen4", 1)
    for key in ("embedding_length", "feed_forward_length", "attention.head_count"):
        at = good.index(f"qwen3.{key}".encode()) + len(f"qwen3.{key}") + 4
        for value in (0, 3, 2**31 - 1):
            yield f"{key} {value}", good[:at] + struct.pack("<I", value) + good[at + 4 :]


def test_ggufs_that_llama_cpp_refuses(folder: Path) -> None:
    path = folder / DECODER_NAME
    cases = dict(bad_ggufs(path.read_bytes()))
    assert len(cases) >= 35
    for name, content in cases.items():
        path.write_bytes(content)
        record(folder, DECODER_NAME)
        with pytest.raises(BundleError) as caught:
            LlamaDecoder(Bundle.open(folder))
        message = str(caught.value)
        assert message.startswith(f"{path}: "), name
        assert message.isprintable(), name


def test_a_gguf_of_another_model(folder: Path, bundle: Make) -> None:
    shutil.copy(bundle("tiny-378") / DECODER_NAME, folder)
    record(folder, DECODER_NAME)
    wrong = f"^{folder / DECODER_NAME}: has hidden_size 256, the manifest says 128$"
    with pytest.raises(BundleError, match=wrong) as caught:
        EdgeVLM.load(folder)
    assert caught.value.exit_code == 2
