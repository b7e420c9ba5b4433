"""Breaks the library's own quantizers, grids and kernels by machine, and counts how many mutants the kit rejects.

``python -m tasks.mutation torch --write``: a mutant is a module with one expression changed: an operator, a comparison,
a constant, a call that is dropped, two arguments that are swapped, a condition that is negated. Each is imported in a
process of its own, which has the framework already, and every law is tried on the quantizers that the module serves
until one is broken. What survives a few cases meets more of them. ``benchmarks/results/mutation-<backend>.json`` lists
the mutants that nothing rejects; ``docs/mutation.md`` says of each why.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SLOW = {"no_framework_leak"}  # starts an interpreter; about imports
STAGES = (3, 6)
"""Cases per law: of a first look, and for what survives it."""
TIMEOUT = 120
"""CPU seconds of one law on one quantizer after which a mutant counts as rejected: a loop that never ends."""
BLOCKED = 1200
"""Seconds after which it does so too, as where it waits for a lock; many, because a machine may be busy."""

Row = dict[str, Any]
"""A mutant and what rejected it."""

BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


@dataclass(frozen=True)
class Target:
    """A module that is broken, and what is checked then.

    Parameters
    ----------
    module : str
        Its import path.
    methods : tuple of str
        The training methods whose quantizers it serves; empty for all.
    tiers : tuple of str
        Kernels of PyTorch with which it is tried, one after the other: what one of them does not run, another does.
    """

    module: str
    methods: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()


KERNELS = "TRAINABLE_TORCH_KERNELS"
PLAIN, PASSES, BOTH = ("plain",), ("passes",), ("plain", "passes")
NATIVE = ("passes", "native")
"""Numba keeps what it compiled. Modules with loops are left out: it would compile them once more for every mutant."""
TARGETS = {
    "torch": [
        Target("trainable_torch.quantizers.ste", ("STE",), PASSES),
        Target("trainable_torch.quantizers.lsq", ("LSQ",), PASSES),
        Target("trainable_torch.quantizers.dqa", ("DQA",), PASSES),
        Target("trainable_torch.quantizers.tqt", ("TQT",), PASSES),
        Target("trainable_torch.quantizers.lsq_plus", ("LSQ_PLUS",), PASSES),
        Target("trainable_torch.quantizers.pact", ("PACT",), PASSES),
        Target("trainable_torch.quantizers.dorefa", ("DOREFA",), PASSES),
        Target("trainable_torch.quantizers.paretoq", ("PARETOQ",), PASSES),
        Target("trainable_torch.quantizers.table", ("APOT", "PARETOQ"), PASSES),
        Target("trainable_torch.quantizers.adaround", ("ADAROUND",), PASSES),
        Target("trainable_torch.quantizers.dynamic", ("DYNAMIC",), PASSES),
        Target("trainable_torch.quantizers.rounding", ("STE", "LSQ"), PASSES),
        Target("trainable_torch.quantizers.base", ("LSQ", "DQA", "TQT", "ADAROUND"), BOTH),
        Target("trainable_torch.annealing", ("DQA",), PASSES),
        Target("trainable_torch.grid", ("LSQ",), BOTH),
        Target("trainable_torch.kernels.plain", ("STE", "LSQ"), PLAIN),
        Target("trainable_torch.kernels.passes", ("STE", "LSQ"), PASSES),
        Target("trainable_torch.kernels.fake_quantization", ("STE", "LSQ"), NATIVE),
    ],
    "keras": [
        Target("trainable_keras.quantizers.ste", ("STE",)),
        Target("trainable_keras.quantizers.lsq", ("LSQ",)),
        Target("trainable_keras.quantizers.dqa", ("DQA",)),
        Target("trainable_keras.quantizers.tqt", ("TQT",)),
        Target("trainable_keras.quantizers.lsq_plus", ("LSQ_PLUS",)),
        Target("trainable_keras.quantizers.pact", ("PACT",)),
        Target("trainable_keras.quantizers.dorefa", ("DOREFA",)),
        Target("trainable_keras.quantizers.paretoq", ("PARETOQ",)),
        Target("trainable_keras.quantizers.table", ("APOT", "PARETOQ")),
        Target("trainable_keras.quantizers.adaround", ("ADAROUND",)),
        Target("trainable_keras.quantizers.dynamic", ("DYNAMIC",)),
        Target("trainable_keras.quantizers.rounding", ("STE", "LSQ")),
        Target("trainable_keras.quantizers.base", ("LSQ", "DQA", "TQT", "ADAROUND")),
        Target("trainable_keras.keras3.annealing", ("DQA",)),
        Target("trainable_keras.grid", ("LSQ",)),
        Target("trainable_keras.ops", ("STE", "LSQ", "TQT", "APOT", "DKM")),
    ],
}
WARM = {"torch": ("torch", "torch._dynamo", "mct_quantizers"), "keras": ("keras", "tensorflow", "mct_quantizers")}


@dataclass(frozen=True)
class Mutant:
    """One change to a module.

    Parameters
    ----------
    module : str
        Import path.
    line : int
        Where.
    change : str
        The expression before and after.
    place : int
        The change's number in the module.
    """

    module: str
    line: int
    change: str
    place: int


class _Sites(ast.NodeVisitor):
    """Finds what can be changed: pairs of a node and its replacement."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.AST, ast.AST]] = []

    def visit_Raise(self, node: ast.Raise) -> None:
        """Leave errors alone: laws look at their types, and no words of theirs."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Look at the value alone."""
        if node.value is not None:
            self.visit(node.value)

    def visit_arguments(self, node: ast.arguments) -> None:
        """Look at defaults alone, not at annotations."""
        for default in (*node.defaults, *(each for each in node.kw_defaults if each is not None)):
            self.visit(default)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Leave out decorators, annotations and the docstring."""
        self.visit(node.args)
        for each in node.body:
            if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)):
                self.visit(each)

    def visit_If(self, node: ast.If) -> None:
        """Negate the condition, except where types are checked or an error follows."""
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if not all(isinstance(each, ast.Raise) for each in node.body[-1:]):
            self._add(node.test, ast.UnaryOp(ast.Not(), copy.deepcopy(node.test)))
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave texts alone."""

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Change the operator."""
        other = BINARY.get(type(node.op))
        if other is not None:
            self._add(node, ast.BinOp(node.left, other(), node.right))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Change the first comparison."""
        other = COMPARISONS.get(type(node.ops[0]))
        if other is not None:
            self._add(node, ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Change `and` and `or`."""
        self._add(node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Drop the sign or the negation."""
        self._add(node, node.operand)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Change a number or a truth value."""
        if isinstance(node.value, bool):
            self._add(node, ast.Constant(not node.value))
        elif isinstance(node.value, int | float):
            self._add(node, ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 2 + 1))

    def visit_Call(self, node: ast.Call) -> None:
        """Drop the call, and swap its first two arguments."""
        positional = [each for each in node.args if not isinstance(each, ast.Starred)]
        if isinstance(node.func, ast.Attribute) and not ast.unparse(node.func.value).startswith(("super", "torch")):
            self._add(node, node.func.value)
        elif positional:
            self._add(node, positional[0])
        if len(positional) > 1 and positional == node.args:
            swapped = [node.args[1], node.args[0], *node.args[2:]]
            self._add(node, ast.Call(node.func, swapped, node.keywords))
        self.generic_visit(node)

    def _add(self, node: ast.AST, other: ast.AST) -> None:
        self.found.append((node, other))


class _Replace(ast.NodeTransformer):
    """Replaces one node."""

    def __init__(self, node: ast.AST, other: ast.AST) -> None:
        self.node, self.other = node, other

    def visit(self, node: ast.AST) -> Any:
        """Return the replacement of the node."""
        return ast.copy_location(self.other, node) if node is self.node else super().visit(node)


def mutants(module: str, source: str) -> Iterator[tuple[Mutant, CodeType]]:
    """Yield every mutant of a module with its code; those that are not Python are left out."""
    sites = _Sites()
    tree = ast.parse(source)
    sites.visit(tree)
    for place in range(len(sites.found)):
        again = _Sites()
        fresh = ast.parse(source)
        again.visit(fresh)
        node, other = again.found[place]
        change = f"{ast.unparse(node)} -> {ast.unparse(other)}"
        broken = ast.fix_missing_locations(_Replace(node, other).visit(fresh))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a mutant may be odd
            try:
                code = compile(broken, module, "exec")
            except (SyntaxError, TypeError, ValueError):
                continue
        yield Mutant(module, getattr(node, "lineno", 0), change, place), code


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from other code."""

    def __init__(self, module: str, code: CodeType) -> None:
        self.module, self.code = module, code

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for the module."""
        del target
        if fullname != self.module:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        spec = importlib.util.spec_from_loader(fullname, self, origin=found.origin if found else None)
        if spec is not None and found is not None:
            spec.has_location = True
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Let Python make the module."""
        del spec
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Run the code."""
        exec(self.code, module.__dict__)  # noqa: S102 - our own module


def rejected(
    backend: str, target: Target, code: CodeType | None, stages: Sequence[int], first: Sequence[str] = ()
) -> str:
    """Return the law that rejects a module's code, or an empty text; run in a process of its own.

    The laws named by `first` are tried first.
    """
    if code is not None:
        sys.meta_path.insert(0, Finder(target.module, code))
    try:
        from trainable_core.conformance import LAWS, try_law  # noqa: PLC0415 - the process decides when
        from trainable_core.conformance.suite import subjects  # noqa: PLC0415
        from trainable_core.registry.process import default_registry  # noqa: PLC0415

        found = [
            each
            for each in subjects(backend, backend)
            if target.methods == () or each.key.quantizer_id in target.methods
        ]
    except Exception as error:  # noqa: BLE001 - a mutant may raise anything
        return f"import: {type(error).__name__}"
    # The registry passes over what can't be loaded, and says so: a plugin, or a class of one.
    problem = next((row.problem for row in default_registry().plugins() if row.name == backend), "")
    if problem or not found:
        return f"import: {problem.partition(':')[0] or 'no quantizers'}"
    for stage, examples in enumerate(stages):
        chosen = found if stage else first_and_last(found)
        for law in (*(LAWS[name] for name in first), *(each for each in LAWS.values() if each.name not in first)):
            for subject in chosen:
                if law.name not in SLOW and law.about(subject):
                    signal.setitimer(signal.ITIMER_PROF, TIMEOUT)
                    signal.alarm(BLOCKED)
                    verdict = try_law(law, subject, examples=examples, seed=0, shrink=False)
                    if not verdict.holds:
                        return law.name
    return ""


def first_and_last(found: Sequence[Any]) -> list[Any]:
    """Return two quantizers of each method, for a first look."""
    methods: dict[str, list[Any]] = {}
    for each in found:
        methods.setdefault(each.key.quantizer_id, []).append(each)
    return [each for of in methods.values() for each in of[:: max(len(of) - 1, 1)]]


def in_a_process(
    backend: str, target: Target, code: CodeType | None, stages: Sequence[int], first: Sequence[str] = ()
) -> str:
    """Fork, and return what `rejected` returns there."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        signal.setitimer(signal.ITIMER_PROF, TIMEOUT)
        signal.alarm(BLOCKED)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            answer = rejected(backend, target, code, stages, first)
        except BaseException as error:  # noqa: BLE001 - told to the parent
            answer = f"raised: {type(error).__name__}"
        os.write(write, (answer or "survived").encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    ended = os.WTERMSIG(status) in {signal.SIGPROF, signal.SIGALRM}
    return answer or ("timeout" if ended else "crash")


def most_severe(rows: Sequence[Row]) -> list[str]:
    """Return the laws that rejected mutants so far, those that rejected most first: most mutants are done soon then."""
    from trainable_core.conformance import LAWS  # noqa: PLC0415 - the command line decides when

    return [name for name, _ in Counter(row["by"] for row in rows).most_common() if name in LAWS]


def path_of(module: str) -> Path:
    """Return the file of a module of ours, without importing it."""
    package, *names = module.split(".")
    return Path(ROOT, "packages", package.replace("_", "-"), "src", package, *names).with_suffix(".py")


def chosen_mutants(targets: Sequence[Target], sample: float, seed: int) -> list[tuple[Target, Mutant, CodeType]]:
    """Return a sample of the mutants of some modules, in an order in which every beginning is a fair sample too."""
    drawn = random.Random(seed)  # noqa: S311 - a sample, no secret
    made = [
        (target, mutant, code)
        for target in targets
        for mutant, code in mutants(target.module, path_of(target.module).read_text(encoding="utf-8"))
    ]
    drawn.shuffle(made)
    return made[: round(sample * len(made))]


def run(backend: str, targets: Sequence[Target], sample: float, seed: int, log: Path, seconds: float) -> list[Row]:
    """Try mutants until the time is over; what is in the log was tried before. Return a row for each that was tried."""
    started = time.monotonic()
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    done = {(row["module"], row["place"]) for row in rows}
    sound: set[str] = {row["module"] for row in rows}
    for target, mutant, code in chosen_mutants(targets, sample, seed):
        if (mutant.module, mutant.place) in done:
            continue
        if time.monotonic() - started > seconds:
            break
        if target.module not in sound:
            by = tried(backend, target, None, STAGES[:1])
            if by != "survived":
                message = f"{target.module} is rejected as it is: {by}"
                raise SystemExit(message)
            sound.add(target.module)
        by = tried(backend, target, code, STAGES, most_severe(rows))
        rows.append({**asdict(mutant), "by": by})
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"{by:<24} {mutant.module}:{mutant.line} {mutant.change}", flush=True)
    return rows


def tried(backend: str, target: Target, code: CodeType | None, stages: Sequence[int], first: Sequence[str] = ()) -> str:
    """Return what rejects a module's code with any of the kernels that it is tried with."""
    by = ""
    for tier in target.tiers or ("",):
        os.environ[KERNELS] = tier
        try:
            by = in_a_process(backend, target, code, stages, first)
        finally:
            del os.environ[KERNELS]
        if by != "survived":
            break
    return by


def summary(backend: str, rows: Sequence[Row], all_mutants: int) -> dict[str, Any]:
    """Return a document on the mutants that were tried."""
    survived = [row for row in rows if row["by"] == "survived"]
    modules = Counter(row["module"] for row in rows)
    kept = Counter(row["module"] for row in survived)
    return {
        "backend": backend,
        "mutants": all_mutants,
        "tried": len(rows),
        "rejected": len(rows) - len(survived),
        "modules": {name: f"{count - kept[name]} of {count}" for name, count in sorted(modules.items())},
        "by": dict(Counter(row["by"] for row in rows).most_common()),
        "survived": survived,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=sorted(TARGETS))
    parser.add_argument("--module", action="append", help="only this module; may be given more than once")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the mutants that are tried")
    parser.add_argument("--seed", type=int, default=0, help="seed of their order")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further one after this time")
    parser.add_argument("--log", type=Path, help="file of results, one a line; what is in it is not tried again")
    parser.add_argument("--write", action="store_true", help="write the document into benchmarks/results")
    arguments = parser.parse_args()
    for name in WARM[arguments.backend]:
        importlib.import_module(name)
    importlib.import_module("trainable_core.conformance.strategies")
    backend = arguments.backend
    targets = [each for each in TARGETS[backend] if not arguments.module or each.module in arguments.module]
    log = arguments.log or ROOT / ".nox" / f"mutation-{backend}.jsonl"
    rows = run(backend, targets, arguments.sample, arguments.seed, log, arguments.seconds)
    document = summary(backend, rows, len(chosen_mutants(targets, 1.0, 0)))
    print(json.dumps({name: value for name, value in document.items() if name != "survived"}, indent=2))
    if arguments.write:
        path = RESULTS / f"mutation-{backend}.json"
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
