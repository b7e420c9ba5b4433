"""What takes the place of a folded batch norm in a Keras 3 model."""

from __future__ import annotations

import keras

from trainable_keras.folding import PassingLayer
from trainable_keras.two_classes import Passing


@keras.saving.register_keras_serializable(package="trainable_keras")
class FoldedBatchNormalization(Passing, PassingLayer, keras.layers.Layer):  # type: ignore[misc] # keras is untyped
    """What stands in the place of a batch norm whose work is done by the layer before: passes everything on."""
