"""WiSE-FT for language models: interpolate an early and a late checkpoint, and measure Pass@k, its bias and its variance."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names in __init__.pyi, imported on first use
