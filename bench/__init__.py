"""Benchmarks: one command per table, records with their provenance, and RESULTS.md made from the records."""
