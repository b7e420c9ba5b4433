"""What hurts a quantized model, what of it trains, and what to change: computed from arrays that backends hand over.

`model.DiagnosedModel` is what a backend writes; `model.diagnose` and `suggestion.suggest` do the rest.
"""
