"""edge-vlm beside llama.cpp and onnxruntime with their defaults, run by run in turns.

    python benchmarks/against_defaults.py --synthetic jina-vlm --size 2728x2046 --runs 5

Arguments are those of ``edge-vlm bench``; ``--baseline-model`` may name a bundle with vision in
fp32. The result is benchmarks/results/against_defaults.json.
"""

from __future__ import annotations

from common import bench, bench_arguments, save


def main() -> None:
    save("against_defaults", bench("edge-vlm", "--baseline", *bench_arguments(__doc__)))


if __name__ == "__main__":
    main()
