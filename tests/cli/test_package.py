"""What importing costs, and what is public."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edge_vlm

HEAVY = ("torch", "onnx", "onnx_ir", "transformers", "numpy", "PIL", "onnxruntime", "llama_cpp")
HEAVY += (
    "pydantic",
    "jinja2",
    "rich",
    "edge_vlm_export",
    "edge_vlm.answering.model",
    "edge_vlm.cli.questions.ask",
)
NEVER = ("torch", "onnx", "onnx_ir", "transformers", "gguf", "safetensors", "edge_vlm_export")


def modules_after(code: str) -> set[str]:
    """Modules imported in a fresh interpreter after running ``code``."""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules, file=sys.stderr)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import edge_vlm",
        "from edge_vlm.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_import_and_help_are_light(code: str) -> None:
    assert modules_after(code).isdisjoint(HEAVY)


def test_the_runtime_never_imports_the_exporter_or_a_training_framework() -> None:
    code = (
        "import edge_vlm\n"
        "from edge_vlm import EdgeVLM\n"
        "with EdgeVLM.load('demo') as vlm: vlm.ask((), 'Hello', max_tokens=1)"
    )
    assert modules_after(code).isdisjoint(NEVER)


def test_public_names_are_sorted_and_importable() -> None:
    assert edge_vlm.__all__ == sorted(edge_vlm.__all__)
    for name in edge_vlm.__all__:
        assert getattr(edge_vlm, name) is not None
    assert set(dir(edge_vlm)) == set(edge_vlm.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = edge_vlm.nothing


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert version("edge-vlm") == edge_vlm.__version__
