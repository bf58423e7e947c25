"""Which bundle a name stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_vlm.bundle.find import EMBEDDED, embedded_bundle, find_bundle, installed_names
from edge_vlm.errors import BundleError
from tests.bundle.damage import refused


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "-x", "--help", "a b", "a\nb", "a\0b", "%2e%2e", "a\\b", "C:x", "~", "*"),
        *(
            "x" * 101,
            "x" * 1000,
            "x" * 100_000,
            "é",
            "．．",
            "CON",
            "nul",
            "aux.x",
            "COM7",
            "$HOME",
        ),
    ],
)
def test_what_is_no_name_of_a_model(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if name in (".", ".."):
        refused(name, "is not a bundle")
        return
    with pytest.raises(BundleError, match="is not the name of a model"):
        find_bundle(name)
    refused(name)


def test_paths_are_paths(tmp_path: Path) -> None:
    for path in ("../../etc/passwd", "/etc", "a//b", "./x"):
        assert find_bundle(path) == Path(path)
        refused(path, path.replace("//", "/").removeprefix("./"))


def test_names_of_installed_bundles(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    monkeypatch.setenv("EDGE_VLM_BUNDLES", str(installed))
    folder.rename(installed / "mine")
    (installed / "a\nb").mkdir()
    (installed / "file").write_text("no folder")
    assert installed_names() == [EMBEDDED, "mine"]
    assert find_bundle("mine") == installed / "mine"
    monkeypatch.setenv("EDGE_VLM_MODEL", "mine")
    assert find_bundle() == installed / "mine"
    assert find_bundle("demo") == embedded_bundle()
    with pytest.raises(BundleError, match=r"^file: no such model; .* one of demo, mine$"):
        find_bundle("file")


def test_a_folder_of_bundles_that_is_missing_or_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_VLM_BUNDLES", str(tmp_path / "none"))
    assert installed_names() == [EMBEDDED]

    def denied(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    assert installed_names() == [EMBEDDED]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings and bundles of their own."""
    monkeypatch.setenv("EDGE_VLM_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("EDGE_VLM_BUNDLES", str(tmp_path / "bundles"))
    return tmp_path


def test_a_folder_named_demo_is_not_the_default(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "demo").mkdir()
    monkeypatch.chdir(home)
    assert find_bundle() == embedded_bundle()
    assert find_bundle("demo") == Path("demo")  # as typed: what shells complete


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"model": 7}', '{"model": ""}', "\xff", "1" * 99999]
)
def test_a_damaged_choice_says_how_to_mend_it(home: Path, content: str) -> None:
    (home / "config").mkdir()
    (home / "config" / "model.json").write_text(content, encoding="latin-1")
    with pytest.raises(BundleError, match="edge-vlm use NAME") as caught:
        find_bundle()
    assert str(home / "config" / "model.json") in str(caught.value)
    assert find_bundle("demo") == embedded_bundle()


def test_a_choice_that_has_gone(home: Path) -> None:
    (home / "config").mkdir()
    (home / "config" / "model.json").write_text('{"model": "gone"}')
    with pytest.raises(BundleError, match="gone: no such model"):
        find_bundle()
