"""weightwatch: read a fine-tune from its weight difference; monitor, steer and audit the model with it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names in __init__.pyi, imported on first use
