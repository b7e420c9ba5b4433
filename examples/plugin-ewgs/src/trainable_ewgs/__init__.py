"""Element-wise gradient scaling (EWGS): a third-party plugin for trainable quantizers."""
