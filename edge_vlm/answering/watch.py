"""Pictures that keep coming: from a folder, a camera or a command, each answered in turn."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import ImageError
from edge_vlm.pictures.frames import Pause, Source
from edge_vlm.pictures.image import Opened

if TYPE_CHECKING:
    from edge_vlm.answering.answer import Answer
    from edge_vlm.answering.model import EdgeVLM
    from edge_vlm.progress import CancelToken, Progress

BLOCK = 16  # pixels; see changed
UInt8 = npt.NDArray[np.uint8]


def watch(
    vlm: EdgeVLM,
    source: Source,
    question: str,
    *,
    cancel: CancelToken,
    when_changed: bool = False,
    tolerance: float = 0,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Generator[dict[str, Any], None, None]:
    """Answer the question for each frame.

    A tile that was in an earlier frame is not encoded again (``MachineSettings.tile_memory``). A
    frame that equals the one before it is not computed again where the answer cannot differ.

    Args:
        vlm: the model.
        source: where frames come from.
        question: what to ask about each.
        cancel: ends it.
        when_changed: leave out frames that show what the last one answered showed.
        tolerance: grey levels that a frame may differ by and not count as changed, see ``changed``.
        progress: as of ``EdgeVLM.ask``.
        options: fields of ``AskOptions``.

    Yields:
        The fields of ``Answer``, or ``error``; with ``frame`` (a number), ``time`` (ISO 8601),
        ``source`` and ``changed``.

    Raises:
        Cancelled: ``cancel`` was set.
        InputError: the source ended, or the options are invalid.
    """
    answered: UInt8 | None = None
    answer: Answer | None = None
    repeatable = not options.get("temperature") or options.get("seed") is not None
    for number, frame in enumerate(source.frames(Pause(cancel)), 1):
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        head = {"frame": number, "time": now, "source": frame.source}
        if frame.pixels is None:
            yield {**head, "error": frame.error}
            continue
        is_changed = answered is None or changed(answered, frame.pixels, tolerance)
        if when_changed and not is_changed:
            continue
        is_known = answered is not None and repeatable and not changed(answered, frame.pixels, 0)
        if answer is None or not is_known:
            picture = Opened(frame.pixels, frame.alpha)
            try:
                answer = vlm.ask(picture, question, cancel=cancel, progress=progress, **options)
            except ImageError as error:
                yield {**head, "error": str(error)}
                continue
        answered = frame.pixels
        yield {**head, "changed": is_changed, **answer.to_dict()}


def changed(before: UInt8, after: UInt8, tolerance: float) -> bool:
    """Whether two frames show something different.

    Without tolerance, one pixel is enough. With it, the mean of some block of 16x16 pixels has to
    differ by more than so many grey levels (of 255): a camera's noise is averaged out.
    """
    if before.shape != after.shape:
        return True
    if not tolerance:
        return not np.array_equal(before, after)
    difference = np.abs(_block_means(before) - _block_means(after))
    return bool(difference.max() > tolerance)


def _block_means(pixels: UInt8) -> npt.NDArray[np.float64]:
    """(rows, columns, 3), blocks at the edges smaller."""
    sums: npt.NDArray[Any] = pixels
    counts = []
    for axis in (0, 1):
        starts = np.arange(0, pixels.shape[axis], BLOCK)
        sums = np.add.reduceat(sums, starts, axis=axis, dtype=np.int64)
        counts.append(np.diff([*starts, pixels.shape[axis]]))
    means: npt.NDArray[np.float64] = sums / (counts[0][:, None] * counts[1])[..., None]
    return means
