"""What a picture may take: refused from its header, or decoded without a second copy of it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_vlm.errors import ImageError
from edge_vlm.families.base import family_of
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.pictures.image import check_memory, open_image
from edge_vlm.planning.models import released_models
from tests.picture_files import bmp_of_size, encoded, png, webp_of_size

PROCESSOR = released_models()["jina-vlm"].processor
PEAK = """
import json, sys
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.pictures.image import open_image
settings = MachineSettings(cache=None, image_formats=("TIFF",))
def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
open_image(sys.argv[1], settings)
before = peak()
shape = open_image(sys.argv[2], settings).pixels.shape
print(json.dumps([shape, peak() - before]))
"""


def tiff_of_size(width: int, height: int) -> bytes:
    """A small TIFF whose header claims another size."""
    data = encoded(Image.new("L", (8, 8)), "TIFF")
    for tag, value in ((256, width), (257, height), (278, height)):
        at = data.index(struct.pack("<H", tag), 8)
        data = data[: at + 2] + struct.pack("<HII", 4, 1, value) + data[at + 12 :]
    return data


@pytest.mark.parametrize("size", [(1, 100_000_000), (100_000_000, 1), (20_000, 99)])
def test_a_shape_that_the_model_does_not_take_is_refused_from_the_header(
    size: tuple[int, int],
) -> None:
    def accepts(width: int, height: int) -> object:
        return family_of(PROCESSOR).layout(width, height, PROCESSOR)

    settings = MachineSettings(cache=None, image_formats=("TIFF",))
    # None of them holds pixels: to decode one is an error of another kind.
    for data in (png(*size, b""), bmp_of_size(*size), tiff_of_size(*size)):
        with pytest.raises(ImageError, match=r"one side is more than\s200 times the other"):
            open_image(data, settings, accepts)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the peak memory")
@pytest.mark.parametrize("kind", ["PNG", "PNG RGBA", "PNG L", "JPEG", "JPEG turned", "BMP", "TIFF"])
def test_a_large_picture_is_in_memory_once(tmp_path: Path, kind: str) -> None:
    """Four bytes a pixel, and some strips: 440 MB for the largest picture that is read."""
    width, height = 5000, 3000
    pixels = np.zeros((height, width), np.uint8)
    pixels[::3] = 200
    file_format, _, mode = kind.partition(" ")
    image = Image.fromarray(pixels)
    options: dict[str, object] = {}
    if mode != "L":
        image = image.convert("RGBA" if mode == "RGBA" else "RGB")
    if mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    if file_format == "TIFF":
        options["compression"] = "tiff_lzw"
    (tmp_path / "small").write_bytes(encoded(image.crop((0, 0, 64, 64)), file_format, **options))
    (tmp_path / "large").write_bytes(encoded(image, file_format, **options))
    arguments = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    shape, rise = json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout)
    assert shape == ([width, height, 3] if mode == "turned" else [height, width, 3])
    assert rise < 4 * width * height + (36 << 20)


def test_what_takes_more_than_600_megabytes_is_refused_before_it_is_decoded() -> None:
    for n_bytes, width in ((16, 16_383), (7, 16_383)):
        with pytest.raises(ImageError, match=f"takes {6000 * width * n_bytes / 1e6:.0f} MB, more"):
            check_memory(width, 6000, n_bytes, "WEBP", "a.webp", 100_000_000)
        check_memory(width, 6000, n_bytes, "WEBP", "a.webp", 300_000_000)
    check_memory(10_000, 10_000, 6, "PNG", "a.png", 100)  # a low limit of pixels is none of bytes


def test_a_large_webp_is_refused_from_its_header() -> None:
    data = webp_of_size(8000, 6000)
    with pytest.raises(ImageError, match="8000x6000 pixels of this kind of WEBP takes 768 MB"):
        open_image(data, MachineSettings(cache=None))


def test_libtiff_writes_nothing_to_stderr(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    data = bytearray(encoded(Image.fromarray(noise), "TIFF", compression="tiff_lzw"))
    for at in range(100, 2000, 150):
        data[at] ^= 0xFF
    path = tmp_path / "damaged.tif"
    path.write_bytes(data)
    code = (
        "import sys\n"
        "from edge_vlm.pictures.image import load_image\n"
        "from edge_vlm.errors import ImageError\n"
        "try: load_image(sys.argv[1], extra_formats=('TIFF',))\n"
        "except ImageError as error: print(error)\n"
        "print('still here', file=sys.stderr)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert "is damaged or cut short" in found.stdout
    assert found.stderr == "still here\n"
