"""The frameworks, by the names that they are imported under; every guard that forbids one takes its list from here."""

FRAMEWORKS = frozenset({"jax", "keras", "tensorflow", "tf_keras", "torch"})
NOT_FOR_CORE = FRAMEWORKS | {"mct_quantizers"}
"""What importing core must not load: mct_quantizers imports every framework that is installed."""
