"""Looking inside: what a compiled step does, saves and remembers."""

from qcompile.inspect.saved_bytes import SavedBytes, SavedTensor, saved_bytes

__all__ = ["SavedBytes", "SavedTensor", "saved_bytes"]
