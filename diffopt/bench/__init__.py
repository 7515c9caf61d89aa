"""Benchmarks: the workloads, the models they run on, the run record and the report made from it."""
