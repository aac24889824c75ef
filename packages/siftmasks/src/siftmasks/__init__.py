"""SIFT-Masks: merge hundreds of fine-tunes with 1-bit masks, and unlearn any one of them exactly."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names in __init__.pyi, imported on first use
