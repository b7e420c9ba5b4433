"""With TRAINABLE_SHARE every test is run, with a share of its cases."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
CASES = 8


def collected(folder: Path, share: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "TRAINABLE_SHARE": share}, capture_output=True, text=True, check=True
    )
    return [line.rpartition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def test_a_share_has_every_test_and_fewer_cases(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    numbers = f"@pytest.mark.parametrize('number', range({CASES * CASES}))"
    letters = "@pytest.mark.parametrize('letter', 'ab')"
    tests = f"""import pytest

{numbers}
{letters}
def test_many(number, letter):
    pass

{letters}
def test_few(letter):
    pass

def test_one():
    pass

@pytest.mark.all_cases
{letters}
@pytest.mark.parametrize('again', range({CASES}))
def test_all(letter, again):
    pass
"""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = all_cases\n", encoding="utf-8")
    (tmp_path / "test_it.py").write_text(tests, encoding="utf-8")
    everything, share = (collected(tmp_path, each) for each in ("1", str(CASES)))
    assert len(everything) == 2 * CASES * CASES + 2 + 1 + 2 * CASES
    assert set(share) < set(everything)
    kept = Counter(name.partition("[")[0] for name in share)
    assert kept["test_few"] in {1, 2}
    assert kept["test_one"] == 1
    assert kept["test_all"] == 2 * CASES
    # 128 cases, of which an eighth is kept: 16, and four standard deviations of a binomial distribution are 15
    assert 1 <= kept["test_many"] <= 31
    letters_kept = {name.rpartition("[")[2].rstrip("]").split("-")[0] for name in share if "test_many" in name}
    assert letters_kept == {"a", "b"}
    assert collected(tmp_path, str(CASES)) == share
