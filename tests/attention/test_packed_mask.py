"""The mask in a state_dict: it travels with the weights, and is never silently another one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from spion_ds.attention import SparseSelfAttention
from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.sparsity import DenseSparsityConfig, SpionSparsityConfig

from .cases import needs_gpu

LENGTH, BLOCK, HEADS = 72, 16, 2
BLOCKS = 5  # the last one has 8 tokens
CPU = torch.device("cpu")
PER_HEAD = pytest.mark.parametrize("per_head", [False, True])


def module(per_head: bool = False, length: int = LENGTH, **settings) -> SparseSelfAttention:
    config = SpionSparsityConfig(HEADS, BLOCK, different_layout_per_head=per_head)
    return SparseSelfAttention(config, max_seq_length=length, **settings)


def mask(seed: int = 0, per_head: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (HEADS, BLOCKS, BLOCKS) if per_head else (BLOCKS, BLOCKS)
    return (torch.rand(shape, generator=generator) < 0.3) | torch.eye(BLOCKS, dtype=torch.bool)


def switched(seed: int = 0, per_head: bool = False) -> SparseSelfAttention:
    attention = module(per_head)
    attention.set_mask(mask(seed, per_head))
    return attention


def drawn() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, HEADS, LENGTH, 8) for _ in range(3)]


def same(a: SparseSelfAttention, b: SparseSelfAttention) -> bool:
    return torch.equal(a(*drawn()), b(*drawn()))


def has(attention: SparseSelfAttention, expected: Tensor | None) -> bool:
    """Whether the next pass computes with a mask."""
    attention(*drawn())
    layout = attention.layout(LENGTH, CPU)
    return layout is None if expected is None else torch.equal(layout.to_mask(), expected)


@PER_HEAD
def test_a_mask_goes_through_a_strict_state_dict(per_head):
    saved, loaded = switched(per_head=per_head), module(per_head)
    dense = loaded(*drawn())
    loaded.load_state_dict(saved.state_dict(), strict=True)
    assert torch.equal(loaded.sparsity_config.pattern, mask(per_head=per_head))
    assert same(loaded, saved)
    loaded.load_state_dict(module(per_head).state_dict(), strict=True)
    assert loaded.sparsity_config.pattern is None
    assert torch.equal(loaded(*drawn()), dense)


def test_the_buffer_has_its_place_and_size_from_the_start():
    attention = module()
    buffer, address = attention.packed_mask, attention.packed_mask.data_ptr()
    assert list(attention.state_dict()) == ["packed_mask"]
    assert (buffer.dtype, buffer.numel()) == (torch.uint8, 64 + -(-BLOCKS * BLOCKS // 8))
    for found in (mask(0), mask(1), None):
        attention.set_mask(found)
        assert has(attention, found)
    assert attention.packed_mask is buffer
    assert attention.packed_mask.data_ptr() == address


def test_without_a_length_or_a_pattern_of_its_own_there_is_no_buffer():
    for attention in (
        SparseSelfAttention(SpionSparsityConfig(HEADS, BLOCK)),
        SparseSelfAttention(DenseSparsityConfig(HEADS, BLOCK), max_seq_length=LENGTH),
    ):
        assert attention.packed_mask is None
        assert attention.state_dict() == {}
        assert list(attention.buffers()) == []


def test_a_configuration_that_has_a_pattern_already_is_in_the_buffer():
    config = SpionSparsityConfig(HEADS, BLOCK)
    config.set_pattern(mask())
    loaded = module()
    loaded.load_state_dict(SparseSelfAttention(config, max_seq_length=LENGTH).state_dict())
    assert has(loaded, mask())
    with pytest.raises(ConfigError, match=r"mask has shape \(5, 5\); allowed: \(8, 8\)"):
        SparseSelfAttention(config, max_seq_length=128)


def write_copy(buffer: Tensor, new: Tensor) -> None:
    buffer.copy_(new)


def write_data(buffer: Tensor, new: Tensor) -> None:
    buffer.data.copy_(new)


def write_numpy(buffer: Tensor, new: Tensor) -> None:
    buffer.numpy()[:] = new.numpy()


@PER_HEAD
@pytest.mark.parametrize("write", [write_copy, write_data, write_numpy])
def test_what_is_written_into_the_buffer_is_noticed(write, per_head):
    attention, source = switched(0, per_head), switched(1, per_head)
    assert has(attention, mask(0, per_head))
    write(attention.packed_mask, source.packed_mask)
    assert has(attention, mask(1, per_head))
    write(attention.packed_mask, module(per_head).packed_mask)
    assert has(attention, None)


def test_an_assigned_buffer_is_noticed():
    attention = module()
    attention(*drawn())
    attention.load_state_dict(switched(0).state_dict(), assign=True)
    assert has(attention, mask(0))
    attention.packed_mask = switched(1).packed_mask
    assert has(attention, mask(1))


def test_a_copy_of_the_same_mask_derives_nothing_again():
    # As DDP does in every forward pass; a captured CUDA graph reads the layout's memory.
    attention = switched()
    layout = attention.layout(LENGTH, CPU)
    attention.packed_mask.copy_(attention.packed_mask.clone())
    assert attention.layout(LENGTH, CPU) is layout
    attention.load_state_dict(switched().state_dict())
    assert attention.layout(LENGTH, CPU) is layout


@pytest.mark.parametrize("phase", ["dense", "sparse"])
@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.to(torch.float64),
    ],
    ids=["half", "bfloat16", "to"],
)
def test_a_model_of_another_dtype_keeps_its_mask(phase, convert):
    model = nn.ModuleList([nn.Linear(2, 2), module()])
    expected = mask() if phase == "sparse" else None
    model[1].set_mask(expected)
    convert(model)
    assert model[1].packed_mask.dtype == torch.uint8
    assert has(model[1], expected)


def test_a_cast_buffer_is_an_error_that_names_the_dtype():
    attention = switched().type(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"packed_mask is torch.bfloat16; allowed: uint8"):
        attention(*drawn())
    with pytest.raises(CheckpointError, match=r"packed_mask is torch.bfloat16"):
        attention.set_mask(mask())
    with pytest.raises(CheckpointError, match=r"packed_mask is torch.float32"):
        module().load_state_dict({"packed_mask": switched().packed_mask.float()})


@pytest.mark.parametrize("averages_buffers", [False, True])
def test_averaged_buffers_are_an_error_and_copied_ones_are_none(averages_buffers):
    models = [nn.ModuleList([nn.Linear(2, 2), switched(seed)]) for seed in (0, 1)]
    average = AveragedModel(models[0], use_buffers=averages_buffers)
    for model in models:
        average.update_parameters(model)
    if not averages_buffers:
        assert has(average.module[1], mask(1))
        return
    with pytest.raises(CheckpointError, match="an average of models does"):
        average.module[1](*drawn())


@pytest.mark.parametrize("byte", [0, 10, 24, 63, 64, 67])
def test_any_changed_byte_is_an_error(byte):
    attention = switched()
    state = {"packed_mask": attention.packed_mask.clone()}
    state["packed_mask"][byte] ^= 4
    with pytest.raises(CheckpointError, match="packed_mask"):
        module().load_state_dict(state)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (
            module(length=128),
            r"a mask of 8×8 blocks of 16 tokens, shared by all heads; allowed: a ",
        ),
        (module(per_head=True), r"5×5 blocks of 16 tokens, for each of 2 heads; allowed: a mask"),
        (
            SparseSelfAttention(SpionSparsityConfig(HEADS, 32), max_seq_length=160),
            r"5×5 blocks of 32 tokens",
        ),
    ],
    ids=["blocks", "heads", "block"],
)
def test_a_mask_of_another_model_is_an_error_and_changes_nothing(other, expected):
    attention = switched()
    before = attention.packed_mask.clone()
    with pytest.raises(CheckpointError, match=expected):
        attention.load_state_dict(other.state_dict())
    assert torch.equal(attention.packed_mask, before)
    assert has(attention, mask())


def test_a_mask_for_a_module_without_a_buffer_is_an_error_even_if_loading_is_not_strict():
    attention = SparseSelfAttention(SpionSparsityConfig(HEADS, BLOCK))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="make it with the max_seq_length of the model"):
            attention.load_state_dict(switched().state_dict(), strict=strict)


def test_a_pattern_set_past_the_module_is_an_error_in_passes_and_in_checkpoints():
    attention = switched(0)
    attention(*drawn())
    attention.sparsity_config.set_pattern(mask(1))
    for use in (lambda: attention(*drawn()), attention.state_dict):
        with pytest.raises(ConfigError, match=r"call attention.set_mask\(mask\), which sets both"):
            use()
    # The same mask is no other one.
    attention.sparsity_config.set_pattern(mask(0))
    attention.state_dict()
    assert has(attention, mask(0))
    attention.sparsity_config.set_pattern(mask(1))
    attention.set_mask(mask(1))
    assert has(attention, mask(1))
    # What is loaded is right, whatever the configuration had.
    attention.sparsity_config.set_pattern(mask(2))
    attention.load_state_dict(switched(1).state_dict())
    assert has(attention, mask(1))


def test_two_attentions_of_one_configuration_do_not_mix_their_masks():
    config = SpionSparsityConfig(HEADS, BLOCK)
    first, second = (SparseSelfAttention(config, max_seq_length=LENGTH) for _ in range(2))
    first.set_mask(mask(0))
    with pytest.raises(ConfigError, match="two attentions share one configuration"):
        second(*drawn())


def pickled(attention: SparseSelfAttention) -> SparseSelfAttention:
    return pickle.loads(pickle.dumps(attention))


def saved_whole(attention: SparseSelfAttention) -> SparseSelfAttention:
    file = io.BytesIO()
    torch.save(attention, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@PER_HEAD
@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, saved_whole])
def test_a_copy_has_the_mask_and_a_life_of_its_own(make_copy, per_head):
    attention = switched(0, per_head)
    attention.observer = Watcher()
    attention(*drawn())
    other = make_copy(attention)
    assert other.observer is None
    assert has(other, mask(0, per_head))
    other.set_mask(mask(1, per_head))
    assert has(other, mask(1, per_head))
    assert has(attention, mask(0, per_head))


class Watcher:
    def add(self, *_, **__):
        pass


def test_a_copy_takes_in_what_its_original_had_not_read_yet():
    attention = switched(0)
    attention.packed_mask.copy_(switched(1).packed_mask)
    other = copy.deepcopy(attention)
    assert torch.equal(other.state_dict()["packed_mask"], switched(1).packed_mask)
    assert has(other, mask(1))


def test_a_module_made_without_memory_takes_its_mask_from_a_state_dict():
    with torch.device("meta"):
        attention = module()
    assert attention.packed_mask.is_meta
    assert attention(*(x.to("meta") for x in drawn())).is_meta
    attention.to_empty(device="cpu")
    attention.load_state_dict(switched().state_dict())
    assert has(attention, mask())


def test_memory_that_nobody_filled_is_an_error():
    with torch.device("meta"):
        attention = module()
    attention.to_empty(device="cpu")
    attention.packed_mask.fill_(170)  # whatever was there
    attention.state_dict()  # what loads into it asks for it first
    with pytest.raises(CheckpointError, match=r"its memory was never written \(as after to_empty"):
        attention(*drawn())
    attention.reset_parameters()  # FSDP calls it
    assert has(attention, None)
    attention.packed_mask.fill_(170)
    attention.set_mask(mask())
    assert has(attention, mask())


def test_a_module_made_in_inference_mode_works():
    with torch.inference_mode():
        attention = module().to(torch.device("cpu"))
        attention.packed_mask = attention.packed_mask.clone()  # an inference tensor
        assert attention.packed_mask.is_inference()
    assert has(attention, None)
    attention.set_mask(mask())
    assert has(attention, mask())
    with torch.inference_mode():
        attention.set_mask(None)
        assert has(attention, None)


@pytest.mark.parametrize("given", [0, -1, True, 2.5, "72"])
def test_a_length_that_is_none_is_refused(given):
    with pytest.raises(
        ConfigError, match=r"max_seq_length is .*; allowed: a whole number from 1 up"
    ):
        module(length=given)


@PER_HEAD
def test_a_mask_that_does_not_fit_the_buffer_is_refused_and_sets_nothing(per_head):
    attention = switched(per_head=per_head)
    for wrong in (torch.ones(4, 4, dtype=torch.bool), mask(per_head=not per_head)):
        with pytest.raises(ConfigError, match="the mask has shape"):
            attention.set_mask(wrong)
    assert has(attention, mask(per_head=per_head))


def test_an_input_longer_than_the_buffer_is_refused_in_both_phases():
    longer = [torch.randn(1, HEADS, 80, 8) for _ in range(3)]
    for attention in (module(), switched()):
        with pytest.raises(ConfigError, match="80 tokens; allowed: up to max_seq_length=72"):
            attention(*longer)
        with pytest.raises(ConfigError, match="up to max_seq_length=72"):
            attention.prepare(80, CPU)
    goes_on = module(longer="local")
    goes_on.set_mask(mask())
    goes_on(*[torch.randn(1, HEADS, 100, 8) for _ in range(3)])


@pytest.mark.gpu
@needs_gpu
def test_a_mask_on_a_gpu_is_noticed_when_it_is_copied_loaded_or_moved():
    device = torch.device("cuda", torch.cuda.current_device())
    attention = module().to(device)
    tensors = [x.to(device) for x in drawn()]

    def on_gpu() -> Tensor:
        attention(*tensors)
        return attention.layout(LENGTH, device).to_mask().cpu()

    attention(*tensors)
    attention.packed_mask.copy_(switched(0).packed_mask)
    assert torch.equal(on_gpu(), mask(0))
    attention.load_state_dict(switched(1).state_dict())
    assert torch.equal(on_gpu(), mask(1))
    attention.packed_mask.data.copy_(switched(2).packed_mask)
    attention.refresh()  # what goes past autograd moves no version
    assert torch.equal(on_gpu(), mask(2))
    assert has(attention.cpu(), mask(2))


@pytest.mark.gpu
@needs_gpu
def test_a_pass_waits_for_no_gpu_while_nobody_writes():
    device = torch.device("cuda", torch.cuda.current_device())
    attention, tensors = switched().to(device), [x.to(device) for x in drawn()]
    attention(*tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
