"""Long contexts with small caches.

The public names are imported when first used; `import longshadow` needs neither torch nor transformers.
    from longshadow import ShadowKVCache, ShadowKVConfig
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longshadow.engine.shadowkv import ShadowKVCache, ShadowKVConfig

__version__ = "0.1.0"
__all__ = ["ShadowKVCache", "ShadowKVConfig", "__version__"]

_HOME = {
    "ShadowKVCache": "longshadow.engine.shadowkv",
    "ShadowKVConfig": "longshadow.engine.shadowkv",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'longshadow' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
