"""The conformance kit by itself, on a backend in NumPy."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.numpy_backend import ADAPTER, NumpyAdapter, NumpySte
from trainable_core.cli import main
from trainable_core.conformance import (
    LAWS,
    Case,
    Law,
    Subject,
    Violation,
    adapter_of,
    check_quantizer,
    conformance_checks,
    parallel,
    replay,
    report,
    strategies,
    try_law,
)
from trainable_core.conformance import test_installed as installed
from trainable_core.conformance.adapter import Way
from trainable_core.conformance.case import grid, move, shown
from trainable_core.conformance.law import named_laws, same_bits
from trainable_core.conformance.matrix import COLUMNS, markdown, matrix_rows
from trainable_core.conformance.strategies import Corner, Kind, cases, grid_after
from trainable_core.conformance.suite import Verdict, checks, subjects_of
from trainable_core.conformance.template import backends_with_template, write_plugin
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule
from trainable_core.errors import DocumentError, InvalidArgumentError, UnknownBackendError, UnsupportedConfigError
from trainable_core.hookspecs import Backend, hookimpl
from trainable_core.registry import process as registry
from trainable_core.registry.rows import QuantizerRow

SUBJECTS = subjects_of(NumpySte, ADAPTER)
every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=str)


class HalfUp(NumpySte):
    """Rounds ties up, where the adapter declares to even."""

    def snap(self, x):
        at = self.current_qparams().along(np.ndim(x))
        low, high = at.quant_min - at.zero_point, at.quant_max - at.zero_point
        codes = np.clip(np.floor(np.asarray(x, np.float32) * (1 / at.scale) + 0.5), low, high) + np.float32(0)
        return (codes * at.scale).astype(np.asarray(x).dtype)


class Raises(NumpySte):
    """Can't take an empty tensor."""

    def snap(self, x):
        return super().snap(x) + 0 * np.max(np.nan_to_num(x, posinf=0, neginf=0))


# ---- cases ----------------------------------------------------------------------------------------------------------


@every_subject
@given(data=st.data())
def test_a_case_survives_its_document(subject, data):
    case = data.draw(cases(subject, Kind()))
    again = Case.from_document(json.loads(json.dumps(case.document())))
    assert again.document() == case.document()
    assert again.config == case.config
    np.testing.assert_array_equal(again.x.view(np.uint32), case.x.view(np.uint32))


@every_subject
@given(data=st.data())
def test_a_case_is_made_for_the_grid_that_its_quantizer_has(subject, data):
    case = data.draw(cases(subject, Kind()))
    own = grid(subject.quantizer(case))
    made_for = grid_after(case.config, case.factors, case.config.n_bits)
    np.testing.assert_array_equal(np.broadcast_to(made_for.scale, own.scale.shape), own.scale)
    np.testing.assert_array_equal(np.broadcast_to(made_for.zero_point, own.zero_point.shape), own.zero_point)


@every_subject
@given(data=st.data())
def test_exact_cases_have_scales_that_are_powers_of_two(subject, data):
    case = data.draw(cases(subject, Kind(exact=True)))
    assert (np.frexp(grid(subject.quantizer(case)).scale)[0] == 0.5).all()


@every_subject
@given(data=st.data())
def test_cases_keep_to_their_kind(subject, data):
    case = data.draw(cases(subject, Kind(bits=(2, 3), finite=True, per_channel=True, least=2)))
    assert case.config.n_bits in {2, 3}
    assert case.x.ndim >= 2
    assert np.isfinite(case.x).all()
    assert case.config.channels_axis is not None


def drawn(kind: Kind, count: int = 300) -> list[Case]:
    """Return cases as a law of this kind meets them."""
    found: list[Case] = []

    def keep(_, case: Case) -> None:
        found.append(case)

    law = LAWS["on_grid"]
    try_law(type(law)("keep", "looks", keep, kind), SUBJECTS[0], examples=count, seed=0)
    return found


def test_cases_hold_what_breaks_quantizers():
    found = drawn(Kind())
    values = np.concatenate([case.x.reshape(-1) for case in found])
    assert np.isposinf(values).any()
    assert np.isneginf(values).any()
    assert (np.signbit(values) & (values == 0)).any()
    assert ((np.abs(values) < np.finfo(np.float32).tiny) & (values != 0)).any()
    assert any(case.x.size == 0 for case in found)
    assert any(case.x.ndim == 0 for case in found)
    assert {case.config.channels_axis for case in found} >= {None, 0, 1, -1, -2}
    ties = 0
    for case in found:
        steps = (
            np.where(np.isfinite(case.x), case.x, 0).astype(np.float64)
            / grid(SUBJECTS[0].quantizer(case)).along(case.x.ndim).scale
        )
        ties += int((np.abs(steps % 1 - 0.5) < 1e-4).sum())
    assert ties > 50


def test_moving_multiplies_grid_variables():
    case = drawn(Kind(moderate=True), 5)[-1]
    quantizer = SUBJECTS[0].fresh(case)
    before = np.array(quantizer.threshold.value)
    move(quantizer, (3.0,))
    np.testing.assert_array_equal(quantizer.threshold.value, before * 3)


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [law for law in LAWS.values() if law.about(SUBJECTS[0])], ids=lambda law: law.name)
@every_subject
def test_the_reference_keeps_every_law(law, subject):
    verdict = try_law(law, subject, examples=20)
    assert verdict.holds, verdict.counterexample


@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_a_law_has_a_reason_and_says_what_it_checks(law):
    assert len(law.reason) > 20
    assert "\n" not in law.reason
    assert law.check.__doc__


def test_the_documentations_table_of_laws_is_what_the_command_prints(capsys):
    document = (Path(__file__).parents[2] / "docs/conformance.md").read_text(encoding="utf-8")
    table = document.partition("<!-- trainable check --laws --markdown -->\n")[2].partition("<!-- end -->")[0]
    assert main(["check", "--laws", "--markdown"]) == 0
    assert table == capsys.readouterr().out
    assert re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE) == list(LAWS)


def test_bits_are_compared_with_the_sign_of_zero():
    zeros = np.zeros(2, np.float32)
    same_bits("zeros", zeros, zeros)
    same_bits("NaN", np.array([np.nan]), np.array([-np.nan]))
    with pytest.raises(Violation, match="zeros"):
        same_bits("zeros", -zeros, zeros)
    with pytest.raises(Violation, match="shape"):
        same_bits("zeros", zeros, zeros[:1])


def test_an_unknown_law_is_refused():
    with pytest.raises(InvalidArgumentError, match="idempotence"):
        named_laws(["idempotenc"])


# ---- counterexamples ------------------------------------------------------------------------------------------------


def broken(cls: type, law: str, **how):
    return next(v for v in check_quantizer(cls, ADAPTER, laws=[law], seed=1, **how) if not v.holds)


def test_a_counterexample_is_small_and_can_be_pasted():
    found = broken(HalfUp, "tie_rule").counterexample
    assert found.case.x.size == 1
    text = str(found)
    expected, got = (line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(("expected", "got")))
    assert not np.array_equal(eval(expected, {"np": np}), eval(got, {"np": np}))  # noqa: S307 - our own text
    config = next(line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("config"))
    assert json.loads(config)["weights_quantization_method"] in {"SYMMETRIC", "UNIFORM"}


def test_without_shrinking_the_same_law_is_broken():
    assert broken(HalfUp, "tie_rule", shrink=False).counterexample.law == "tie_rule"


def test_whatever_a_quantizer_raises_is_a_counterexample():
    # it raises for empty tensors only: the oldest hypothesis needs more than the usual number of cases to draw one
    found = broken(Raises, "on_grid", examples=500).counterexample
    assert found.case.x.size == 0
    assert "ValueError" in found.got


def test_a_run_is_the_same_for_the_same_seed():
    one, two = (broken(HalfUp, "tie_rule").counterexample for _ in range(2))
    assert str(one) == str(two)


@pytest.fixture
def numpy_backend(monkeypatch):
    """The NumPy backend, registered in process."""
    module = types.ModuleType("numpy_verbs.conformance")
    module.ADAPTER = ADAPTER
    monkeypatch.setitem(sys.modules, "numpy_verbs", types.ModuleType("numpy_verbs"))
    monkeypatch.setitem(sys.modules, "numpy_verbs.conformance", module)

    class Plugin:
        @staticmethod
        @hookimpl
        def trainable_register_backend():
            return Backend("numpy", "numpy", ("numpy",), TieRule.HALF_EVEN, "numpy_verbs")

        @staticmethod
        @hookimpl
        def trainable_register_quantizers(backend):
            return [NumpySte] if backend == "numpy" else []

    registry.register(Plugin, "made-up")
    yield module
    registry.default_registry().unregister("made-up")


def test_a_counterexample_can_be_replayed(numpy_backend):
    document = json.loads(json.dumps(broken(HalfUp, "tie_rule").counterexample.document()))
    with pytest.raises(Violation, match="ties"):
        replay(document, HalfUp)
    name = f"{NumpySte.__module__}.{NumpySte.__qualname__}"
    replay({**document, "quantizer": name})  # the sound class, found by its name
    with pytest.raises(InvalidArgumentError, match="nowhere"):
        replay({**document, "quantizer": "nowhere.Nothing"})
    with pytest.raises(UnsupportedConfigError, match="POWER_OF_TWO"):
        replay({**document, "quantizer": name, "method": "POWER_OF_TWO"})
    replay({**document, "quantizer": name, "law": "no_framework_leak", "case": None})


def test_the_last_line_of_a_counterexample_tries_it_again(numpy_backend):
    last = str(broken(HalfUp, "tie_rule").counterexample).splitlines()[-1]
    call = last.removeprefix("repeat").strip()
    with pytest.raises(Violation, match="ties"):
        exec(call, {"replay": replay})  # noqa: S102 - our own text


def test_the_tests_that_come_with_the_kit_try_what_is_installed(numpy_backend):
    class Collected:
        def parametrize(self, name, values, ids):
            assert name == "check"
            self.values, self.ids = values, ids

    collected = Collected()
    installed.pytest_generate_tests(collected)
    assert f"numpy-{SUBJECTS[0]}-zero" in collected.ids
    installed.test_conformance(collected.values[collected.ids.index(f"numpy-{SUBJECTS[0]}-zero")])


def test_values_are_shown_so_that_they_can_be_pasted():
    array = np.array([np.inf, -0.0, np.nan], np.float32)
    np.testing.assert_array_equal(eval(shown(array), {"np": np}), array)  # noqa: S307 - our own text


# ---- ways in --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_found_by_its_backends_name(numpy_backend):
    assert adapter_of("numpy") is ADAPTER
    assert isinstance(adapter_of("numpy"), NumpyAdapter)
    del numpy_backend.ADAPTER
    with pytest.raises(UnsupportedConfigError, match=r"numpy_verbs\.conformance"):
        adapter_of("numpy")
    with pytest.raises(UnknownBackendError):
        adapter_of("numpi")


def test_the_decorator_gives_a_check_for_each_law_and_grid(numpy_backend):
    mark = conformance_checks(NumpySte).mark
    names = [parameter.id for parameter in mark.args[1]]
    assert names == [f"{subject}-{name}" for subject in SUBJECTS for name, law in LAWS.items() if law.about(subject)]
    assert [str(check) for check in checks(NumpySte, laws=["zero"])] == [f"{subject}-zero" for subject in SUBJECTS]
    mark = conformance_checks(backend="numpy", laws=["zero"]).mark
    assert [parameter.id for parameter in mark.args[1]] == [f"{subject}-zero" for subject in SUBJECTS]


def test_the_decorator_marks_expected_failures(numpy_backend):
    expected = {"STE-Weights-UNIFORM-zero": "a known fault"}
    mark = conformance_checks(NumpySte, laws=["zero"], expected_failures=expected).mark
    assert [len(parameter.marks) for parameter in mark.args[1]] == [0, 1]
    assert mark.args[1][1].marks[0].kwargs["strict"] is True


def project(folder: Path, table: dict[str, str], name: str = "my_plugin") -> Path:
    """Return a pyproject.toml with a table of expected failures."""
    lines = [f'{law} = "{reason}"' for law, reason in table.items()]
    file = folder / "pyproject.toml"
    file.write_text("\n".join([f'[project]\nname = "{name}"', "[tool.trainable.expected-failures]", *lines]))
    return file


@pytest.fixture
def of_my_plugin(numpy_backend, monkeypatch):
    """Let the NumPy quantizer be that of a distribution ``my-plugin``."""
    listed = registry.default_registry().list_quantizers
    rows = [replace(row, distribution="my-plugin") for row in listed("numpy")]
    monkeypatch.setattr(registry.default_registry(), "list_quantizers", lambda *_: rows)


@pytest.mark.usefixtures("of_my_plugin")
def test_a_project_says_which_checks_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["check", "--backend", "numpy", "--law", "zero", "--examples", "2"]
    expected = project(tmp_path, {"STE-Weights-UNIFORM-zero": "is broken", "tie_rule": "no check that is made here"})
    assert main(command) == 1  # it holds after all
    assert "STE-Weights-UNIFORM-zero: expected to be broken, and holds: is broken" in capsys.readouterr().out
    mark = conformance_checks(NumpySte, laws=["zero"], expected_failures=expected).mark
    assert [len(parameter.marks) for parameter in mark.args[1]] == [0, 1]
    project(tmp_path, {"zero": "is broken"}, name="somebody-else")
    assert main(command) == 0
    project(tmp_path, {"zeros": "is broken"})
    assert main(command) == 2
    assert "zeros" in capsys.readouterr().err
    moved = expected.rename(tmp_path / "other.toml")
    assert main(command) == 0
    assert main([*command, "--project", str(moved)]) == 2
    assert main([*command, "--project", str(tmp_path / "missing.toml")]) == 2
    assert "missing.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[tool.trainable.expected-failures]\nzero = "is broken"', "names no project"),
        ('[project]\nname = "x"\n[tool.trainable.expected-failures]\nzero = 1', "table of texts"),
        ('[project]\nname = "x"\n[tool.trainable]\nexpected-failures = "zero"', "table of texts"),
        ('[project]\nname = "x"\n[tool.trainable.expected-failures]\nzero = " "', "no reason"),
        ("[project", "TOML"),
    ],
)
def test_a_table_that_says_nothing_is_refused(numpy_backend, tmp_path, text, named):
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises((InvalidArgumentError, DocumentError), match=named):
        conformance_checks(NumpySte, laws=["zero"], expected_failures=tmp_path / "pyproject.toml")


def test_an_expectation_of_no_check_is_refused_where_all_are_made(numpy_backend, tmp_path):
    file = project(tmp_path, {"STE-Weights-POWER_OF_TWO-zero": "NumpySte has no such grid"})
    with pytest.raises(InvalidArgumentError, match="POWER_OF_TWO"):
        conformance_checks(NumpySte, expected_failures=file)
    conformance_checks(NumpySte, laws=["zero"], expected_failures=file)


def test_the_command_says_what_it_found(numpy_backend, tmp_path, capsys):
    arguments = ["check", "--backend", "numpy", "--law", "zero", "--examples", "5"]
    assert main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [verdict["cases"] for verdict in report["verdicts"]] == [5, 5]
    assert "all 2 checks passed: 10 cases" in capsys.readouterr().out
    assert main([*arguments, "--json", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["0", "-1", "many"])
def test_the_command_wants_a_positive_number_of_examples(wrong, capsys):
    with pytest.raises(SystemExit):
        main(["check", "--examples", wrong])
    assert "positive" in capsys.readouterr().err


def test_the_command_says_what_to_install(monkeypatch, capsys):
    for module in ("trainable_core.conformance.law", "trainable_core.conformance.suite"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "trainable_core.conformance.law", None)
    error = ModuleNotFoundError("No module named 'hypothesis'", name="hypothesis")

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("trainable_core.conformance."):
                raise error

    monkeypatch.delitem(sys.modules, "trainable_core.conformance.law")
    monkeypatch.delattr("trainable_core.conformance.law", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert main(["check"]) == 2
    assert "trainable-core[conformance]" in capsys.readouterr().err


# ---- matrix and template --------------------------------------------------------------------------------------------


def test_the_matrix_merges_backends():
    grids = (QuantizationMethod.SYMMETRIC, QuantizationMethod.UNIFORM)
    rows = [
        QuantizerRow("torch", QuantizationTarget.Weights, grids, "A", int, None, None),
        QuantizerRow("keras", QuantizationTarget.Weights, grids[:1], "A", float, None, None),
        QuantizerRow("keras", QuantizationTarget.Activation, grids[1:], "A", str, None, None),
    ]
    drawn_rows = {row[2]: dict(zip(COLUMNS, row, strict=True)) for row in matrix_rows(rows)}
    assert drawn_rows["Weights"]["SYMMETRIC"] == "torch, keras"
    assert drawn_rows["Weights"]["UNIFORM"] == "torch"
    assert drawn_rows["Weights"]["POWER_OF_TWO"] == "-"
    assert drawn_rows["Activation"]["granularity"] == "per tensor"
    assert drawn_rows["Activation"]["learns"] == "-"
    lines = markdown(matrix_rows(rows)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 4


@pytest.mark.parametrize("backends", [*([name] for name in backends_with_template()), backends_with_template()])
def test_a_new_plugin_is_whole(backends, tmp_path):
    folder = tmp_path / "deep" / "plugin"
    written = write_plugin("trainable-my-way", backends, folder)
    names = {path.name for path in written}
    assert {name for name in names if "_quantizers" in name} == {f"{backend}_quantizers.py" for backend in backends}
    hook = (folder / "src/trainable_my_way/plugin.py").read_text()
    assert [backend for backend in ("torch", "keras") if f'"{backend}"' in hook] == sorted(backends, reverse=True)
    assert folder / "src/trainable_my_way/plugin.py" in written
    for path in written:
        text = path.read_text()
        assert "$" not in text
        if path.suffix == ".py":
            compile(text, str(path), "exec")
    assert 'trainable_my_way = "trainable_my_way.plugin"' in (folder / "pyproject.toml").read_text()
    with pytest.raises(DocumentError, match="plugin"):
        write_plugin("trainable-my-way", backends, folder)


def test_a_plugin_for_a_backend_without_a_template_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="torch"):
        write_plugin("trainable-my-way", ["abacus"], tmp_path / "plugin")
    assert not (tmp_path / "plugin").exists()


@pytest.mark.parametrize("name", ["My-Way", "1st", "my way", "-", "class/../x"])
def test_a_name_that_no_package_can_have_is_refused(name, tmp_path):
    with pytest.raises(InvalidArgumentError, match="name"):
        write_plugin(name, ["torch"], tmp_path / "plugin")


def test_the_command_writes_a_plugin(tmp_path, capsys):
    assert main(["new-plugin", "my-way", "--output", str(tmp_path / "plugin")]) == 0
    assert "trainable check --plugin my-way" in capsys.readouterr().out
    assert (tmp_path / "plugin/src/my_way/torch_quantizers.py").exists()
    assert (tmp_path / "plugin/src/my_way/keras_quantizers.py").exists()
    assert main(["new-plugin", "my-way", "--backend", "keras", "--output", str(tmp_path / "one")]) == 0
    assert not (tmp_path / "one/src/my_way/torch_quantizers.py").exists()


# ---- conditions -----------------------------------------------------------------------------------------------------

PLENTY = Kind(moderate=True, finite=True, bound=True, fixed_input=True)


class Laid(NumpyAdapter):
    """The NumPy backend, as if its tensors had layouts and its quantizers fast paths."""

    layouts = ("contiguous", "transposed", "channels_last", "expanded")
    sizes = (100, 1000)


LAID = [replace(subject, adapter=Laid()) for subject in SUBJECTS]
CORNERS = [(subject, corner) for subject in LAID for corner in strategies.corners(subject, PLENTY)]


@pytest.mark.parametrize(("subject", "corner"), CORNERS, ids=lambda each: str(each)[:80])
def test_a_case_in_a_corner_meets_its_condition(subject, corner):
    random = np.random.default_rng(3)
    for _ in range(10):
        case = strategies.corner_case(random, subject, PLENTY, corner)
        assert corner.rank in {None, case.x.ndim}
        assert corner.bits in {None, case.config.n_bits}
        assert case.x.size > corner.size or not corner.size
        assert corner.way in {None, case.way}
        assert not corner.empty or not case.x.size
        assert not corner.bound or case.at_bound() or min(case.factors) > 0.75
        again = Case.from_document(json.loads(json.dumps(case.document())))
        np.testing.assert_array_equal(again.x, case.x)
        np.testing.assert_array_equal(again.upstream, case.upstream)
        assert (again.way, again.repeats) == (case.way, case.repeats)


def test_a_large_tensor_is_a_small_document():
    case = strategies.corner_case(np.random.default_rng(0), LAID[0], PLENTY, Corner(rank=2, size=10_000))
    assert case.x.size > 10_000
    assert len(json.dumps(case.document())) < 10_000
    assert any(label.startswith(">=") for label in case.repeated(case.repeats[0], 2**14).labels())


def test_an_expanded_tensor_can_be_expanded():
    for way in (Way(layout="expanded"), Way(upstream="expanded")):
        case = strategies.corner_case(np.random.default_rng(0), LAID[0], PLENTY, Corner(rank=3, way=way))
        if way.layout == "expanded":
            assert (case.x == case.x[:1]).all()
        else:
            assert np.unique(case.upstream).size == 1


def failing(condition) -> Law:
    """Return a law that holds except for cases that meet a condition."""

    def check(subject: Subject, case: Case) -> None:
        if condition(subject, case):
            raise Violation("condition", "not met", "met")

    return replace(LAWS["on_grid"], name="made_up", check=check, kind=PLENTY)


@pytest.mark.parametrize(
    ("condition", "shown_as"),
    [
        (lambda subject, _: subject.way.layout == "transposed", "layout='transposed'"),
        (lambda _, case: case.x.size > 1000, "elements: the input below"),
        (lambda subject, _: not subject.way.input_gradient, "input_gradient=False"),
    ],
    ids=["layout", "size", "input"],
)
def test_a_counterexample_names_the_condition_that_it_needs(condition, shown_as):
    verdict = try_law(failing(condition), LAID[0], examples=60, seed=0)
    assert not verdict.holds
    assert shown_as in str(verdict.counterexample)
    assert verdict.counterexample.case.steps == 0
    assert set(verdict.counterexample.case.factors) == {1.0}


def test_a_counterexample_in_a_corner_is_made_smaller():
    law = failing(lambda _, case: case.x.ndim == 5 and bool((case.x > 0).any()))
    # one drawn case, the simplest there is, and every corner
    case = try_law(law, LAID[0], examples=1, seed=0, thorough=True).counterexample.case
    sizes = [size for axis, size in enumerate(case.x.shape) if case.config.channels_axis not in {axis, axis - 5}]
    assert set(sizes) == {1}


def test_subjects_share_the_corners_out():
    seen: set[str] = set()
    for index in range(40):
        subject = replace(LAID[0], cls=type(f"Another{index}", (NumpySte,), {}))
        verdict = try_law(failing(lambda *_: False), subject, examples=4, seed=0)
        assert verdict.cases == 4
        seen |= verdict.covered
    assert {"transposed input", "expanded upstream", "input without gradient", "at a bound", "empty", "5-D"} <= seen


def test_successive_seeds_meet_every_corner(monkeypatch):
    met = []

    def observed(generator, subject, kind, corner):
        met.append(corner)
        return corner_case(generator, subject, kind, corner)

    corner_case = strategies.corner_case
    monkeypatch.setattr(strategies, "corner_case", observed)
    law = failing(lambda *_: False)
    corners = law.corners(LAID[0])
    for seed in range(len(corners)):
        try_law(law, LAID[0], examples=3, seed=seed)  # two drawn cases and one corner
    assert len(met) == len(corners)
    assert all(corner in met for corner in corners)


def test_a_thorough_run_tries_every_corner():
    verdict = try_law(failing(lambda *_: False), LAID[0], examples=4, seed=0, thorough=True)
    assert verdict.cases >= len(strategies.corners(LAID[0], PLENTY))


def test_a_law_that_takes_long_is_tried_on_few_cases():
    law = replace(failing(lambda *_: False), most=2)
    assert try_law(law, LAID[0], examples=50, seed=0).cases == 2
    assert try_law(law, LAID[0], examples=5, seed=0, thorough=True).cases > 5


# ---- processes ------------------------------------------------------------------------------------------------------


def work_on(*classes: type, laws: tuple[str, ...]) -> list[parallel.Work]:
    found = [subject for cls in classes for subject in subjects_of(cls, ADAPTER)]
    return [parallel.work(place, each, named_laws([*laws]), 5, 1, thorough=False) for place, each in enumerate(found)]


def said(found: list[Verdict]) -> list[tuple[str, str, int, frozenset[str], str]]:
    return [(f"{v.subject}", v.law.name, v.cases, v.covered, f"{v.counterexample}") for v in found]


def test_another_process_answers_what_is_found_here(monkeypatch):
    """What crosses the pipe is all of a verdict, counterexamples too; an unknown quantizer or law has no answer."""
    pending = work_on(NumpySte, HalfUp, laws=("zero", "tie_rule"))
    monkeypatch.setattr(parallel.suite, "subjects", lambda backend: [each.subject for each in pending[:-1]])
    asked = [each.task for each in pending]
    asked.append(asked[0]._replace(laws=("zero", "no such law")))
    given, made = io.BytesIO(b"".join(map(pickle.dumps, [["numpy"], *asked]))), io.BytesIO()
    parallel.serve(given, made)
    made.seek(0)
    assert pickle.load(made) == []  # noqa: S301 - ours
    for each in pending[:-1]:
        found = pickle.load(made)  # noqa: S301
        answer = [parallel.verdict(each.subject, *one) for one in zip(each.laws, found, strict=True)]
        assert said(answer) == said([*parallel.verdicts(each.task, each.subject, each.laws)])
    assert [pickle.load(made) for _ in range(2)] == [None, None]  # noqa: S301
    assert any("HalfUp" in f"{verdict.counterexample}" for verdict in answer)


class Process:
    """Stands for a process that ends after some answers."""

    answers = 0

    def __init__(self, *_args, **_how):
        self.stdin, self.stdout = io.BytesIO(), io.BytesIO()
        for _ in range(self.answers):
            self.stdout.write(pickle.dumps([]))
        self.stdout.seek(0)

    def kill(self):
        """End it."""

    def communicate(self):
        """Wait for it."""


@pytest.mark.parametrize("answers", [0, 1])
def test_a_process_that_ends_loses_nothing(monkeypatch, answers):
    """Before it has imported a backend, and with a quantizer that it has taken."""
    monkeypatch.setattr(parallel, "FEWEST", 1)
    monkeypatch.setattr(parallel.subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "answers", answers)
    taken = []
    found = parallel.run(work_on(NumpySte, laws=("zero",)), 3, lambda each, law, _: taken.append((each.place, law)))
    assert [len(each) for each in found] == [1] * len(SUBJECTS)
    assert sum(law is None for _, law in taken) <= 2 * answers
    assert {place for place, law in taken if law is not None} == {*range(len(SUBJECTS))}


def test_a_quantizer_of_this_process_alone_is_checked_here(monkeypatch):
    monkeypatch.setattr(parallel, "FEWEST", 1)  # so that processes are begun, which don't know the backend
    laws = named_laws(["zero", "tie_rule"])
    one, several = (report.run(SUBJECTS, laws, examples=5, seed=3, jobs=jobs) for jobs in (1, 3))
    assert said(one.verdicts) == said(several.verdicts)


def test_a_single_quantizer_gets_more_cases_than_each_of_many():
    alone, together = (report.share(SUBJECTS[0], SUBJECTS[:1] * many, thorough=False) for many in (1, 50))
    assert alone == report.MOST
    assert together == SUBJECTS[0].adapter.cases // 50
    assert report.share(SUBJECTS[0], SUBJECTS[:1] * 50, thorough=True) == together * report.THOROUGH


def test_the_command_prints_what_the_cases_covered(numpy_backend, tmp_path, capsys):
    arguments = ["check", "--backend", "numpy", "--law", "zero", "--examples", "40", "--coverage"]
    assert main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    assert "what the cases covered" in capsys.readouterr().out
    covered = json.loads((tmp_path / "report.json").read_text())["coverage"]["zero"]
    assert {"1 bit", "5-D", "empty", "infinities"} <= set(covered)


def test_values_of_a_large_array_are_cut_short():
    assert len(shown(np.zeros(100_000, np.float32))) < 40_000
    assert "100000" in shown(np.zeros(100_000, np.float32))


def test_the_grids_of_a_class_share_laws_on_calls_out_where_cases_are_few():
    laws = [law for law in LAWS.values() if law.about(SUBJECTS[0]) and law.about(SUBJECTS[1])]
    assert SUBJECTS[0].cls is SUBJECTS[1].cls
    shares = [[report.shared_out(laws, subject, SUBJECTS[:2], seed) for subject in SUBJECTS[:2]] for seed in (0, 1)]
    for first, second in shares:
        names, others = ({law.name for law in each} for each in (first, second))
        assert names | others == {law.name for law in laws}
        assert {"on_grid", "tie_rule"} <= names & others  # on values
        assert not {"deepcopy", "pickling", "fresh_output"} & names & others  # on calls
    assert {law.name for law in shares[0][0]} & {"deepcopy", "pickling"} == {law.name for law in shares[1][1]} & {
        "deepcopy",
        "pickling",
    }


def test_where_there_is_no_case_for_each_quantizer_laws_are_tried_on_as_many_as_there_are_cases_for(monkeypatch):
    monkeypatch.setattr(type(ADAPTER), "cases", report.FEWEST * 2)
    many = [replace(SUBJECTS[number % 2], cls=type(f"Of{number}", (NumpySte,), {})) for number in range(8)]
    laws = [law for law in LAWS.values() if all(law.about(each) for each in many)]
    tried = [[{law.name for law in report.shared_out(laws, each, many, seed)} for each in many] for seed in range(4)]
    for shares in tried:
        assert {sum(law.name in own for own in shares) for law in laws} == {2}
    for place in range(8):  # successive seeds try every law on every quantizer
        assert set().union(*(shares[place] for shares in tried)) == {law.name for law in laws}


def test_a_run_shares_laws_out_only_where_there_are_too_few_cases(monkeypatch):
    given = []
    monkeypatch.setattr(report.parallel, "run", lambda pending, *_: given.extend(pending) or [[] for _ in pending])
    monkeypatch.setattr(type(ADAPTER), "cases", report.FEWEST)
    report.run(SUBJECTS[:1], list(LAWS.values()), seed=0)
    assert [law.name for law in given[0].laws] == [law.name for law in LAWS.values() if law.about(SUBJECTS[0])]
    monkeypatch.setattr(type(ADAPTER), "cases", 1)
    report.run(SUBJECTS[:2], list(LAWS.values()), seed=0)
    assert len(given[1].laws) < len(given[0].laws)
    report.run(SUBJECTS[:2], [LAWS["deepcopy"]], seed=0)  # laws that somebody asked for
    assert [[law.name for law in each.laws] for each in given[3:]] == [["deepcopy"]] * 2
