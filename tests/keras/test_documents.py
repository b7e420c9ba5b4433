"""What fits a Keras backend's file, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.core.numpy_backend import NumpySte
from trainable_core import QuantizationRecipe, TrainableQuantizerWeightsConfig
from trainable_core.errors import DocumentError, QuantizerStateError
from trainable_core.recipe.state import WrappedState
from trainable_keras.documents import by_place, fill, header_of, place_numbers, storable

RECIPE = {"schema_version": 1, "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "STE"}}


def quantizer(subject="fc.kernel", cls=NumpySte):
    config = TrainableQuantizerWeightsConfig(
        weights_quantization_method="UNIFORM", weights_n_bits=4, weights_quantization_params={}
    )
    made = cls(config)
    made.subject = subject
    made.initialize_quantization((3, 2), "kernel", None)
    return made


def header(**more):
    state = WrappedState(QuantizationRecipe.model_validate(RECIPE))
    deployed = {"fc.kernel": SimpleNamespace(get_config=lambda: {"num_bits": 4})}
    return {**header_of("form", state, {"fc.kernel": quantizer()}, deployed), **more}


def test_a_header_tells_signs_and_inferable_quantizers_too():
    found = header()
    assert (found["format"], found["signs"], found["frozen"], found["finalized"]) == ("form", {}, [], False)
    assert found["inferable"] == {"fc.kernel": {"num_bits": 4}}


def test_placed_numbers_make_a_quantizer_convert():
    made = quantizer()
    place_numbers("file", {"fc.kernel": made}, {"fc.kernel": {"num_bits": 4}})
    assert made.calibrated
    assert made.current_qparams().quant_max == 15


class PointingQuantizer(NumpySte):
    """A plugin's method that keeps three grids and points at the one it deploys, with a variable of its own."""

    widths = (2, 4, 8)

    def add_variables(self):
        self.add_quantizer_variable("pointer", np.zeros(()), trained=False)

    @property
    def selected_width(self):
        return self.widths[int(self.pointer.value)]

    def select_width(self, width):
        self.assign(self.pointer, np.asarray(self.widths.index(width), np.float32))


@pytest.mark.parametrize("width", PointingQuantizer.widths)
def test_a_method_with_several_widths_selects_the_deployed_one_in_its_own_way(width):
    made = quantizer(cls=PointingQuantizer)
    place_numbers("file", {"fc.kernel": made}, {"fc.kernel": {"num_bits": width}})
    assert made.selected_width == width
    assert made.current_qparams().quant_max == 2**width - 1


@pytest.mark.parametrize("width", [3, None, "4"])
def test_a_deployed_width_that_the_quantizer_has_no_grid_for_is_refused(width):
    made = quantizer()
    with pytest.raises(DocumentError, match=r"fc\.kernel.*bits, this model's has 4"):
        place_numbers("file", {"fc.kernel": made}, {"fc.kernel": {"num_bits": width}})
    assert not made.calibrated


def test_a_method_that_cannot_select_a_width_is_told_what_to_write():
    class Fixed(NumpySte):
        widths = (2, 4)

    made = quantizer(cls=Fixed)
    place_numbers("file", {"fc.kernel": made}, {"fc.kernel": {"num_bits": 2}})
    with pytest.raises(QuantizerStateError, match="select_width"):
        place_numbers("file", {"fc.kernel": made}, {"fc.kernel": {"num_bits": 4}})


def test_a_quantizer_that_the_file_lacks_is_named():
    with pytest.raises(DocumentError, match=r"fc\.kernel"):
        place_numbers("file", {"fc.kernel": quantizer()}, {})


@pytest.mark.parametrize("key", ["signs", "frozen"])
def test_quantizers_that_the_model_lacks_are_named(key):
    with pytest.raises(DocumentError, match="nowhere"):
        fill("file", header(**{key: {"nowhere": True}}), {}, {"fc.kernel": quantizer()}, dict, None)


def test_a_model_is_filled_with_what_the_file_holds():
    made = quantizer()
    asked = []

    def variables_of():
        asked.append(made.freeze_quant_params)  # frozen first: some Keras lists frozen variables elsewhere
        return {"0:range_min": made.range_min, "1:range_max": made.range_max}

    arrays = {"0:range_min": np.float32(-1.0), "1:range_max": np.float32(2.0)}
    found = header(frozen=["fc.kernel"], signs={"fc.kernel": False})
    assert not made.calibrated
    fill("file", found, arrays, {"fc.kernel": made}, variables_of, made.assign)
    assert asked == [True]
    assert (float(made.range_min.value), float(made.range_max.value)) == (-1.0, 2.0)
    assert (made.signed, made.calibrated) == (False, True)
    arrays["0:range_min"] = np.float32(np.nan)
    fill("file", found, arrays, {"fc.kernel": made}, variables_of, made.assign)
    assert not made.calibrated  # the file's model was not either


def test_nothing_is_filled_with_another_models_arrays():
    made = quantizer()
    made.set_quantization_params({4: {"range_min": -1.0, "range_max": 1.0}})
    with pytest.raises(DocumentError, match="another architecture"):
        fill("file", header(), {}, {"fc.kernel": made}, lambda: {"0:range_min": made.range_min}, made.assign)
    assert float(made.range_min.value) <= -1.0


def test_variables_are_named_by_their_place():
    variables = [SimpleNamespace(name="kernel"), SimpleNamespace(name="kernel")]
    assert by_place(variables, lambda each: each.name) == {"0:kernel": variables[0], "1:kernel": variables[1]}


def test_what_numpy_lacks_is_stored_as_float32():
    class Half(np.ndarray):
        dtype = SimpleNamespace(name="bfloat16")

        def astype(self, dtype):
            return dtype

    assert storable(np.zeros(2).view(Half)) is np.float32
    array = np.zeros(2, np.float16)
    assert storable(array) is array
