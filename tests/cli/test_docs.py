"""The documentation says what the program does."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FOLDERS = ("benchmarks", "docs", "edge_vlm", "examples", "export", "models", "tests")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
GROUPS = ("edge_vlm.commands", "edge_vlm.exporter", "edge_vlm.families")  # of entry points


def script(name: str) -> ModuleType:
    """A script of the folder docs, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_is_up_to_date() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == script("generate_commands").commands_page(), (
        "run: python docs/generate_commands.py"
    )


def test_the_picture_of_the_rooms_is_up_to_date() -> None:
    picture = (ROOT / "docs" / "images" / "rooms.svg").read_text(encoding="utf-8")
    assert picture == script("draw_rooms").drawing(), "run: python docs/draw_rooms.py"
    names = {text.text for text in ElementTree.fromstring(picture).iter() if text.text}  # noqa: S314
    assert {"pictures", "prompt", "decoder", "answering"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_name_files_and_functions_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`(?:python )?([\w/]+\.py)\b", text):
        assert any(f"/{path.as_posix()}".endswith(f"/{name}") for path in FILES), name
    for name in re.findall(r"`(edge_vlm(?:_export)?(?:\.\w+)+)", text):
        assert name in GROUPS or pkgutil.resolve_name(name)


def test_the_readme_names_pictures_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"examples/\S+\.(?:png|jpg)", text):
        assert (ROOT / name).is_file(), name
