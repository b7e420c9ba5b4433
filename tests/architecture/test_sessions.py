"""noxfile.py, what it is made of, and who calls its sessions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def sessions() -> dict[str, bool]:
    """Return the names of the sessions, read from noxfile.py, and whether a plain `nox` runs each."""
    found = {}
    for node in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body:
        for call in getattr(node, "decorator_list", []):
            options = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
            found[ast.literal_eval(call.args[0])] = options.get("default", True)
    return found


def called_by(workflow: Path) -> list[str]:
    """Return the sessions in the matrix of a workflow's only job."""
    yaml = pytest.importorskip("yaml", reason="reading a workflow needs PyYAML")
    (job,) = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [
        "pip install nox",
        "nox -s ${{ matrix.session }}",
    ]
    return job["strategy"]["matrix"]["session"]


def test_there_are_sessions_and_workflows():
    assert {"lint", "tests-core", "quickstart"} <= set(sessions())
    assert [path.stem for path in WORKFLOWS] == ["checks", "weekly"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_sessions_that_exist(workflow):
    called = called_by(workflow)
    assert called
    assert set(called) <= set(sessions())


def test_every_push_runs_what_a_plain_nox_runs():
    default = [name for name, is_default in sessions().items() if is_default]
    assert sorted(called_by(ROOT / ".github/workflows/checks.yml")) == sorted(default)


def test_a_session_has_a_docstring_that_says_what_it_does():
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(functions) == len(sessions())
    assert all((ast.get_docstring(node) or "").partition("\n")[0].endswith((".", "`.")) for node in functions)


@pytest.fixture
def tasks():
    pytest.importorskip("nox", reason="tasks/ is nox's; the environment of the torch tests has it")
    from tasks import environments, quickstart, results

    return environments, quickstart, results


def test_every_environment_has_its_constraints(tasks):
    environments, _, _ = tasks
    made = [value for value in vars(environments).values() if isinstance(value, environments.Environment)]
    assert len({environment.name for environment in made}) == len(made)
    for environment in made:
        if environment.constraints is not None:
            assert (ROOT / f"constraints/{environment.constraints}.txt").exists()


def test_an_environment_is_made_again_when_its_requirements_change(tasks):
    environments, _, _ = tasks
    one, same, other = (environments.Environment("e", [name]) for name in ("torch", "torch", "keras"))
    assert one.made_from() == same.made_from() != other.made_from()


@pytest.mark.parametrize(
    ("arguments", "example", "environment", "options"),
    [
        ([], "torch", "quickstart", []),
        (["--seed", "3"], "torch", "quickstart", ["--seed", "3"]),
        (["--backend", "torch", "--epochs", "2"], "torch", "quickstart", ["--epochs", "2"]),
        (["--backend", "keras"], "keras", "keras", []),
        (["--backend", "keras", "--engine", "jax", "--seed", "1"], "keras", "keras-jax", ["--seed", "1"]),
        (["--backend", "keras", "--engine", "torch"], "keras", "keras-torch", []),
        (["--backend", "tf_keras"], "keras", "keras-2", []),
    ],
)
def test_the_quickstart_runs_the_example_of_the_backend_that_was_asked_for(
    tasks, arguments, example, environment, options
):
    found = tasks[1].Quickstart.of(arguments)
    assert (ROOT / found.example).exists()
    assert found.example == f"examples/quickstart_{example}.py"
    assert (found.environment.name, list(found.options)) == (environment, options)


def test_the_quickstart_tells_keras_what_to_run_on(tasks):
    of = tasks[1].Quickstart.of
    assert of(["--backend", "keras", "--engine", "jax"]).env["KERAS_BACKEND"] == "jax"
    assert of(["--backend", "tf_keras"]).env["TF_USE_LEGACY_KERAS"] == "1"


@pytest.mark.parametrize(
    "wrong", [["--backend", "caffe"], ["--engine", "jax"], ["--backend", "keras", "--engine", "x"]]
)
def test_the_quickstart_refuses_what_it_does_not_have(tasks, wrong, capsys):
    with pytest.raises(SystemExit):
        tasks[1].Quickstart.of(wrong)
    assert "nox -s quickstart" in capsys.readouterr().err


def test_every_benchmark_is_run_by_a_session(tasks):
    from tasks import benchmarks

    lists = [value for name, value in vars(benchmarks).items() if name.endswith("_SCRIPTS")]
    scripts = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
    }
    assert len(lists) == 5
    assert {script for scripts in lists for script in scripts} == scripts


def test_counts_are_read_from_a_report(tasks, tmp_path):
    results = tasks[2]
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="10" skipped="2" errors="1" failures="3"/></testsuites>')
    result = results.Result("tests", outcome="ok", seconds=2.0)
    results.count(result, report)
    assert (result.passed, result.failed, result.skipped) == (4, 4, 2)
    results.count(result, report)
    lines = results.summary([results.Result("lint", outcome="ok", seconds=1.0), result]).splitlines()
    assert lines[-1] == "total: 8 passed, 8 failed, 4 skipped"
    assert lines[-2].split() == ["all", "sessions", "took", "3", "s"]
    assert len(lines) == 5
