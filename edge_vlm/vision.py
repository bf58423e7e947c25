"""From crops to embeddings: the vision tower and connector in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.bundle import VISION_NAME, Bundle
from edge_vlm.cancel import CancelToken
from edge_vlm.errors import BundleError, Cancelled, InputError, VisionError
from edge_vlm.onnx_scan import external_files
from edge_vlm.providers import open_session
from edge_vlm.tiling import Tiles

Float32 = npt.NDArray[np.float32]
_QUIET = 4  # onnxruntime's severity "fatal"
_WARNING = 2


class VisionTower:
    """An onnxruntime session for a bundle's ``vision.onnx``.

    Raises:
        BundleError: the graph reads files outside the bundle, does not load, or has other inputs
            and outputs than the manifest says.
        InputError: the execution provider that was asked for is not installed.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int, provider: str = "cpu", logs: bool = False
    ) -> None:
        path = bundle.file(VISION_NAME)
        for name in external_files(path):
            if name not in bundle.manifest.files:
                raise BundleError(f"{path}: reads {name!r}, which is not a file of the bundle")
        import onnxruntime as ort

        self._ort = ort
        self._severity = _WARNING if logs else _QUIET
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = self._severity

        def create(providers: list[str]) -> Any:
            # Its own fallback would try the same again, and print that to stdout.
            return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)

        try:
            self._session = open_session(provider, ort.get_available_providers(), create)
        except InputError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BundleError(
                f"{path}: onnxruntime cannot load it: {_first_line(error)}"
            ) from error
        self._check_interface(bundle)

    @property
    def providers(self) -> list[str]:
        """Ids of the execution providers in use, the first preferred."""
        return list(self._session.get_providers())

    def encode(
        self,
        tiles: Tiles,
        *,
        cancel: CancelToken | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Float32:
        """Embeddings of each crop, (n_crops, tokens_per_crop, hidden_size), one crop at a time.

        ``progress`` is called with the number of crops done.

        Raises:
            Cancelled: ``cancel`` was set.
            VisionError: onnxruntime failed.
        """
        out: list[Float32] = []
        for index in range(len(tiles.crops)):
            feed = {
                "crops": tiles.crops[index : index + 1],
                "is_last": tiles.is_last[index : index + 1],
            }
            out.append(self._run("embeddings", feed, cancel)[0])
            if progress:
                progress(index + 1)
        return np.stack(out)

    def marker_embeddings(self) -> Float32:
        """(3, hidden_size): decoder embeddings of <im_start>, <im_col> and <im_end>."""
        crops = np.zeros((0, *self._crop_shape), np.float32)
        return self._run("marker_embeddings", {"crops": crops, "is_last": np.zeros(0, bool)}, None)

    def _run(self, output: str, feed: dict[str, Any], cancel: CancelToken | None) -> Float32:
        run = self._ort.RunOptions()
        run.log_severity_level = self._severity

        def stop() -> None:
            run.terminate = True

        if cancel:
            cancel.check()
            cancel.listen(stop)
        try:
            result: Float32 = self._session.run([output], feed, run)[0]
        except Exception as error:  # see above
            if cancel and cancel.is_set:
                raise Cancelled("stopped while encoding the picture") from error
            raise VisionError(f"onnxruntime failed: {_first_line(error)}") from error
        finally:
            if cancel:
                cancel.forget(stop)
        return result

    def _check_interface(self, bundle: Bundle) -> None:
        settings = bundle.manifest.image_processor
        hidden = bundle.manifest.vision.output_size
        self._crop_shape = (settings.n_patches, settings.patch_values)
        expected = {
            "crops": ("tensor(float)", [*self._crop_shape]),
            "is_last": ("tensor(bool)", []),
            "embeddings": ("tensor(float)", [settings.tokens_per_crop, hidden]),
        }
        found = {
            value.name: (value.type, list(value.shape)[1:])
            for value in (*self._session.get_inputs(), *self._session.get_outputs())
        }
        markers = found.pop("marker_embeddings", None)
        if found != expected or markers != ("tensor(float)", [hidden]):
            raise BundleError(
                f"{bundle.path / VISION_NAME}: its inputs and outputs are not those of the manifest"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
