"""Pixels that are hidden, in every way that a file can hide them: white, or as they are stored."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_vlm.errors import InputError
from edge_vlm.machine.settings import MachineSettings
from edge_vlm.pictures.alpha import on_white
from edge_vlm.pictures.image import open_image
from tests.picture_files import encoded, photo, png, png_chunk

UInt8 = npt.NDArray[np.uint8]
FIELD = Path(__file__).parents[1] / "field"
H, W = 12, 16
RGB = np.asarray(photo(W, H))
OPACITY = np.linspace(0, 255, H * W).reshape(H, W).astype(np.uint8)
RGBA = np.dstack((RGB, OPACITY))
GREY = RGB[..., 0].copy()
LA = np.dstack((GREY, OPACITY))
INK = np.where(np.add.outer(np.arange(H), np.arange(W)) % 3 == 0, 0, 1).astype(np.uint8)


def settings(alpha: str = "white") -> MachineSettings:
    return MachineSettings(cache=None, alpha=alpha, image_formats=("TIFF", "AVIF"))


def white(colours: UInt8, opacity: UInt8) -> UInt8:
    """What is right, in float64."""
    part = opacity[..., None] / 255
    return np.floor(colours * part + 255 * (1 - part) + 0.5 + 1e-9).astype(np.uint8)


def grey(values: UInt8) -> UInt8:
    return np.repeat(values[..., None], 3, axis=2)


def rows_of(values: npt.NDArray[Any]) -> bytes:
    """Rows of a PNG in 16 bit, compressed."""
    wide = (values.astype(np.uint16) * 257).astype(">u2")
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in wide))


def low_bits(levels: UInt8, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bit whose level 1 is hidden."""
    per_byte = 8 // bits
    packed = sum(levels[:, i::per_byte] << (8 - bits * (i + 1)) for i in range(per_byte))
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed.astype(np.uint8)))
    return png(W, H, data, bits=bits, extra=png_chunk(b"tRNS", b"\0\1"))


def palette(hidden: int | bytes, file_format: str = "PNG") -> tuple[bytes, UInt8, UInt8]:
    image = photo(W, H).quantize(8)
    indices = np.asarray(image)
    table = np.full(256, 255, np.uint8)
    if isinstance(hidden, int):
        table[hidden] = 0
    else:
        table[: len(hidden)] = list(hidden)
    data = encoded(image, file_format, transparency=hidden)
    return data, np.asarray(image.convert("RGB")), table[indices]


def cases() -> dict[str, tuple[Any, UInt8, UInt8]]:
    """Source, colours as they are stored, opacities."""
    image = Image.fromarray(RGBA)
    found = (RGB[2, 3] == RGB).all(axis=-1)
    hidden_rgb = np.where(found, 0, 255).astype(np.uint8)
    hidden_ink = INK * 255
    tiff16 = io.BytesIO()
    Image.fromarray(RGBA).save(tiff16, "TIFF")
    paper = np.where(INK, 90, 10).astype(np.uint8)
    return {
        "RGBA png": (encoded(image, "PNG"), RGB, OPACITY),
        "RGBA webp": (encoded(image, "WEBP", lossless=True, exact=True), RGB, OPACITY),
        "RGBA tiff": (tiff16.getvalue(), RGB, OPACITY),
        "RGBA bmp": (encoded(image, "BMP"), RGB, OPACITY),
        "LA png": (encoded(Image.fromarray(LA), "PNG"), grey(GREY), OPACITY),
        "16-bit RGBA png": (png(W, H, rows_of(RGBA), bits=16, colour=6), RGB, OPACITY),
        "16-bit LA png": (png(W, H, rows_of(LA), bits=16, colour=4), grey(GREY), OPACITY),
        "palette, one colour": palette(3),
        "palette, opacities": palette(bytes(range(0, 240, 30))),
        "gif": palette(3, "GIF"),
        "L png with a hidden level": (
            encoded(Image.fromarray(paper), "PNG", transparency=10),
            grey(paper),
            hidden_ink,
        ),
        "RGB png with a hidden colour": (
            encoded(Image.fromarray(RGB), "PNG", transparency=tuple(map(int, RGB[2, 3]))),
            RGB,
            hidden_rgb,
        ),
        "16-bit grey png with a hidden level": (
            png(W, H, rows_of(paper), bits=16, extra=png_chunk(b"tRNS", bytes((10, 10)))),
            grey(paper),
            hidden_ink,
        ),
        "16-bit RGB png with a hidden colour": (
            png(
                *(W, H, rows_of(RGB)),
                bits=16,
                colour=2,
                extra=png_chunk(b"tRNS", bytes(np.repeat(RGB[2, 3], 2))),
            ),
            RGB,
            hidden_rgb,
        ),
        **{
            f"{bits}-bit grey png with a hidden level": (
                low_bits(INK, bits),
                grey(INK * np.uint8(255 // (2**bits - 1))),
                (1 - INK) * 255,
            )
            for bits in (1, 2, 4)
        },
        "RGBA array": (RGBA, RGB, OPACITY),
        "16-bit RGBA array": (RGBA.astype(np.uint16) * 257, RGB, OPACITY),
        "PIL RGBA": (image, RGB, OPACITY),
        "PIL LA": (Image.fromarray(LA), grey(GREY), OPACITY),
        "PIL PA": (pa_image(), grey(GREY), OPACITY),
        "PIL RGBa": (Image.fromarray(RGBA).convert("RGBa"), *premultiplied()),
    }


def pa_image() -> Image.Image:
    image = Image.frombytes("PA", (W, H), LA.tobytes())
    image.putpalette(bytes(np.repeat(np.arange(256), 3).astype(np.uint8)))
    return image


def premultiplied() -> tuple[UInt8, UInt8]:
    back = np.asarray(Image.fromarray(RGBA).convert("RGBa").convert("RGBA"))
    return back[..., :3], back[..., 3]


@pytest.mark.parametrize("name", cases())
def test_hidden_pixels_are_white_or_as_they_are_stored(name: str) -> None:
    source, colours, opacity = cases()[name]
    assert opacity.min() < 255
    shown, dropped = open_image(source, settings()), open_image(source, settings("drop"))
    assert np.array_equal(shown.pixels, white(colours, opacity))
    assert shown.alpha == "white"
    assert np.array_equal(dropped.pixels, colours)
    assert dropped.alpha == "drop"


def test_avif_with_opacity() -> None:
    data = encoded(Image.fromarray(RGBA), "AVIF", quality=100, subsampling="4:4:4")
    with Image.open(io.BytesIO(data)) as image:
        decoded = np.asarray(image.convert("RGBA"))
    shown = open_image(data, settings())
    assert np.array_equal(shown.pixels, white(decoded[..., :3], decoded[..., 3]))
    assert shown.alpha == "white"


def test_the_arithmetic_is_exact_for_every_level_and_opacity() -> None:
    levels, opacities = np.meshgrid(np.arange(256), np.arange(256))
    exact = (2 * (levels * opacities + 255 * (255 - opacities)) + 255) // 510  # no ties: 255 is odd
    found = on_white(
        np.repeat(levels[..., None], 3, 2).astype(np.uint8), opacities.astype(np.uint8)
    )
    assert np.array_equal(found, np.repeat(exact[..., None], 3, axis=2))


def test_opaque_pictures_say_nothing() -> None:
    opaque = np.dstack((RGB, np.full((H, W), 255, np.uint8)))
    for source in (RGB, opaque, encoded(Image.fromarray(opaque), "PNG"), encoded(photo(), "JPEG")):
        for alpha in ("white", "drop"):
            assert open_image(source, settings(alpha)).alpha is None


def test_a_bmp_whose_fourth_bytes_are_zeros_is_opaque() -> None:
    nothing = np.dstack((RGB, np.zeros((H, W), np.uint8)))
    opened = open_image(encoded(Image.fromarray(nothing), "BMP"), settings())
    assert np.array_equal(opened.pixels, RGB)
    assert opened.alpha is None


@pytest.mark.parametrize("name", ["alpha.gif", "alpha.webp"])
def test_paper_that_is_hidden_over_black_is_white(name: str) -> None:
    shown = open_image(FIELD / name, settings()).pixels
    dropped = open_image(FIELD / name, settings("drop")).pixels
    assert np.median(shown) == 255  # paper
    assert shown.min() < 60  # ink
    assert np.median(dropped) < 60


def test_a_large_picture_is_composited_strip_by_strip() -> None:
    side = 1500  # 9 MB: three strips
    opacity = np.arange(side * side).reshape(side, side).astype(np.uint8)
    colours = np.repeat(opacity[::-1, :, None], 3, axis=2)
    data = encoded(Image.fromarray(np.dstack((colours, opacity))), "PNG", compress_level=1)
    assert np.array_equal(open_image(data, settings()).pixels, white(colours, opacity))


def test_other_words_are_refused() -> None:
    with pytest.raises(InputError, match="alpha: must be one of white, drop, not black"):
        settings("black")
    with pytest.raises(InputError, match="alpha"):
        MachineSettings.from_environment({"EDGE_VLM_ALPHA": "grey"})
    assert MachineSettings.from_environment({"EDGE_VLM_ALPHA": "DROP"}).alpha == "drop"
