"""A bundle's files and their checksums: what is hashed again, and what is remembered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from edge_vlm.bundle.checksums import verify
from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Bundle
from edge_vlm.errors import BundleError
from edge_vlm.machine.folders import cache_folder
from tests.bundle.damage import FILES, edit, flip, set_in


def hashed_by_verify(folder: Path, **options: Any) -> set[str]:
    """Names of the files that are hashed, where every file counts as large."""
    opened = Bundle.open(folder)
    sizes = {name: opened.manifest.files[name].size for name in FILES}
    totals = {0}
    verify(opened, always=0, progress=lambda _, total: totals.add(total), **options)
    found = {sum(sizes[name] for name in names): set(names) for names in ((), *zip(FILES), FILES)}
    assert len(found) == 4
    return found[max(totals)]


def test_a_large_file_is_hashed_once_until_it_changes(folder: Path) -> None:
    both = set(FILES)
    assert hashed_by_verify(folder) == both
    assert hashed_by_verify(folder) == set()
    assert hashed_by_verify(folder, again=True) == both
    os.utime(folder / VISION_NAME, ns=(1, 1))
    assert hashed_by_verify(folder) == {VISION_NAME}
    flip(folder / DECODER_NAME, 1000, 1)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        hashed_by_verify(folder)
    flip(folder / DECODER_NAME, 1000, 1)
    assert hashed_by_verify(folder) == {DECODER_NAME}


def test_content_changed_under_the_old_time_is_found(folder: Path) -> None:
    hashed_by_verify(folder)
    path = folder / DECODER_NAME
    times = path.stat()
    flip(path, 1000, 1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(BundleError, match="SHA-256 differs"):
        hashed_by_verify(folder)


def test_another_manifest_makes_what_was_remembered_worthless(folder: Path) -> None:
    hashed_by_verify(folder)
    edit(folder, set_in("files", DECODER_NAME, "sha256", to="0" * 64))
    with pytest.raises(BundleError, match="SHA-256 differs"):
        hashed_by_verify(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"decoder.gguf": 3}']
)
def test_a_damaged_memory_is_ignored(folder: Path, content: bytes) -> None:
    hashed_by_verify(folder)
    (memory,) = (cache_folder() / "verified").iterdir()
    memory.write_bytes(content)
    assert hashed_by_verify(folder) == set(FILES)
    assert hashed_by_verify(folder) == set()
    assert [path.name for path in memory.parent.iterdir()] == [memory.name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_in_its_place_is_not_waited_for(folder: Path) -> None:
    hashed_by_verify(folder)
    (memory,) = (cache_folder() / "verified").iterdir()
    memory.unlink()
    os.mkfifo(memory)
    assert hashed_by_verify(folder) == set(FILES)
    assert hashed_by_verify(folder) == set()


def test_no_memory_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("EDGE_VLM_CACHE", str(blocked))
    for _ in range(2):
        assert hashed_by_verify(folder) == set(FILES)


def test_progress_counts_every_byte(folder: Path) -> None:
    opened = Bundle.open(folder)
    total = sum(entry.size for entry in opened.manifest.files.values())
    steps: list[tuple[int, int]] = []
    verify(opened, progress=lambda done, of: steps.append((done, of)))
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)
