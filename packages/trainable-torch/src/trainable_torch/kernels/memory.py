"""How numbers lie in the memory that the loops are given: what `native` writes and the loops read."""

PART = 2**8
"""Elements of a gradient that are masked at once, or not at all."""

INTEGERS = 16
"""Integers at the beginning of the table of a layer's tensor; `native.part` says which."""

SLOTS = 21
"""Numbers of 8 bytes in that table: the integers, then floats. The grid's numbers and the marks come behind it."""
