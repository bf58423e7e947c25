"""onnxruntime, imported so that it keeps to itself."""

from __future__ import annotations

import os
from typing import Any


def import_onnxruntime() -> Any:
    """The onnxruntime module, its telemetry off.

    Since 2026 the released packages for Linux and macOS write a device id into the user's cache
    folder and send events to Microsoft unless ``ORT_DISABLE_TELEMETRY`` is set before they are
    loaded (https://github.com/microsoft/onnxruntime/pull/27379); on Windows events go to the
    system until they are switched off.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("ORT_TELEMETRY_DISABLED", "1")  # the name in releases before
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime
