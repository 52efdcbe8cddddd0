"""The training loop: dense steps, checks, the switch, sparse steps; on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from spion_ds.data.baselines import majority_baseline
from spion_ds.data.storage.cache import Dataset
from spion_ds.distributed.agreement import Agreement
from spion_ds.distributed.heartbeat import Watch
from spion_ds.distributed.process_group import Ranks
from spion_ds.distributed.stopping import StopRequest
from spion_ds.switching import CoordinationError, DenseToSparse, Event, Look, PatternError
from spion_ds.switching.masks import layouts_digest, set_masks
from spion_ds.training.checkpoints.checkpoint import (
    TrainingState,
    load_state,
    load_weights,
    save_checkpoint,
)
from spion_ds.training.checkpoints.files import checkpoint_name, prune_checkpoints, write_pointer
from spion_ds.training.checkpoints.resuming import Resume, load_engine
from spion_ds.training.config.deepspeed import with_universal_checkpoint
from spion_ds.training.config.run import RunConfig
from spion_ds.training.reports.metrics import Tally
from spion_ds.training.reports.run_log import (
    RunLog,
    StepTimer,
    peak_memory_bytes,
    reset_peak_memory,
)
from spion_ds.training.reports.switch_log import SwitchLog
from spion_ds.training.step.acceleration import AcceleratedForward
from spion_ds.training.step.batches import Batch, DrawKeys, training_reader
from spion_ds.training.step.deepspeed_engine import DeepSpeedEngine
from spion_ds.training.step.evaluation import build_model, evaluate
from spion_ds.training.step.losses import Losses
from spion_ds.training.step.step_guard import StepGuard, StepReport
from spion_ds.training.step.verdict import StepVerdict, TrainingError


class Trainer:
    """One run on one rank.

    Args:
        config: the validated run configuration.
        dataset: the task's data.
        ranks: this process among all.
        agreement: the control channel between ranks.
        watch: told about every step.
        request: the wish to stop, on this rank.
        folder: the run's folder.
        resume: checkpoint to go on from, None for a new run.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        ranks: Ranks,
        agreement: Agreement,
        watch: Watch,
        request: StopRequest,
        folder: Path,
        resume: Resume | None,
    ) -> None:
        self.config, self.dataset, self.ranks, self.agreement = config, dataset, ranks, agreement
        self.watch, self.request = watch, request
        self.checkpoints = folder / "checkpoints"
        self.device = ranks.device
        self.model = build_model(config)
        self.engine = self._make_engine(resume)
        skips = config.training.on_nonfinite == "skip"
        self.guard = StepGuard(
            self.model,
            self.device,
            at_once=skips or self.device.type == "cpu",
            gradients=config.training.precision != "fp16",
            whole=self.engine.has_whole_gradients,
        )

        self.state = TrainingState(seed=config.training.seed)
        self.majority = majority_baseline(dataset.train, dataset.validation)
        self.switch = self._make_switch() if config.switches else None
        sparsity = [attention.sparsity_config for attention in self.model.attentions]
        if resume is not None:
            self._resume(resume)
        elif config.is_sparse and not config.switches:
            length = config.data.sequence_length
            self.state.masks = [layer.make_mask(length) for layer in sparsity]
            self.state.switch_step = 0
        self._derive_layouts()
        self._compare_layouts()
        self.reader = training_reader(
            config, dataset.train, ranks, self.device, self.model.dropout_places
        )
        self.accelerated = AcceleratedForward(
            self.model,
            compile=config.training.compile,
            cuda_graph=config.training.cuda_graph,
            observes=config.switches,
            keeps_gradients=self.engine.keeps_gradients,
            before_capture=self.reader.settle,
        )
        self.timer = StepTimer(self.device)
        self.log = RunLog(
            folder if ranks.is_first else None, config.training.steps, self.state.step
        )
        self.switch_log = SwitchLog(
            self.log, config.transition, config.training.log_every, self.majority
        )
        self.verdict = StepVerdict(self.log, config.training.on_nonfinite)
        self.tally = Tally(self.device)
        self.losses = Losses(config, self.model, self.engine, self.tally)
        self._rate = 0.0
        self._skipping = False
        if self.state.step == 0 and self.state.masks is not None:
            shown = ", ".join(f"{mask.double().mean():.1%}" for mask in self.state.masks)
            mode = config.sparse_attention.mode
            self.log.say(f"sparse attention from the first step ({mode}); densities {shown}")
            self.log.pictures(0, None, self.state.masks)

    def _make_engine(self, resume: Resume | None) -> DeepSpeedEngine:
        config = self.config
        deepspeed_config = config.resolved
        if resume is not None and resume.way == "weights":
            self.model.load_state_dict(load_weights(resume.folder))
        elif resume is not None and resume.way == "universal":
            deepspeed_config = with_universal_checkpoint(config.resolved)
        return DeepSpeedEngine(self.model, deepspeed_config, clip_value=config.optimizer.clip_value)

    @property
    def stopped_by_signal(self) -> bool:
        """Whether a signal on any rank ended ``train``."""
        return self.verdict.stopping

    def train(self, stop_at: int | None = None) -> bool:
        """Train to the last step, or to ``stop_at`` or a signal; return whether it is finished."""
        training, state = self.config.training, self.state
        last = training.steps if stop_at is None else min(stop_at, training.steps)
        self.request.patient = True
        self.engine.train()
        while state.step < last and not self.verdict.stopping:
            phase = self._step()
            self.watch.tick(state.step)
            ends = state.step == last
            evaluates = state.step % training.evaluate_every == 0 or state.step == training.steps
            switched = phase != state.phase
            logs = state.step % training.log_every == 0
            due = state.step % training.checkpoint_every == 0
            ends_row = logs or evaluates or switched or ends or self.verdict.stopping
            if due or ends_row:
                self._obey(self.guard.reports())
            if ends_row:
                self._log_row(phase)
            if switched:
                reset_peak_memory(self.device)  # each phase has a peak of its own
            best = evaluates and self._evaluate()
            if best or due or ends or self.verdict.stopping:
                self._save(best)
        if self.verdict.stopping:
            self.log.say(f"step {state.step}: asked to stop; a checkpoint is saved")
        return state.step == training.steps

    def watched(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return ``forward`` so that the watch sees this rank move at every call."""

        def call(*inputs: Tensor) -> Tensor:
            self.watch.tick(self.state.step)
            return forward(*inputs)

        return call

    def _step(self) -> str:
        """Take one optimizer step and return its phase; on a check step, decide the switch."""
        config, state = self.config, self.state
        phase, number = state.phase, state.step + 1
        checking = self.switch is not None and self.switch.looks_at(number)
        # Where every step is a check, the checks are part of the step.
        timed = not checking or config.transition.check_every == 1
        if timed:
            self.timer.start()
        else:
            self.timer.stop()
        self._rate = config.schedule.at(state.step, state.switch_step)
        self.engine.set_learning_rate(self._rate)
        self.tally.begin()
        with self._watching(number, checking) as look:
            for micro_step in range(config.batches.accumulation):
                self._micro_step(micro_step, number, look)
            if look is not None and not self.engine.step_applied:
                look.skipped()  # a value was not finite, or overflowed under loss scaling
            elif checking and not self.guard.at_once:
                self._obey(self.guard.reports())
        state.step = number
        state.samples_seen += config.batches.total
        if not self._skipping:
            self.tally.keep()
        if look is not None and look.event is not None:
            self._note(look.event)
        if timed:
            self.timer.count()
        return phase

    def _micro_step(self, micro_step: int, number: int, look: Look | None) -> None:
        """Take a micro-batch forward and backward; with the last one the optimizer steps."""
        config, state = self.config, self.state
        batch, keys = self._read(micro_step)
        inputs = (batch.input_ids, batch.padding_mask, keys.dropout)
        observers = () if look is None else look.observers
        with self.accelerated.step(state.phase == "sparse", inputs, observers):
            logits = self.engine(*inputs).float()
        loss = self.losses.of(batch, keys, logits, state.step)
        self.engine.backward(loss)
        self.reader.read_ahead(state.step, micro_step)
        self.guard.add_loss(loss)
        if micro_step == config.batches.accumulation - 1:
            self._skipping = self._obey(self.guard.close(number, self.request.asked))
        self.engine.step(skip=self._skipping)

    @contextmanager
    def _watching(self, number: int, checking: bool) -> Iterator[Look | None]:
        """Let the driver of the switch watch a step, where the run has one."""
        if self.switch is None:
            yield None
            return
        masks = self._padding_masks() if checking else None
        hold = self.config.transition.holds(self.state.best_accuracy, self.majority)
        try:
            with self.switch.step(number, padding_masks=masks, hold=hold) as look:
                look.by_hand()  # the accelerated pass shows itself; others are not looked at
                yield look
        except CoordinationError as error:
            if not isinstance(error, PatternError) or self.config.training.on_nonfinite != "skip":
                raise TrainingError(f"step {number}: {error}") from error
            self.log.row(number, "skipped", parts="the attention maps")
            self.log.say(f"step {number}: {error}; the check is skipped")

    def _padding_masks(self) -> list[Tensor]:
        """Return the padding masks of this rank's micro-batches as attention will see them."""
        batches = [self._read(number)[0] for number in range(self.config.batches.accumulation)]
        return [
            self.model.seen_by_attention(batch.input_ids, batch.padding_mask)[1]
            for batch in batches
        ]

    def _read(self, micro_step: int) -> tuple[Batch, DrawKeys]:
        """Return a micro-batch of the present step and its keys."""
        batch, keys = self.reader.read(self.state.step, micro_step)
        return batch, DrawKeys.split(keys)

    def _obey(self, reports: list[StepReport]) -> bool:
        """Do what all ranks together found about steps; return whether to skip the present one."""
        return self.verdict.obey(reports, self.state.phase)

    def _note(self, event: Event) -> None:
        """Go on with what the driver of the switch decided, and write it down."""
        state, switch = self.state, self.switch
        assert switch is not None
        if event.kind == "switch":
            for pattern in self.model.patterns:
                pattern.freeze()
            if self.config.sparse_attention.restarts_optimizer:
                self.engine.restart_optimizer()
            self._compare_layouts()
            state.masks, state.switch_step = switch.masks, switch.switch_step
            # Sparse checkpoints compete among themselves: a dense one is another model.
            state.best_step, state.best_accuracy = None, -1.0
        self.switch_log.write(event, state.masks)

    def _make_switch(self) -> DenseToSparse:
        transition = self.config.transition
        return DenseToSparse(
            self.model,
            transition.build(),
            check_every=transition.steps_between_checks,
            max_dense_steps=transition.max_dense_steps,
            resolution=transition.resolution,
            sources=self._pattern_weights if self.model.patterns else None,
            agreement=self.agreement,
        )

    def _pattern_weights(self) -> list[Tensor]:
        """Return SAT's W of each layer, whole on every rank."""
        parameters = [pattern.weight for pattern in self.model.patterns]
        with self.engine.gathered(parameters):
            return [parameter.detach().clone() for parameter in parameters]

    def _derive_layouts(self) -> None:
        """Make the layouts now: a compiled step could not."""
        self.model.prepare(self.config.batches.micro, self.device)

    def _compare_layouts(self) -> None:
        """Raise on all ranks unless all have the same layouts."""
        digest = layouts_digest(self.model.attentions, self.config.data.sequence_length)
        other = self.agreement.differing(digest)
        if other:
            raise TrainingError(
                f"step {self.state.step}: the layouts of rank(s) {', '.join(map(str, other))} "
                "differ from rank 0's; memory or network is faulty: go on with --resume, from the "
                "last checkpoint"
            )

    def _log_row(self, phase: str) -> None:
        """Average what was counted since the last row over all ranks, and write it down."""
        step, seconds, means = self.state.step, self.timer.take(), self.tally.take()
        if means is None:  # every step since the last row was skipped
            return
        speed = {}
        if seconds is not None:
            tokens_per_second = self.config.tokens_per_step / seconds
            speed = {"step_seconds": seconds, "tokens_per_second": tokens_per_second}
        memory = peak_memory_bytes(self.device)
        self.log.row(
            step, "train", **means, phase=phase, lr=self._rate, memory_bytes=memory, **speed
        )
        shown = {"loss": f"{means['loss']:.3f}", "acc": f"{means['accuracy']:.1%}", "phase": phase}
        if seconds is not None:
            shown["tok/s"] = f"{tokens_per_second:,.0f}"
        self.log.progress(step, **shown)

    def _evaluate(self) -> bool:
        """Evaluate on the validation split; return whether it is the best of this phase."""
        self.timer.stop()
        self.engine.eval()
        result = evaluate(
            self.watched(self.engine),
            self.dataset.validation,
            self.config.batches.micro,
            self.ranks,
            self.device,
        )
        self.engine.train()
        state = self.state
        self.log.row(
            state.step, "validation", accuracy=result.accuracy, loss=result.loss, phase=state.phase
        )
        self.log.say(
            f"step {state.step}: validation accuracy {result.accuracy:.2%}, loss {result.loss:.4f}"
        )
        best = result.accuracy > state.best_accuracy
        if best:
            state.best_step, state.best_accuracy = state.step, result.accuracy
        return best

    def _save(self, best: bool) -> None:
        self.timer.stop()
        self._compare_layouts()
        self.state.switch = {} if self.switch is None else self.switch.state_dict()
        place = save_checkpoint(
            self.engine, self.checkpoints, self.state, self.config, self.ranks, self.agreement
        )

        def point_and_prune() -> None:
            if best:
                write_pointer(self.checkpoints, "best", place.name)
            prune_checkpoints(self.checkpoints, self.config.training.keep_checkpoints)

        # The others must not look for the best before it is named.
        self.agreement.from_first(point_and_prune)
        self.watch.tick(self.state.step)

    def _resume(self, resume: Resume) -> None:
        self.state, _ = load_state(resume.folder)
        set_masks(self.model, self.state.masks)
        if self.switch is not None:
            self.switch.load_state_dict(self.state.switch)
        load_engine(self.engine, resume, self.agreement)
        if self.ranks.is_first and self.state.best_step is not None:
            # A run that was killed while it saved, or that goes back, knows another best.
            best = checkpoint_name(self.state.best_step)
            if (self.checkpoints / best).is_dir():
                write_pointer(self.checkpoints, "best", best)
