"""Recipes for look-up tables, which the tests of every backend deploy."""

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
    ]
}
