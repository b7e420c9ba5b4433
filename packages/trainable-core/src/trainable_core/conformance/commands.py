"""The sub-commands ``check``, ``methods``, ``matrix`` and ``new-plugin``; only ``check`` imports hypothesis."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainable_core.conformance.expected import (
    TABLE,
    checked_expectations,
    checked_table,
    normalized,
    parsed_expectations,
    project_expectations,
)
from trainable_core.conformance.matrix import COLUMNS, METHOD_COLUMNS, markdown, matrix_rows, method_rows
from trainable_core.conformance.template import backends_with_template, write_plugin
from trainable_core.errors import INSTALL, DocumentError, InvalidArgumentError, UnsupportedConfigError
from trainable_core.registry.process import default_registry

PrintTable = Callable[[str, Sequence[str], Sequence[Sequence[str]]], None]
LAW_COLUMNS = ("law", "what holds", "reason")
COVERAGE_COLUMNS = ("law", "cases", "covered")
MOST_JOBS = 4
"""Processes that are begun unasked: each holds a framework, and the last of many waits for one slow quantizer."""
CHECK_COLUMNS = ("backend", "quantizer", "laws that hold", "cases", "seconds", "broken laws")


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``trainable check``."""
    parser.add_argument("--backend", metavar="NAME", help="only this backend's; by default every installed one's")
    parser.add_argument(
        "--plugin", metavar="NAME", help="only this plugin's; its entry point's or its distribution's name"
    )
    parser.add_argument("--law", metavar="NAME", action="append", help="only this law; may be given more than once")
    parser.add_argument(
        "--examples", metavar="N", type=_positive, help="cases per law and quantizer; by default what the backend says"
    )
    parser.add_argument(
        "--thorough", action="store_true", help="ten times as many cases, every corner, compiled calls: takes an hour"
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_positive,
        default=min(os.cpu_count() or 1, MOST_JOBS),
        help="processes that share the quantizers out between them; each imports the framework (%(default)s here)",
    )
    parser.add_argument("--coverage", action="store_true", help="print for each law what its cases covered")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="seed of the generated cases (0)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write a JSON report here")
    parser.add_argument(
        "--expect",
        metavar="LAW=REASON",
        action="append",
        default=[],
        help="a law, or QUANTIZER-LAW as in EWGS-Weights-UNIFORM-tie_rule, that is expected to be broken, and why; "
        "it fails when it holds; may be given more than once",
    )
    parser.add_argument(
        "--project",
        metavar="FILE",
        type=Path,
        help=f"the file whose table [{TABLE}] says the same for the quantizers of its project; "
        "by default the pyproject.toml in this folder",
    )
    parser.add_argument("--laws", action="store_true", help="list the laws and their reasons, and check nothing")
    parser.add_argument("--markdown", action="store_true", help="with --laws: print a Markdown table, for documents")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        message = f"must be a positive whole number, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def check(arguments: argparse.Namespace, print_table: PrintTable) -> int:
    """Check quantizers against the laws; return 0 when all hold but those expected to be broken, else 1."""
    try:
        from trainable_core.conformance import law, report, suite  # noqa: PLC0415 - they need the extra
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        hint = "pip install 'trainable-core[conformance]'"
        raise UnsupportedConfigError("trainable check", "hypothesis is not installed", hint) from error
    laws = law.named_laws(arguments.law)
    if arguments.laws:
        rows = [(each.name, each.statement, each.reason) for each in laws]
        if arguments.markdown:
            sys.stdout.write(markdown([(f"`{name}`", *texts) for name, *texts in rows], LAW_COLUMNS))
        else:
            print_table("laws", LAW_COLUMNS, rows)
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # what frameworks print while they are imported
        subjects = suite.subjects(arguments.backend, arguments.plugin)
    for name, problem in default_registry().failures().items():
        sys.stderr.write(f"plugin {name!r} failed: {problem}\n")
    if not subjects:
        raise InvalidArgumentError("trainable check", "no quantizers are registered", ", ".join(INSTALL.values()))
    pairs = [(subject, each) for subject in subjects for each in laws if each.about(subject)]
    expected = _expected(arguments, pairs, {each.name for each in laws}, set(law.LAWS))
    progress = report.Progress()
    done = report.run(
        subjects,
        laws,
        examples=arguments.examples,
        seed=arguments.seed,
        thorough=arguments.thorough,
        jobs=arguments.jobs,
        progress=progress,
    )
    progress.end()
    print_table(f"conformance with seed {done.seed}", CHECK_COLUMNS, done.rows())
    if arguments.coverage:
        print_table("what the cases covered", COVERAGE_COLUMNS, done.coverage())
    failed, told = 0, []
    for verdict in done.verdicts:
        name = f"{verdict.subject}-{verdict.law.name}"
        why = expected.get((verdict.subject.cls, name))
        if why is None and verdict.counterexample is not None:
            told.append(f"\n{verdict.counterexample}\n")
        elif why is not None:
            outcome = "expected to be broken, and holds" if verdict.holds else "broken as expected"
            told.append(f"{name}: {outcome}: {why}\n")
        failed += verdict.holds != (why is None)
    sys.stdout.writelines(told)
    as_expected = f", {len(done.counterexamples)} broken as expected" if expected and not failed else ""
    result = f"{failed} of {len(done.verdicts)} checks failed" if failed else f"all {len(done.verdicts)} checks passed"
    sys.stdout.write(f"{result}{as_expected}: {done.cases} cases in {done.seconds:.0f} s\n")
    if arguments.json is not None:
        _write(arguments.json, json.dumps(done.document(), indent=2) + "\n")
    return 1 if failed else 0


def _expected(
    arguments: argparse.Namespace, pairs: Sequence[tuple[Any, Any]], chosen: set[str], laws: set[str]
) -> dict[tuple[type[Any], str], str]:
    """Return why checks are expected to fail, by class and check, from the command line and a project's table."""
    made = [(subject.cls, f"{subject}-{each.name}", each.name) for subject, each in pairs]
    given = checked_expectations(parsed_expectations(arguments.expect), {name for _, name, _ in made} | chosen)
    project, table = project_expectations(arguments.project)
    rows = default_registry().list_quantizers(arguments.backend) if table else []
    own = {row.cls for row in rows if row.distribution and normalized(row.distribution) == normalized(project)}
    of_project = [name for cls, name, _ in made if cls in own]
    if of_project:
        checked_table(table, of_project, laws, complete=arguments.law is None and arguments.backend is None)
    found = {}
    for cls, name, of_law in made:
        why = given.get(name, given.get(of_law)) or (table.get(name, table.get(of_law)) if cls in own else None)
        if why is not None:
            found[cls, name] = why
    return found


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DocumentError(path, f"can't be written: {error.strerror}") from error


def matrix_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``trainable matrix``."""
    parser.add_argument("--backend", metavar="NAME", help="only this backend's; by default every installed one's")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table, for documents")


def matrix(arguments: argparse.Namespace, print_table: PrintTable) -> int:
    """Print which backend implements which method on which grid."""
    with contextlib.redirect_stdout(sys.stderr):
        quantizers = default_registry().list_quantizers(arguments.backend)
    rows = matrix_rows(quantizers)
    if arguments.markdown:
        sys.stdout.write(markdown(rows))
    else:
        print_table("implemented methods", COLUMNS, rows)
    return 0


def methods_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``trainable methods``."""
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table, for documents")


def methods(arguments: argparse.Namespace, print_table: PrintTable) -> int:
    """Print what the built-in training methods declare."""
    if arguments.markdown:
        sys.stdout.write(markdown(method_rows(), METHOD_COLUMNS))
    else:
        print_table("built-in training methods", METHOD_COLUMNS, method_rows())
    return 0


def new_plugin_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``trainable new-plugin``."""
    parser.add_argument("name", metavar="NAME", help="name of the distribution, such as trainable-mymethod")
    parser.add_argument(
        "--backend",
        choices=backends_with_template(),
        action="append",
        help="a backend to write quantizers for; may be given more than once; by default every backend listed here",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder to write; by default ./NAME")


def new_plugin(arguments: argparse.Namespace) -> int:
    """Write a plugin that passes the conformance kit, as a start for a method of one's own."""
    folder = arguments.output or Path(arguments.name)
    for path in write_plugin(arguments.name, arguments.backend or backends_with_template(), folder):
        sys.stdout.write(f"{path}\n")
    sys.stdout.write(f"Next: pip install -e {folder} && trainable check --plugin {arguments.name}\n")
    return 0
