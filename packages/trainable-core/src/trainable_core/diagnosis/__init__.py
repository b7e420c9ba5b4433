"""What hurts a quantized model, what of it trains, and what to change: computed from arrays that backends hand over.

`backend.view.ModelView` is what a backend writes; `examination.diagnose` and `suggestion.suggest` do the rest.
"""
