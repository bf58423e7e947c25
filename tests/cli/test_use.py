"""`edge-vlm use`: the model of commands that name none, and the line about the demo."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_vlm.bundle.find import find_bundle
from edge_vlm.cli.choose import DEMO_LINE
from tests.conftest import Run, assert_one_line

QUESTION = ("ask", "Hello", "--max-tokens", "1", "--json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings and bundles of their own."""
    monkeypatch.setenv("EDGE_VLM_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("EDGE_VLM_BUNDLES", str(tmp_path / "bundles"))
    return tmp_path


def test_the_order_of_model_environment_choice_and_demo(
    run: Run, folder: Path, bundle: Callable[..., Path]
) -> None:
    def answers(*options: str, variable: str = "") -> tuple[int, str]:
        """Prompt length, which differs between the models, and what was said on stderr."""
        result = run(*QUESTION, *options, EDGE_VLM_MODEL=variable)
        assert result.returncode == 0, result.stderr
        data = json.loads(result.stdout)
        return data["kv_bytes"], result.stderr.decode().strip()

    first, second = (str(bundle(name)) for name in ("tiny-126-tied", "tiny-378"))
    kv = {name: answers("--model", name)[0] for name in (first, second, "demo")}
    assert len(set(kv.values())) == 3
    assert answers() == (kv["demo"], DEMO_LINE)
    assert run("use", first, EDGE_VLM_MODEL="").returncode == 0
    assert answers() == (kv[first], "")
    assert answers(variable=second) == (kv[second], "")
    assert answers("--model", "demo", variable=second) == (kv["demo"], "")
    assert run("use", "demo", EDGE_VLM_MODEL="").returncode == 0
    assert answers() == (kv["demo"], "")
    assert run("use", "--reset", EDGE_VLM_MODEL="").returncode == 0
    assert answers() == (kv["demo"], DEMO_LINE)


def test_use_shows_the_choice(run: Run, folder: Path, bundle: Callable[..., Path]) -> None:
    shown = run("use")
    assert shown.stdout == b"demo\n"
    assert b"installed: demo" in shown.stderr
    path = bundle("tiny-378")
    (folder / "bundles").mkdir()
    (folder / "bundles" / "mine").symlink_to(path)
    assert run("use", "mine").returncode == 0
    assert run("use").stdout == b"mine\n"
    assert find_bundle() == folder / "bundles" / "mine"


def test_a_path_is_remembered_whole(run: Run, folder: Path, bundle: Callable[..., Path]) -> None:
    """Relative where it was typed, right from anywhere."""
    (folder / "near").symlink_to(bundle("tiny-378"))
    assert run("use", "near").returncode == 0
    assert find_bundle() == bundle("tiny-378").resolve()


def test_what_use_refuses(run: Run, folder: Path) -> None:
    assert_one_line(run("use", "absent"), 2, "absent", "demo")
    assert_one_line(run("use", str(folder)), 2, "bundle.json")
    assert_one_line(run("use", "demo", "--reset"), 2, "not both")
    assert not (folder / "config").exists()
