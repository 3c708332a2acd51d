"""LightningModules of Quiver. Imported lazily, so that pure functions and `quiver --help` stay light."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.causal_lm import CausalLMModule
    from lightning_modules.grpo.module import GRPOModule
    from lightning_modules.sft import SFTModule
    from lightning_modules.sparse.adapter import SparseAdapter
    from lightning_modules.sparse.module import SparseAdapterModule

_HOMES = {
    "AdapterLibraryModule": "lightning_modules.library.module",
    "CausalLMModule": "lightning_modules.causal_lm",
    "GRPOModule": "lightning_modules.grpo.module",
    "RoutedAdapter": "lightning_modules.library.adapter",
    "SFTModule": "lightning_modules.sft",
    "SparseAdapter": "lightning_modules.sparse.adapter",
    "SparseAdapterModule": "lightning_modules.sparse.module",
}

__all__ = [
    "AdapterLibraryModule",
    "CausalLMModule",
    "GRPOModule",
    "RoutedAdapter",
    "SFTModule",
    "SparseAdapter",
    "SparseAdapterModule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"lightning_modules has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
