"""Worker processes of ``MultiWorkerMirroredStrategy`` on this machine: started together, looked at when all ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 300
"""Seconds after which workers that wait for each other are given up."""


def free_ports(count: int) -> list[int]:
    """Return free ports."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def run_workers(run: list[str], folder: Path, count: int) -> list[tuple[int, str]]:
    """Return the exit status and the messages of each of `count` processes; 0 asks for one without a strategy.

    Parameters
    ----------
    run : list of str
        The interpreter's arguments, such as ``["-m", module]``. What runs is given a file to write, the worker's
        number, and the ports of all.
    folder : path
        Files are ``<count>-<number>.npz`` in it.
    count : int
        How many workers.
    """
    ports = [str(port) for port in free_ports(count)]
    path = os.pathsep.join(each for each in [str(ROOT), *sys.path] if each)
    settings = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": path}
    started = []
    for index in range(max(count, 1)):
        file = str(folder / f"{count}-{index}.npz")
        log = (folder / f"{count}-{index}.log").open("w+")
        command = [sys.executable, "-W", "ignore", *run, file, str(index), *ports]
        started.append((subprocess.Popen(command, env=settings, cwd=ROOT, stdout=log, stderr=log), log))
    found = []
    try:
        for process, log in started:
            status = process.wait(LIMIT)
            log.seek(0)
            found.append((status, log.read()[-4000:]))
    finally:
        for process, log in started:
            process.kill()  # does nothing to one that has ended
            process.wait()
            log.close()
    return found
