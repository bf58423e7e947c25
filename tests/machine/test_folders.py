"""Where files are kept: homes that are none, ``~`` in variables, files that are written whole."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge_vlm import InputError, MachineSettings
from edge_vlm.bundle.find import bundles_folder, chosen_model, find_bundle, installed_names
from edge_vlm.bundle.manifest import Bundle
from edge_vlm.cli.options import FILE, UserPath
from edge_vlm.errors import BundleError, EdgeVLMError
from edge_vlm.machine import folders
from edge_vlm.machine.folders import (
    ABANDONED,
    cache_folder,
    config_folder,
    new_file,
    pictures_cache,
    platform_folder,
    user_path,
    write_file,
)
from edge_vlm.planning.tuning import load_tuning
from tests.fake_engine import FakeEngine

posix = pytest.mark.skipif(sys.platform != "linux", reason="homes are found otherwise there")
PATHS = ("CACHE_HOME", "CONFIG_HOME", "DATA_HOME", "STATE_HOME")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*(f"XDG_{path}" for path in PATHS), "EDGE_VLM_CACHE", "EDGE_VLM_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without a name."""
    import pwd

    def unknown(key: Any) -> None:
        raise KeyError(key)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@posix
@pytest.mark.usefixtures("nobody")
def test_a_user_without_a_home_has_no_cache_and_chose_nothing(
    fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    folders._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "edge_vlm"):
        assert pictures_cache() is None
        assert MachineSettings().cache is None
        assert MachineSettings.from_environment().cache is None
        assert chosen_model() is None
        assert find_bundle().name == "bundle"
        assert installed_names() == ["demo"]
        assert load_tuning(Bundle.open(fake.bundle).manifest) is None
    (record,) = caplog.records
    assert record.getMessage() == (
        "pictures are not cached: the user has no home folder for the cache; EDGE_VLM_CACHE can"
        " name one"
    )
    with pytest.raises(InputError, match="EDGE_VLM_CONFIG can name one"):
        config_folder()
    with pytest.raises(InputError, match="EDGE_VLM_BUNDLES can name one"):
        bundles_folder()
    with pytest.raises(InputError, match="HOME can name one"):
        platform_folder("state")


@posix
@pytest.mark.usefixtures("nobody")
def test_without_a_home_a_variable_with_one_is_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pictures_cache({"EDGE_VLM_CACHE": "~/cache"}) is None
    monkeypatch.setenv("EDGE_VLM_CONFIG", "~/settings")
    assert chosen_model() is None
    assert [*tmp_path.iterdir()] == []


@posix
@pytest.mark.usefixtures("nobody")
def test_without_a_home_variables_name_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert pictures_cache({"EDGE_VLM_CACHE": str(tmp_path)}) == tmp_path
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_folder() == tmp_path / "edge-vlm"


@posix
@pytest.mark.parametrize("home", ["/dev/null", "/nonexistent", "{file}", "{closed}", "{folder}"])
def test_homes_in_which_nothing_can_be(
    home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: FakeEngine
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "closed").mkdir(mode=0)
    choice = tmp_path / "folder" / ".config" / "edge-vlm" / "model.json"
    choice.mkdir(parents=True)
    names = {name: str(tmp_path / name) for name in ("file", "closed", "folder")}
    monkeypatch.setenv("HOME", home.format(**names))
    assert chosen_model() is None
    assert load_tuning(Bundle.open(fake.bundle).manifest) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has none")
def test_a_choice_that_is_a_fifo_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_VLM_CONFIG", str(tmp_path))
    os.mkfifo(tmp_path / "model.json")
    assert chosen_model() is None


@pytest.mark.parametrize("text", ["", "{", '{"model": ""}', '{"model": 5}', "[]", "[" * 60_000])
def test_a_choice_that_is_damaged_is_said(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGE_VLM_CONFIG", str(tmp_path))
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(BundleError, match="edge-vlm use NAME"):
        chosen_model()


def test_homes_in_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for variable, found in (
        ("EDGE_VLM_CACHE", cache_folder),
        ("EDGE_VLM_CACHE", pictures_cache),
        ("EDGE_VLM_CONFIG", config_folder),
        ("EDGE_VLM_BUNDLES", bundles_folder),
        ("EDGE_VLM_MODEL", find_bundle),
    ):
        monkeypatch.setenv(variable, "~/a folder")
        assert found() == tmp_path / "a folder"
        monkeypatch.delenv(variable)
    (tmp_path / "edge-vlm").mkdir()
    (tmp_path / "edge-vlm" / "model.json").write_text(json.dumps({"model": "mine"}))
    monkeypatch.setenv("EDGE_VLM_CONFIG", "~/edge-vlm")
    assert chosen_model() == "mine"
    assert user_path("a~b") == Path("a~b")
    with pytest.raises(InputError, match="~nosuchuser/x: there is no such home folder"):
        user_path("~nosuchuser/x")


def part(path: Path, age: float) -> Path:
    """As a killed process leaves it."""
    with new_file(path) as found:
        pass
    found.write_text("half")
    os.utime(found, (time.time() - age,) * 2)
    return found


def test_what_killed_processes_left_goes_with_the_next_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    old, new = part(path, ABANDONED + 60), part(path, 0)
    other, long = part(tmp_path / "y.json", ABANDONED + 60), part(tmp_path / ("z" * 240), 7200)
    (tmp_path / ".x.json.backup.part").write_text("the user's")
    write_file(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert not old.exists()
    assert new.exists()  # perhaps another process is writing it
    assert other.exists()
    write_file(tmp_path / ("z" * 240), b"whole")
    assert not long.exists()
    assert (tmp_path / ".x.json.backup.part").exists()


@pytest.mark.parametrize("name", ["nowhere/x", "file/x", "folder", "a\0b", "x" * 300])
def test_a_file_that_cannot_be_written_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EdgeVLMError) as error:
        write_file(tmp_path / name, b"x")
    assert "\n" not in str(error.value)
    assert "\0" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_homes_in_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``--out=~/x`` is expanded by no shell, nor is a variable."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    path, text = UserPath(path_type=Path), FILE
    assert path.convert("~/a b", None, None) == tmp_path / "a b"
    assert text.convert("~/a b", None, None) == str(tmp_path / "a b")
    for name in ("-", "", "builtin", "a~b", "./~/x"):
        assert text.convert(name, None, None) == name
    with pytest.raises(InputError, match="no such home folder"):
        text.convert("~nosuchuser/x", None, None)
