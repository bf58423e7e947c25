"""The stress test of ``tests/stress.py``, for as many minutes as EDGE_VLM_TEST_STRESS says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MINUTES = os.environ.get("EDGE_VLM_TEST_STRESS")  # a fixture clears the variables


@pytest.mark.engine
@pytest.mark.fullsize
@pytest.mark.skipif(not MINUTES, reason="EDGE_VLM_TEST_STRESS=20 runs it for 20 minutes")
def test_threads_that_ask_cancel_and_close_at_random() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.stress", "--minutes", MINUTES or "0"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["wrong"] == []
    assert found["memory_is_flat"] is not False
    assert found["outcomes"]["answered"] > 100
