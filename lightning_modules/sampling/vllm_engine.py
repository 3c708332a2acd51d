"""VLLMEngineSampler: rollouts from vLLM inside the training process.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.ranges import check_number, check_whole
from lightning_modules.ranks import several_ranks
from lightning_modules.sampling.own_ranks import ranks_hidden
from lightning_modules.sampling.policy_folder import PolicyFolderSampler
from lightning_modules.sampling.vllm_policy import SavedPolicy
from lightning_modules.sampling.vllm_requests import Drawn


class VLLMEngineSampler(PolicyFolderSampler[int]):
    """Samples with a vLLM engine that this process starts beside its own model, without a server. One rank only.

    Before each rollout the policy of this version is written as a folder and loaded into the engine, as `VLLMSampler`
    does. vLLM must be installed in this environment: `pip install 'lightning-quiver[vllm]'`.

    Args:
        gpu_memory_utilization: Share of the GPU that vLLM takes, weights and cache; the trainer needs the rest.
        max_model_len: The most tokens of prompt and completion; None takes the model's context.
        sync_folder: Where policies are written for the engine; None makes a temporary folder.
        engine_args: Further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        sync_folder: str | None = None,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(sync_folder)
        check_number("gpu_memory_utilization", gpu_memory_utilization, above=0, most=1, hint="0.3 is usual.")
        check_whole("max_model_len", max_model_len, least=2, none=True)
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_model_len = max_model_len
        self.engine_args = engine_args
        self._engine: Any = None
        self._loads = 0
        self._adapter: Any = None

    def sync(self, version: int, save: Callable[[Path], None]) -> None:
        """Save the policy and load it into the engine, unless it is there in this version.

        Raises:
            ValueError: If there are several ranks, or the engine cannot serve the policy.
            ImportError: If vLLM is not installed.
        """
        if several_ranks():
            raise ValueError(
                "VLLMEngineSampler serves one rank. With several, start a server and use VLLMSampler with its url."
            )
        super().sync(version, save)

    def load(self, policy: SavedPolicy) -> int:
        """Load a policy into the engine, which is started before the first one."""
        if self._engine is None:
            self._engine = self._start(policy)
        self._loads += 1
        if policy.rank is None:
            self.check_reload(str(self._engine.llm_engine.vllm_config.device_config.device))
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(policy.folder)})
            self._engine.reset_prefix_cache()
            self._engine.update_weight_version(policy.name)
            return self._loads
        from vllm.lora.request import LoRARequest

        self._adapter = LoRARequest(policy.name, self._loads, str(policy.folder))
        try:
            self._engine.llm_engine.add_lora(self._adapter)
        except Exception as error:  # of many kinds, out of another process
            raise ValueError(
                f"vLLM refuses the adapter: {error}. Use NativeSampler, or another adapter."
            ) from error
        return self._loads

    def adopt(self, loaded: int) -> None:
        """Take the engine's context."""
        self.context = int(self._engine.llm_engine.model_config.max_model_len)

    def forget(self, name: str) -> None:
        """Unload the adapter before the last one."""
        if self._adapter is not None:
            self._engine.llm_engine.remove_lora(self._loads - 1)

    def draw(
        self, name: str, prompts: Sequence[list[int]], parameters: Sequence[dict[str, Any]]
    ) -> list[Drawn]:
        """Draw all rows in one call."""
        from vllm import SamplingParams

        try:
            outputs = self._engine.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                [SamplingParams(**one, include_stop_str_in_output=True) for one in parameters],
                lora_request=self._adapter,
                use_tqdm=False,
            )
            base = self._engine.llm_engine.get_weight_version()
        except Exception as error:  # of many kinds, out of another process
            raise RuntimeError(
                f"The vLLM engine failed: {error}. Go on from the last checkpoint with --ckpt_path."
            ) from error
        drawn = []
        for output in outputs:
            [one] = output.outputs
            adapter = output.lora_request
            drawn.append(
                Drawn(
                    model=base if adapter is None else adapter.lora_name,
                    token_ids=list(one.token_ids),
                    logprobs=[
                        step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)
                    ],
                    finish=one.finish_reason,
                )
            )
        return drawn

    def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine.llm_engine.engine_core.shutdown()
        self._engine = self._adapter = None
        super().close()

    def _start(self, policy: SavedPolicy) -> Any:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                "VLLMEngineSampler needs vLLM: pip install 'lightning-quiver[vllm]'. Or let vLLM live in another "
                "environment, and use VLLMSampler."
            ) from error
        lora = {} if policy.room is None else {"enable_lora": True, "max_lora_rank": policy.room}
        with ranks_hidden():
            return LLM(
                model=self.place,
                revision=self.revision,
                tokenizer_revision=self.revision,
                dtype=self.dtype,
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=self.max_model_len,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                **lora,
                **(self.engine_args or {}),
            )
