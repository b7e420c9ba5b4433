"""The tables of docs/evidence.md, between its two markers; the text around them is written by hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cells import (
    FLOAT,
    FRAMEWORKS,
    NEAREST,
    NOT_TRIED,
    RATED,
    RATED_METHODS,
    RATES,
    ROWS,
    SEEDS,
    SETTINGS,
    STES,
    Cell,
    cell_of,
)
from problems import PROBLEMS, Problem

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
BEGIN, END = "<!-- begin of results -->", "<!-- end of results -->"
TITLES = {"torch": "PyTorch", "keras": "Keras 3"}

LEARNED = {"cnn": ("LSQ", "TQT", "LSQ_PLUS", "PARETOQ"), "transformer": ("LSQ", "LSQ_PLUS"), "recurrent": ("LSQ",)}
"""Methods that learn thresholds, by the networks on which they are compared with fixed ones."""

FEWEST = 2
"""Seeds that a spread needs."""

Scores = dict[int, float]
"""Scores by seed."""
Found = dict[Cell, dict[str, Any]]


def write(records: Iterable[dict[str, Any]]) -> None:
    """Put tables of these records between the page's markers."""
    found = {cell_of(record): record for record in records}
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text(found)}\n\n{END}{after}", encoding="utf-8")


def text(found: Found) -> str:
    """Return everything that is generated."""
    seconds = sum(record["seconds"] for record in found.values())
    conditions = f"{len(found)} runs, {seconds / 3600:.1f} hours of CPU time."
    parts = [conditions, "## Expectations", expectations(found)]
    for problem in PROBLEMS.values():
        parts += [f"## {problem.title}", _unit(problem)]
        for framework in FRAMEWORKS:
            tables = [_table(found, framework, problem, "score")]
            if any("reestimated" in record for cell, record in found.items() if cell.network == problem.name):
                tables += ["With statistics of batch normalization that were estimated anew:"]
                tables += [_table(found, framework, problem, "reestimated")]
            if tables[0]:
                parts += [f"### {TITLES[framework]}, {problem.name}", *tables]
    return "\n\n".join([*parts, "## Learning rates", _rates(found)])


def _unit(problem: Problem) -> str:
    better = "higher" if problem.higher_is_better else "lower"
    metric = problem.metric[0].upper() + problem.metric[1:]
    return f"{metric}; {better} is better. {problem.steps} training steps in batches of {problem.batch}."


def scores(
    found: Found,
    framework: str,
    network: str,
    setting: str,
    method: str,
    *,
    rate: float | None = None,
    what: str = "score",
) -> Scores:
    """Return the scores of one entry of a table, by seed; `rate` of what quantizers learn, by default the method's."""
    qparams = ROWS[method].qparams if rate is None else rate
    cells = {seed: Cell(framework, network, setting, method, seed, qparams) for seed in SEEDS}
    return {seed: found[cell][what] for seed, cell in cells.items() if what in found.get(cell, {})}


def comparable(found: Found, *entries: tuple[str, str, str, str]) -> list[Scores]:
    """Return the scores of entries (framework, network, setting, method), of the seeds that can be compared.

    There all began with the same float model: two machines train two, and accuracies differ with them.
    """
    all_scores = [scores(found, *each) for each in entries]
    models = [scores(found, *each, what="float") for each in entries]
    common = sorted(set.intersection(*map(set, all_scores)))
    seeds = [seed for seed in common if len({model.get(seed) for model in models}) == 1]
    return [{seed: each[seed] for seed in seeds} for each in all_scores]


def entry(of: Scores, digits: int) -> str:
    """Return mean and standard deviation, with the number of seeds where some are missing."""
    if not of:
        return ""
    mean = f"{statistics.mean(of.values()):.{digits}f}"
    spread = f" ± {statistics.stdev(of.values()):.{digits}f}" if len(of) > 1 else ""
    return mean + spread + ("" if len(of) == len(SEEDS) else f" ({len(of)})")


def _table(found: Found, framework: str, problem: Problem, what: str) -> str:
    columns, rows = [each for each in SETTINGS if each not in NOT_TRIED[problem.name]], []
    for row in ROWS.values():
        if row.name == FLOAT:
            of = scores(found, framework, problem.name, "W8A8", FLOAT, what=what)
            entries = [entry(of, _digits(problem))] * len(columns)
        else:
            all_scores = (scores(found, framework, problem.name, each, row.name, what=what) for each in columns)
            entries = [entry(of, _digits(problem)) for of in all_scores]
        if any(entries):
            rows.append([_name(row.name), *entries])
    return table(["method", *columns], rows) if rows else ""


def _digits(problem: Problem) -> int:
    return 1 if problem.higher_is_better else 3


def _name(method: str) -> str:
    return {FLOAT: "*float model*", NEAREST: "*post-training*"}.get(method, method)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _rates(found: Found) -> str:
    rows = []
    for network, setting in RATED:
        for method in RATED_METHODS:
            of = [scores(found, "torch", network, setting, method, rate=rate) for rate in RATES]
            entries = [entry(each, _digits(PROBLEMS[network])) for each in of]
            if any(entries):
                rows.append([f"{network}, {setting}", method, *entries])
    header = ["network", "method", *(f"{rate:g} times" for rate in RATES)]
    return table(header, rows) if rows else "Not measured yet."


def expectations(found: Found) -> str:
    """Return what is expected of methods, and whether it is so."""
    rows = [
        _against(found, "cnn", "W4A4", "LSQ", ("W8A8", FLOAT), within=0.5),
        *(
            _against(found, network, "W2A2", method, ("W2A2", fixed))
            for fixed in STES
            for network, methods in LEARNED.items()
            for method in methods
        ),
        *(
            _against(found, "depthwise", setting, f"LSQ {kind}{rate}", (setting, f"LSQ{rate}"))
            for setting in ("W3", "W3A3")
            for rate in (", constant rate", "")
            for kind in ("dampening", "freezing")
        ),
        *(
            _against(found, network, "W2 g32", method, ("W2", method))
            for network in ("transformer", "recurrent")
            for method in (NEAREST, "LSQ")
        ),
    ]
    return table(["expected", *TITLES.values()], [row for row in rows if any(row[1:])]) + "\n\n" + agreement(found)


def _against(
    found: Found, network: str, setting: str, method: str, other: tuple[str, str], *, within: float | None = None
) -> list[str]:
    """Return a row: one entry of a table is better than another, or at most `within` worse, seed by seed."""
    problem = PROBLEMS[network]
    unit = "points" if problem.higher_is_better else problem.metric.rpartition(", ")[2]
    wish = "is better than" if within is None else f"is at most {within} {unit} worse than"
    where = "" if other[0] == setting or other[1] == FLOAT else f" at {other[0]}"
    row = [f"{network}: {_name(method)} at {setting} {wish} {_name(other[1])}{where}"]
    for framework in FRAMEWORKS:
        ours, theirs = comparable(
            found, (framework, network, setting, method), (framework, network, other[0], other[1])
        )
        sign = 1 if problem.higher_is_better else -1
        gains = [sign * (ours[seed] - theirs[seed]) for seed in ours]
        row.append(_verdict(gains, within, unit))
    return row


def _verdict(gains: list[float], within: float | None, unit: str) -> str:
    """Return the mean gain with its standard error; *clearly* is more than two of these."""
    if len(gains) < FEWEST:
        return ""
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    if within is not None:
        verdict = "yes" if mean >= -within else "**no**"
    else:
        verdict = "clearly" if mean > 2 * error else "not clearly" if mean > 0 else "**no**"
    seeds = "" if len(gains) == len(SEEDS) else f", {len(gains)} seeds"
    return f"{verdict}: {mean:+.3f} ± {error:.3f} {unit}{seeds}"


def agreement(found: Found) -> str:
    """Return where PyTorch's and Keras's means differ by more than one standard deviation."""
    compared, apart = 0, []
    entries = {(cell.network, cell.setting, cell.method) for cell in found if cell.framework == "keras"}
    for network, setting, method in sorted(entries):
        ours, theirs = comparable(found, *((framework, network, setting, method) for framework in FRAMEWORKS))
        if len(ours) < FEWEST or method in (FLOAT, NEAREST):
            continue
        compared += 1
        spread = (statistics.variance(ours.values()) + statistics.variance(theirs.values())) / 2
        distance = abs(statistics.mean(ours.values()) - statistics.mean(theirs.values()))
        if distance > spread**0.5:
            digits = _digits(PROBLEMS[network])
            apart.append(f"- {network}, {setting}, {method}: {entry(ours, digits)} and {entry(theirs, digits)}")
    if not compared:
        return "PyTorch and Keras are not compared yet."
    alike = compared - len(apart)
    told = f"PyTorch's and Keras's means are within one standard deviation in {alike} of {compared} entries."
    return "\n".join([told, *(["The others:", "", *apart] if apart else [])])
