"""Mutation fuzzing of documents: bytes and JSON values, damaged in the ways that parsers trip over."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import zlib
from typing import Any

# A document that is read in a minute at this length is read in seconds at the other.
INPUTS = 20_000 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 500


def seeded(text: str) -> random.Random:
    """Return a random generator that is the same for the same text."""
    return random.Random(zlib.crc32(text.encode()))  # noqa: S311 - tests need numbers that come back, not secrets


def _deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


DEPTHS = (60, 600)
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 17, 1.5, -0.0, 2**63, -(2**70), 10**400, 1e308, float("nan"), float("inf"), "", "0",
    "LSQ", "SYMMETRIC", "UNIFORM", "minmax", "threshold", "../../etc/passwd", "\x00", "\ud800", "é" * 300, "a" * 70_000,
    "*" * 40 + "b", "[", [], {}, [[]], [None], {"": None}, {"__class__": "os.system"},
]  # fmt: skip


def _hostile(rng: random.Random) -> Any:
    if rng.randrange(20) == 0:
        return _deep(rng.choice(DEPTHS))
    return copy.deepcopy(rng.choice(HOSTILE))


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a document."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, item in items:
        found.append((value, key))
        _places(item, found)
    return found


def mutated_value(document: Any, rng: random.Random) -> Any:
    """Return a document with one to three of its parts replaced, removed, renamed, repeated, swapped or wrapped."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        try:
            places = _places(document, [])
        except RecursionError:  # one deep value inside another
            return document
        if not places:
            return _hostile(rng)
        holder, key = rng.choice(places)
        way = rng.randrange(8)
        if way <= 3:
            holder[key] = _hostile(rng)
        elif way == 4:
            del holder[key]
        elif way == 5 and isinstance(holder, dict):
            holder[rng.choice([f"{key}x", "", str(key).upper(), "schema_version", "target"])] = holder[key]
        elif way == 6:
            other, at = rng.choice(places)
            with contextlib.suppress(RecursionError):  # too deep to be copied
                holder[key] = copy.deepcopy(other[at])
        else:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"0": holder[key]}
    return document


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return content with one to four bits flipped, bytes set, stretches removed, repeated, moved or cut off."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        size = len(damaged)
        if not size:
            return rng.randbytes(rng.randrange(64))
        at, length = rng.randrange(size), rng.choice([1, 2, 4, 8, 64])
        way = rng.randrange(7)
        if way == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            damaged[at] = rng.choice([0, 9, 34, 44, 45, 58, 91, 93, 123, 125, 127, 128, 255])
        elif way == 2:
            damaged[at : at + length] = rng.randbytes(length)
        elif way == 3:
            del damaged[at : at + length]
        elif way == 4:
            damaged[at:at] = damaged[at : at + length] * rng.choice([1, 2, 50])
        elif way == 5:
            to = rng.randrange(size)
            damaged[to : to + length] = damaged[at : at + length]
        else:
            del damaged[at:]
    return bytes(damaged)
