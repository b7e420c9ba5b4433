"""Targets: what a model can be deployed with, and what each of them can express."""
