"""LightningModules of Quiver. Imported lazily, so that pure functions and `quiver --help` stay light."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_modules.threads import bound_spinning

if TYPE_CHECKING:
    from lightning_modules.causal_lm import CausalLMModule
    from lightning_modules.grpo.module import GRPOModule
    from lightning_modules.sft import SFTModule
    from lightning_modules.sparse.adapter import SparseAdapter
    from lightning_modules.sparse.module import SparseAdapterModule

# Before anything here imports torch, which reads the setting.
bound_spinning()

_HOMES = {
    "AdapterLibraryModule": "lightning_modules.library.module",
    "ArrowRouter": "lightning_modules.library.routers.token",
    "CISPO": "lightning_modules.grpo.policy_losses",
    "CausalLMModule": "lightning_modules.causal_lm",
    "CentroidRouter": "lightning_modules.library.routers.token",
    "ClippedSurrogate": "lightning_modules.grpo.policy_losses",
    "FSDP2Strategy": "lightning_modules.fsdp2",
    "GDPO": "lightning_modules.grpo.estimators",
    "GMPO": "lightning_modules.grpo.policy_losses",
    "GRPOModule": "lightning_modules.grpo.module",
    "GroupAdvantage": "lightning_modules.grpo.estimators",
    "LibraryExpert": "lightning_modules.library.expert_adapter",
    "LinearRouter": "lightning_modules.library.routers.learned",
    "LoraHubModule": "lightning_modules.library.lorahub",
    "MaskedImportance": "lightning_modules.grpo.objective",
    "NativeSampler": "lightning_modules.sampling.native",
    "OPO": "lightning_modules.grpo.estimators",
    "PhatgooseGates": "lightning_modules.library.routers.learned",
    "PhatgooseRouter": "lightning_modules.library.routers.token",
    "PolyRouter": "lightning_modules.library.routers.poly",
    "RetrievalRouter": "lightning_modules.library.routers.retrieval",
    "RoutedAdapter": "lightning_modules.library.adapter",
    "SAPO": "lightning_modules.grpo.policy_losses",
    "SFTModule": "lightning_modules.sft",
    "Snapshot": "lightning_modules.grpo.reference",
    "SparseAdapter": "lightning_modules.sparse.adapter",
    "SparseAdapterModule": "lightning_modules.sparse.module",
    "SpectralRouter": "lightning_modules.library.routers.token",
    "TaskRouter": "lightning_modules.library.routers.fixed",
    "TruncatedImportance": "lightning_modules.grpo.objective",
    "UniformRouter": "lightning_modules.library.routers.fixed",
    "VLLMEngineSampler": "lightning_modules.sampling.vllm_engine",
    "VLLMSampler": "lightning_modules.sampling.vllm",
    "WeightsRouter": "lightning_modules.library.routers.fixed",
}

__all__ = [
    "CISPO",
    "GDPO",
    "GMPO",
    "OPO",
    "SAPO",
    "AdapterLibraryModule",
    "ArrowRouter",
    "CausalLMModule",
    "CentroidRouter",
    "ClippedSurrogate",
    "FSDP2Strategy",
    "GRPOModule",
    "GroupAdvantage",
    "LibraryExpert",
    "LinearRouter",
    "LoraHubModule",
    "MaskedImportance",
    "NativeSampler",
    "PhatgooseGates",
    "PhatgooseRouter",
    "PolyRouter",
    "RetrievalRouter",
    "RoutedAdapter",
    "SFTModule",
    "Snapshot",
    "SparseAdapter",
    "SparseAdapterModule",
    "SpectralRouter",
    "TaskRouter",
    "TruncatedImportance",
    "UniformRouter",
    "VLLMEngineSampler",
    "VLLMSampler",
    "WeightsRouter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"lightning_modules has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
