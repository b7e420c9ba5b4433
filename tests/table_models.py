"""Recipes for look-up tables, which the tests of every backend deploy."""

SOON_HARD = {"t_start": 0, "t_end": 1, "initial_val": 0.3, "target_val": 0.2}
"""A schedule that a few training steps end."""

RECIPES = {
    f"{name} {grid} {'per channel' if per_channel else 'per tensor'}": {
        "weights": {
            "method": grid,
            "n_bits": n_bits,
            "training_method": method,
            "per_channel": per_channel,
            "arguments": arguments,
        }
    }
    for name, method, n_bits, arguments, grid, per_channel in [
        ("binary", "PARETOQ", 1, {}, "LUT_SYM_QUANTIZER", True),
        ("ternary", "PARETOQ", 2, {"ternary": True}, "LUT_POT_QUANTIZER", False),
        ("stretched", "PARETOQ", 2, {}, "LUT_SYM_QUANTIZER", True),
        ("powers", "APOT", 4, {}, "LUT_POT_QUANTIZER", True),
        ("powers", "APOT", 5, {}, "LUT_SYM_QUANTIZER", False),
        ("learned", "DKM", 2, {"temperature": SOON_HARD}, "LUT_SYM_QUANTIZER", True),
        ("learned", "DKM", 4, {"temperature": SOON_HARD}, "LUT_POT_QUANTIZER", False),
    ]
}


ACTIVATIONS = {
    f"{name} {n_bits} bits": {
        "activations": {
            "method": "LUT_POT_QUANTIZER",
            "n_bits": n_bits,
            "training_method": method,
            "arguments": arguments,
        }
    }
    for name, method, n_bits, arguments in [
        ("powers", "APOT", 2, {}),
        ("powers", "APOT", 5, {}),
        ("learned", "DKM", 1, {"temperature": SOON_HARD}),
        ("learned", "DKM", 4, {"temperature": SOON_HARD}),
    ]
}
"""Recipes that quantize activations alone; of a model that begins with a layer and a ReLU they have both signs."""

REFUSED_OF_ACTIVATIONS = [
    ({"training_method": "APOT", "method": "LUT_SYM_QUANTIZER"}, {}, "use .*LUT_POT_QUANTIZER"),
    ({"training_method": "APOT", "n_bits": 6}, {}, "activations for 2, 3, 4, 5 bits, not for 6"),
    ({"training_method": "DKM", "n_bits": 5}, {}, "1 to 4 bits"),
    ({"training_method": "PARETOQ", "n_bits": 2}, {}, "no quantizer is registered"),
    ({"training_method": "LSQ"}, {}, "no quantizer is registered"),
    ({"training_method": "APOT"}, {"target": "onnx", "bias": "float"}, "onnx has no LUT_POT_QUANTIZER for activations"),
    ({"training_method": "APOT"}, {"target": "tflite"}, "tflite has no LUT_POT_QUANTIZER for activations"),
    (
        {"training_method": "APOT"},
        {"bias": "int32", "weights": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "STE"}},
        "the layer's input has values of a table",
    ),
    ({"training_method": "APOT", "modifiers": {"oscillation_freezing": {"threshold": 0.1}}}, {}, "for weights"),
]
"""Activations that there can't be, the other parts of the recipe, and a word of the reason."""


def refused(activations, others):
    """Return the recipe of an entry of `REFUSED_OF_ACTIVATIONS`."""
    return {"activations": {"method": "LUT_POT_QUANTIZER", "n_bits": 4, **activations}, **others}
