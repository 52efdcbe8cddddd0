"""Training steps that cost the host less: compiled by TorchInductor, replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spion_ds.attention.observing import Observer
from spion_ds.errors import ConfigError
from spion_ds.models import EncoderClassifier
from spion_ds.models.encoder import Seen

Forward = Callable[..., Tensor]


class AcceleratedForward:
    """The forward pass of training steps; evaluation keeps the model's own.

    A replay runs no Python: what attention sees in it, patterns learn from and observers look at
    afterwards, where the graph wrote it. Without such a graph, an observed pass is the model's own.

    Args:
        model: the module that trains, already on its device; its parameters stay as they are.
        compile: whether TorchInductor compiles it; it does so at the first step of each phase,
            and as one graph; with the Hopper kernels if ``SparseSelfAttention.prepare`` of each
            layer came before. (With the torch backend, that of no usual case, the graph breaks at
            each attention.)
        cuda_graph: whether each phase is captured at its first step, forward and backward, and
            replayed until there are other patterns. Shapes must then stay the same.
        observes: whether dense steps may come with observers. A graph then keeps queries and keys
            of all layers to the end of each dense step, and with learned positions the values too,
            which share their memory. With activation checkpointing that would be most of what a
            step keeps: there an observed step is the model's own.
        keeps_gradients: whether a parameter may keep a gradient until the next replay. Otherwise it
            has the graph's own memory as its gradient, and needs no copy of it.
        before_capture: called before a capture; from then to its end no other thread may allocate
            memory for the GPU, nor pin any.
        backend: of torch.compile.
    """

    def __init__(
        self,
        model: EncoderClassifier,
        *,
        compile: bool,
        cuda_graph: bool,
        observes: bool = False,
        keeps_gradients: bool = True,
        before_capture: Callable[[], object] = lambda: None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        self.model, self.cuda_graph, self._before_capture = model, cuda_graph, before_capture
        self._keeps_gradients, self._observes = keeps_gradients, observes
        self._compiled: Forward | None = None
        if compile:
            # What this process compiled for other models counts towards a limit of eight.
            torch.compiler.reset()
            # TorchInductor would choose between kernels that add up in different orders by timing
            # them: another run of the same seed would round otherwise.
            options: dict[str, Any] | None = None
            if backend == "inductor":
                options = {"deterministic": True}
            self._compiled = torch.compile(
                _Own(model), dynamic=False, backend=backend, options=options
            )
        self._forward = self._compiled
        # The phase and the patterns that the graph is of: it reads the memory of their layouts.
        self._captured: str | None = None
        self._patterns: list[Tensor | None] = []
        self._seen: list[Seen] = []  # what attention sees in it

    @contextmanager
    def step(
        self, sparse: bool, inputs: tuple[Tensor, ...], observers: Sequence[Observer] = ()
    ) -> Iterator[None]:
        """Let the model's forward be the accelerated one inside the context, for one call.

        Args:
            sparse: whether the model is in its sparse phase.
            inputs: what the model is about to be called with; the graph is captured with these.
            observers: one a layer, shown the attention of the call by the end of the context.
        """
        phase = "sparse" if sparse else "dense"
        if self.cuda_graph and self._must_capture(phase):
            self._capture(phase, inputs)
        plain = self._forward is None or (bool(observers) and not self._seen)
        if plain:
            watched = self.model.attentions[: len(observers)]
            for attention, observer in zip(watched, observers, strict=True):
                attention.observer = observer
            try:
                yield
            finally:
                for attention in watched:
                    attention.observer = None
            return
        # Past nn.Module's own attributes, which would make a submodule of it.
        vars(self.model)["forward"] = self._forward
        try:
            yield
        finally:
            del vars(self.model)["forward"]
        for seen, observer in zip(self._seen, observers, strict=False):
            observer.add(*seen)
        if self._seen:
            self.model.learn_patterns(self._seen)

    def _capture(self, phase: str, inputs: tuple[Tensor, ...]) -> None:
        # The other phase's graph and its memory; what replays it refers to itself.
        if isinstance(self._forward, _Own):
            vars(self._forward).pop("forward", None)
        self._forward, self._seen = None, []
        model, module = self.model, _Own(self.model, self._compiled)
        learns = model.learns_patterns
        watched = self._observes and not model.config.activation_checkpointing
        model.keeps_seen = phase == "dense" and (learns or watched)
        self._before_capture()
        # Replaces module.forward. What only patterns learn with has no part in it.
        torch.cuda.make_graphed_callables(module, inputs, allow_unused_input=learns)
        # As long as somebody holds them, nothing else in the graph takes their memory.
        self._seen, model.seen, model.keeps_seen = model.seen, [], False
        if self._captured is None and self._keeps_gradients:
            # The graph writes gradients to the same memory at every replay: what a parameter
            # keeps must be a copy.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(torch.clone)
        self._forward, self._captured = module, phase
        self._patterns = self._present_patterns()

    def _must_capture(self, phase: str) -> bool:
        pairs = zip(self._patterns, self._present_patterns(), strict=False)
        return self._captured != phase or any(old is not new for old, new in pairs)

    def _present_patterns(self) -> list[Tensor | None]:
        return [getattr(a.sparsity_config, "pattern", None) for a in self.model.attentions]


class _Own(nn.Module):
    """Calls the class's forward of a model, or ``forward``, whatever the instance's forward is."""

    def __init__(self, model: nn.Module, forward: Forward | None = None) -> None:
        super().__init__()
        self.model = model
        self._run = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        if self._run is not None:
            return self._run(*inputs)
        return type(self.model).forward(self.model, *inputs)


def check_acceleration(
    training: Any, deepspeed: dict[str, Any], stage: int, device_type: str, accumulation: int
) -> None:
    """Raise ConfigError unless ``training.compile`` and ``.cuda_graph`` can work in this run."""
    for name in ("compile", "cuda_graph"):
        if getattr(training, name) and stage == 3:
            raise ConfigError(
                f"training.{name} is true at ZeRO stage 3, which gathers parameters in the middle "
                "of a forward pass; allowed: stages 0, 1 and 2"
            )
    if not training.cuda_graph:
        return
    if device_type != "cuda":
        raise ConfigError("training.cuda_graph is true on a CPU; allowed: on a GPU only")
    if accumulation > 1:
        raise ConfigError(
            f"training.cuda_graph is true with {accumulation} accumulation steps; allowed: 1, "
            "i.e. a micro-batch that is the rank's whole share"
        )
    if deepspeed.get("torch_autocast", {}).get("enabled", False):
        raise ConfigError(
            "training.cuda_graph is true with DeepSpeed's torch_autocast; allowed: "
            "training.precision bf16, fp16 or fp32 without it"
        )
