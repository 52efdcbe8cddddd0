"""DenseToSparse in one process: when it looks, what it decides, what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spion_ds import DenseToSparse
from spion_ds.attention import SparseSelfAttention, attention_map
from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.patterns import DistanceRule, FixedStepRule, TransitionReport
from spion_ds.sparsity import (
    BudgetSparsityConfig,
    DenseSparsityConfig,
    SpionSparsityConfig,
    find_patterns,
)
from spion_ds.switching import Event, PatternError
from tests.devices import CPU_AND_GPU
from tests.switching.toy import BLOCK, FILTER, LENGTH, Toy, micro_batches, samples, toy, train_step


class Shown:
    """An observer that keeps what it is shown."""

    def __init__(self) -> None:
        self.passes: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def add(self, q: Tensor, k: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> None:
        self.passes.append((q.detach(), k.detach(), mask))


def shown_by(model: Toy, x: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Return the queries and keys of every layer."""
    observers = [Shown() for _ in model.layers]
    for layer, observer in zip(model.layers, observers, strict=True):
        layer.attention.observer = observer
    model.train()(x, mask)
    for layer in model.layers:
        layer.attention.observer = None
    return [observer.passes[0][:2] for observer in observers]


def look_at(
    switch: DenseToSparse,
    model: nn.Module,
    number: int,
    batches: Sequence[tuple[Tensor, Tensor | None]],
    **options: Any,
) -> Event | None:
    """Take a step without an optimizer."""
    with switch.step(number, **options) as look:
        for x, mask in batches:
            model(x, mask)
    return look.event


def run(
    switch: DenseToSparse, model: nn.Module, steps: Sequence[int], micro: int = 1
) -> tuple[list[float], list[Event]]:
    """Train and return losses and events; AdamW's state hangs on the model."""
    optimizer = vars(model).setdefault("_optimizer", torch.optim.AdamW(model.parameters(), 1e-2))
    losses, events = [], []
    for number in steps:
        batches = list(micro_batches(number, micro))
        masks = [mask for _, mask, _ in batches]
        with switch.step(number, padding_masks=masks) as look:
            losses.append(train_step(model, optimizer, batches))
        if look.event is not None:
            events.append(look.event)
    return losses, events


def test_masks_are_the_patterns_of_the_mean_maps_over_all_samples() -> None:
    model, (x, mask, _) = toy(), samples(1, 6)
    expected = [
        attention_map(q, k, block=BLOCK, filter_size=FILTER, key_padding_mask=mask)
        for q, k in shown_by(model, x, mask)
    ]
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    parts = [(x[:4], mask[:4]), (x[4:], mask[4:])]
    event = look_at(switch, model, 1, parts, padding_masks=[part[1] for part in parts])
    assert event is not None
    assert (event.kind, event.average) == ("switch", "samples")
    for layer, found, wanted in zip(model.layers, event.pooled or [], expected, strict=True):
        # Sums of float32 probabilities in another order.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)
        assert torch.equal(
            layer.attention.sparsity_config.pattern,
            layer.attention.sparsity_config.find_pattern(found),
        )


def test_without_padding_masks_every_micro_batchs_mean_counts_alike() -> None:
    model, (x, mask, _) = toy(), samples(1, 6)
    parts = [(x[:4], mask[:4]), (x[4:], mask[4:])]
    expected = [
        torch.stack(
            [
                attention_map(q[s], k[s], block=BLOCK, filter_size=FILTER, key_padding_mask=mask[s])
                for s in (slice(0, 4), slice(4, 6))
            ]
        ).mean(dim=0)
        for q, k in shown_by(model, x, mask)
    ]
    event = look_at(DenseToSparse(model, FixedStepRule(), check_every=1), model, 1, parts)
    assert event is not None
    assert event.average == "micro_batches"
    for found, wanted in zip(event.pooled or [], expected, strict=True):
        # Batches of another size are other products: float32 rounding.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)


def test_it_looks_at_check_steps_alone_and_switches_by_the_last_dense_one() -> None:
    model = toy()
    switch = DenseToSparse(model, DistanceRule(1), check_every=3, max_dense_steps=7)
    _, events = run(switch, model, range(1, 10))
    assert [(event.step, event.kind, event.forced) for event in events] == [
        (3, "check", False),
        (6, "check", False),
        (7, "switch", True),
    ]
    assert (switch.phase, switch.switch_step) == ("sparse", 7)
    assert switch.densities == events[-1].densities
    assert all(0.0 < density < 1.0 for density in switch.densities)


def test_the_rule_decides_when() -> None:
    model = toy()
    switch = DenseToSparse(model, FixedStepRule(), check_every=4)
    run(switch, model, range(1, 6))
    assert switch.switch_step == 4


def test_a_held_rule_waits() -> None:
    model, (x, mask, _) = toy(), samples(1, 2)
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    event = look_at(switch, model, 1, [(x, mask)], hold=True)
    assert event is not None
    assert event.kind == "check"
    assert event.report is not None
    assert event.report.held
    look_at(switch, model, 2, [(x, mask)])
    assert switch.switch_step == 2


class OwnRule:
    """Fires at the second check; as little as a rule can be."""

    def __init__(self) -> None:
        self.shapes: list[list[tuple[int, ...]]] = []

    def update(self, maps: list[Tensor], *, hold: bool = False) -> TransitionReport:
        self.shapes.append([tuple(map_.shape) for map_ in maps])
        return TransitionReport(fire=len(self.shapes) == 2)

    def state_dict(self) -> dict[str, Any]:
        return {"shapes": self.shapes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shapes = state["shapes"]


def test_a_rule_of_ones_own_works() -> None:
    model = toy()
    switch = DenseToSparse(model, OwnRule(), check_every=2)
    run(switch, model, range(1, 6))
    assert switch.switch_step == 4


@pytest.mark.parametrize(("per_head", "shape"), [(False, (4, 4)), (True, (2, 4, 4))])
def test_a_rule_sees_means_over_heads_unless_it_asks_for_more(
    per_head: bool, shape: tuple[int, ...]
) -> None:
    model, rule, (x, mask, _) = toy(per_head=True), OwnRule(), samples(1, 2)
    rule.per_head = per_head  # type: ignore[attr-defined]
    look_at(DenseToSparse(model, rule, check_every=1), model, 1, [(x, mask)])
    assert rule.shapes == [[shape, shape]]


def test_patterns_come_from_one_function_of_all_layers_maps() -> None:
    model, (x, mask, _) = toy(), samples(1, 2)

    def alike(configs: Sequence[Any], maps: Sequence[Tensor]) -> list[Tensor]:
        together = [sum(maps) / len(maps)] * len(maps)
        return find_patterns(configs, together)

    switch = DenseToSparse(model, FixedStepRule(), check_every=1, patterns=alike)
    event = look_at(switch, model, 1, [(x, mask)])
    assert event is not None
    assert event.pooled is not None
    assert not torch.equal(*event.pooled)
    assert switch.masks is not None
    assert torch.equal(*switch.masks)


def test_layers_may_differ_in_heads_and_blocks() -> None:
    model, (x, mask, _) = toy(heads=(2, 4), blocks=(16, 8)), samples(1, 2)
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    look_at(switch, model, 1, [(x, mask)], padding_masks=[mask])
    assert [tuple(mask.shape) for mask in switch.masks or []] == [(4, 4), (8, 8)]


def test_heads_get_patterns_of_their_own() -> None:
    model, (x, mask, _) = toy(per_head=True), samples(1, 6)
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    look_at(switch, model, 1, [(x, mask)], padding_masks=[mask])
    assert switch.masks is not None
    assert switch.masks[0].shape == (2, 4, 4)
    assert any(not torch.equal(mask[0], mask[1]) for mask in switch.masks)


def test_a_skipped_step_is_looked_at_one_step_later() -> None:
    model, (x, mask, _) = toy(), samples(1, 2)
    rule = OwnRule()
    switch = DenseToSparse(model, rule, check_every=2)
    look_at(switch, model, 1, [(x, mask)])
    with switch.step(2) as look:
        model(x, mask)
        look.skipped()
    assert look.event is not None
    assert look.event.kind == "skipped"
    assert rule.shapes == []
    event = look_at(switch, model, 3, [(x, mask)])
    assert event is not None
    assert event.kind == "check"
    assert look_at(switch, model, 4, [(x, mask)]) is not None


@pytest.mark.parametrize("device", CPU_AND_GPU)
def test_in_fp16_the_first_step_that_the_loss_scaler_takes_is_looked_at(device: str) -> None:
    model = toy().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24)  # fp16 gradients overflow
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    kinds, scales = [], []
    for number in range(1, 30):
        scales.append(scaler.get_scale())
        x, mask, y = (tensor.to(device) for tensor in samples(number, 2))
        with switch.step(number) as look:
            with torch.autocast(device, torch.float16):
                loss = F.cross_entropy(model(x, mask), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() < scales[-1]:
                look.skipped()
        kinds.append(look.event.kind if look.event is not None else None)
        if switch.phase == "sparse":
            break
    assert kinds == ["skipped"] * (number - 1) + ["switch"]
    assert len(kinds) > 1
    model(x, mask).sum().backward()  # the sparse phase trains


def test_maps_that_are_not_finite_are_named_and_the_next_step_is_looked_at() -> None:
    model, (x, mask, _) = toy(), samples(1, 2)
    switch = DenseToSparse(model, DistanceRule(15), check_every=2)
    look_at(switch, model, 1, [(x, mask)])
    weight = model.layers[1].qkv.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(PatternError, match=r"layer 1 has NaN or infinite"):
        look_at(switch, model, 2, [(x, mask)])
    with torch.no_grad():
        weight.copy_(before)
    assert switch.looks_at(3)


def test_a_density_without_room_is_named_at_the_first_step() -> None:
    model, (x, mask, _) = toy(), samples(1, 2)
    model.layers[1].attention.sparsity_config = BudgetSparsityConfig(2, BLOCK, density=0.2)
    switch = DenseToSparse(model, FixedStepRule(), check_every=100)
    with pytest.raises(ConfigError, match=r"layers\.1\.attention cannot get a pattern: density is"):
        look_at(switch, model, 1, [(x, mask)])


def test_refreshing_replaces_the_patterns() -> None:
    model = toy()
    switch = DenseToSparse(model, FixedStepRule(), check_every=2, refresh_every=3)
    seen = []
    for number in range(1, 10):
        run(switch, model, [number])
        seen.append(switch.masks)
    _, events = [], [n for n in range(1, 10) if switch.switch_step == 2 and (n - 2) % 3 == 0]
    assert events == [2, 5, 8]
    assert seen[1] is not None
    assert any(not torch.equal(a, b) for a, b in zip(seen[1], seen[-1] or [], strict=True))


def test_a_refresh_looks_at_dense_maps() -> None:
    model, (x, mask, _) = toy(), samples(1, 6)
    switch = DenseToSparse(model, FixedStepRule(), check_every=1, refresh_every=1)
    look_at(switch, model, 1, [(x, mask)], padding_masks=[mask])
    # The first layer's queries and keys are the same in both phases: so are its maps.
    first = switch.masks
    event = look_at(switch, model, 2, [(x, mask)], padding_masks=[mask])
    assert event is not None
    assert event.kind == "refresh"
    assert first is not None
    assert switch.masks is not None
    assert torch.equal(first[0], switch.masks[0])


@pytest.mark.parametrize("stop", [3, 5, 8])
@pytest.mark.parametrize("buffer", [None, LENGTH])
def test_a_run_goes_on_as_if_it_had_not_stopped(stop: int, buffer: int | None) -> None:
    def start() -> tuple[Toy, DenseToSparse]:
        model = toy(max_seq_length=buffer)
        rule = DistanceRule(1)
        return model, DenseToSparse(model, rule, check_every=2, max_dense_steps=5, refresh_every=2)

    whole, switch = start()
    losses, _ = run(switch, whole, range(1, 11))
    model, first = start()
    before, _ = run(first, model, range(1, stop + 1))
    saved = {"model": model.state_dict(), "switch": first.state_dict()}
    saved["optimizer"] = vars(model)["_optimizer"].state_dict()
    again, second = start()
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["switch"])
    vars(again)["_optimizer"] = torch.optim.AdamW(again.parameters(), 1e-2)
    vars(again)["_optimizer"].load_state_dict(saved["optimizer"])
    assert second.last_step == stop
    after, _ = run(second, again, range(stop + 1, 11))
    assert before + after == losses
    assert switch.masks is not None
    assert all(map(torch.equal, switch.masks, second.masks or []))


def test_a_state_is_plain_values_and_tensors(tmp_path: Any) -> None:
    model = toy()
    switch = DenseToSparse(model, DistanceRule(15), check_every=1, max_dense_steps=2)
    for steps in ([1], [2]):
        run(switch, model, steps)
        torch.save(switch.state_dict(), tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        other = DenseToSparse(toy(), DistanceRule(15), check_every=1, max_dense_steps=2)
        other.load_state_dict(loaded)
        assert other.phase == switch.phase


def test_with_mask_buffers_the_state_has_a_digest_alone() -> None:
    model = toy(max_seq_length=LENGTH)
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    run(switch, model, [1])
    state = switch.state_dict()
    assert state["masks"] == [None, None]
    assert len(state["digest"]) == 64


def test_masks_of_another_checkpoint_are_an_error() -> None:
    states = []
    for seed in (0, 1):
        model = toy(seed, max_seq_length=LENGTH)
        switch = DenseToSparse(model, FixedStepRule(), check_every=1)
        run(switch, model, [1])
        states.append((model.state_dict(), switch.state_dict()))
    model = toy(max_seq_length=LENGTH)
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    model.load_state_dict(states[0][0])
    switch.load_state_dict(states[1][1])
    with pytest.raises(CheckpointError, match="not those of the loaded state"):
        run(switch, model, [2])


def test_a_model_that_is_sparse_already_needs_the_drivers_state() -> None:
    model = toy()
    run(DenseToSparse(model, FixedStepRule(), check_every=1), model, [1])
    with pytest.raises(ConfigError, match=r"layers\.0\.attention is sparse"):
        run(DenseToSparse(model, FixedStepRule(), check_every=1), model, [1])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"heads": (2, 4)}, "layer 1 has"),
        ({"blocks": (8, 16)}, "layer 0 has"),
        ({"blocks": (16, 8)}, "layer 1 has"),
        ({"per_head": True}, "layer 0 has"),
        ({"heads": (2,), "blocks": (16,)}, "2 layers and this model 1"),
    ],
)
def test_a_state_of_another_model_is_refused(other: dict[str, Any], named: str) -> None:
    model = toy()
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    run(switch, model, [1])
    with pytest.raises(CheckpointError, match=named):
        DenseToSparse(toy(**other), FixedStepRule()).load_state_dict(switch.state_dict())


def test_passes_in_evaluation_mode_and_paused_ones_are_not_counted() -> None:
    model, (x, mask, _) = toy(), samples(1, 4)
    alone = look_at(DenseToSparse(model, OwnRule(), check_every=1), model, 1, [(x, mask)])
    switch = DenseToSparse(model, OwnRule(), check_every=1)
    with switch.step(1) as look:
        model(x, mask)
        model.eval()(x.flip(0), mask.flip(0))
        model.train()
        with look.paused():
            model(x.flip(1), None)
    assert alone is not None
    assert look.event is not None
    assert all(map(torch.equal, alone.pooled or [], look.event.pooled or []))


class Checkpointed(Toy):
    reentrant: bool | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(x) + self.positions(torch.arange(x.shape[1]))
        for layer in self.layers:
            if self.reentrant is None:
                hidden = layer(hidden, mask)
            else:
                hidden = checkpoint(layer, hidden, mask, use_reentrant=self.reentrant)
        return self.head(hidden.mean(dim=1))


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_is_not_counted(
    reentrant: bool, announced: bool, micro: int
) -> None:
    maps = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        model = Checkpointed()
        model.reentrant = kind
        batches = list(micro_batches(1, micro))
        masks = [mask for _, mask, _ in batches] if announced else None
        switch = DenseToSparse(model, FixedStepRule(), check_every=1)
        with switch.step(1, padding_masks=masks) as look:
            for x, mask, y in batches:
                F.cross_entropy(model(x, mask), y).backward()
        assert look.event is not None
        maps.append(look.event.pooled or [])
    assert all(map(torch.equal, *maps))


def test_looking_changes_no_loss_and_no_draw() -> None:
    results = []
    for rule_every in (1, 1000):
        model = toy()
        for layer in model.layers:
            layer.attention.dropout_p = 0.2
        torch.manual_seed(5)
        switch = DenseToSparse(model, DistanceRule(1), check_every=rule_every)
        losses, _ = run(switch, model, range(1, 4))
        results.append((losses, torch.rand(1)))
    assert results[0] == results[1]


@pytest.mark.parametrize("check_every", [1, 100])
def test_a_layer_that_is_not_called_is_an_error_at_the_first_step(check_every: int) -> None:
    model, (x, mask, _) = toy(), samples(1, 2)
    switch = DenseToSparse(model, FixedStepRule(), check_every=check_every)
    with (
        pytest.raises(ConfigError, match=r"layers\.1\.attention saw no attention in step 1"),
        switch.step(1),
    ):
        model.layers[0](model.embedding(x), mask)


def test_what_a_graph_computed_can_be_shown_by_hand() -> None:
    model, (x, mask, _) = toy(), samples(1, 2)
    shown = shown_by(model, x, mask)
    called = look_at(DenseToSparse(model, OwnRule(), check_every=1), model, 1, [(x, mask)])
    switch = DenseToSparse(model, OwnRule(), check_every=1)
    with switch.step(1) as look:
        look.by_hand()
        model(x.flip(0), mask.flip(0))
        for layer, (q, k) in enumerate(shown):
            look.add(layer, q, k, mask)
    assert called is not None
    assert look.event is not None
    assert all(map(torch.equal, called.pooled or [], look.event.pooled or []))


@pytest.mark.parametrize("number", [0, 2, 5])
def test_steps_are_numbered_without_gaps(number: int) -> None:
    switch = DenseToSparse(toy(), FixedStepRule())
    with (
        pytest.raises(ConfigError, match=f"step {number} was given after step 0"),
        switch.step(number),
    ):
        pass


def test_padding_that_was_not_announced_is_an_error() -> None:
    model, (x, mask, _) = toy(), samples(1, 2)
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    with pytest.raises(ConfigError, match="other padding in step 1"):
        look_at(switch, model, 1, [(x, mask)], padding_masks=[torch.ones_like(mask)])


@pytest.mark.parametrize(
    "masks",
    [[], [torch.ones(2, LENGTH)], [torch.ones(LENGTH, dtype=torch.bool)], torch.ones(2, LENGTH)],
    ids=["empty", "float", "one dimension", "a tensor"],
)
def test_padding_masks_are_bool_and_one_a_micro_batch(masks: Any) -> None:
    model = toy()
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    with pytest.raises(ConfigError, match="padding"), switch.step(1, padding_masks=masks):
        pytest.fail("the step began")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"check_every": 0}, "check_every is 0"),
        ({"check_every": None}, "check_every is None"),
        ({"max_dense_steps": 1.5}, "max_dense_steps is 1.5"),
        ({"refresh_every": True}, "refresh_every is True"),
        ({"resolution": "pixel"}, "resolution is 'pixel'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        DenseToSparse(toy(), FixedStepRule(), **arguments)


def test_token_maps_give_no_patterns_a_head() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.attention has a pattern a head"):
        DenseToSparse(toy(per_head=True), FixedStepRule(), resolution="token")


@pytest.mark.parametrize("rule", [FixedStepRule, object(), 15])
def test_what_is_no_rule_is_refused(rule: Any) -> None:
    with pytest.raises(ConfigError, match="no rule"):
        DenseToSparse(toy(), rule)


def test_a_model_without_switchable_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="no attention that can switch"):
        DenseToSparse(nn.Linear(2, 2), FixedStepRule())
    static = SparseSelfAttention(DenseSparsityConfig(2, 16))
    with pytest.raises(ConfigError, match="DenseSparsityConfig"):
        DenseToSparse(static, FixedStepRule())


def test_two_layers_with_one_configuration_are_refused() -> None:
    shared = SpionSparsityConfig(2, 16)
    model = nn.ModuleList([SparseSelfAttention(shared), SparseSelfAttention(shared)])
    with pytest.raises(ConfigError, match="0 and 1 share one SpionSparsityConfig"):
        DenseToSparse(model, FixedStepRule())


@pytest.mark.parametrize(
    "patterns",
    [
        lambda configs, maps: [torch.ones(3, 3, dtype=torch.bool)] * 2,
        lambda configs, maps: [torch.full((4, 4), 0.5)] * 2,
        lambda configs, maps: find_patterns(configs, maps)[:1],
        lambda configs, maps: 1 / 0,
    ],
    ids=["another shape", "not 0 and 1", "too few", "a bug"],
)
def test_patterns_that_do_not_fit_are_refused_and_nothing_switches(patterns: Any) -> None:
    model, (x, mask, _) = toy(), samples(1, 2)
    switch = DenseToSparse(model, FixedStepRule(), check_every=1, patterns=patterns)
    with pytest.raises(PatternError):
        look_at(switch, model, 1, [(x, mask)], padding_masks=[mask])
    assert switch.phase == "dense"


def test_a_rule_that_answers_something_else_is_refused() -> None:
    model, (x, mask, _) = toy(), samples(1, 2)
    rule = OwnRule()
    rule.update = lambda maps, hold=False: True  # type: ignore[method-assign, assignment]
    with pytest.raises(PatternError, match="returned True"):
        look_at(DenseToSparse(model, rule, check_every=1), model, 1, [(x, mask)])


def test_ranks_without_a_process_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match="WORLD_SIZE is 2"),
        DenseToSparse(toy(), FixedStepRule()).step(1),
    ):
        pytest.fail("the step began")


def test_inputs_of_other_lengths_need_a_length_of_their_own() -> None:
    model, (x, mask, _) = toy(max_seq_length=LENGTH), samples(1, 4)
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    short = (x[:2, :40], mask[:2, :40])
    event = look_at(switch, model, 1, [short, (x[2:], mask[2:])])
    assert event is not None
    assert [tuple(mask.shape) for mask in switch.masks or []] == [(4, 4), (4, 4)]
