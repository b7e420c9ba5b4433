"""Following a training in core: what is written, where, and what is warned of."""

from __future__ import annotations

import csv
import shutil
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.core.home_view import HomeView
from trainable_core.errors import (
    CalibrationError,
    DocumentError,
    GradientMissingWarning,
    InvalidArgumentError,
    ModelError,
    RecordsLostWarning,
    StatisticsRunAwayWarning,
    ThresholdCollapsedWarning,
)
from trainable_core.tracking.alarm import PATIENCE
from trainable_core.tracking.measure import QUANTITIES, WeightMemory
from trainable_core.tracking.routine import TrackingRoutine
from trainable_core.tracking.writers import (
    CsvWriter,
    Scalar,
    TensorBoardWriter,
    crc32c,
    event_of,
    read_csv,
    record_of,
    tag_of,
)

EVENT = (
    "09000000000000f83f10ac022a2d0a140a0d6c6f772f66632e77656967687415000080be"
    "0a150a0e686967682f66632e7765696768741500006040"
)
RECORD = "0300000000000000b099490e6162636e57f121"
BATCHES = [np.float32([-2.0, 0.0, 0.5]), np.float32([0.25])]


class Tracking(TrackingRoutine):
    """With gradients that a test gives."""

    given: Mapping[str, float | None] | None = None
    begun = 0

    def begin(self) -> None:
        self.begun += 1

    def finish(self) -> None:
        self.begun -= 1

    def gradients(self) -> Mapping[str, float | None] | None:
        return self.given


def tracking(path: Path, view: HomeView | None = None, every: int = 1, batches: Any = None, **more: Any) -> Tracking:
    return Tracking(HomeView() if view is None else view, path / "run.csv", every, batches, **more)


def numbers(path: Path) -> dict[tuple[int, str], dict[str, float]]:
    found: dict[tuple[int, str], dict[str, float]] = {}
    for scalar in read_csv(path / "run.csv"):
        found.setdefault((scalar.step, scalar.tensor), {})[scalar.quantity] = scalar.value
    return found


def test_a_record_says_grids_codes_and_statistics(tmp_path: Path) -> None:
    view = HomeView()
    routine = tracking(tmp_path, view, batches=BATCHES)
    routine.given = {"fc.weight": 0.5, "fc: input": None}
    routine.start()
    view.weights.threshold[...] = 2.0, 1.0
    view.weight[0, 0] = 1.2
    routine.step_end()
    first, second = (numbers(tmp_path)[step, "fc.weight"] for step in (0, 1))
    # thresholds 1 and 2 make steps 0.125 and 0.25: ends -8 and 7 of either, and their means
    assert (first["low"], first["high"]) == (-1.5, 1.3125)
    assert (first["scale_min"], first["scale_max"], first["moved"]) == (0.125, 0.25, 0.0)
    # 0.9 is within half a step beyond 0.875, 4.0 is beyond 1.75: one of six
    assert first["clipped"] == pytest.approx(1 / 6)
    # codes 1, -5, 7 and 1, 1, 7: three of sixteen
    assert first["codes_used"] == 3 / 16
    assert second["gradient"] == 0.5
    assert second["moved"] == 1.0  # the step of the first channel is twice what it was
    # now 5, -2, 4 and 2, 2, 7: all but the last changed
    assert (second["changed"], second["returned"]) == (5 / 6, 0.0)
    of_input = numbers(tmp_path)[0, "fc: input"]
    assert (of_input["largest"], of_input["clipped"]) == (2.0, 0.25)
    assert numbers(tmp_path)[1, "norm"] == {"mean": 0.0, "variance": 1.0}
    assert {quantity for told in numbers(tmp_path).values() for quantity in told} <= QUANTITIES.keys()


def test_a_step_before_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="before start"):
        tracking(tmp_path).step_end()


def test_records_are_written_when_they_are_due_and_at_the_end(tmp_path: Path) -> None:
    routine = tracking(tmp_path, every=3)
    routine.start(4)
    due = []
    for step in range(5, 9):
        due.append(routine.looks_next)
        routine.step_end(step if step % 2 else None)
    routine.before_evaluation()
    assert {step for step, _ in numbers(tmp_path)} == {4, 6}
    assert due == [False, True, False, False]
    routine.end()
    assert {step for step, _ in numbers(tmp_path)} == {4, 6, 8}
    assert routine.begun == 0
    routine.start(8)  # goes on: the record is there already
    routine.end()
    assert sum(step == 8 for step, _ in numbers(tmp_path)) == 3  # weight, input, norm


def test_a_process_that_does_not_write_looks_at_nothing(tmp_path: Path) -> None:
    routine = tracking(tmp_path, writes=False)
    routine.start()
    routine.step_end()
    routine.end()
    assert not (tmp_path / "run.csv").exists()
    assert not routine.looks_next


def test_codes_that_go_back_are_told_from_those_that_go_on() -> None:
    memory = WeightMemory()
    seen = [memory.compared(np.int32(codes)) for codes in ([0, 0, 0], [1, 1, 0], [2, 0, 0], [2, 1, 0])]
    assert seen[0] == {}
    assert [(each["changed"], each["returned"]) for each in seen[1:]] == [
        (2 / 3, 0.0),
        (2 / 3, 1 / 3),
        (1 / 3, 1 / 3),
    ]


# ---- warnings -------------------------------------------------------------------------------------------------------


def steps(routine: Tracking, count: int) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        routine.start()
        for _ in range(count):
            routine.step_end()
    return caught


@pytest.mark.parametrize("gradient", [None, 0.0])
def test_thresholds_without_a_gradient_are_told_once(tmp_path: Path, gradient: float | None) -> None:
    routine = tracking(tmp_path)
    routine.given = {"fc.weight": gradient, "fc: input": 0.1}
    assert steps(routine, PATIENCE - 1) == []
    caught = steps(routine, PATIENCE + 2)
    assert [each.category for each in caught] == [GradientMissingWarning]
    assert "fc.weight" in str(caught[0].message)
    assert "fc: input" not in str(caught[0].message)
    assert list(routine.problems) == ["GradientMissingWarning"]


def test_where_gradients_are_not_seen_thresholds_that_stand_still_are_told(tmp_path: Path) -> None:
    view = HomeView()
    routine = tracking(tmp_path, view)
    routine.start()
    for step in range(PATIENCE - 1):
        view.weights.threshold[...] = 1.0 + step / 8
        routine.step_end()
    view.weights.threshold[...] = 2.0
    with pytest.warns(GradientMissingWarning, match="fc: input: no change"):
        routine.step_end()


def test_frozen_thresholds_need_no_gradient(tmp_path: Path) -> None:
    view = HomeView()
    for quantizer in (view.weights, view.activations):
        quantizer.get_trainable_variables = lambda _group: []
    assert steps(tracking(tmp_path, view), PATIENCE + 2) == []


@pytest.mark.parametrize("threshold", [(1e-3, 2.0), (np.nan, 2.0), (0.0, 2.0)])
def test_a_collapsed_threshold_is_told(tmp_path: Path, threshold: Any) -> None:
    view = HomeView()
    routine = tracking(tmp_path, view)
    routine.given = {"fc.weight": 1.0, "fc: input": 1.0}
    routine.start()
    view.weights.threshold[...] = 0.5, 1.0  # learning is no collapse
    routine.step_end()
    assert routine.problems == {}
    view.weights.threshold[...] = threshold
    with pytest.warns(ThresholdCollapsedWarning, match="1 of the 2 steps fell from 0.125"):
        routine.step_end()


def test_a_channel_that_was_at_its_bound_from_the_beginning_has_not_collapsed(tmp_path: Path) -> None:
    view = HomeView(threshold=(2.0**-16, 1.0))  # calibration gives that to a channel of zeros
    routine = tracking(tmp_path, view)
    routine.given = {"fc.weight": 1.0, "fc: input": 1.0}
    assert steps(routine, 2) == []


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    batches = [np.float32([0.5])]
    routine = tracking(tmp_path, batches=batches)
    routine.given = {"fc.weight": 1.0, "fc: input": 1.0}
    routine.start()
    batches[0] = np.float32([0.5, np.nan])
    with pytest.warns(StatisticsRunAwayWarning, match="fc: input: largest value went from 0.5 to nan"):
        routine.step_end()


def test_statistics_that_run_away_are_told(tmp_path: Path) -> None:
    view = HomeView()
    routine = tracking(tmp_path, view, batches=(batches := [np.float32([0.5])]))
    routine.given = {"fc.weight": 1.0, "fc: input": 1.0}
    assert steps(routine, 1) == []
    view.statistics = np.float32([0, 1]), np.float32([1.0, 3e4])
    batches[0] = np.float32([9e4])
    with pytest.warns(StatisticsRunAwayWarning) as caught:
        routine.step_end()
    assert {"norm", "fc: input"} <= caught[0].message.reasons.keys()
    view.statistics = np.float32([0, 1]), np.float32([1.0, np.nan])
    routine.step_end()  # is not told again


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"every": 0}, InvalidArgumentError, "every"),
        ({"every": 2.0}, InvalidArgumentError, "every"),
        ({"every": True}, InvalidArgumentError, "every"),
        ({"batches": iter(BATCHES)}, InvalidArgumentError, "read only once"),
        ({"batches": BATCHES[0]}, CalibrationError, r"pass \[batch\]"),
    ],
)
def test_wrong_arguments_are_refused_before_a_file_is_made(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        tracking(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_trainable_quantizers_is_refused(tmp_path: Path) -> None:
    view = HomeView()
    view.tensors = list  # type: ignore[method-assign] # what a finalized model has
    with pytest.raises(ModelError, match="no trainable quantizer"):
        tracking(tmp_path, view)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_csv_file_goes_on_and_the_last_number_counts(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    odd = 'a "quoted", name'
    CsvWriter(path).write([Scalar(1, odd, "low", 0.1), Scalar(2, odd, "low", float("inf"))])
    CsvWriter(path).write([Scalar(2, odd, "low", -0.2), Scalar(2, odd, "high", float("nan"))])
    found = read_csv(path)
    assert found[:2] == [Scalar(1, odd, "low", 0.1), Scalar(2, odd, "low", -0.2)]
    assert np.isnan(found[2].value)
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == ["step", "tensor", "quantity", "value"]


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "step,tensor,quantity,value\n1,fc,low\n", "step,tensor,quantity,value\nx,f,l,1\n"]
)
def test_a_csv_file_of_others_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.csv"
    path.write_text(text)
    with pytest.raises(DocumentError, match=r"run\.csv"):
        read_csv(path)
    if text.startswith("a"):
        with pytest.raises(DocumentError, match="not written by `track`"):
            tracking(tmp_path)
        assert path.read_text() == text


@pytest.mark.parametrize("name", ["missing/run.csv", "file/run"])
def test_a_place_that_can_not_be_written_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DocumentError):
        Tracking(HomeView(), tmp_path / name, 1, None)


def test_an_event_is_what_protobuf_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1.5)
    scalars = [Scalar(300, "fc.weight", "low", -0.25), Scalar(300, "fc.weight", "high", 3.5)]
    assert event_of(300, scalars).hex() == EVENT  # made with tensorboard 2.21's own classes


def test_a_record_is_what_tensorboard_writes() -> None:
    assert record_of(b"abc").hex() == RECORD  # made with tensorboard 2.21's RecordWriter
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value of CRC-32C


def test_a_folder_gets_an_event_file_for_each_run(tmp_path: Path) -> None:
    for _ in range(2):
        routine = Tracking(HomeView(), tmp_path / "runs" / "one", 1, None)
        routine.start()
        routine.step_end()
    files = sorted((tmp_path / "runs" / "one").iterdir())
    assert len(files) == 2
    assert all(file.name.startswith("events.out.tfevents.") for file in files)
    content, count = files[0].read_bytes(), 0
    while content:  # each record: its length, a checksum, the event, a checksum
        (length,) = struct.unpack("<Q", content[:8])
        content, count = content[16 + length :], count + 1
    assert count == 3  # the version, and two steps
    assert TensorBoardWriter(tmp_path).path.parent == tmp_path


def lost(routine: Tracking) -> str:
    (reason,) = routine.problems["RecordsLostWarning"].values()
    return reason


@pytest.mark.parametrize("name", ["runs/run.csv", "runs/board"])
def test_a_training_goes_on_where_its_records_are_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / "runs").mkdir()
    routine = Tracking(HomeView(), tmp_path / name, 1, None)
    routine.start()
    shutil.rmtree(tmp_path / "runs")
    with pytest.warns(RecordsLostWarning, match="begun anew"):
        routine.step_end()
    routine.step_end()  # and warns no more
    routine.end()
    (file,) = (each for each in (tmp_path / "runs").rglob("*") if each.is_file())
    if file.suffix == ".csv":
        assert {scalar.step for scalar in read_csv(file)} == {1, 2}
    else:
        assert b"brain.Event:2" in file.read_bytes()[:48]


@pytest.mark.parametrize("name", ["run.csv", "board"])
def test_a_training_goes_on_where_it_can_not_write(tmp_path: Path, name: str) -> None:
    routine = Tracking(HomeView(), tmp_path / name, 1, None)
    routine.start()
    (path,) = (each for each in tmp_path.rglob("*") if each.is_file())
    before = path.read_bytes()
    path.unlink()
    path.mkdir()
    with pytest.warns(RecordsLostWarning, match="the record is lost"):
        routine.step_end()
    path.rmdir()
    path.write_bytes(before)
    routine.step_end()
    routine.end()
    assert path.read_bytes().startswith(before)  # written again once that is possible
    assert len(path.read_bytes()) > len(before)
    assert lost(routine).startswith("it can't be written")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full is a device of Linux")
def test_a_full_disk_is_warned_of(tmp_path: Path) -> None:
    routine = tracking(tmp_path)
    routine.start()
    (tmp_path / "run.csv").unlink()
    (tmp_path / "run.csv").symlink_to("/dev/full")
    with pytest.warns(RecordsLostWarning, match="No space left"):
        routine.step_end()


@pytest.mark.parametrize("room", [0, 1, 40, 200])
def test_a_record_is_written_as_a_whole_or_not_at_all(tmp_path: Path, room: int) -> None:
    resource = pytest.importorskip("resource")
    writer = CsvWriter(tmp_path / "run.csv")
    assert not writer.write([Scalar(1, "fc", "low", 0.5)])
    before = writer.path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limit[1]))
    try:
        told = writer.write([Scalar(2, "fc", name, 0.5) for name in "abcdefgh" * 10])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "lost" in told
    assert writer.path.read_bytes() == before
    assert not writer.write([Scalar(3, "fc", "low", 0.5)])
    assert [scalar.step for scalar in read_csv(writer.path)] == [1, 3]


def test_tensorboard_groups_by_quantity() -> None:
    assert tag_of(Scalar(0, "fc: input", "low", 0.0)) == "low/fc.input"
