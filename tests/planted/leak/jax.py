"""Stands for a framework that happens to be installed."""
