"""``python -m edge_vlm`` is ``edge-vlm``."""

from edge_vlm.cli.main import main

if __name__ == "__main__":
    main()
