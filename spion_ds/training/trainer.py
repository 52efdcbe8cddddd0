"""The training loop: dense steps, checks, the switch, sparse steps; on any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from spion_ds.attention import AttentionMapAccumulator, PooledMapAccumulator
from spion_ds.attention.map_request import mean_row_weights, row_counts
from spion_ds.data import Dataset, get_task
from spion_ds.data.baselines import majority_baseline
from spion_ds.distributed.agreement import Agreement
from spion_ds.distributed.heartbeat import Watch
from spion_ds.distributed.process_group import Ranks
from spion_ds.distributed.stopping import StopRequest
from spion_ds.errors import SpionError
from spion_ds.random_bits import sample_keys
from spion_ds.sparsity import SwitchingSparsityConfig
from spion_ds.switching.coordinator import (
    CoordinationError,
    Coordinator,
    PatternError,
    layouts_digest,
)
from spion_ds.switching.masks import set_masks
from spion_ds.training.checkpoints.checkpoint import (
    TrainingState,
    load_state,
    load_weights,
    save_checkpoint,
)
from spion_ds.training.checkpoints.files import checkpoint_name, prune_checkpoints, write_pointer
from spion_ds.training.checkpoints.resuming import Resume, drop_universal, make_universal
from spion_ds.training.config.deepspeed import with_universal_checkpoint
from spion_ds.training.config.run import RunConfig
from spion_ds.training.reports.metrics import Tally
from spion_ds.training.reports.run_log import (
    RunLog,
    StepTimer,
    peak_memory_bytes,
    reset_peak_memory,
)
from spion_ds.training.step.acceleration import AcceleratedForward
from spion_ds.training.step.batches import (
    Batch,
    BatchOrder,
    BatchReader,
    DrawKeys,
    micro_batch_positions,
)
from spion_ds.training.step.deepspeed_engine import DeepSpeedEngine
from spion_ds.training.step.evaluation import build_model, evaluate
from spion_ds.training.step.losses import Losses
from spion_ds.training.step.step_guard import StepGuard, StepReport

# Skipping more steps than this without one that counts is no training.
_MOST_SKIPPED = 10


class TrainingError(SpionError, RuntimeError):
    """Training cannot go on: a loss, gradient or attention map is not finite."""


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
        self.rule = config.transition.build()
        self._majority = majority_baseline(dataset.train, dataset.validation)
        self._told_held = False
        sparsity = [attention.sparsity_config for attention in self.model.attentions]
        if resume is not None:
            self._resume(resume)
        elif config.is_sparse and not config.switches:
            length = config.data.sequence_length
            self.state.masks = [layer.make_mask(length) for layer in sparsity]
            self.state.switch_step = 0
        self._derive_layouts()
        self._compare_layouts()
        self.coordinator = Coordinator(
            self.rule,
            [c for c in sparsity if isinstance(c, SwitchingSparsityConfig)],
            -(-config.data.sequence_length // config.sparse_attention.block),
            agreement,
        )
        self.order = BatchOrder(len(dataset.train), config.batches.total, config.training.seed)
        self.reader = self._make_reader()
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
        self.tally = Tally(self.device)
        self.losses = Losses(config, self.model, self.engine, self.tally)
        self._rate = 0.0
        self._skipping = False
        self._skipped = 0  # steps in a row
        self._stopping = False  # agreed by all ranks
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

    def _make_reader(self) -> BatchReader:
        """Return what reads this rank's micro-batches, with their keys, ahead of the steps."""
        config, ranks = self.config, self.ranks
        task = get_task(config.task)
        augments, names = config.training.augment, config.model.subexpression_loss > 0.0
        return BatchReader(
            self.dataset.train,
            self.order,
            lambda micro_step: micro_batch_positions(
                micro_step, config.batches.micro, ranks.rank, ranks.world_size
            ),
            config.batches.accumulation,
            lambda step, places: sample_keys(
                config.training.seed,
                step,
                torch.from_numpy(places),
                DrawKeys.places(self.model.dropout_places),
            ),
            self.device,
            augment=task.augmentation(config.data) if augments and task.augmentation else None,
            values=task.token_targets.values if names and task.token_targets else None,
        )

    @property
    def stopped_by_signal(self) -> bool:
        """Whether a signal on any rank ended ``train``."""
        return self._stopping

    def train(self, stop_at: int | None = None) -> bool:
        """Train to the last step, or to ``stop_at`` or a signal; return whether it is finished."""
        training, state = self.config.training, self.state
        last = training.steps if stop_at is None else min(stop_at, training.steps)
        self.request.patient = True
        self.engine.train()
        while state.step < last and not self._stopping:
            phase = self._step()
            self.watch.tick(state.step)
            ends = state.step == last
            evaluates = state.step % training.evaluate_every == 0 or state.step == training.steps
            switched = phase != state.phase
            logs = state.step % training.log_every == 0
            due = state.step % training.checkpoint_every == 0
            ends_row = logs or evaluates or switched or ends or self._stopping
            if due or ends_row:
                self._obey(self.guard.reports())
            if ends_row:
                self._log_row(phase)
            if switched:
                reset_peak_memory(self.device)  # each phase has a peak of its own
            best = evaluates and self._evaluate()
            if best or due or ends or self._stopping:
                self._save(best)
        if self._stopping:
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
        checking = config.switches and phase == "dense" and config.transition.is_check(number)
        # Where every step is a check, the checks are part of the step.
        timed = not checking or config.transition.check_every == 1
        observed: list[AttentionMapAccumulator | PooledMapAccumulator] = []
        if checking:
            observed = self._observers()
        if timed:
            self.timer.start()
        else:
            self.timer.stop()
        self._rate = config.schedule.at(state.step, state.switch_step)
        self.engine.set_learning_rate(self._rate)
        self.tally.begin()
        for micro_step in range(config.batches.accumulation):
            batch, keys = self._read(micro_step)
            inputs = (batch.input_ids, batch.padding_mask, keys.dropout)
            with self.accelerated.step(phase == "sparse", inputs, observed):
                logits = self.engine(*inputs).float()
            loss = self.losses.of(batch, keys, logits, state.step)
            self.engine.backward(loss)
            self.reader.read_ahead(state.step, micro_step)
            self.guard.add_loss(loss)
            if micro_step == config.batches.accumulation - 1:
                self._skipping = self._obey(self.guard.close(number, self.request.asked))
            self.engine.step(skip=self._skipping)
        state.step = number
        state.samples_seen += config.batches.total
        if not self._skipping:
            self.tally.keep()
        if checking and not self._skipping:
            if not self.guard.at_once:
                self._obey(self.guard.reports())
            self._check(observed)
        if timed:
            self.timer.count()
        return phase

    def _read(self, micro_step: int) -> tuple[Batch, DrawKeys]:
        """Return a micro-batch of the present step and its keys."""
        batch, keys = self.reader.read(self.state.step, micro_step)
        return batch, DrawKeys.split(keys)

    def _observers(self) -> list[AttentionMapAccumulator | PooledMapAccumulator]:
        """Return one accumulator a layer for the global batch of the present step."""
        layers = self.coordinator.sparsity_configs
        if self.config.transition.resolution == "token":
            return [AttentionMapAccumulator() for _ in layers]
        # Pooling mixes rows, so their weights in the mean are needed before the first micro-batch.
        count = torch.zeros(
            self.config.data.sequence_length, dtype=torch.float64, device=self.device
        )
        for micro_step in range(self.config.batches.accumulation):
            batch, _ = self._read(micro_step)
            seen = self.model.seen_by_attention(batch.input_ids, batch.padding_mask)
            count += row_counts(seen[1], self.config.model.heads)
        dist.all_reduce(count)
        weights = mean_row_weights(count)
        keeps = self.config.transition.rule == "skewness"
        return [
            PooledMapAccumulator(layer.block, layer.convolution, weights, keep_batches=keeps)
            for layer in layers
        ]

    def _obey(self, reports: list[StepReport]) -> bool:
        """Do what all ranks together found about steps; return whether to skip the present one."""
        skips = False
        for report in reports:
            self._stopping = self._stopping or report.stop
            self._skipped = self._skipped + 1 if report.not_finite else 0
            if not report.not_finite:
                continue
            where = f"{' and '.join(report.not_finite[:2])}" + (
                f" and {len(report.not_finite) - 2} more" if len(report.not_finite) > 2 else ""
            )
            found = f"step {report.step} ({self.state.phase} phase): {where} not finite"
            if self.config.training.on_nonfinite == "stop" or self._skipped > _MOST_SKIPPED:
                raise TrainingError(
                    f"{found}; lower optimizer.lr, train in fp32 or set training.on_nonfinite to "
                    "skip, and go on with --resume, from the last checkpoint"
                )
            skips = True
            self.log.row(report.step, "skipped", parts=", ".join(report.not_finite))
            self.log.say(f"{found}; the step is skipped")
        return skips

    def _check(self, observed: list[AttentionMapAccumulator | PooledMapAccumulator]) -> None:
        state, started = self.state, time.perf_counter()
        transition = self.config.transition
        force = transition.is_forced(state.step)
        hold = transition.holds(state.best_accuracy, self._majority)
        try:
            decision = self.coordinator.check(
                observed, force=force, hold=hold, weights=self._pattern_weights()
            )
        except CoordinationError as error:
            if isinstance(error, PatternError) and self.config.training.on_nonfinite == "skip":
                self.log.row(state.step, "skipped", parts="the attention maps")
                self.log.say(f"step {state.step}: {error}; the check is skipped")
                return
            raise TrainingError(f"step {state.step}: {error}") from error
        if decision.report is not None:
            self.log.row(
                state.step,
                "check",
                distance=decision.report.distances,
                change=decision.report.changes,
                **({"skewness": decision.report.skewness} if decision.report.skewness else {}),
                seconds=time.perf_counter() - started,
            )
            if decision.report.held and not force and not self._told_held:
                self._told_held = True
                self.log.say(
                    f"step {state.step}: the maps are steady, but no validation accuracy was "
                    f"{transition.min_gain_percent:g} points above the majority class's "
                    f"{self._majority:.1%} yet (transition.min_gain_percent): attention stays dense"
                )
        if decision.masks is not None:
            set_masks(self.model, decision.masks)
            if self.config.sparse_attention.restarts_optimizer:
                self.engine.restart_optimizer()
            self._derive_layouts()
            self._compare_layouts()
            state.masks, state.switch_step = decision.masks, state.step
            # Sparse checkpoints compete among themselves: a dense one is another model.
            state.best_step, state.best_accuracy = None, -1.0
            densities = [float(mask.double().mean()) for mask in decision.masks]
            self.log.row(
                state.step, "switch", density=densities, digest=decision.digest, forced=force
            )
            shown = ", ".join(f"{density:.1%}" for density in densities)
            self.log.say(f"step {state.step}: switched to sparse attention; densities {shown}")
        # Checks may come every step; pictures need not.
        log_every = self.config.training.log_every
        rare = transition.check_every >= log_every
        if decision.masks is not None or rare or state.step % log_every == 0:
            self.log.pictures(state.step, decision.maps, decision.masks)

    def _pattern_weights(self) -> list[Tensor] | None:
        """Return SAT's W of each layer, whole on every rank; None in other modes."""
        parameters = [pattern.weight for pattern in self.model.patterns]
        if not parameters:
            return None
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
        # The rule's memory is a map a layer; once it has fired nobody asks it again.
        self.state.rule = self.rule.state_dict() if self.state.masks is None else {}
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
        if self.state.masks is None:
            self.rule.load_state_dict(self.state.rule)
        set_masks(self.model, self.state.masks)
        # DeepSpeed's optimizer files are pickles; they were written by this run.
        if resume.way == "exact":
            self.engine.load_checkpoint(resume.folder)
        elif resume.way == "universal":
            folder = make_universal(resume.folder, self.agreement)
            self.engine.load_checkpoint(folder)
            self.agreement.barrier()
            if self.ranks.is_first:
                drop_universal(folder)
        if self.ranks.is_first and self.state.best_step is not None:
            # A run that was killed while it saved, or that goes back, knows another best.
            best = checkpoint_name(self.state.best_step)
            if (self.checkpoints / best).is_dir():
                write_pointer(self.checkpoints, "best", best)
