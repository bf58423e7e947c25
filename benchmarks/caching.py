"""What the caches save: python benchmarks/caching.py [BUNDLE] [--size 2728x2046]

Three questions about a picture of noise: the first, the second in a new process, and one about the
picture with a small part changed. Prints JSON: seconds to the first token with loading, crops
encoded and known, bytes on disk. Ratios are of one run on one machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
import json, sys, time
started = time.perf_counter()
import numpy as np
from edge_vlm import EdgeVLM, MachineSettings
bundle, cache, width, height, changed = sys.argv[1:]
pixels = np.random.default_rng(0).integers(0, 256, (int(height), int(width), 3), np.uint8)
if changed == "changed":
    pixels[int(height) // 3 :, int(width) // 3 :][:24, :24] ^= 0xFF
with EdgeVLM.load(bundle, settings=MachineSettings(cache=cache)) as vlm:
    with vlm.stream(pixels, "What is shown?", max_tokens=2) as stream:
        next(stream, None)
        first = time.perf_counter() - started
        for _ in stream: pass
    answer = stream.answer
print(json.dumps({
    "seconds_to_first_token": round(first, 3),
    "vision_seconds": round(answer.timings.vision, 3),
    "encoded_crops": answer.encoded_crops,
    "cached_crops": answer.cached_crops,
    "restored_tokens": answer.restored_tokens,
}))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?", default="demo")
    parser.add_argument("--size", default="2728x2046")
    arguments = parser.parse_args()
    size = arguments.size.split("x")
    with tempfile.TemporaryDirectory() as cache:
        # The first process also reads the bundle's files into the system's memory.
        ask(arguments.bundle, f"{cache}/warm", size, "same")
        found = {
            "first": ask(arguments.bundle, f"{cache}/kept", size, "same"),
            "second": ask(arguments.bundle, f"{cache}/kept", size, "same"),
            "changed": ask(arguments.bundle, f"{cache}/kept", size, "changed"),
        }
        kept = Path(cache, "kept", "pictures", "entries")
        n_bytes = {
            kind: sum(path.stat().st_size for path in kept.glob(f"*.{kind}"))
            for kind in ("tile", "prefix")
        }
    first = found["first"]["seconds_to_first_token"]
    print(
        json.dumps(
            {
                **found,
                "second_to_first": round(found["second"]["seconds_to_first_token"] / first, 4),
                "changed_to_first_vision": round(
                    found["changed"]["vision_seconds"] / found["first"]["vision_seconds"], 4
                ),
                "bytes_on_disk": n_bytes,
            },
            indent=2,
        )
    )


def ask(bundle: str, cache: str, size: list[str], picture: str) -> dict[str, float]:
    """One process, one question."""
    result = subprocess.run(
        [sys.executable, "-c", CODE, bundle, cache, *size, picture],
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(result.stdout)
    return found


if __name__ == "__main__":
    main()
