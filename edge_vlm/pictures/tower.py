"""From crops to embeddings: the vision tower and connector in onnxruntime."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_vlm.bundle.manifest import DECODER_NAME, VISION_NAME, Bundle
from edge_vlm.bundle.onnx_files import check_graph
from edge_vlm.errors import BundleError, Cancelled, InputError, VisionError
from edge_vlm.families.base import family_of
from edge_vlm.machine.engine_settings import EngineSettings, untuned
from edge_vlm.machine.memory import give_back_memory
from edge_vlm.machine.process import import_onnxruntime, keep_in_children, note_work
from edge_vlm.machine.providers import CPU, open_session

if TYPE_CHECKING:
    from edge_vlm.families.base import Tiles
    from edge_vlm.progress import CancelToken

Float32 = npt.NDArray[np.float32]
_QUIET = 4  # onnxruntime's severity "fatal"
_WARNING = 2
_TENSORS: dict[type[np.generic], str] = {np.bool_: "tensor(bool)", np.int64: "tensor(int64)"}

Feed = Mapping[str, npt.NDArray[Any]]  # one value of each for a crop, or one crop


class OnnxTower:
    """An onnxruntime session for a bundle's ``vision.onnx``.

    It is loaded when a picture is encoded: with text alone, or a picture whose embeddings or KV
    cache were kept, seconds and a gigabyte of memory are saved.

    Raises:
        BundleError: the graph reads files outside the bundle, or has operators that are not
            allowed.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: EngineSettings | None = None,
        *,
        provider: str = "cpu",
        before_load: Callable[[], None] | None = None,
        logs: bool = False,
    ) -> None:
        path = bundle.file(VISION_NAME)
        self._bundle, self._path = bundle, path
        self._processor = bundle.manifest.image_processor
        self._family = family_of(self._processor)
        check_graph(path, bundle.manifest.files, self._family.operators)
        self._engines = engines or untuned()
        # A picture that is one crop has all threads.
        self._streams = 1 if self._processor.any_size else self._engines.streams
        self._ort: Any = None
        self._provider = provider
        self._before_load = before_load
        self._severity = _WARNING if logs else _QUIET
        self._stamps = self._stamp()
        self._session: Any = None
        self._loading = threading.Lock()
        self.load_seconds = 0.0  # until now

    @property
    def identity(self) -> dict[str, Any]:
        """What an embedding depends on besides the crop."""
        files = self._bundle.manifest.files
        return {
            "files": {name: files[name].sha256 for name in files if name != DECODER_NAME},
            "onnxruntime": _version(),
            "threads": self._threads_per_stream,
            "tiles_per_call": self._engines.tiles_per_call,
            "provider": self._provider,
        }

    @property
    def is_loaded(self) -> bool:
        """Whether the session is there."""
        return self._session is not None

    @property
    def output_shape(self) -> tuple[int, int]:
        """Of one crop's embeddings: (tokens_per_crop, hidden_size)."""
        return self._processor.tokens_per_crop, self._bundle.manifest.vision.output_size

    @property
    def n_markers(self) -> int:
        """Rows of ``marker_embeddings``."""
        return self._family.n_markers

    @property
    def crops_at_once(self) -> int:
        """Crops that are encoded side by side."""
        return self._streams * self._engines.tiles_per_call

    @property
    def _threads_per_stream(self) -> int:
        return self._engines.vision_threads // self._streams

    def load(self) -> Any:
        """The session; it is created unless it is there.

        Raises:
            BundleError: the graph does not load, or has other inputs and outputs than the manifest
                says.
            InputError: the execution provider that was asked for is not installed.
        """
        note_work()
        with self._loading:
            if self._session is None:
                if self._before_load:
                    self._before_load()
                started = time.perf_counter()
                self._session = self._load()
                self.load_seconds += time.perf_counter() - started
            return self._session

    def release(self) -> None:
        """Give the session's memory back until the next picture."""
        with self._loading:
            self._session = None
        give_back_memory()

    def _stamp(self) -> dict[str, tuple[int, ...]]:
        """What shows that a file was replaced since its checksum was compared."""
        files = {name: self._bundle.file(name).stat() for name in self._bundle.manifest.files}
        return {name: (s.st_size, s.st_mtime_ns, s.st_ino) for name, s in files.items()}

    def _load(self) -> Any:
        path = self._path
        if self._stamp() != self._stamps:
            raise BundleError(f"{path.parent}: was changed after it was loaded; load it again")
        self._ort = ort = import_onnxruntime()

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads_per_stream
        options.inter_op_num_threads = 1
        spinning = str(int(self._engines.spinning))
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        options.log_severity_level = self._severity
        # A plan of the memory is made for each size, and held beside what the first run took.
        options.enable_mem_pattern = not self._processor.any_size

        def create(providers: list[str]) -> Any:
            # Its own fallback would try the same again, and print that to stdout.
            return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)

        try:
            session = open_session(self._provider, ort.get_available_providers(), create)
        except InputError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            reason = _first_line(error)
            raise BundleError(f"{path}: onnxruntime cannot load it: {reason}") from error
        self._check_interface(session)
        return keep_in_children(session)

    @property
    def providers(self) -> list[str]:
        """Ids of the execution providers in use, the first preferred."""
        return list(self.load().get_providers())

    def encode(
        self,
        tiles: Tiles,
        *,
        cancel: CancelToken | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Float32:
        """Embeddings of each crop, (n_crops, tokens_per_crop, hidden_size).

        ``progress`` is called with the number of crops done.

        Raises:
            Cancelled: ``cancel`` was set.
            VisionError: onnxruntime failed.
            BundleError: see ``load``.
        """
        found: dict[int, Float32] = {}
        for part, rows in self.encode_parts(tiles.feed, cancel=cancel):
            found |= dict(zip(part, rows, strict=True))
            if progress:
                progress(len(found))
        return np.stack([found[index] for index in range(len(tiles.crops))])

    def encode_parts(
        self,
        feed: Feed,
        wanted: Sequence[int] | None = None,
        *,
        cancel: CancelToken | None = None,
    ) -> Iterator[tuple[list[int], Float32]]:
        """Embeddings of the crops with the indices ``wanted`` (all), as they become ready.

        Args:
            feed: the graph's inputs, see ``Tiles.feed``.
            wanted: indices of crops.
            cancel: as ``encode``.

        Yields:
            Indices and embeddings, (n, tokens_per_crop, hidden_size); errors as ``encode``.
        """
        wanted = range(len(feed["crops"])) if wanted is None else wanted
        size = self._engines.tiles_per_call
        parts = [list(wanted[i : i + size]) for i in range(0, len(wanted), size)]

        def run(part: list[int]) -> tuple[list[int], Float32]:
            chosen = {name: values[part] for name, values in feed.items()}
            return part, self.encode_crops(chosen, cancel=cancel)

        streams = self._streams
        if len(parts) < 2 or streams == 1 or self.providers[0] != CPU:
            yield from map(run, parts)
            return
        # The last ones run all at once: a single one would leave the other streams' cores idle.
        at_the_end = streams + len(parts) % streams
        with ThreadPoolExecutor(at_the_end, "vision") as pool:
            running: set[Future[tuple[list[int], Float32]]] = set()
            while parts or running:
                left = len(parts) + len(running)
                while parts and len(running) < (at_the_end if left <= at_the_end else streams):
                    part = parts.pop(0)
                    try:
                        running.add(pool.submit(run, part))
                    except RuntimeError:  # there are no more threads, or the main one has ended
                        yield run(part)
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()

    def rest(self) -> None:
        """Give back what onnxruntime needed while it encoded; the weights stay."""
        is_fixed = self._session is None or (self._takes_one_crop and not self._processor.any_size)
        if not is_fixed and self.providers[0] == CPU:
            self._run_on_nothing(**{"memory.enable_memory_arena_shrinkage": "cpu:0"})

    def encode_crops(self, feed: Feed, *, cancel: CancelToken | None = None) -> Float32:
        """Embeddings of crops in one call; shape and errors as ``encode``."""
        self.load()  # shows whether the graph takes more than one
        n_crops = len(feed["crops"])
        if self._takes_one_crop and n_crops > 1:
            ones = ({name: v[[i]] for name, v in feed.items()} for i in range(n_crops))
            return np.concatenate([self.encode_crops(one, cancel=cancel) for one in ones])
        return self._run("embeddings", feed, cancel)

    @cached_property
    def marker_embeddings(self) -> Float32:
        """(n_markers, hidden_size): the rows that no crop decides."""
        if not self.n_markers:
            return np.empty((0, self.output_shape[1]), np.float32)
        return self._run_on_nothing()

    def _run_on_nothing(self, **config: str) -> Float32:
        """A run for the markers, which depend on no crop."""
        self.load()
        shape = (int(self._takes_one_crop), *self._processor.least_crop)
        feed = self._family.inputs(np.zeros(shape, np.float32), self._processor)
        output = "marker_embeddings" if self.n_markers else "embeddings"
        return self._run(output, feed, None, **config)

    def _run(self, output: str, feed: Feed, cancel: CancelToken | None, **config: str) -> Float32:
        session = self.load()
        run = self._ort.RunOptions()
        run.log_severity_level = self._severity
        for key, value in config.items():
            run.add_run_config_entry(key, value)

        def stop() -> None:
            run.terminate = True

        if cancel:
            cancel.check()
            cancel.listen(stop)
        try:
            # A copy: the array itself lies in onnxruntime's arena and would keep all of it.
            result: Float32 = session.run([output], feed, run)[0].copy()
        except Exception as error:  # see above
            if cancel and cancel.is_set:
                raise Cancelled("stopped while encoding the picture") from error
            raise VisionError(f"onnxruntime failed: {_first_line(error)}") from error
        finally:
            if cancel:
                cancel.forget(stop)
        return result

    def _check_interface(self, session: Any) -> None:
        expected = {
            "crops": ("tensor(float)", [*self._processor.crop_axes]),
            **{
                name: (_TENSORS[kind], [*self._family.extra_axes.get(name, ())])
                for name, kind in self._family.extras.items()
            },
            "embeddings": (
                "tensor(float)",
                [self._processor.vector_axis, self.output_shape[1]],
            ),
        }
        if self.n_markers:
            expected["marker_embeddings"] = ("tensor(float)", [self.output_shape[1]])
        found = {
            value.name: (value.type, list(value.shape)[1:])
            for value in (*session.get_inputs(), *session.get_outputs())
        }
        # Engines that want fixed shapes get graphs for exactly one crop.
        batch = next((v.shape[0] for v in session.get_inputs() if v.name == "crops"), None)
        self._takes_one_crop = batch == 1
        if isinstance(batch, int) and batch != 1:
            raise BundleError(f"{self._path}: takes {batch} crops at a time instead of one")
        if found != expected:
            raise BundleError(f"{self._path}: its inputs and outputs are not those of the manifest")


def _version() -> str:
    try:
        return metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:  # a build for some accelerator has another name
        return str(import_onnxruntime().__version__)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
