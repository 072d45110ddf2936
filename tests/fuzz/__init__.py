"""Differential fuzzer: random small models, held against torch's own derivatives in float64."""
