"""The whole story on a laptop's CPU: a small base, an instruction, a prefix, full fine-tuning beside it."""

from prefix_ds.demo.story import demo

__all__ = ["demo"]
