"""Divergence with and without an importance matrix, same type: `python -m benchmarks.imatrix_gain`.

Held-out prompts with pictures, none of which the matrix was collected from.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from edge_vlm_export import export_checkpoint

from edge_vlm.bundle.report import Report

DEMO = Path(__file__).parent.parent / "models" / "demo" / "checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description="What an importance matrix gains.")
    parser.add_argument("--checkpoint", type=Path, default=DEMO)
    parser.add_argument("--samples", default="builtin", help="a folder of pictures, or builtin")
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q4_0", "iq4_xs"])
    options = parser.parse_args()
    print(f"{'type':8}{'divergence':>12}{'with':>9}{'same token':>12}{'with':>9}")
    for kind in options.types:
        plain = measure(options.checkpoint, kind, options.samples, matrix=False)
        helped = measure(options.checkpoint, kind, options.samples, matrix=True)
        print(
            f"{kind:8}{plain[0]:>12.4f}{helped[0]:>9.4f}{plain[1]:>12.1%}{helped[1]:>9.1%}",
            flush=True,
        )


def measure(checkpoint: Path, kind: str, samples: str, *, matrix: bool) -> tuple[float, float]:
    """Mean divergence in nats and share of same tokens, on the held-out samples."""
    from edge_vlm_export.steps.against import measure_bundle

    from edge_vlm.bundle.manifest import Bundle

    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as folder:
        out = export_checkpoint(
            checkpoint,
            Path(folder) / "bundle",
            vision="fp32",
            decoder=kind,
            calibrate=samples if matrix else None,
            measure=False,
            allow_loss=True,
            on_report=reports.append,
        )
        found = measure_bundle(Bundle.open(out), checkpoint, samples=samples).decoder
    if found is None:
        raise RuntimeError("nothing was measured")
    return found.divergence_mean, found.same_top


if __name__ == "__main__":
    main()
