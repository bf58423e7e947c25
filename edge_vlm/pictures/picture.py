"""A picture of a conversation: opened, encoded once tile by tile, its rows kept for the decoder.

A tile's embeddings depend on its own pixels alone (and on what else a family's graph asks of it,
see ``Tiles.extras``), so a tile that was seen before, in whatever picture, frame or tiling, is not
encoded again. They are kept as the float32 that the vision tower gives: rounded to 16 bit, an
answer would differ from the one computed without the cache.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import DecoderError, ImageError
from edge_vlm.families.base import family_of
from edge_vlm.machine.store import Entry, Store, make_key
from edge_vlm.pictures.image import open_image, strips
from edge_vlm.progress import CancelToken, OnProgress, Progress

if TYPE_CHECKING:
    from edge_vlm.engines import VisionTower
    from edge_vlm.families.base import ImageProcessor, Layout, Tiles
    from edge_vlm.machine.settings import MachineSettings

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
_KIND = "tile"


class TileCache:
    """Encodes pictures with a vision tower, each different tile once.

    Args:
        vision: the tower.
        identity: what the embeddings depend on besides the tile, see ``VisionTower.identity``.
        memory_bytes: of embeddings to hold in memory.
        store: where they are kept on disk, too.
    """

    def __init__(
        self,
        vision: VisionTower,
        identity: Mapping[str, Any],
        memory_bytes: int,
        store: Store | None = None,
    ) -> None:
        self._vision = vision
        self._identity = dict(identity)
        self._memory_bytes = memory_bytes
        self._store = store
        self._held: OrderedDict[bytes, Float32] = OrderedDict()  # the longest unused first
        self._guard = threading.Lock()

    @property
    def model(self) -> bytes:
        """Stands for the tower: embeddings of two towers that differ do not go together."""
        return make_key(self._identity)

    def encode(
        self,
        tiles: Tiles,
        *,
        cancel: CancelToken | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Float32, int]:
        """Embeddings as of ``VisionTower.encode``, and how many crops were not encoded for it.

        Raises:
            Cancelled: ``cancel`` was set; the crops done are kept.
            VisionError, BundleError: as ``VisionTower.encode``.
        """
        n_tokens, hidden = self._vision.output_shape
        out = np.empty((len(tiles.crops), tiles.tokens_per_crop or n_tokens, hidden), np.float32)
        extras = tiles.extras.values()
        keys = [
            make_key(self._identity, crop.data.cast("B"), *(v[i].tobytes() for v in extras))
            for i, crop in enumerate(tiles.crops)
        ]
        first: dict[bytes, int] = {}  # index of each different one
        wanted: list[int] = []
        for index, key in enumerate(keys):
            if first.setdefault(key, index) == index:
                known = self._find(key, out.shape[1:])
                if known is None:
                    wanted.append(index)
                else:
                    out[index] = known
        fresh: list[Entry] = []
        n_known = len(keys) - len(wanted)
        report = progress or (lambda _: None)
        for done in range(n_known):
            report(done + 1)
        try:
            for part, rows in self._vision.encode_parts(tiles.feed, wanted, cancel=cancel):
                for index, row in zip(part, rows, strict=True):
                    out[index] = row
                    kept = row.copy()  # not a view that would keep the others alive
                    fresh.append(Entry(_KIND, keys[index], kept))
                    self._hold(keys[index], kept)
                report(n_known + len(fresh))
        finally:
            if self._store:
                self._store.write_soon(fresh)
        for index, key in enumerate(keys):
            out[index] = out[first[key]]
        return out, len(keys) - len(fresh)

    def markers(self) -> Float32:
        """As ``VisionTower.marker_embeddings``, which need not load the tower."""
        if not self._vision.n_markers:
            return np.empty((0, self._vision.output_shape[1]), np.float32)
        key = make_key(self._identity, b"markers")
        rows = self._find(key, (self._vision.n_markers, self._vision.output_shape[1]))
        if rows is None:
            rows = self._vision.marker_embeddings
            self._hold(key, rows)
            if self._store:
                self._store.write_soon([Entry(_KIND, key, rows)])
        return rows

    def _find(self, key: bytes, shape: tuple[int, ...]) -> Float32 | None:
        with self._guard:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        if self._store is None or (payload := self._store.read(_KIND, key)) is None:
            return None
        if payload.nbytes != 4 * math.prod(shape):  # not what was written under this key
            self._store.drop(_KIND, key)
            return None
        rows = payload.view(np.float32).reshape(shape)
        self._hold(key, rows)
        return rows

    def _hold(self, key: bytes, rows: Float32) -> None:
        with self._guard:
            self._held[key] = rows
            self._held.move_to_end(key)
            while sum(held.nbytes for held in self._held.values()) > self._memory_bytes:
                self._held.popitem(last=False)


@dataclass(frozen=True)
class ImageUse:
    """How a picture was used; sizes are (width, height) in pixels."""

    size: tuple[int, int]
    resized: tuple[int, int]
    tiling: tuple[int, int]  # rows, columns
    crops: int  # the thumbnail included
    reduced: bool  # whether the model saw fewer pixels than the picture has
    used: tuple[int, int]  # at most so many of its pixels were seen: resized, and then in tiles
    alpha: str | None = None  # what hidden pixels became, "white" or "drop"; None: there are none
    crop: tuple[int, int, int, int] | None = None  # left, top, width, height; of this part

    @property
    def loses_detail(self) -> bool:
        """Whether less than half of its width was seen."""
        return self.used[0] * 2 < self.size[0]


@dataclass(frozen=True)
class EncodedImage:
    """A picture's embeddings, to be given in place of the picture any number of times.

    Made by ``EdgeVLM.encode``; good for every conversation with the same vision tower, also of
    another process's ``EdgeVLM``. The tiling is that of ``encode``, whatever ``max_tiles`` says.
    """

    use: ImageUse
    rows: Float32 = field(repr=False)  # (n_tokens, hidden_size)
    digest: bytes = field(repr=False)  # of the pixels and the tiling
    model: bytes = field(repr=False)  # see TileCache.model
    processor: ImageProcessor = field(repr=False)
    positions: Int32 | None = field(default=None, repr=False)  # see Family.positions

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt that the picture takes."""
        return len(self.rows)


@dataclass(eq=False)
class Picture:
    """A picture in a conversation."""

    use: ImageUse
    n_tokens: int
    alone: ImageProcessor  # as it would be seen were it the only picture,
    processor: ImageProcessor  # and as it is
    digest: bytes  # of the pixels, the tiling and the positions
    source: object  # what it was opened from
    positions: Int32 | None = None  # see Family.positions
    pixels: UInt8 | None = None  # dropped once it is encoded
    rows: Float32 | None = None  # (n_tokens, hidden_size)

    def encoded(self, model: bytes) -> EncodedImage:
        """What stands for it once it is encoded."""
        if self.rows is None:
            raise DecoderError("the picture was not encoded")
        return EncodedImage(self.use, self.rows, self.digest, model, self.processor, self.positions)


class Seeing(Protocol):
    """What a picture needs of a loaded model."""

    @property
    def settings(self) -> MachineSettings:
        """Limits for pictures."""

    @property
    def tiles(self) -> TileCache:
        """Of its vision tower."""


@dataclass
class Crops:
    """Crops of the pictures of one turn."""

    encoded: int = 0
    cached: int = 0
    seconds: float = 0.0


def open_picture(source: object, alone: ImageProcessor, n_pictures: int, model: Seeing) -> Picture:
    """Read and plan a picture, or take one that is encoded.

    Args:
        source: see ``load_image``; or an ``EncodedImage``.
        alone: the image processor, its tiles limited.
        n_pictures: of the whole conversation, which may decide how each is seen.
        model: the loaded model.

    Raises:
        ImageError: it cannot be read, or was encoded by another model or for fewer pictures.
    """
    processor: ImageProcessor = family_of(alone).beside(alone, n_pictures)
    if isinstance(source, EncodedImage):
        if source.model != model.tiles.model:
            raise ImageError("this picture was encoded by another model or with other settings")
        if family_of(alone).beside(source.processor, n_pictures) != source.processor:
            raise ImageError(
                "this picture was encoded to be the only one, and this model sees several"
                " pictures in another way; give the picture itself"
            )
        own = source.processor  # whatever tiles are allowed now
        seen = source.use, source.n_tokens, own, own, source.digest, source, source.positions
        return Picture(*seen, rows=source.rows)
    family = family_of(processor)

    def accepts(width: int, height: int) -> Layout:
        return family.layout(width, height, processor)

    opened = open_image(source, model.settings, accepts)
    pixels = opened.pixels
    height, width = pixels.shape[:2]
    plan = accepts(width, height)
    positions = family.positions(plan, processor)
    (resized_h, resized_w), (used_h, used_w) = plan.resized_hw, plan.used_hw
    use = ImageUse(
        size=(width, height),
        resized=(resized_w, resized_h),
        tiling=plan.tiling,
        crops=plan.n_crops,
        reduced=plan.is_reduced,
        used=(used_w, used_h),
        alpha=opened.alpha,
        crop=opened.crop,
    )
    shape = np.array(pixels.shape, np.int64).tobytes()
    rows = (np.ascontiguousarray(pixels[part]).data for part in strips(height, width * 3))
    placed = [] if positions is None else [positions.tobytes()]
    digest = make_key(processor.model_dump(), shape, *(part.cast("B") for part in rows), *placed)
    return Picture(use, plan.n_tokens, alone, processor, digest, source, positions, pixels)


def seen_among(picture: Picture, n_pictures: int, model: Seeing) -> Picture:
    """The same picture, or one opened anew where so many pictures are seen in another way.

    Raises:
        ImageError: it cannot be read any more.
    """
    if family_of(picture.alone).beside(picture.alone, n_pictures) == picture.processor:
        return picture
    return open_picture(picture.source, picture.alone, n_pictures, model)


def encode_pictures(
    pictures: Sequence[Picture],
    tiles: TileCache,
    progress: OnProgress,
    cancel: CancelToken | None,
) -> Crops:
    """Encode those that have no rows yet.

    Raises:
        Cancelled, VisionError, BundleError: as ``TileCache.encode``.
    """
    waiting = [picture for picture in pictures if picture.rows is None]
    total = sum(picture.use.crops for picture in waiting)
    crops = Crops()
    started = time.perf_counter()
    if total:
        progress(Progress("vision", 0, total))
    for picture in waiting:

        def report(n_crops: int, before: int = crops.encoded + crops.cached) -> None:
            progress(Progress("vision", before + n_crops, total))

        if picture.pixels is None:
            raise DecoderError("a picture has neither pixels nor embeddings")
        family = family_of(picture.processor)
        cut = family.cut(picture.pixels, picture.processor)
        embeddings, n_cached = tiles.encode(cut, cancel=cancel, progress=report)
        picture.rows = family.rows(embeddings, tiles.markers(), cut.plan, picture.processor)
        picture.pixels = None
        crops.cached += n_cached
        crops.encoded += picture.use.crops - n_cached
    crops.seconds = time.perf_counter() - started
    return crops
