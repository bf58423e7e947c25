"""Pictures, good and bad: right pixels, or one clear error, in little time and memory."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile

from edge_vlm.errors import ImageError
from edge_vlm.pictures.image import EXTRA_FORMATS, MAX_FILE_BYTES, load_image
from tests.conftest import examples
from tests.picture_files import (
    FORMATS,
    apng,
    bmp_of_size,
    encoded,
    gif_of_size,
    jpeg_of_size,
    jpeg_with_scans,
    photo,
    png,
    png_chunk,
    webp_of_size,
    zeros,
)

UInt8 = npt.NDArray[np.uint8]


def refused(source: Any, **options: Any) -> str:
    """The message with which a picture is refused: one line, at once."""
    started = time.process_time()
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    assert time.process_time() - started < 1
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable()
    assert len(message) < 1000
    return message


def outcome(data: bytes) -> UInt8 | str:
    """Pixels, or the message."""
    try:
        return load_image(data)
    except ImageError as error:
        return str(error)


# Files that are no picture


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\x89", "is not a picture"),
        (b"Hello, this is text.", "is text"),
        (b"<!doctype html><html><body>404</body></html>", "is an HTML page"),
        (b"\x89PNG\r\n\x1a\n", "is damaged or cut short"),
        (b"\xff\xd8\xff\xe0", "is damaged or cut short"),
        (b"GIF89a", "is damaged or cut short"),
        (b"RIFF\x04\0\0\0WEBP", "is damaged or cut short"),
        (bytes(1000), "is not a picture"),
    ],
)
def test_content_that_is_no_picture_is_named_and_refused(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_an_extension_decides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(photo(), "PNG"))
    assert np.array_equal(load_image(path), np.asarray(photo()))


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    link = tmp_path / "link"
    link.symlink_to(fifo)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "No such file" in refused(tmp_path / "missing.png")
    assert "is a folder" in refused(tmp_path)
    assert "is not a regular file" in refused(fifo)
    assert "is not a regular file" in refused(link)
    assert "is not a regular file" in refused("/dev/zero")
    assert str(loop) in refused(loop)
    assert "is a folder" in refused("")
    assert "null" in refused("a\0b.png")
    assert refused("x" * 100_000).startswith("xxx")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(photo(), "PNG"))

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    assert refused(path) == f"{path}: Permission denied"


def test_an_error_is_one_line_whatever_the_name(tmp_path: Path) -> None:
    for name in ("a\nb.png", "a\x1b[31mb.png", "a\u202eb.png", "a\udcffb.png"):
        assert repr(str(tmp_path / name)) in refused(tmp_path / name)
    path = tmp_path / "x\ny.png"
    path.write_bytes(b"no")
    assert repr(str(path)) in refused(path)


@pytest.mark.parametrize(
    "name", ["-x.png", "quote'\".png", "🖼️ größe.png", "a b\tc.png", "n\nl.png"]
)
def test_a_good_file_with_an_odd_name_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(encoded(photo(), "PNG"))
    assert np.array_equal(load_image(path), np.asarray(photo()))


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/a.png", "HTTPS://example.org/a.png", "file:///etc/passwd", "ftp://x/y"],
)
def test_urls_are_not_fetched(url: str) -> None:
    assert refused(url) == f"{url}: URLs are not fetched; download the picture first"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    assert "is larger than 256 MiB" in refused(path)


# Damage


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_cut_file_is_an_error_or_complete(file_format: str) -> None:
    good = encoded(photo(), file_format)
    whole = load_image(good)
    for step in range(1, 20):
        assert "cut short" in refused(good[: len(good) * step // 20]) or step == 1
    # All pixels may be there even if the last bytes are not.
    for n_missing in range(1, 30):
        result = outcome(good[:-n_missing])
        assert isinstance(result, str) or np.array_equal(result, whole)


def test_a_cut_file_is_an_error_even_if_pillow_was_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    good = encoded(photo(), "JPEG")
    assert "is damaged or cut short" in refused(good[: len(good) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # the caller's switch is as it was


@pytest.mark.parametrize("file_format", FORMATS)
def test_one_changed_byte_gives_pixels_or_an_error(file_format: str) -> None:
    good = encoded(photo(), file_format)
    for seed in range(20):
        rng = random.Random(seed)
        damaged = bytearray(good)
        damaged[rng.randrange(len(good))] ^= rng.randrange(1, 256)
        started = time.process_time()
        result = outcome(bytes(damaged))
        assert time.process_time() - started < 5
        assert result.isprintable() if isinstance(result, str) else result.ndim == 3


MEASURE = """
import io, json, os, sys, time
from PIL import Image
from edge_vlm.errors import ImageError
from edge_vlm.pictures.image import FORMATS, load_image
def read_all_formats():
    for name in FORMATS:
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, name)
        load_image(file.getvalue())
def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024
read_all_formats()
for path in sys.argv[1:]:
    if os.fork() == 0:
        read_all_formats()
        before, started = peak(), time.process_time()
        try:
            result = list(load_image(path).shape)
        except ImageError as error:
            result = str(error)
        print(json.dumps([result, time.process_time() - started, peak() - before]), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(path)
"""


def measured(*paths: Path) -> list[tuple[list[int] | str, float, float]]:
    """For each file: shape or message, CPU seconds, MiB by which the peak memory rose.

    Each is read in a process of its own, a fork of one that has read others.
    """
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)],
        stdout=subprocess.PIPE,
        check=True,
        timeout=60 + 4 * len(paths),  # what hangs would do so for ever
    )
    return [tuple(json.loads(line)) for line in found.stdout.splitlines()]


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the peak memory")


@pytest.mark.limits
@linux
def test_a_changed_byte_takes_no_more_memory(tmp_path: Path) -> None:
    n = examples(8, 80)
    paths = []
    for file_format in FORMATS:
        good = encoded(photo(800, 600), file_format)
        paths.append(tmp_path / file_format)
        paths[-1].write_bytes(good)
        for seed in range(n):
            rng = random.Random(seed)
            damaged = bytearray(good)
            damaged[rng.randrange(len(good))] ^= rng.randrange(1, 256)
            paths.append(tmp_path / f"{file_format}{seed}")
            paths[-1].write_bytes(damaged)
    results = measured(*paths)
    assert len(results) == len(FORMATS) * (n + 1)
    while results:
        (shape, _, usual), *damaged_ones = results[: n + 1]
        assert shape == [600, 800, 3]
        assert all(rise < usual + 10 for _, _, rise in damaged_ones), damaged_ones
        del results[: n + 1]


# Bombs


def text_of_100_megabytes(kind: bytes) -> bytes:
    compressed = zeros(100 << 20)
    middle = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    return png(64, 48, zeros(65 * 48), extra=png_chunk(kind, middle + compressed))


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "png": (lambda: png(25_000, 25_000, zeros(25_001 * 25_000)), "25000x25000 = 625 megapixels"),
    "png of 2^31": (lambda: png(2**31 - 1, 2**31 - 1, b"x"), "2147483647x2147483647"),
    "jpeg": (lambda: jpeg_of_size(65_535, 65_500), "65535x65500"),
    "progressive jpeg": (lambda: jpeg_of_size(65_535, 65_500, True), "65535x65500"),
    "jpeg of 1000 scans": (lambda: jpeg_with_scans(9_000, 9_000, 1_000), "more than 100 scans"),
    "gif": (lambda: gif_of_size(30_000, 30_000), "30000x30000"),
    "gif frame": (lambda: gif_of_size(30_000, 30_000, frame=True), "30000x30000"),
    "webp": (lambda: webp_of_size(16_383, 16_383), "16383x16383"),
    "bmp": (lambda: bmp_of_size(100_000, 100_000), "100000x100000"),
    "bmp upside down": (lambda: bmp_of_size(10_000, -(2**31)), "10000x2147483648"),
    "text": (
        lambda: png(8, 8, zeros(72), extra=png_chunk(b"tEXt", b"k\0" + bytes(100 << 20))),
        "holds 100 MiB that are not pixels",
    ),
    "compressed text": (lambda: text_of_100_megabytes(b"zTXt"), "too large"),
    "compressed unicode text": (lambda: text_of_100_megabytes(b"iTXt"), "too large"),
    "colour profile": (lambda: text_of_100_megabytes(b"iCCP"), "too large"),
    "million chunks": (
        lambda: png(8, 8, zeros(72), extra=png_chunk(b"abCd", b"") * 1_000_000),
        "more than 100000 chunks",
    ),
}


@pytest.fixture(scope="module")
def bombs(once: Callable[..., Any], shared: Path) -> dict[str, Any]:
    """By name: the file, and what ``measured`` says of it."""

    def measure_all() -> dict[str, Any]:
        paths = [shared / f"bomb-{number}" for number in range(len(BOMBS))]
        for path, (build, _) in zip(paths, BOMBS.values(), strict=True):
            path.write_bytes(build())
        results = measured(*paths)
        for path in paths:
            path.unlink()
        return dict(zip(BOMBS, zip(map(str, paths), results, strict=True), strict=True))

    return once("bombs", measure_all)


@pytest.mark.limits
@linux
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_from_its_header(bombs: dict[str, Any], name: str) -> None:
    path, (message, seconds, rise) = bombs[name]
    assert isinstance(message, str)
    assert message.startswith(f"{path}: ")
    assert BOMBS[name][1] in message
    assert seconds < 0.5
    assert rise < 50


@pytest.mark.limits
@linux
def test_pixels_behind_the_last_row_and_frames_behind_the_first_cost_nothing(
    tmp_path: Path,
) -> None:
    files = {
        "rows": png(64, 48, zeros(300 << 20)),
        "apng": apng(10_000),
        "gif": encoded(
            photo(64, 48),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (64, 48), (i % 256, i // 256, 0)) for i in range(300)],
        ),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for shape, seconds, rise in measured(*(tmp_path / name for name in files)):
        assert isinstance(shape, list)
        assert seconds < 0.5
        assert rise < 50


def test_the_pixel_limit_is_exact_and_the_callers() -> None:
    data = encoded(photo(40, 25), "PNG")
    assert load_image(data, max_pixels=1000).shape == (25, 40, 3)
    assert "40x25" in refused(data, max_pixels=999)
    assert "40x25" in refused(photo(40, 25), max_pixels=999)
    assert "40x25" in refused(np.zeros((25, 40, 3), np.uint8), max_pixels=999)


def test_pillows_own_limit_is_neither_used_nor_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert load_image(encoded(photo(), "PNG")).shape == (120, 160, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_jpeg_of_many_pictures_is_its_first(tmp_path: Path) -> None:
    """Phones add a second picture to a JPEG file; films may follow, with bytes like markers."""
    first, second = photo(), Image.new("RGB", (160, 120), (9, 9, 9))
    expected = load_image(encoded(first, "JPEG", quality=95))
    many = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert np.array_equal(load_image(many), expected)
    assert np.array_equal(load_image(many + b"\xff\xda" * 5000), expected)


# Formats


DISGUISES = {
    "PSD": b"8BPS\0\x01" + bytes(6) + b"\0\x03\0\0\0\x10\0\0\0\x10\0\x08\0\x03" + bytes(100),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(80) + bytes(2880),
    "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n%%EOF\n",
    "JPEG2000": encoded(photo(16, 16), "JPEG2000"),
    "TIFF": encoded(photo(16, 16), "TIFF"),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>",
    "ICO": encoded(photo(16, 16), "ICO"),
    "AVIF": encoded(photo(16, 16), "AVIF"),
    "DIB": encoded(photo(16, 16), "DIB"),
    "TGA": encoded(photo(16, 16), "TGA"),
    "PPM": encoded(photo(16, 16), "PPM"),
}


NAMES = {
    "PSD": "a Photoshop file, which is not read (JPEG, PNG, WEBP, BMP, GIF are); save it as",
    "EPS": "PostScript, which",
    "FITS": "a format of pictures, which",
    "PDF": "damaged" if find_spec("pypdfium2") else "PDF, which",
    "JPEG2000": "JPEG 2000, which",
    "TIFF": "TIFF, which is not read (JPEG, PNG, WEBP, BMP, GIF are); --allow-format tiff reads it",
    "SVG": "SVG, which",
    "ICO": "an icon, which",
    "AVIF": "AVIF, which is not read (JPEG, PNG, WEBP, BMP, GIF are); --allow-format avif reads it",
    "DIB": "not a picture in a format that is read (JPEG, PNG, WEBP, BMP, GIF)",
    "TGA": "not a picture in a format that is read",
    "PPM": "a PNM picture, which",
}


@pytest.mark.parametrize("name", DISGUISES)
@pytest.mark.parametrize("extension", ["", ".png"])
def test_other_formats_are_refused_under_any_name(
    tmp_path: Path, name: str, extension: str
) -> None:
    path = tmp_path / f"picture{extension or '.' + name.lower()}"
    path.write_bytes(DISGUISES[name])
    assert refused(path).startswith(f"{path}: is {NAMES[name]}")


def test_no_other_decoder_is_ever_imported(tmp_path: Path) -> None:
    paths = []
    for name, data in [*DISGUISES.items(), *((f, encoded(photo(), f)) for f in FORMATS)]:
        paths.append(tmp_path / name)
        paths[-1].write_bytes(data)
    code = (
        "import sys\n"
        "from edge_vlm.errors import ImageError\n"
        "from edge_vlm.pictures.image import load_image\n"
        "read = 0\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_image(path); read += 1\n"
        "    except ImageError: pass\n"
        "from PIL import Image\n"
        "print(read, *sorted(Image.OPEN), *(m for m in sys.modules if 'ImagePlugin' in m))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout.split()
    plugins = {f"PIL.{n}ImagePlugin" for n in ("Bmp", "Gif", "Jpeg", "Png", "WebP")}
    assert found[0] == "5"
    # Pillow itself imports PPM with the first file, and a class of its TIFF module for EXIF; their
    # decoders are not among those it may try.
    assert set(found[1:]) - {"PPM", "PIL.PpmImagePlugin", "TIFF", "PIL.TiffImagePlugin"} == {
        *FORMATS,
        "DIB",
        *plugins,
    }


def test_tiff_and_avif_on_request() -> None:
    assert EXTRA_FORMATS == ("TIFF", "AVIF")
    tiff = encoded(photo(), "TIFF")
    assert np.array_equal(load_image(tiff, extra_formats=("tiff",)), np.asarray(photo()))
    assert load_image(DISGUISES["AVIF"], extra_formats=("AVIF",)).shape == (16, 16, 3)
    assert "is TIFF" in refused(tiff, extra_formats=("AVIF",))
    assert refused(tiff, extra_formats=("PSD",)) == "format PSD: only TIFF and AVIF can be added"
    grey = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    message = refused(encoded(grey, "TIFF"), extra_formats=("TIFF",))
    assert message == "the image: has F-mode pixels; save it as 8 or 16 bit"


# Pixels


def gradient(top: int, dtype: Any) -> npt.NDArray[Any]:
    return np.linspace(0, top, 12 * 16, dtype=np.float64).reshape(12, 16).astype(dtype)


GREY = gradient(255, np.uint8)
RGB = np.asarray(photo(16, 12))
ALPHA = GREY[::-1].copy()


def grey_rgb(values: npt.NDArray[Any]) -> UInt8:
    return np.repeat(values[..., None], 3, axis=2).astype(np.uint8)


def palette(**options: Any) -> tuple[bytes, UInt8]:
    image = photo(16, 12).quantize(8)
    return encoded(image, options.pop("format"), **options), np.asarray(image.convert("RGB"))


def modes() -> dict[str, tuple[bytes, UInt8]]:
    """File and expected pixels."""
    rgba = np.dstack((RGB, ALPHA))
    black_white = Image.fromarray(GREY).convert("1")
    grey16 = gradient(65_535, np.uint16)
    rgb16 = zlib.compress(
        b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB.astype(np.uint16) * 257)
    )
    rgba16 = zlib.compress(
        b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgba.astype(np.uint16) * 257)
    )
    cmyk = Image.fromarray(RGB).convert("CMYK")
    return {
        "1 png": (encoded(black_white, "PNG"), np.asarray(black_white.convert("RGB"))),
        "1 bmp": (encoded(black_white, "BMP"), np.asarray(black_white.convert("RGB"))),
        "L png": (encoded(Image.fromarray(GREY), "PNG"), grey_rgb(GREY)),
        "L bmp": (encoded(Image.fromarray(GREY), "BMP"), grey_rgb(GREY)),
        "LA png": (
            encoded(Image.fromarray(np.dstack((GREY, ALPHA))), "PNG"),
            grey_rgb(GREY),
        ),
        "RGB png": (encoded(Image.fromarray(RGB), "PNG"), RGB),
        "RGB webp": (encoded(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
        "RGBA png": (encoded(Image.fromarray(rgba), "PNG"), RGB),
        "RGBA webp": (encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), RGB),
        "P png": palette(format="PNG"),
        "P gif": palette(format="GIF"),
        "P bmp": palette(format="BMP"),
        "P png with a transparent colour": palette(format="PNG", transparency=3),
        "P png with alpha": palette(format="PNG", transparency=bytes(range(0, 240, 30))),
        "P gif with a transparent colour": palette(format="GIF", transparency=3),
        "P 2 bit": palette(format="PNG", bits=4),
        "RGB png with a transparent colour": (
            encoded(Image.fromarray(RGB), "PNG", transparency=tuple(map(int, RGB[0, 0]))),
            RGB,
        ),
        "L png with a transparent grey": (
            encoded(Image.fromarray(GREY), "PNG", transparency=7),
            grey_rgb(GREY),
        ),
        "16 bit grey png": (encoded(Image.fromarray(grey16), "PNG"), grey_rgb(grey16 >> 8)),
        "16 bit RGB png": (png(16, 12, rgb16, bits=16, colour=2), RGB),
        "16 bit RGBA png": (png(16, 12, rgba16, bits=16, colour=6), RGB),
        "CMYK jpeg": (encoded(cmyk, "JPEG", quality=100, subsampling=0), RGB),
        "YCbCr jpeg": (encoded(Image.fromarray(RGB), "JPEG", quality=100, subsampling=0), RGB),
        "L jpeg": (encoded(Image.fromarray(GREY), "JPEG", quality=100), grey_rgb(GREY)),
        "ICC profile": (encoded(Image.fromarray(RGB), "PNG", icc_profile=bytes(300)), RGB),
    }


@pytest.mark.parametrize("name", modes())
def test_every_mode_of_pixels_becomes_rgb(name: str) -> None:
    data, expected = modes()[name]
    pixels = load_image(data, alpha="drop")
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    lossy = 0 if "jpeg" not in name else 12 if "CMYK" in name else 4
    assert np.abs(pixels.astype(int) - expected).max() <= lossy


def adobe_marked(data: bytes, transform: int) -> bytes:
    """A CMYK JPEG with another transform in its Adobe marker."""
    at = data.index(b"Adobe") + 11
    return data[:at] + bytes([transform]) + data[at + 1 :]


@pytest.mark.parametrize("transform", [None, 0, 2])
def test_cmyk_and_ycck_are_read_as_pillow_converts_them(transform: int | None) -> None:
    data = encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=100)
    if transform is None:  # without Adobe's marker
        start = data.index(b"\xff\xee")
        data = data[:start] + data[start + 16 :]
    else:
        data = adobe_marked(data, transform)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(load_image(data), expected)
    assert (np.abs(expected.astype(int) - RGB).max() <= 12) == (transform != 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, file_format: str) -> None:
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:24, :32] = (200, 0, 0)
    upright[24:, :32] = (0, 200, 0)
    upright[:24, 32:] = (0, 0, 200)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    image = Image.fromarray(np.ascontiguousarray(stored))
    data = encoded(image, file_format, exif=exif, **options.get(file_format, {}))
    assert np.abs(load_image(data).astype(int) - upright).max() <= 4


def test_broken_exif_does_not_matter() -> None:
    for exif in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\xff",
    ):
        data = encoded(photo(), "JPEG", exif=exif)
        assert load_image(data).shape == (120, 160, 3)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(load_image(data), np.asarray(frames[0]))


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 10_000), (10_000, 1), (2, 2), (377, 379), (1000, 1003)],
)
def test_every_shape_is_read(height: int, width: int) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(load_image(encoded(Image.fromarray(pixels), "PNG")), pixels)


# What is not a file


def test_bytes_of_any_kind_and_data_urls() -> None:
    data = encoded(photo(), "PNG")
    expected = np.asarray(photo())
    text = base64.b64encode(data).decode()
    for source in (
        data,
        bytearray(data),
        memoryview(data),
        f"data:image/png;base64,{text}",
        f"DATA:image/PNG;name=a.png;base64,{text}",
        f"data:image/jpeg;base64,{text}",  # the content decides
    ):
        assert np.array_equal(load_image(source), expected)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:", "is not of the form"),
        ("data:,hello", "is not of the form"),
        ("data:text/plain;base64,aGVsbG8=", "is not of the form"),
        ("data:image/png,%89PNG", "is not of the form"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,@@@", "is not valid base64"),
        ("data:image/png;base64,aGVsbG8", "is not valid base64"),
        ("data:image/png;base64,aGVs\nbG8=", "is not valid base64"),
        ("data:image/png;base64,aGVsbG8é", "is not valid base64"),
        ("data:image/png;base64,aGVsbG8=", "is text"),
        ("data:image/" + "png;" * 100_000, "is not of the form"),
    ],
)
def test_bad_data_urls(url: str, reason: str) -> None:
    message = refused(url)
    assert message.startswith("the data: URL")
    assert reason in message


def test_arrays() -> None:
    rgba = np.dstack((RGB, ALPHA))
    for array, expected in (
        (RGB, RGB),
        (rgba, RGB),
        (GREY, grey_rgb(GREY)),
        (GREY[..., None], grey_rgb(GREY)),
        (RGB[::-1, ::2], RGB[::-1, ::2]),
        (RGB.astype(np.uint16) << 8 | 0xFF, RGB),
        (gradient(65_535, np.uint16), grey_rgb(gradient(65_535, np.uint16) >> 8)),
    ):
        pixels = load_image(array, alpha="drop")
        assert np.array_equal(pixels, expected)
        assert pixels.flags.c_contiguous


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 2), np.uint8), "(4, 4, 2)"),
        (np.zeros((3, 8, 8), np.uint8), "(3, 8, 8)"),
        (np.zeros((0, 4, 3), np.uint8), "(0, 4, 3)"),
        (np.zeros(4, np.uint8), "(4,"),
        (np.zeros((1, 4, 4, 3), np.uint8), "(1, 4, 4, 3)"),
        (np.array(0, np.uint8), "()"),
        (np.zeros((4, 4, 3), np.float32), "uint8, uint16 or bool, not float32"),
        (np.zeros((4, 4, 3), np.int16), "uint8, uint16 or bool, not int16"),
        (np.full((4, 4), None), "uint8, uint16 or bool, not object"),
    ],
)
def test_arrays_that_are_no_picture(array: npt.NDArray[Any], reason: str) -> None:
    assert reason in refused(array)


@pytest.mark.parametrize("source", [None, 3, 1.5, ["a.png"], {"url": "a.png"}, object()])
def test_objects_that_are_no_picture(source: Any) -> None:
    assert refused(source) == (
        "an image is a path, bytes, an object with read() or __array__, a PIL image or an array,"
        f" not {type(source).__name__}"
    )


def test_pil_images_of_every_mode() -> None:
    base = photo(16, 12)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV"):
        image = base.convert(mode)
        assert np.array_equal(load_image(image), np.asarray(image.convert("RGB"))), mode
        assert image.mode == mode  # the caller's object is left alone
    wide = Image.fromarray(gradient(65_535, np.int32))
    assert np.array_equal(load_image(wide), grey_rgb(gradient(65_535, np.uint16) >> 8))
    assert "I-mode" in refused(Image.fromarray(gradient(70_000, np.int32)))
    assert "F-mode" in refused(Image.fromarray(gradient(1, np.float32)))
    assert "has no pixels" in refused(Image.new("RGB", (0, 5)))


def test_a_pil_image_that_was_turned_by_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(16, 12), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(load_image(image), np.rot90(np.asarray(photo(16, 12)), -1))
        assert image.size == (16, 12)
