"""Trace-driven benchmarking of LLM serving: replay, simulate, report."""
