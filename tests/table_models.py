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
