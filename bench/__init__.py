"""Benchmarks: run as modules, one JSON line each."""
