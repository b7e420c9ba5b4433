"""The kit proves itself on Keras: every planted defect is rejected, first by the law that is about its mistake."""

from __future__ import annotations

import pytest

pytest.importorskip("keras", reason="needs Keras 3")
pytest.importorskip("trainable_keras", reason="needs trainable-keras")

from tests.planted import keras_defects, keras_strangers
from tests.planted.defect import DEFECTS, EXAMPLES, SEED, Defect, failures
from tests.planted.table import listed
from trainable_core.conformance import LAWS, adapter_of, try_law
from trainable_core.conformance.suite import subjects_of

# TensorFlow 2.21's tensors have an __array__ without the argument that NumPy 2 asks for; Keras calls it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
PLANTED = DEFECTS["keras"]
# A case costs five times what it does in PyTorch; that earlier laws hold is shown there, with more of them.
BEFORE = 3
SLOW = {"no_framework_leak"}  # starts a process with the framework; the sound class is in the defects' own module

# Laws that try more situations, and meet some of these mistakes there before the law that is about them is tried.
EARLIER = {
    "NanThreshold": "deployment",
    "ArgumentsLost": "regularization_gradient",
    "SharedThreshold": "convert_midway",
    "ThresholdNotSaved": "load_then_deploy",
}


@pytest.mark.all_cases
@pytest.mark.parametrize("defect", PLANTED, ids=str)
def test_a_planted_defect_is_rejected_by_the_law_that_is_about_it(defect: Defect):
    assert next(failures(defect.cls, defect.caught_by, 0), None) is not None, f"nothing rejects {defect}"


@pytest.mark.parametrize("defect", PLANTED, ids=str)
def test_no_other_law_is_the_first_to_reject_a_planted_defect(defect: Defect):
    first = next(failures(defect.cls, defect.caught_by, BEFORE if defect.before is None else defect.before), None)
    assert first is not None, f"nothing rejects {defect}: {defect.mistake}"
    assert first.law.name == EARLIER.get(str(defect), defect.caught_by), first.counterexample


@pytest.mark.parametrize("law", [law for law in LAWS.values() if law.name not in SLOW], ids=lambda law: law.name)
def test_the_quantizer_that_defects_are_planted_in_is_sound(law):
    for subject in subjects_of(keras_defects.Sound, adapter_of("keras")):
        if law.about(subject):
            verdict = try_law(law, subject, examples=EXAMPLES // 5, seed=SEED)
            assert verdict.holds, verdict.counterexample


@pytest.mark.parametrize("law", [law for law in LAWS.values() if law.name not in SLOW], ids=lambda law: law.name)
def test_what_strangers_make_mistakes_in_is_sound(law):
    for cls in keras_strangers.SOUND:
        subject = subjects_of(cls, adapter_of("keras"))[0]
        if law.about(subject):
            verdict = try_law(law, subject, examples=2, seed=SEED)
            assert verdict.holds, verdict.counterexample


def test_the_documentation_lists_every_defect():
    assert listed("keras") == [(str(defect), defect.mistake, defect.caught_by) for defect in PLANTED]
