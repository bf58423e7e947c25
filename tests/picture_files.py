"""Pictures as files: small good ones, and ones whose header promises far more than they hold."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


def photo(width: int = 160, height: int = 120) -> Image.Image:
    """A picture with something in every corner."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(7).integers(0, 40, (height, width))
    pixels = np.stack((x * 255 // width, y * 255 // height, (x * y + noise) % 256), axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, pixels: bytes, *, bits: int = 8, colour: int = 0, extra: bytes = b""
) -> bytes:
    """A PNG file from compressed rows; ``extra`` are chunks in front of them."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            extra,
            png_chunk(b"IDAT", pixels),
            png_chunk(b"IEND", b""),
        )
    )


def zeros(n_bytes: int) -> bytes:
    """That many zero bytes, compressed: one compressed block again and again."""
    compressor = zlib.compressobj(9)
    step = 1 << 20
    start = compressor.compress(b"") + compressor.flush(zlib.Z_FULL_FLUSH)
    block = compressor.compress(bytes(step)) + compressor.flush(zlib.Z_FULL_FLUSH)
    rest = compressor.compress(bytes(n_bytes % step)) + compressor.flush()
    checksum = struct.pack(">I", (n_bytes % 65521) << 16 | 1)
    return start + block * (n_bytes // step) + rest[:-4] + checksum


def jpeg_of_size(width: int, height: int, progressive: bool = False) -> bytes:
    """A small JPEG whose header claims another size."""
    data = bytearray(encoded(Image.new("L", (64, 48)), "JPEG", progressive=progressive))
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_with_scans(width: int, height: int, n_scans: int) -> bytes:
    """A progressive JPEG that goes over all its pixels ``n_scans`` more times."""
    data = jpeg_of_size(width, height, progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * n_scans + data[-2:]


def gif_of_size(width: int, height: int, frame: bool = False) -> bytes:
    """A small GIF whose screen, or whose first frame, claims another size."""
    data = bytearray(encoded(photo(64, 48), "GIF"))
    at = data.index(b"\x2c\0\0\0\0") + 5 if frame else 6
    data[at : at + 4] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_of_size(width: int, height: int) -> bytes:
    """A small BMP whose header claims another size."""
    data = bytearray(encoded(photo(64, 48), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def webp_of_size(width: int, height: int) -> bytes:
    """A lossless WebP that is all header."""
    bits = (width - 1) | ((height - 1) << 14)
    body = b"\x2f" + struct.pack("<I", bits) + bytes(21)
    chunk = b"VP8L" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def apng(n_frames: int) -> bytes:
    """An animated PNG of 16 x 16 pixels: grey, with black frames after the first."""
    control = struct.pack(">IIIIIHHBB", 0, 16, 16, 0, 0, 1, 10, 0, 0)
    parts = [png_chunk(b"acTL", struct.pack(">II", n_frames, 0)), png_chunk(b"fcTL", control)]
    grey = zlib.compress((b"\0" + bytes([99]) * 16) * 16)
    black = zlib.compress(bytes(17 * 16))
    start = png(16, 16, grey, extra=b"".join(parts))
    end = start[-12:]
    frames = []
    for index in range(1, n_frames):
        number = 2 * index - 1
        frame_control = struct.pack(">I", number) + control[4:]
        frames.append(png_chunk(b"fcTL", frame_control))
        frames.append(png_chunk(b"fdAT", struct.pack(">I", number + 1) + black))
    return start[:-12] + b"".join(frames) + end
