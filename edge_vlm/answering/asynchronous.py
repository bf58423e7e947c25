"""The same for asyncio: work runs in threads, and stops when its task is cancelled.

Progress is reported in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from edge_vlm.answering.model import Chat, EdgeVLM, Stream
from edge_vlm.errors import Cancelled, DecoderError
from edge_vlm.progress import CancelToken, OnProgress, Progress

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from edge_vlm.answering.answer import (
        Answer,
        AskKeywords,
        LoadKeywords,
        RequestKeywords,
        TurnKeywords,
    )
    from edge_vlm.pictures.picture import EncodedImage

T = TypeVar("T")


class _Closing:
    """``async with`` closes."""

    async def aclose(self) -> None:
        """Free what is held."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class AsyncStream(_Closing):
    """Pieces of an answer: ``async for piece in stream``; afterwards ``answer`` holds all of it."""

    def __init__(self, begin: Callable[..., Stream], how: TurnKeywords) -> None:
        self._stream: Stream | None = None
        self._is_closed = False
        self._given, self._cancel = how.get("cancel"), CancelToken()
        if self._given:
            self._given.listen(self._cancel.set)
        report = _in_loop(how.get("progress"))
        self._begin = partial(begin, **{**how, "progress": report, "cancel": self._cancel})
        # One thread for the whole answer: libgomp's threads belong to the one that calls it.
        self._thread = ThreadPoolExecutor(1, "edge-vlm answer")

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        if self._is_closed:
            if self._stream and self._stream.is_complete:
                raise StopAsyncIteration
            raise DecoderError("the stream was closed")
        try:
            piece = await _in_thread(self._next, self._cancel, self._thread)
        except BaseException as error:
            was_closed = self._is_closed
            await self.aclose()
            if was_closed and isinstance(error, Cancelled):
                raise DecoderError("the stream was closed") from error
            raise
        if piece is None:
            await self.aclose()
            raise StopAsyncIteration
        return piece

    def _next(self) -> str | None:
        if self._stream is None:
            self._stream = self._begin()
        return next(self._stream, None)

    @property
    def answer(self) -> Answer:
        """As of ``Stream``.

        Raises:
            DecoderError: the stream was not read to its end.
        """
        if self._stream is None:
            raise DecoderError("the answer is not complete; read the stream to its end first")
        return self._stream.answer

    async def result(self) -> Answer:
        """Read to the end; the whole answer."""
        async for _ in self:
            pass
        return self.answer

    async def aclose(self) -> None:
        """Stop here; what was yielded stays valid."""
        self._is_closed = True
        self._cancel.set()
        if self._given:
            self._given.forget(self._cancel.set)
            self._given = None
        with contextlib.suppress(RuntimeError):  # it was closed before
            close = self._thread.submit(lambda: self._stream.close() if self._stream else None)
            self._thread.shutdown(wait=False)
            await asyncio.wrap_future(close)


class AsyncChat(_Closing):
    """A conversation; made by ``AsyncEdgeVLM.chat``. ``chat`` is the one that it works with."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    async def ask(self, *asked: Any, **how: Unpack[TurnKeywords]) -> Answer:
        """Answer the next question, (question) or (images, question)."""
        return await self.stream(*asked, **how).result()

    def stream(
        self, *asked: Any, keep_partial: bool = False, **how: Unpack[TurnKeywords]
    ) -> AsyncStream:
        """As ``ask``, piece by piece; see ``Chat.stream``."""
        return AsyncStream(partial(self.chat.stream, *asked, keep_partial=keep_partial), how)

    async def aclose(self) -> None:
        """Stop its answer and free the KV cache."""
        await asyncio.to_thread(self.chat.close)


class AsyncEdgeVLM(_Closing):
    """A loaded model; ``vlm`` is the one that it works with.

        async with await AsyncEdgeVLM.load() as vlm:
            print(await vlm.ask("receipt.jpg", "What is the total?"))

    A task that is cancelled stops its answer between two operators of an engine.
    """

    def __init__(self, vlm: EdgeVLM) -> None:
        self.vlm = vlm

    @classmethod
    async def load(
        cls, model: str | os.PathLike[str] | None = None, **how: Unpack[LoadKeywords]
    ) -> AsyncEdgeVLM:
        """Load a bundle; arguments and errors as ``EdgeVLM.load``."""
        how["progress"] = _in_loop(how.get("progress"))
        return cls(await asyncio.to_thread(EdgeVLM.load, model, **how))

    async def ask(
        self, images: Any = (), question: str | None = None, **how: Unpack[RequestKeywords]
    ) -> Answer:
        """Answer a question about pictures; arguments and errors as ``EdgeVLM.ask``."""
        return await self.stream(images, question, **how).result()

    def stream(
        self, images: Any = (), question: str | None = None, **how: Unpack[RequestKeywords]
    ) -> AsyncStream:
        """As ``ask``, piece by piece. What is wrong with the request is raised by the first one."""
        return AsyncStream(partial(self.vlm.stream, images, question), how)

    async def encode(
        self,
        image: Any,
        *,
        max_tiles: int | None = None,
        crop: Any = None,
        progress: OnProgress | None = None,
    ) -> EncodedImage:
        """Look at a picture once; see ``EdgeVLM.encode``."""
        how: dict[str, Any] = {"max_tiles": max_tiles, "crop": crop, "progress": _in_loop(progress)}
        token = CancelToken()
        return await _in_thread(partial(self.vlm.encode, image, cancel=token, **how), token)

    def chat(self, **options: Unpack[AskKeywords]) -> AsyncChat:
        """A conversation that keeps its KV cache; see ``EdgeVLM.chat``."""
        return AsyncChat(self.vlm.chat(**options))

    async def aclose(self) -> None:
        """Free the model and close all of it; see ``EdgeVLM.close``."""
        await asyncio.to_thread(self.vlm.close)


async def _in_thread(
    work: Callable[[], T], cancel: CancelToken, executor: Executor | None = None
) -> T:
    """Run ``work`` in a thread; if the task is cancelled it is stopped, and its end waited for."""
    future = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cancel.set()
        await asyncio.wait([future])
        future.exception()  # it was stopped: nobody else will look
        raise


def _in_loop(progress: OnProgress | None) -> OnProgress | None:
    """The same callback, called in the event loop."""
    if progress is None:
        return None
    loop = asyncio.get_running_loop()

    def report(event: Progress) -> None:
        loop.call_soon_threadsafe(progress, event)

    return report
