"""What importing costs, and what is public."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edge_vlm
from edge_vlm.cli.exporter import exporter

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "onnx", "onnx_ir", "transformers", "numpy", "PIL", "onnxruntime", "llama_cpp")
HEAVY += (
    "pydantic",
    "jinja2",
    "llguidance",
    "huggingface_hub",
    "rich",
    "edge_vlm_export",
    "edge_vlm.answering.model",
    "edge_vlm.cli.questions.ask",
)
NEVER = ("torch", "onnx", "onnx_ir", "transformers", "gguf", "safetensors", "edge_vlm_export")
# What the command line itself may take a share of its tenth of a second for.
LIGHT = {"edge_vlm", "click", "colorama"}
HELP = "from edge_vlm.cli.main import main\ntry: main({})\nexcept SystemExit: pass"
EVERY_HELP = """
import click
from edge_vlm.cli.main import group, main
for name in group.list_commands(click.Context(group)):
    if name != "export":  # the exporter's own
        try: main([name, "--help"])
        except SystemExit: pass
"""
NAMES_OF_0_1 = {
    *("Answer", "AskOptions", "BudgetError", "BundleError", "CancelToken", "Cancelled", "Chat"),
    *("CheckpointError", "DecoderError", "EdgeVLM", "EdgeVLMError", "EncodedImage", "ImageError"),
    *("ImageUse", "InputError", "MachineSettings", "Progress", "PromptError", "Stream", "Timings"),
    *("VisionError", "__version__"),
}


def modules_after(code: str) -> set[str]:
    """Modules imported in a fresh interpreter after running ``code``."""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules, file=sys.stderr)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stderr.split())


def packages_of(code: str) -> set[str]:
    """Those of them that are not the standard library's, nor there in every interpreter."""
    modules = modules_after(code) - modules_after("")
    return {name.split(".")[0] for name in modules} - sys.stdlib_module_names


@pytest.mark.parametrize("code", ["import edge_vlm", HELP.format(["--help"])])
def test_import_and_help_are_light(code: str) -> None:
    assert modules_after(code).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "code",
    ["import edge_vlm", HELP.format(["--help"]), HELP.format(["--version"]), EVERY_HELP],
    ids=["import", "--help", "--version", "COMMAND --help"],
)
def test_nothing_else_is_imported(code: str) -> None:
    """So that it takes no time, on any machine; benchmarks say how much."""
    assert packages_of(code) <= LIGHT


def test_the_package_runs_as_the_command_does() -> None:
    shown = [
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.argv[0] = 'edge-vlm'; {code}"]
            if code
            else [sys.executable, "-m", "edge_vlm", "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "100"},
        ).stdout
        for code in ("", "from edge_vlm.cli.main import main; main(['--help'])")
    ]
    first, second = (text.partition("\n")[2] for text in shown)  # behind the program's name
    assert first == second
    assert "  ask " in first


@pytest.mark.engine
def test_the_runtime_never_imports_the_exporter_or_a_training_framework() -> None:
    code = (
        "import edge_vlm\n"
        "from edge_vlm import EdgeVLM\n"
        "with EdgeVLM.load('demo') as vlm: vlm.ask((), 'Hello', max_tokens=1)"
    )
    assert modules_after(code).isdisjoint(NEVER)


def test_an_engine_of_ones_own_keeps_the_others_away(tmp_path: Path) -> None:
    """A model with engines in Python needs neither onnxruntime nor llama.cpp."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from tests.fake_engine import FakeEngine\n"
        "import numpy as np\n"
        f"with FakeEngine(Path({str(tmp_path / 'toy')!r})).load() as model:\n"
        "    model.ask(np.zeros((50, 50, 3), np.uint8), 'Hello', max_tokens=1)"
    )
    assert modules_after(code).isdisjoint({*NEVER, "onnxruntime", "llama_cpp"})


def test_public_names_are_sorted_and_importable() -> None:
    assert edge_vlm.__all__ == sorted(edge_vlm.__all__)
    for name in edge_vlm.__all__:
        assert getattr(edge_vlm, name) is not None
    assert set(dir(edge_vlm)) == set(edge_vlm.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = edge_vlm.nothing


def test_public_names_only_become_more() -> None:
    assert set(edge_vlm.__all__) >= NAMES_OF_0_1


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert version("edge-vlm") == edge_vlm.__version__


def test_an_installation_that_lacks_an_entry_point_says_to_reinstall() -> None:
    """As an editable one that was made before the entry point was added."""
    with pytest.raises(edge_vlm.InputError, match="names no no_such_step; reinstall it: pip"):
        exporter("no_such_step", "verify --against")
