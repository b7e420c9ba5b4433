"""Stands for a heavy framework: being in `sys.modules` is what tests look for."""
