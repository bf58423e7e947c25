"""What ``huggingface_hub`` tells while it works: its exceptions as one line, its bars as counts."""

from __future__ import annotations

import _thread
import errno
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import EdgeVLMError, InputError

if TYPE_CHECKING:
    from edge_vlm_export.counted import Progress


class Counter:
    """Tells a callback how much of a stage is done; what the callback raises stops the download.

    Xet, the hub's storage, counts in a thread of its own, which would lose an exception: it is kept
    here, and the calling thread interrupted as by Ctrl-C.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.raised: BaseException | None = None
        self._caller = threading.current_thread()

    def each(
        self,
        stage: str,
        sizes: Mapping[str, int],
        step: Callable[[str, Callable[[int], None]], object],
    ) -> None:
        """Take a step for each file; what it is given counts the bytes of it that are done."""
        done, total = 0, sum(sizes.values())
        for file, size in sizes.items():

            def told(n_bytes: int, before: int = done, size: int = size) -> None:
                self._tell(stage, before + min(n_bytes, size), total)

            step(file, told)
            told(size)
            done += size
            if self.raised:  # and nothing interrupted: this is not the main thread
                raise self.raised

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is None or self.raised:
            return
        try:
            self.progress(stage, done, total)
        except BaseException as error:
            self.raised = error
            if threading.current_thread() is self._caller:
                raise
            if self._caller is threading.main_thread():
                _thread.interrupt_main()


def bar(told: Callable[[int], None]) -> type:
    """A class of bars that draw nothing and tell how many bytes of one file are done."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        most = 0  # Xet has two bars, for what is received and what is written

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            Bar.most = max(Bar.most, int(self.n))
            told(Bar.most)

    return Bar


@contextmanager
def client(name: str, cache: Path, counter: Counter) -> Iterator[None]:
    """Keep the client's warnings off stderr, and turn its exceptions into this project's."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except BaseException as error:
        if counter.raised:
            raise counter.raised from None
        if isinstance(error, EdgeVLMError) or not isinstance(error, Exception):
            raise
        raise _explained(error, name, cache) from error
    finally:
        logging.set_verbosity(verbosity)


def _explained(error: Exception, name: str, cache: Path) -> EdgeVLMError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # a question about a file failed: why
        if not isinstance(error.__cause__, Exception):
            return InputError(f"{name}: is not in {cache}, and downloads are off (--offline)")
        error = error.__cause__
    access = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{name}: its terms have to be accepted on the hub's page; then {access}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(f"{name}: no such model on the hub, or a private one: {access}")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{name}: has no revision {name.partition('@')[2] or 'main'}")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return InputError(f"{name}: the hub refuses access ({status}); {access}")
        return EdgeVLMError(f"{name}: the hub failed ({status}); try again later")
    kept = "what is finished is kept for the next try"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return EdgeVLMError(f"{cache}: no space left; {kept}")
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return EdgeVLMError(
        f"{name}: the download failed ({reason}); {kept}, and --offline uses an earlier download"
    )
