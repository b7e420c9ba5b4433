"""Stands for a heavy framework: being in `sys.modules` is what tests look for."""

print("beta framework says hello")  # noqa: T201 - frameworks do, on standard output
