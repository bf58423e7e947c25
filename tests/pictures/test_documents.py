"""Pages of a PDF, HEIC, and frames of animations."""

from __future__ import annotations

import io
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_vlm.errors import ImageError
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.pictures.image import load_image, open_image
from tests.picture_files import encoded, photo

FIELD = Path(__file__).parents[1] / "field"
COLOURS = ((255, 0, 0), (0, 160, 0), (0, 0, 255))
needs_pdf = pytest.mark.skipif(not find_spec("pypdfium2"), reason="pypdfium2 is not installed")
needs_heic = pytest.mark.skipif(not find_spec("pillow_heif"), reason="pillow-heif is not installed")


@pytest.fixture
def pdf(tmp_path: Path) -> Path:
    """Three pages of two inches by one, each of one colour."""
    path = tmp_path / "report.pdf"
    first, *others = (Image.new("RGB", (144, 72), colour) for colour in COLOURS)
    first.save(path, "PDF", resolution=72, save_all=True, append_images=others)
    return path


def refused(source: object, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source, MachineSettings(cache=None, **options))  # type: ignore[arg-type]
    return str(caught.value)


@needs_pdf
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("dpi", [72, 150])
def test_a_page(pdf: Path, number: int, dpi: int) -> None:
    pixels = open_image(f"{pdf}#page={number}", MachineSettings(cache=None, dpi=dpi)).pixels
    assert pixels.shape == (dpi, 2 * dpi, 3)
    assert np.abs(pixels[5:-5, 5:-5].astype(int) - COLOURS[number - 1]).max() <= 4


@needs_pdf
def test_a_document_needs_a_page_if_it_has_several(pdf: Path, tmp_path: Path) -> None:
    assert "has 3 pages; say which behind its name, such as '#page=1'" in refused(pdf)
    assert "its last page is 3" in refused(f"{pdf}#page=4")
    assert "its last page is 3" in refused(f"{pdf}#frame=1")
    one = encoded(Image.new("RGB", (72, 72), "red"), "PDF", resolution=72)
    assert open_image(one, MachineSettings(cache=None)).pixels.shape == (150, 150, 3)


@needs_pdf
def test_a_page_is_bounded_before_it_is_drawn(pdf: Path) -> None:
    assert "has 2400x1200 = 3 megapixels" in refused(
        f"{pdf}#page=1", dpi=1200, max_pixels=1_000_000
    )
    broken = pdf.read_bytes()[:300]
    assert "is damaged or cut short" in refused(broken)
    assert "is damaged or cut short" in refused(FIELD / "x.pdf")


@needs_heic
def test_heic_is_read_as_it_is() -> None:
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(photo()).save(file, quality=-1, chroma=444)
    pixels = load_image(file.getvalue())
    assert np.abs(pixels.astype(int) - np.asarray(photo())).max() <= 6
    assert "19 kilopixels" not in refused(file.getvalue(), max_pixels=100)
    assert "has 160x120" in refused(file.getvalue(), max_pixels=100)
    assert "is damaged or cut short" in refused(file.getvalue()[:300])
    assert "is damaged or cut short" in refused(FIELD / "iphone.heic")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("iphone.heic", "is HEIC, which is not read (JPEG, PNG, WEBP, BMP, GIF are);"
         " pip install 'edge-vlm[heic]' reads it"),
        ("x.pdf", "is PDF, which is not read (JPEG, PNG, WEBP, BMP, GIF are);"
         " pip install 'edge-vlm[pdf]' reads its pages"),
    ],
)  # fmt: skip
def test_without_the_package_the_line_that_installs_it(name: str, line: str) -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('pillow_heif', 'pypdfium2'))\n"
        "from edge_vlm.pictures.image import load_image\n"
        "from edge_vlm.errors import ImageError\n"
        "try: load_image(sys.argv[1])\n"
        "except ImageError as error: print(error)"
    )
    arguments = [sys.executable, "-c", code, str(FIELD / name)]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert line in said


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_a_frame_of_an_animation(tmp_path: Path, file_format: str) -> None:
    path = tmp_path / "film"
    first, *others = (Image.new("RGB", (20, 10), colour) for colour in COLOURS)
    first.save(path, file_format, save_all=True, append_images=others, lossless=True)
    for number, colour in enumerate(COLOURS, 1):
        pixels = load_image(f"{path}#frame={number}")
        assert pixels.shape == (10, 20, 3)
        assert (pixels == colour).all()
    assert "its last frame is 3" in refused(f"{path}#frame=4")
    assert f"is {file_format}, which has no pages" in refused(f"{path}#page=1")


def test_other_words_behind_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(photo(), "PNG"))
    for part in ("#page", "#page=0", "#page=x", "#frames=1", "#", "#page=1-2"):
        assert "No such file; a part of one is '#page=3' of a PDF" in refused(f"{path}{part}")
    assert "No such file" in refused(f"{tmp_path / 'b.pdf'}#page=1")
    own = tmp_path / "a.png#page=1"
    own.write_bytes(encoded(photo(30, 20), "PNG"))
    assert load_image(own).shape == (20, 30, 3)
    assert load_image(f"{path}#frame=1").shape == (120, 160, 3)
