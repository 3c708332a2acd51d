"""RoutedAdapter: a library of experts, or new ones, and a router, behind the Adapter seam."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.batches import Prompt
from lightning_modules.adapters import Adapter, check_state
from lightning_modules.library.building import load_experts, name_experts, new_experts
from lightning_modules.library.experts import Experts
from lightning_modules.library.layers import LoraStack, RoutedLinear
from lightning_modules.library.mixing import Mixing, output_mixing
from lightning_modules.library.publish import write_expert
from lightning_modules.library.routers.base import Router, missing_descriptions
from lightning_modules.library.routers.poly import PolyRouter
from lightning_modules.library.rows import RoutingState, follow_generate
from lightning_modules.library.steps import KeepAbsent
from lightning_modules.library.store import AdapterLibrary
from lightning_modules.ranges import check_number, check_whole
from lightning_modules.ranks import is_first_rank
from lightning_modules.sharding import copy_rows
from lightning_modules.sparse.storage import fingerprint
from lightning_modules.sparse.targets import find_targets


class RoutedAdapter(Adapter):
    """Experts in every layer, and a router that says how tokens or rows find them.

    With `library` the experts come from there, else they are new. Every module takes this adapter;
    `AdapterLibraryModule` adds what only a library needs.

    Args:
        router: Chooses experts.
        library: Folder of an `AdapterLibrary`.
        experts: With a library the names of the experts to use, None for all. Without, the new experts: how many
            skills, the names of tasks that get an expert each, a mapping from expert to its tasks, or a file that
            `quiver library cluster` wrote.
        rank: Of new experts.
        alpha: LoRA's alpha of new experts: their change is scaled by alpha / rank.
        target_modules: Layers that new experts change: `all-linear`, ends of module names, or a regular
            expression.
        mixing: `lightning_modules.library.mixing.output_mixing` or `factor_mixing`.
        train_experts: Whether experts are trained. None trains new ones and freezes those of a library.
        router_lr: Learning rate of what the router learns; None is the optimiser's own.
        subtract: Experts of the library whose mean is taken off the others as general knowledge. They are not
            routed to.
        same_start: New experts start from the same A.

    Raises:
        ValueError: If arguments contradict each other.
    """

    def __init__(
        self,
        router: Router,
        library: str | None = None,
        experts: int | list[str] | dict[str, list[str]] | str | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: list[str] | str = "all-linear",
        mixing: Mixing = output_mixing,
        train_experts: bool | None = None,
        router_lr: float | None = None,
        subtract: list[str] | None = None,
        same_start: bool = False,
    ) -> None:
        check_whole("rank", rank)
        check_number("alpha", alpha, above=0)
        check_number("router_lr", router_lr, least=0, none=True, hint="null is the optimiser's own.")
        if isinstance(experts, int | float):
            check_whole("experts", experts)
        if library is not None and not (experts is None or isinstance(experts, list)):
            raise ValueError(
                f"experts={experts!r}: with library={library!r}, give a list of its experts, or null for all."
            )
        if library is None and (train_experts is False or subtract):
            raise ValueError("train_experts: false and subtract are for experts of a library. Set library.")
        if isinstance(router, PolyRouter) and router.num_heads > 1 and mixing is output_mixing:
            raise ValueError(
                f"mixing=output_mixing: num_heads={router.num_heads} mixes parts of the factors. Set mixing: "
                "lightning_modules.library.mixing.factor_mixing."
            )
        if train_experts and subtract:
            raise ValueError("subtract: experts that are trained cannot share a subtracted part. Drop one.")
        self.router = router
        self.library = library
        self.experts = experts
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules
        self.mixing = mixing
        self.train_experts = train_experts
        self.router_lr = router_lr
        self.subtract = subtract
        self.same_start = same_start
        self.state = RoutingState()
        self.layers: dict[str, RoutedLinear] = {}
        self._fingerprints: dict[str, str] = {}
        self.defer_descriptions = False
        self.data_tasks: list[str] | None = None
        self.reads_weights = library is not None

    # ------------------------------------------------------------------ the Adapter seam

    def attach(self, model: nn.Module) -> nn.Module:
        """Put stacks of experts and routers into the layers of `model`.

        Raises:
            ValueError: If an expert is missing, broken or of another base model, or does not suit the router.
        """
        model.requires_grad_(False)
        self._model = model
        if self.library is None and self.router.needs_library:
            raise ValueError(
                f"router={type(self.router).__name__} routes by what experts have learned, and new ones have learned "
                "nothing. Set library."
            )
        self.stacked = self._build(model)
        for layer, stack in self.stacked.layers.items():
            base = model.get_submodule(layer)
            if not isinstance(base, nn.Linear):
                raise ValueError(
                    f"{layer} is a {type(base).__name__}. Experts are routed in nn.Linear layers."
                )
            # Poly's logits and the like come with `install`.
            routed = RoutedLinear(base, stack.to(base.weight.device), nn.Identity(), self.mixing, self.state)
            if not base.weight.is_meta:  # nothing to read: its parameters are only counted
                self._fingerprints[f"{layer}.weight"] = fingerprint(base.weight)
            parent, _, child = layer.rpartition(".")
            setattr(model.get_submodule(parent), child, routed)
            self.layers[layer] = routed
        weights = {name.removesuffix(".weight"): own for name, own in self._fingerprints.items()}
        self.stacked = replace(self.stacked, fingerprints=weights)
        follow_generate(model)
        self._warn_of_mixing()
        if missing := missing_descriptions(self.router, self.stacked):
            if not self.defer_descriptions:
                raise ValueError(
                    f"router={type(self.router).__name__} knows experts by examples, and the library has none of "
                    f"{missing[0]!r}. Run AdapterLibraryModule with this router once: quiver validate."
                )
        else:
            self.install(self.router)
        return model

    def install(self, router: Router) -> None:
        """Route by `router` from now on.

        Raises:
            ValueError: If the router cannot choose among the experts.
        """
        router.prepare(self.stacked)
        for name, layer in self.layers.items():
            layer.router = router.for_layer(name).to(layer.base_layer.weight.device)
        self.router = router

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the base model answer alone."""
        before, self.state.enabled = self.state.enabled, False
        try:
            yield
        finally:
            self.state.enabled = before

    def route(self, tasks: Sequence[str], prompts: Sequence[Prompt]) -> None:
        """Hand the rows of the next forward passes to the router; passes with another number of rows are refused."""
        self.state.hear(self.router, tasks, prompts, self._device)

    def route_all(self, task: str = "", prompt: Prompt = "") -> None:
        """Treat all rows of the next forward passes alike, however many there are.

        Args:
            task: The task of all of them.
            prompt: The prompt of all of them.
        """
        self.state.hear(self.router, [task], [prompt], self._device, alike=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return trained experts, and what routers learned."""
        state = {}
        for name, layer in self.layers.items():
            for key, value in (*layer.experts.state_dict().items(), *_prefixed("router.", layer.router)):
                state[f"{name}.{key}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        own = self.tensors()
        check_state(own, state)
        with torch.no_grad():
            for name, value in own.items():
                copy_rows(value, state[name])

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a library: every expert as a PEFT folder, frozen ones copied, and arrays that the router learned."""
        written = AdapterLibrary(folder, create=True)
        self.publish(written, state=state)

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        """Give the router its own learning rate, as `router_lr` says."""
        if self.router_lr is None:
            return parameters
        learned = {id(p) for layer in self.layers.values() for p in layer.router.parameters()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if id(p) not in learned]},
            {"params": [p for p in parameters if id(p) in learned], "lr": self.router_lr},
        ]
        return [group for group in groups if group["params"]]

    def watch(self, optimizer: Optimizer, epoch: Callable[[], int] = lambda: 0) -> None:
        """Keep experts still in steps without rows of theirs, and count steps for routers that want to know."""
        KeepAbsent(self.expert_parameters(), optimizer)
        routers = [layer.router for layer in self.layers.values() if isinstance(layer.router, PolyRouter)]

        def advance(*_: Any) -> None:
            for router in routers:
                router.advance()

        optimizer.register_step_post_hook(advance)

    # ------------------------------------------------------------------ experts

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters whose first dimension counts experts."""
        found = []
        for layer in self.layers.values():
            assert isinstance(layer.router, Router)
            found += [*layer.experts.parameters(), *layer.router.per_expert_parameters()]
        return found

    def publish(
        self,
        library: AdapterLibrary,
        metrics: Mapping[str, Mapping[str, float]] | None = None,
        prefix: str = "",
        state: Mapping[str, Tensor] | None = None,
    ) -> list[str]:
        """Add the experts to a library; of experts that are there already, only what the router learned of them.

        Args:
            library: Where to.
            metrics: Of each expert.
            prefix: Put before the names of trained experts.
            state: What `state_dict` returns; None asks for it. Under sharding all ranks ask, and one publishes.

        Returns:
            The names of the experts in that library.

        Raises:
            ValueError: If a name is taken by another adapter.
        """
        names = []
        state = self.state_dict() if state is None else state
        same = self.stacked.library is not None and library.root == self.stacked.library.root
        for number, name in enumerate(self.stacked.names):
            frozen = not self._trained
            target = name if frozen else prefix + name
            names.append(target)
            if not (frozen and same):
                with tempfile.TemporaryDirectory() as aside:
                    source = self.stacked.library[name].folder if frozen and self.stacked.library else None
                    if source is None:
                        source = Path(aside)
                        write_expert(
                            source,
                            self._expert_factors(number, state),
                            self.source,
                            self.choice.get("revision"),
                        )
                    library.add(
                        source,
                        target,
                        tasks=self.stacked.tasks[name],
                        metrics=(metrics or {}).get(name),
                        lineage=[name] if self.stacked.library is not None and not frozen else [],
                        fingerprint=self._fingerprints,
                    )
            learned = {
                layer: state[f"{layer}.router.{key}"][number].detach().cpu().contiguous()
                for layer, routed in self.layers.items()
                for key, parameter in routed.router.named_parameters()
                if any(parameter is own for own in routed.router.per_expert_parameters())  # type: ignore[operator]
            }
            if learned:
                library.put_arrays(target, self.router.kind, learned, self.router.description_settings())
        return names

    def _warn_of_mixing(self) -> None:
        """Say it where changes are averaged that the router's papers average by their factors."""
        stacks = self.stacked.layers.values()
        factors = len(self.stacked.names) > 1 and all(isinstance(stack, LoraStack) for stack in stacks)
        if self.router.mixes_factors and self.mixing is output_mixing and factors and is_first_rank():
            warnings.warn(
                f"mixing: output_mixing with {type(self.router).__name__} averages the changes B A of experts. Its "
                "papers average A and B apart: set mixing: lightning_modules.library.mixing.factor_mixing for that.",
                stacklevel=2,
            )

    @property
    def _device(self) -> torch.device:
        """Where the routed layers are."""
        return next((layer.base_layer.weight.device for layer in self.layers.values()), torch.device("cpu"))

    @property
    def _trained(self) -> bool:
        return self.library is None if self.train_experts is None else self.train_experts

    def _build(self, model: nn.Module) -> Experts:
        """Load the experts, or make new ones."""
        data_tasks = tuple(self.data_tasks or ())
        if self.library is None:
            return new_experts(
                name_experts(self.experts, data_tasks),
                find_targets(model, self.target_modules),
                model,
                self.rank,
                self.alpha,
                same_start=self.same_start,
                data_tasks=data_tasks,
            )
        assert self.experts is None or isinstance(self.experts, list)
        return load_experts(
            AdapterLibrary(self.library),
            self.experts,
            self.subtract or [],
            model,
            trained=self._trained,
            data_tasks=data_tasks,
        )

    def _expert_factors(
        self, number: int, state: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Factors of one expert without filling, by layer: A (r, in), B (out, r), scale."""
        factors = {}
        for name, layer in self.layers.items():
            stack = layer.experts
            if isinstance(stack, LoraStack) and bool(stack.present[number]):
                rank = stack.ranks[number]
                A, B = (state.get(f"{name}.{key}", getattr(stack, key))[number].detach() for key in "AB")
                scale = float(stack.get_buffer("scale")[number]) if stack.trained else 1.0
                factors[name] = (A[:rank], B[:, :rank], scale)
        return factors


def _prefixed(prefix: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(prefix + name, value) for name, value in module.state_dict().items()]
