"""Fixtures shared by all tests: the golden checkpoints, and bundles exported from them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from filelock import FileLock
from hypothesis import settings

from tests.fake_engine import FakeEngine

GOLDEN = Path(__file__).parent / "golden"
NO_ENGINE = Path(__file__).parent / "no_engine"  # what is imported there says that it must not be
ENGINE_FIXTURES = frozenset({"bundle", "run", "vlm"})
GOLDEN_NAMES = ("tiny-378", "tiny-126-tied")
COMMAND = shutil.which("edge-vlm", path=str(Path(sys.executable).parent)) or "edge-vlm"
MAX_WORKERS = 4  # each imports all tests: more are not quicker
Run = Callable[..., "subprocess.CompletedProcess[bytes]"]
T = TypeVar("T")

pytest.register_assert_rewrite("tests.export_helpers")  # its checks tell values, too

# No deadlines: a busy machine, or the first import of a library, is not a fault.
settings.register_profile("few", deadline=None)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("few")


@dataclass(frozen=True)
class GoldenCase:
    """One prompt and the numbers the published implementation gives for it."""

    model: str
    name: str
    images: tuple[Path, ...]
    data: dict[str, Any]  # the entry of cases.json
    arrays_path: Path

    @cached_property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of ``cases/<name>.npz``; golden/README.md lists them."""
        with np.load(self.arrays_path) as arrays:
            return dict(arrays)

    def __str__(self) -> str:
        return f"{self.model}-{self.name}"


@dataclass(frozen=True)
class GoldenModel:
    """One tiny checkpoint with its cases."""

    name: str
    folder: Path
    cases: dict[str, GoldenCase]

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's folder."""
        return self.folder / "checkpoint"


def load_golden(name: str) -> GoldenModel:
    """A golden model; its arrays are read when asked for."""
    folder = GOLDEN / name
    listed = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    cases = {
        data["name"]: GoldenCase(
            model=name,
            name=data["name"],
            images=tuple(folder / "images" / image for image in data["images"]),
            data=data,
            arrays_path=folder / data["arrays"],
        )
        for data in listed
    }
    return GoldenModel(name, folder, cases)


def golden_cases() -> list[GoldenCase]:
    """All cases of all golden models, for ``pytest.mark.parametrize(..., ids=str)``."""
    return [case for name in GOLDEN_NAMES for case in load_golden(name).cases.values()]


def examples(few: int, many: int) -> int:
    """``few`` random inputs, or ``many`` with ``--hypothesis-profile thorough``."""
    return many if settings.get_current_profile_name() == "thorough" else few


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """``pytest -m unit`` uses a process a core; what is named otherwise is run by this one.

    Tests with an engine use two threads each, and some measure time and memory.
    """
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    cores = len(psutil.Process().cpu_affinity()) if psutil.LINUX else os.cpu_count() or 1
    workers = min(cores, MAX_WORKERS)
    if not is_whole or config.option.markexpr != "unit" or config.option.keyword or workers == 1:
        return 0
    config.option.dist = "worksteal"
    return workers


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test is marked ``engine``, ``limits`` or ``unit``; those without an engine run first.

    An engine test says so with ``pytest.mark.engine``, or uses a fixture that exports a model, runs
    the command with one or is one. ``limits`` says so.
    """
    for item in items:
        if not ENGINE_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("engine")
        elif not needs_engine(item) and item.get_closest_marker("limits") is None:
            item.add_marker("unit")
    items.sort(key=needs_engine)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Llama.cpp can be imported in tests with the mark ``engine`` alone, and their children."""
    with pytest.MonkeyPatch.context() as patch:
        if not needs_engine(item):
            patch.setitem(sys.modules, "llama_cpp", None)
            patch.setenv("PYTHONPATH", str(NO_ENGINE), prepend=os.pathsep)
        return (yield)


def needs_engine(item: pytest.Item) -> bool:
    """Whether a test may use llama.cpp and models."""
    return item.get_closest_marker("engine") is not None


@pytest.fixture(scope="session")
def golden() -> dict[str, GoldenModel]:
    """The golden models by name: "tiny-378" and "tiny-126-tied"."""
    return {name: load_golden(name) for name in GOLDEN_NAMES}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of one run of the tests have in common."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared: Path) -> Callable[[str, Callable[[], T]], T]:
    """``once(name, compute)``: what ``compute`` returns, as JSON; the first to ask computes it."""

    def get(name: str, compute: Callable[[], T]) -> T:
        path = shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not path.exists():
                path.write_text(json.dumps(compute()), encoding="utf-8")
        found: T = json.loads(path.read_text(encoding="utf-8"))
        return found

    return get


@pytest.fixture(scope="session")
def bundle(shared: Path) -> Callable[..., Path]:
    """``bundle(name, vision="fp32", decoder="f32", target="cpu")``: an exported golden model.

    Tests share the folder: copy it before changing anything in it.
    """

    def export(name: str, vision: str = "fp32", decoder: str = "f32", target: str = "cpu") -> Path:
        folder = shared / "-".join(("bundle", name, vision, decoder, target))
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                from edge_vlm_export import export_checkpoint

                export_checkpoint(
                    GOLDEN / name / "checkpoint",
                    folder,
                    vision=vision,
                    target=target,
                    decoder=decoder,
                    measure=False,
                    name=name,
                )
        return folder

    return export


@pytest.fixture
def fake(tmp_path: Path) -> FakeEngine:
    """A toy model whose answers the test writes."""
    return FakeEngine(tmp_path / "toy-bundle")


@pytest.fixture
def run(bundle: Callable[..., Path], tmp_path: Path) -> Run:
    """``run(*arguments, stdin=b"", **environment)``: the command in an empty folder.

    It uses a golden model unless EDGE_VLM_MODEL says otherwise.
    """

    def runner(
        *arguments: str | os.PathLike[str], stdin: bytes = b"", **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [COMMAND, *map(os.fspath, arguments)],
            input=stdin,
            capture_output=True,
            cwd=tmp_path,
            timeout=60,
            env={
                **os.environ,
                "EDGE_VLM_MODEL": str(bundle("tiny-126-tied")),
                "EDGE_VLM_THREADS": "1",
                **environment,
            },
        )

    return runner


def assert_one_line(result: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    text = result.stderr.decode()
    assert result.returncode == code, text
    assert result.stdout == b""
    assert "Traceback" not in text
    errors = [line for line in text.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1, text
    for word in words:
        assert word in errors[0]


@pytest.fixture(scope="session", autouse=True)
def _no_user_cache() -> Iterator[None]:
    """Models that several tests share are loaded without a cache on disk, and without a trial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_VLM_CACHE", "off")
        patch.setenv("EDGE_VLM_TRUST_BUNDLE", "1")
        yield


@pytest.fixture(autouse=True)
def _no_user_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests away from the user's folders and settings.

    Bundles are trusted: what is tried in a process of its own is tests/answering/test_trial.py's.
    """
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("EDGE_VLM_")]:
            patch.delenv(variable)
        for variable in ("HOME", "USERPROFILE", "LOCALAPPDATA", "APPDATA"):
            patch.setenv(variable, str(home))
        for variable in ("CACHE", "CONFIG", "DATA", "STATE"):
            patch.setenv(f"XDG_{variable}_HOME", str(home / variable.lower()))
        patch.setenv("EDGE_VLM_CACHE", str(home / "cache"))
        patch.setenv("EDGE_VLM_TRUST_BUNDLE", "1")
        yield
