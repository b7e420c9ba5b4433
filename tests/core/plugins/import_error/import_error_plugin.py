"""A plugin that can't be imported."""

message = "libaccelerator.so.7: cannot open shared object file"
raise ImportError(message)
