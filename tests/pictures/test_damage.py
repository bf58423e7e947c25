"""Files that are not whole: harmless damage is read, half a picture never."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edge_vlm.errors import ImageError
from edge_vlm.pictures.image import load_image
from tests.picture_files import encoded, photo, png_chunk

FIELD = Path(__file__).parents[1] / "field"
PNG = encoded(photo(), "PNG")
PIXELS = np.asarray(photo())


def with_chunk(kind: bytes, data: bytes, *, behind: bool = False) -> bytes:
    """A PNG with one more chunk, whose checksum is wrong."""
    chunk = png_chunk(kind, data)
    broken = chunk[:-1] + bytes([chunk[-1] ^ 1])
    at = len(PNG) - 12 if behind else 33
    return PNG[:at] + broken + PNG[at:]


def refused(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(data)
    return str(caught.value)


ANCILLARY = {
    b"tEXt": b"Comment\0hello",
    b"zTXt": b"a\0\0" + zlib.compress(b"x"),
    b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0<x/>",
    b"gAMA": struct.pack(">I", 45455),
    b"pHYs": struct.pack(">IIB", 2835, 2835, 1),
    b"eXIf": b"MM\0*\0\0\0\x08\0\0",
    b"tIME": bytes(7),
    b"iCCP": b"a\0\0" + zlib.compress(b"x" * 50),
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", ANCILLARY)
def test_a_wrong_checksum_of_what_is_not_pixels_does_not_matter(kind: bytes, behind: bool) -> None:
    assert np.array_equal(load_image(with_chunk(kind, ANCILLARY[kind], behind=behind)), PIXELS)


def test_an_end_that_is_missing_or_damaged_does_not_matter() -> None:
    for data in (PNG[:-12], PNG[:-1], PNG[:-1] + b"\0", PNG + b"more" * 100):
        assert np.array_equal(load_image(data), PIXELS)


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"tRNS"])
def test_a_wrong_checksum_of_what_decides_pixels_is_damage(kind: bytes) -> None:
    if kind == b"IHDR":
        data = PNG[:32] + bytes([PNG[32] ^ 1]) + PNG[33:]
    else:
        data = with_chunk(kind, bytes(6))
    message = refused(data)
    assert message == (
        f"the image: is damaged or cut short (the checksum of its {kind.decode()} chunk is wrong)"
    )


def jpeg(**options: object) -> bytes:
    return encoded(photo(400, 300), "JPEG", **{"quality": 90, **options})


KINDS = {"baseline": {}, "optimized": {"optimize": True}, "progressive": {"progressive": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_cut_jpeg_with_an_end_marker_is_damage(kind: str, share: float) -> None:
    whole = jpeg(**KINDS[kind])
    cut = whole[: int(len(whole) * share)].rstrip(b"\xff") + b"\xff\xd9"
    if kind == "progressive" and share == 0.9:
        return  # of its last scan some last bits are missing: no pixel changes by much
    assert "is damaged or cut short" in refused(cut)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_jpeg_that_goes_on_as_zeros_is_damage(kind: str, end: bytes) -> None:
    whole = jpeg(**KINDS[kind])
    half = len(whole) // 2
    assert "is damaged or cut short" in refused(whole[:half] + bytes(len(whole) - half) + end)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0", "4:2:2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (400, 300), (401, 299)])
def test_whole_jpegs_are_read_as_pillow_reads_them(
    kind: str, subsampling: str, size: tuple[int, int]
) -> None:
    for image in (photo(*size), photo(*size).convert("L"), Image.new("RGB", size, "white")):
        for extra in ({}, {"restart_marker_blocks": 3}):
            data = encoded(image, "JPEG", subsampling=subsampling, **KINDS[kind], **extra)
            with Image.open(io.BytesIO(data)) as opened:
                expected = np.asarray(opened.convert("RGB"))
            assert np.array_equal(load_image(data), expected)
            assert np.array_equal(load_image(data + b"\0" * 5000), expected)  # padding behind


def test_a_blank_page_has_long_zeros_and_is_read() -> None:
    page = Image.new("RGB", (1500, 2000), "white")
    ImageDraw.Draw(page).rectangle((100, 100, 400, 300), "black")
    for kind in KINDS.values():
        assert (load_image(encoded(page, "JPEG", **kind))[-1] > 250).all()


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_that_goes_on_as_zeros_is_damage(lossless: bool) -> None:
    whole = encoded(photo(400, 300), "WEBP", lossless=lossless, quality=90)
    half = len(whole) // 2
    assert "it ends in zeros" in refused(whole[:half] + bytes(len(whole) - half))
    alpha = photo(400, 300)
    alpha.putalpha(128)
    extended = encoded(alpha, "WEBP", lossless=lossless, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    assert load_image(extended).shape == (300, 400, 3)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("colour", ["black", "white", "red"])
def test_a_webp_of_one_colour_is_read(lossless: bool, colour: str) -> None:
    image = Image.new("RGB", (900, 700), colour)
    assert load_image(encoded(image, "WEBP", lossless=lossless)).shape == (700, 900, 3)


@pytest.mark.parametrize("options", [{}, {"lossless": True, "quality": 0, "method": 0}])
def test_a_webp_with_a_plain_lower_part_is_read(options: dict[str, object]) -> None:
    """Its last bytes are zeros; of the lossless one 20 kB."""
    pixels = np.full((900, 1200, 3), 17, np.uint8)
    pixels[:100] = np.random.default_rng(0).integers(0, 255, (100, 1200, 3))
    image = Image.fromarray(pixels)
    data = encoded(image, "WEBP", **options)
    assert len(data) - len(data.rstrip(b"\0")) > 50
    assert np.abs(load_image(data)[500:].astype(int) - 17).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_bmp_that_goes_on_as_zeros_is_damage(mode: str, share: float) -> None:
    page = Image.new("RGB", (201, 160), (250, 251, 252)).convert(mode)
    whole = encoded(page, "BMP")
    kept = int(len(whole) * share)
    assert "zeros" in refused(whole[:kept] + bytes(len(whole) - kept))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_black_parts_of_a_bmp_are_read(mode: str) -> None:
    """The last bytes are the top rows."""
    for box in ((0, 0, 201, 60), (0, 0, 201, 160), (50, 0, 201, 100), (0, 0, 100, 90)):
        page = Image.new("RGB", (201, 160), (250, 251, 252))
        ImageDraw.Draw(page).rectangle(box, (0, 0, 0))
        assert load_image(encoded(page.convert(mode), "BMP")).shape == (160, 201, 3)
    night = Image.new("RGB", (201, 160))
    ImageDraw.Draw(night).ellipse((60, 90, 120, 150), (255, 255, 240))
    assert load_image(encoded(night.convert(mode), "BMP")).max() > 200


NAMED: dict[str, tuple[bytes, str]] = {
    "git-lfs": ((FIELD / "lfs-pointer.png").read_bytes(), "is a git-lfs pointer, which"),
    "HTML": ((FIELD / "html-named.jpg").read_bytes(), "is an HTML page, which"),
    "HTML behind a comment": (b"\n<!-- x -->\n<HTML><body>", "is an HTML page, which"),
    "JPEG XL": ((FIELD / "x.jxl").read_bytes(), "is JPEG XL, which"),
    "JPEG XL in a box": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "is JPEG XL, which"),
    "AVIF": ((FIELD / "x.avif").read_bytes(), "--allow-format avif reads it"),
    "SVG": ((FIELD / "x.svg").read_bytes(), "is SVG, which"),
    "SVG behind XML": (b"<?xml version='1.0'?>\n<!-- a -->\n<svg xmlns='x'/>", "is SVG, which"),
    "SVG behind a doctype": (b'<!DOCTYPE svg PUBLIC "-//W3C//DTD">\n<svg/>', "is SVG, which"),
    "XML": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is XML, which"),
    "JSON": (b'{"error": "not found"}', "is JSON, which"),
    "a list in JSON": (b"[]", "is JSON, which"),
    "text": ("Größe: nicht gefunden\n".encode(), "is text, which"),
    "MP4": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(99), "is a video, which"),
    "MOV": (b"\0\0\0\x14ftypqt  " + bytes(99), "is a video, which"),
    "WebM": (b"\x1aE\xdf\xa3" + bytes(99), "is a video, which"),
    "AVI": (b"RIFF\x24\0\0\0AVI LIST" + bytes(99), "is a video, which"),
    "CR2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "is a camera's raw file, which"),
    "CR3": (b"\0\0\0\x18ftypcrx " + bytes(99), "is a camera's raw file, which"),
    "NEF": (b"MM\0*\0\0\0\x08" + bytes(90) + b"NIKON CORPORATION", "is a camera's raw file"),
    "RAF": (b"FUJIFILMCCD-RAW 0201" + bytes(99), "is a camera's raw file, which"),
    "BigTIFF": (b"II+\0\x08\0\0\0" + bytes(99), "is TIFF, which"),
    "PSD": (b"8BPS\0\1" + bytes(99), "is a Photoshop file, which"),
    "ZIP": (b"PK\3\4" + bytes(99), "is a ZIP archive or an Office document, which"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "is an archive, which"),
    "JPEG 2000": (b"\xff\x4f\xff\x51" + bytes(99), "is JPEG 2000, which"),
    "DICOM": (bytes(128) + b"DICM" + bytes(99), "is DICOM, which"),
    "OpenEXR": (b"\x76\x2f\x31\x01" + bytes(99), "is a format of pictures, which"),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("suffix", ["", ".jpg"])
def test_what_is_not_read_is_named_from_its_first_bytes(
    tmp_path: Path, name: str, suffix: str
) -> None:
    data, words = NAMED[name]
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert message.isprintable()


@pytest.mark.parametrize("build", [lambda: bytes(500), lambda: bytes(range(128, 250))])
def test_what_nobody_knows_is_not_named(build: Callable[[], bytes]) -> None:
    assert "is not a picture in a format that is read (JPEG, PNG" in refused(build())
