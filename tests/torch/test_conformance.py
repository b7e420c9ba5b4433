"""Every registered PyTorch quantizer keeps every law; the ways in; plugins that are not ours."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer

from tests.kit import affordable
from trainable_core.cli import main
from trainable_core.conformance import (
    LAWS,
    ConformanceError,
    check_quantizer,
    conformance_checks,
    parallel,
    replay,
    report,
    subjects,
)
from trainable_core.conformance.law import named_laws
from trainable_core.conformance.suite import checks
from trainable_core.conformance.template import write_plugin
from trainable_core.errors import InvalidArgumentError
from trainable_core.registry import process as registry
from trainable_torch.conformance import ADAPTER, laid_out
from trainable_torch.quantizers import SteWeightsQuantizer

ROOT = Path(__file__).parents[2]
FEW = 5  # what is tested here is the way in; the laws have their own number of cases


CHECKS = affordable(checks(backend="torch", plugin="torch", examples=5))  # for each of 18 quantizers: 90 cases per law


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_built_in_quantizers_keep_every_law(check):
    check()


@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.SYMMETRIC], "TIES")
class TiesUp(SteWeightsQuantizer):
    """Rounds ties up, where PyTorch's kernels round to even."""

    def fake_quantize(self, x, grid, training):
        low, high = grid.ends
        return ((x * grid.scale.reciprocal() + 0.5).floor().clamp(low, high) + 0.0) * grid.scale


@conformance_checks(TiesUp, laws=["tie_rule", "zero"], expected_failures={"tie_rule": "the method rounds up"})
def test_an_expected_failure_is_expected(check):
    check()


def outcomes(pytester_source: str, path: Path) -> int:
    """Run a test module in this process and return pytest's exit code."""
    module = path / f"test_made_up_{abs(hash(pytester_source))}.py"
    module.write_text(pytester_source)
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-o", "addopts=", str(module)]))


def test_an_expected_failure_that_passes_fails(tmp_path):
    source = (
        "from trainable_core.conformance import conformance_checks\n"
        "from trainable_torch.quantizers import SteWeightsQuantizer\n"
        "@conformance_checks(SteWeightsQuantizer, laws=['zero'], examples=5, expected_failures={'zero': 'why not'})\n"
        "def test_it(check):\n"
        "    check()\n"
    )
    assert outcomes(source, tmp_path) == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("expected", [{"tie_rul": "a typo"}, {"tie_rule": " "}])
def test_an_expected_failure_names_a_law_and_a_reason(expected):
    with pytest.raises(InvalidArgumentError, match=next(iter(expected))):
        conformance_checks(TiesUp, expected_failures=expected)


def test_a_broken_law_is_told_by_a_counterexample_that_can_be_replayed():
    verdict = next(v for v in check_quantizer(TiesUp, "torch", laws=["tie_rule"], seed=0))
    assert verdict.counterexample is not None
    document = json.loads(json.dumps(verdict.counterexample.document()))
    assert document["law"] == "tie_rule"
    with pytest.raises(AssertionError, match="ties"):
        replay(document, TiesUp)
    for part in ("tie_rule", "TiesUp", "weights_quantization_method", "np.array", "expected", "got", "replay("):
        assert part in str(verdict.counterexample)


def test_a_counterexample_is_shrunk_to_one_element():
    verdict = next(v for v in check_quantizer(TiesUp, "torch", laws=["tie_rule"], seed=0))
    assert verdict.counterexample is not None
    assert verdict.counterexample.case is not None
    assert verdict.counterexample.case.x.size == 1


def test_the_command_checks_a_plugin_and_reports(tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["check", "--backend", "torch", "--plugin", "torch", "--law", "zero", "--law", "freeze"]
    assert main([*arguments, "--examples", str(FEW), "--seed", "3", "--json", str(report)]) == 0
    document = json.loads(report.read_text())
    assert document["ok"] is True
    assert document["seed"] == 3
    assert document["examples"] == FEW
    assert document["versions"]["torch"] == torch.__version__.partition("+")[0] or document["versions"]["torch"]
    assert len(document["verdicts"]) == 2 * len(subjects("torch", "torch"))
    assert set(document["laws"]) == {"zero", "freeze"}
    output = capsys.readouterr()
    assert "LSQ-Weights-UNIFORM" in output.out
    assert "2 of 2" in output.out
    assert "LSQ-Weights-UNIFORM" in output.err, "progress is told while it runs"


@pytest.fixture
def broken_plugin():
    class Plugin:
        @staticmethod
        def trainable_register_quantizers(backend: str):
            return [TiesUp] if backend == "torch" else []

    from trainable_core import hookimpl

    hookimpl(Plugin.trainable_register_quantizers)
    registry.register(Plugin, "broken")
    yield
    registry.default_registry().unregister("broken")


def test_the_command_fails_when_a_law_is_broken(broken_plugin, capsys):
    assert main(["check", "--plugin", "broken", "--law", "tie_rule", "--examples", "20"]) == 1
    output = capsys.readouterr().out
    assert "0 of 1" in output
    assert "1 of 1 checks failed" in output
    assert "law        tie_rule" in output


def test_the_command_refuses_what_it_does_not_know(capsys):
    assert main(["check", "--law", "tie_rul"]) == 2
    assert "tie_rule" in capsys.readouterr().err
    assert main(["check", "--plugin", "torhc"]) == 2
    assert "torch" in capsys.readouterr().err
    assert main(["check", "--backend", "torhc"]) == 2


def test_the_command_lists_the_laws(capsys):
    assert main(["check", "--laws"]) == 0
    assert "pruned weights and the zeros of ReLU" in capsys.readouterr().out


def test_the_matrix_shows_who_implements_what(capsys):
    assert main(["matrix", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| training method | learns | target | granularity | POWER_OF_TWO |")
    assert any(
        line.startswith("| LSQ | thresholds, ranges | Weights | per tensor, per channel, per group |")
        and "torch" in line
        for line in lines
    )
    assert main(["matrix"]) == 0
    assert "LSQ" in capsys.readouterr().out


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a source tree an installed distribution, as pip would: importable, with its metadata."""
    loaded = set(sys.modules)

    def put(source: Path, name: str, plugin: str) -> None:
        metadata = tmp_path / "site" / f"{name.replace('-', '_')}-0.1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (metadata / "entry_points.txt").write_text(f"[trainable]\n{plugin}\n")
        monkeypatch.syspath_prepend(str(metadata.parent))
        monkeypatch.syspath_prepend(str(source))
        registry.default_registry().reset()

    yield put
    monkeypatch.undo()
    registry.default_registry().reset()
    for module in set(sys.modules) - loaded:
        if module.startswith(("trainable_ewgs", "trainable_fade", "trainable_log_threshold")):
            del sys.modules[module]


def check(plugin: str, examples: int) -> int:
    """Try a plugin on the laws that need no interpreter or compiler of their own; tests/plugin runs the whole kit."""
    slow = {"no_framework_leak", "graph_execution"}
    laws = [part for law in LAWS if law not in slow for part in ("--law", law)]
    return main(["check", "--plugin", plugin, "--backend", "torch", "--examples", str(examples), *laws])


def test_a_new_plugin_keeps_the_laws_as_it_is_written(tmp_path, install, capsys):
    write_plugin("trainable-fade", ["torch"], tmp_path / "plugin")
    install(tmp_path / "plugin" / "src", "trainable-fade", "trainable_fade = trainable_fade.plugin")
    assert check("trainable-fade", 2) == 0, capsys.readouterr().out


def test_the_example_plugin_keeps_the_laws(install, capsys):
    install(ROOT / "examples/plugin-ewgs/src", "trainable-ewgs", "ewgs = trainable_ewgs.plugin")
    assert check("ewgs", 2) == 0, capsys.readouterr().out


def test_methods_with_variables_of_their_own_keep_the_laws(install, capsys):
    source = ROOT / "examples/plugin-log-threshold/src"
    install(source, "trainable-log-threshold", "log_threshold = trainable_log_threshold.plugin")
    assert check("log_threshold", 1) == 0, capsys.readouterr().out


@pytest.mark.parametrize(("method", "lines"), [("log", 40), ("dsq", 50)])
def test_the_estimators_are_short(method, lines):
    source = ROOT / f"examples/plugin-log-threshold/src/trainable_log_threshold/torch_{method}.py"
    assert len(source.read_text().splitlines()) <= lines


def test_the_example_plugin_is_chosen_by_a_recipe(install):
    import trainable_torch

    install(ROOT / "examples/plugin-ewgs/src", "trainable-ewgs", "ewgs = trainable_ewgs.plugin")
    weights = {"method": "SYMMETRIC", "n_bits": 4, "training_method": "EWGS", "arguments": {"delta": 0.25}}
    model = trainable_torch.wrap(torch.nn.Sequential(torch.nn.Linear(3, 2)), {"weights": weights})
    deltas = [module.delta for module in model.modules() if type(module).__name__ == "EwgsWeightsQuantizer"]
    assert deltas == [0.25]


def test_the_example_plugin_is_short():
    for backend in ("torch",):
        source = ROOT / f"examples/plugin-ewgs/src/trainable_ewgs/{backend}_quantizers.py"
        assert len(source.read_text().splitlines()) < 60


def test_processes_share_the_quantizers_out(monkeypatch):
    """Another process tries all of them here, because this one waits until nothing is left, and finds the same."""

    def nothing(left, _found, _begins):
        until = time.monotonic() + 300
        while left and time.monotonic() < until:
            time.sleep(0.1)

    def told(found):
        return f"{found.subject}", found.law.name, found.cases, found.covered, found.holds

    laws, some = named_laws(["on_grid", "pickling"]), subjects("torch", "torch")[:16]
    one = report.run(some, laws, examples=2, seed=5)
    monkeypatch.setattr(parallel, "_here", nothing)
    several = report.run(some, laws, examples=2, seed=5, jobs=2)
    assert [told(verdict) for verdict in several.verdicts] == [told(verdict) for verdict in one.verdicts]


def test_a_check_raises_its_counterexample():
    verdict = next(v for v in check_quantizer(TiesUp, "torch", laws=["tie_rule"], seed=0))
    with pytest.raises(ConformanceError, match="tie_rule"):
        raise ConformanceError(verdict.counterexample)


@pytest.mark.parametrize(
    ("expect", "code", "told"),
    [
        ("tie_rule=the method rounds up", 0, "all 1 checks passed, 1 broken as expected"),
        ("TIES-Weights-SYMMETRIC-tie_rule=the method rounds up", 0, "broken as expected: the method rounds up"),
        ("zero=why not", 1, "expected to be broken, and holds: why not"),
        ("tie_rul=a typo", 2, "did you mean 'tie_rule'"),
        ("tie_rule=", 2, "no reason"),
        ("tie_rule", 2, "no reason"),
    ],
)
def test_the_command_takes_expected_failures(broken_plugin, capsys, expect, code, told):
    law = "zero" if expect.startswith("zero") else "tie_rule"
    assert main(["check", "--plugin", "broken", "--law", law, "--examples", "20", "--expect", expect]) == code
    output = capsys.readouterr()
    assert told in output.out + output.err


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("transposed", (2, 3)),
        ("strided", (2, 3)),
        ("expanded", (4, 3)),
        ("channels_last", (2, 3, 4, 5)),
        ("channels_last_3d", (2, 3, 4, 5, 6)),
    ],
)
def test_the_adapter_lays_tensors_out_as_it_says(layout, shape):
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    x = x[:1].expand(shape).contiguous() if layout == "expanded" else x
    laid = laid_out(x, layout)
    assert torch.equal(laid, x)
    assert laid.stride() != x.stride()
    assert laid_out(x[:0], layout).shape == x[:0].shape
    assert laid_out(torch.tensor(1.0), layout).item() == 1.0


def observed(function):
    """Return what the adapter observes of a quantizer that is a function."""

    class Called(torch.nn.Module):
        def forward(self, x, training):
            return function(x)

    x = np.ones(3, np.float32)
    return ADAPTER.observe(Called(), x, x, training=True)


def test_the_adapter_observes_what_a_call_leaves_behind():
    kept: list[torch.Tensor] = []
    nothing = observed(lambda x: x * 2)
    assert (nothing.kept, nothing.shared, nothing.upstream_changed) == ((), (), False)
    assert (nothing.mode_changed, nothing.recorded) == (False, (True, False))
    assert observed(lambda x: (kept.append(x), x * 2)[1]).kept == ("the input",)
    assert observed(lambda x: x.view(-1)).shared == ("the input", "an earlier output")
    assert observed(lambda x: x.detach() * 2).recorded == (False, False)
