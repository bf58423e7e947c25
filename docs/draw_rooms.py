"""Draw docs/images/rooms.svg: python docs/draw_rooms.py [--check]

The rooms of both packages in the order of the contracts in pyproject.toml, with the purpose that
each states in its ``__init__``. Those that a question passes, by docs/how-it-works.md, are marked.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "images" / "rooms.svg"
PACKAGES = {  # id of the contract, folder, heading
    "rooms": ("edge_vlm", "the runtime"),
    "export-rooms": ("export/edge_vlm_export", "the exporter, which imports the runtime"),
}
WIDTH, MARGIN, ROW, SMALL_ROW, HEADING = 860, 24, 30, 48, 40  # pixels
NAME_X, PURPOSE_X = 58, 168
# Its own background, so that it can be read on any page.
STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de; }
  .room { fill: #f6f8fa; stroke: #d0d7de; }
  .passed { fill: #0969da; }
  text { font: 13px system-ui, sans-serif; fill: #1f2328; }
  .name { font: bold 13px ui-monospace, monospace; }
  .heading { font-size: 15px; font-weight: bold; }
  .less { font-size: 12px; fill: #59636e; }
  .arrow { stroke: #59636e; fill: none; stroke-width: 1.5; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d; }
    .room { fill: #151b23; stroke: #3d444d; }
    .passed { fill: #4493f8; }
    text { fill: #f0f6fc; }
    .less { fill: #9198a1; }
    .arrow { stroke: #9198a1; }
  }
"""


def drawing() -> str:
    """The file's text."""
    body: list[str] = []
    y = MARGIN
    contracts = _contracts()
    for contract, (folder, heading) in PACKAGES.items():
        package = ROOT / folder
        rooms = [name for name in _names(contracts[contract]) if (package / name).is_dir()]
        body.append(_text(MARGIN, y + 18, f"{package.name}: {heading}", "heading"))
        y += HEADING
        top = y
        for name in rooms:
            y += _room(body, package / name, y)
        body.append(f'  <path class="arrow" d="M{MARGIN + 12} {top} V{y - 12} m-4 -7 l4 7 l4 -7"/>')
        y += MARGIN
    legend = "marked: a question passes it; the arrow: imports lead downwards, never up"
    body.append(_text(MARGIN, y, legend, "less"))
    height = y + MARGIN
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
            f' viewBox="0 0 {WIDTH} {height}" role="img">',
            "  <title>The rooms of edge-vlm</title>",
            f"  <style>{STYLE}  </style>",
            f'  <rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}"'
            ' rx="6"/>',
            *body,
            "</svg>\n",
        )
    )


def _room(body: list[str], folder: Path, y: int) -> int:
    """Draw one; returns its height."""
    inner = sorted(path.parent.name for path in folder.glob("*/__init__.py"))
    height = SMALL_ROW if inner else ROW
    x = NAME_X - 14
    body.append(
        f'  <rect class="room" x="{x}" y="{y}" width="{WIDTH - MARGIN - x}"'
        f' height="{height - 6}" rx="4"/>'
    )
    if folder.relative_to(ROOT).as_posix() in _passed():
        body.append(
            f'  <rect class="passed" x="{x}" y="{y}" width="5" height="{height - 6}" rx="2"/>'
        )
    body.append(_text(NAME_X, y + 16, folder.name, "name"))
    body.append(_text(PURPOSE_X, y + 16, _purpose(folder)))
    if inner:
        body.append(_text(PURPOSE_X, y + 34, ", ".join(inner), "less"))
    return height


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'  <text{kind} x="{x}" y="{y}">{escape(text)}</text>'


def _contracts() -> dict[str, Any]:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {one["id"]: one for one in data["tool"]["importlinter"]["contracts"]}


def _names(contract: dict[str, Any]) -> Iterator[str]:
    layers: Sequence[str] = contract["layers"]
    for layer in layers:
        yield from re.findall(r"\w+", layer)


def _purpose(folder: Path) -> str:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    return (text or "").splitlines()[0].rstrip(".")


def _passed() -> set[str]:
    """Rooms of the files that docs/how-it-works.md lists."""
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    return {f"edge_vlm/{name}" for name in re.findall(r"^\| `(\w+)/", page, re.MULTILINE)}


if __name__ == "__main__":
    if "--check" in sys.argv and TARGET.read_text(encoding="utf-8") != drawing():
        sys.exit(f"{TARGET.relative_to(ROOT)} is old: run python docs/draw_rooms.py")
    TARGET.write_text(drawing(), encoding="utf-8")
