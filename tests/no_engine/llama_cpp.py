"""Stands in front of the real package in processes that unit tests start."""

raise ImportError("a unit test asked for llama.cpp; mark it with pytest.mark.engine")
