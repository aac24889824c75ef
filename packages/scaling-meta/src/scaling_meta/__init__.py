"""scaling-meta: predict a model's scores from its design, and say which choices matter."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names in __init__.pyi, imported on first use
