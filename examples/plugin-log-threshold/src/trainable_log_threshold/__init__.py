"""LOG_THRESHOLD and DSQ: a third-party plugin for trainable quantizers whose methods have variables of their own."""
