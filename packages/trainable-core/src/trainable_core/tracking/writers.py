"""Where the numbers of a training go: a CSV file, or a folder for TensorBoard.

Both take scalars by step, name of the tensor, and name of the quantity, and both are whole at any moment: a process
that is killed loses nothing that was written. TensorBoard's files need no library: a scalar is a few bytes of protobuf
in a record with two checksums.
"""

from __future__ import annotations

import csv
import io
import os
import secrets
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trainable_core.documents.files import as_path, require_writable
from trainable_core.errors import DocumentError

COLUMNS = ("step", "tensor", "quantity", "value")
"""Header of the CSV file."""

SUFFIX = ".csv"


class Scalar(NamedTuple):
    """One number of a training."""

    step: int
    tensor: str
    quantity: str
    value: float


class Writer(ABC):
    """Takes the numbers of one record after the other.

    Parameters
    ----------
    path : path
        The file.

    Notes
    -----
    The constructors of subclasses find out, before the training does, whether the place can be written to, and raise
    DocumentError. Later nothing is raised: a training goes on without its records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def head(self) -> bytes:
        """Return what a file begins with."""

    @abstractmethod
    def body(self, scalars: Iterable[Scalar]) -> bytes:
        """Return what is appended for the numbers of a record."""

    def begin(self) -> None:
        """Make the file if it is not there.

        Raises
        ------
        DocumentError
            When it can't be written.
        """
        try:
            self._append(b"")
        except OSError as error:
            raise DocumentError(self.path, f"can't be written: {error}") from error

    def write(self, scalars: Iterable[Scalar]) -> str:
        """Append the numbers of a record, and let them reach the disk; return what was lost, or an empty string."""
        content = self.body(scalars)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            made = self._append(content)
        except OSError as error:
            return f"it can't be written, and the record is lost: {error}"
        return "it was removed or emptied, and is begun anew: what was in it is lost" if made else ""

    def _append(self, content: bytes) -> bool:
        """Append all of it or nothing, and return whether the file was empty."""
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            left = content if end else self.head() + content
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise
        return not end


def writer_for(path: object) -> Writer:
    """Return the writer of a place: a CSV file where the name ends so, else a folder for TensorBoard."""
    place = as_path(path)
    return CsvWriter(place) if place.suffix.lower() == SUFFIX else TensorBoardWriter(place)


class CsvWriter(Writer):
    """Appends to a CSV file with one number a line; goes on where an earlier run stopped.

    Parameters
    ----------
    path : path
        The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        require_writable(path)
        if path.exists() and path.stat().st_size:
            _require_columns(path)
        self.begin()

    def head(self) -> bytes:
        """Return the names of the columns."""
        return f"{','.join(COLUMNS)}\n".encode()

    def body(self, scalars: Iterable[Scalar]) -> bytes:
        """Return a line for each number."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((s.step, s.tensor, s.quantity, repr(s.value)) for s in scalars)
        return text.getvalue().encode()


def read_csv(path: object) -> list[Scalar]:
    """Return what a `CsvWriter` wrote; of a number that was written again after a resumption, the last.

    Raises
    ------
    DocumentError
        When it is missing, or no such file; names the line.
    """
    place = as_path(path)
    if not place.is_file():
        raise DocumentError(place, "no such file")
    _require_columns(place)
    found: dict[tuple[int, str, str], Scalar] = {}
    try:
        with place.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if number > 1 and row:
                    step, tensor, quantity, value = row
                    found[int(step), tensor, quantity] = Scalar(int(step), tensor, quantity, float(value))
    except (OSError, ValueError, csv.Error) as error:  # ValueError: also what is no text
        raise DocumentError(place, f"line {number}: {error}") from error
    return sorted(found.values(), key=lambda scalar: scalar.step)


def _require_columns(path: Path) -> None:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline(256).strip()
    except (OSError, ValueError) as error:
        raise DocumentError(path, f"it can't be read: {error}") from error
    if first != ",".join(COLUMNS):
        raise DocumentError(path, "it was not written by `track`", f"its first line must be {','.join(COLUMNS)}.")


class TensorBoardWriter(Writer):
    """Writes an event file into a folder that TensorBoard is pointed to; each run writes a file of its own.

    Parameters
    ----------
    folder : path
        Made if it is not there.

    Notes
    -----
    An event is the protobuf message ``Event`` with ``wall_time`` (1, double), ``step`` (2, int64) and ``summary`` (5),
    which holds ``value`` (1) messages of ``tag`` (1) and ``simple_value`` (2, float). A record is the length of the
    event, a checksum of that, the event, and a checksum of it; the checksum is CRC-32C, rotated and offset.
    """

    def __init__(self, folder: Path) -> None:
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise DocumentError(folder, f"can't be written: {error}", f"a name in {SUFFIX} writes a table.") from error
        super().__init__(folder / name)
        self.begin()

    def head(self) -> bytes:
        """Return the event that tells the version."""
        return record_of(_double(1, time.time()) + _text(3, "brain.Event:2"))

    def body(self, scalars: Iterable[Scalar]) -> bytes:
        """Return an event for each step."""
        by_step: dict[int, list[Scalar]] = {}
        for scalar in scalars:
            by_step.setdefault(scalar.step, []).append(scalar)
        return b"".join(record_of(event_of(step, found)) for step, found in by_step.items())


def event_of(step: int, scalars: Iterable[Scalar]) -> bytes:
    """Return the event of a step's numbers."""
    values = (_text(1, tag_of(each)) + _float(2, each.value) for each in scalars)
    summary = b"".join(_message(1, value) for value in values)
    return _double(1, time.time()) + _key(2, 0) + _varint(step) + _message(5, summary)


def tag_of(scalar: Scalar) -> str:
    """Return the name of a number in TensorBoard, which groups names by what comes before the first slash."""
    return f"{scalar.quantity}/{scalar.tensor.replace(': ', '.')}"


# ---- protobuf, as far as scalars need it ----------------------------------------------------------------------------


def _varint(number: int) -> bytes:
    parts = list(_septets(number))
    return bytes([*(part | 0x80 for part in parts[:-1]), parts[-1]])


def _septets(number: int) -> Iterator[int]:
    yield number & 0x7F
    while number := number >> 7:
        yield number & 0x7F


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _message(field: int, content: bytes) -> bytes:
    return _key(field, 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _double(field: int, value: float) -> bytes:
    return _key(field, 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _key(field, 5) + struct.pack("<f", max(min(value, _LARGEST), -_LARGEST) if value == value else value)  # noqa: PLR0124 - NaN


_LARGEST = 3.4028234e38
"""Largest float32: larger numbers are written as it."""


# ---- records --------------------------------------------------------------------------------------------------------


def record_of(content: bytes) -> bytes:
    """Return an event with its length and its checksums."""
    length = struct.pack("<Q", len(content))
    return length + _checksum(length) + content + _checksum(content)


def _checksum(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _table() -> Iterator[int]:
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
        yield crc


_TABLE = tuple(_table())


def crc32c(content: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of some bytes.

    Examples
    --------
    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
