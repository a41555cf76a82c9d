"""Benchmarks of parts of padseg: bin/bench."""
