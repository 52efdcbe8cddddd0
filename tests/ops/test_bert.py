"""Hugging Face's BERT and RoBERTa with their attention replaced by SparseAttentionUtils."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spion_ds.errors import ConfigError
from spion_ds.ops.sparse_attention import (
    BertSparseSelfAttention,
    BigBirdSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    SparseAttentionUtils,
)
from tests.training.launching import ROOT, command, launch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tests.ops.train_bert import HEADS, LENGTH, SPARSITY, padded_batch, tiny_config  # noqa: E402

# Two ways of adding up the same float32 numbers, through two layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def bert(kind="BertModel", **changes):
    torch.manual_seed(0)
    return getattr(transformers, kind)(tiny_config(**changes)).eval()


def replaced(model, sparsity):
    return SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(
        model, LENGTH, sparsity
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_dense_layout_gives_the_dense_models_outputs(implementation, padded, device):
    model = bert(attn_implementation=implementation).to(device)
    batch = padded_batch(device)
    mask = batch["attention_mask"] if padded else None
    wanted = model(batch["input_ids"], attention_mask=mask).last_hidden_state
    replaced(model, DenseSparsityConfig(HEADS))
    for layer in model.encoder.layer:
        assert isinstance(layer.attention.self, BertSparseSelfAttention)
    out = model(batch["input_ids"], attention_mask=mask).last_hidden_state
    torch.testing.assert_close(out, wanted, **CLOSE)


def test_padding_does_not_reach_real_tokens(device):
    model = replaced(bert(), BigBirdSparsityConfig(HEADS)).to(device)
    batch = padded_batch(device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    other = torch.where(mask.bool(), ids, 7)
    a, b = (model(x, attention_mask=mask).last_hidden_state for x in (ids, other))
    assert torch.equal(a[mask.bool()], b[mask.bool()])


def test_weights_and_their_names_are_kept():
    model = bert("BertForMaskedLM")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    replaced(model, None)  # takes FixedSparsityConfig for the model's heads
    first = model.bert.encoder.layer[0].attention.self.sparse_self_attention
    assert isinstance(first.sparsity_config, FixedSparsityConfig)
    assert first.sparsity_config.num_heads == HEADS
    after = {n: x for n, x in model.state_dict().items() if "master_layout" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_no_mask_of_length_by_length_is_made():
    model = replaced(bert(), BigBirdSparsityConfig(HEADS))
    attention = model.encoder.layer[0].attention.self.sparse_self_attention
    seen = []
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["key_padding_mask"]), with_kwargs=True
    )
    mask = padded_batch(torch.device("cpu"))["attention_mask"]
    model(torch.ones_like(mask), attention_mask=mask)
    assert seen[0].untyped_storage().nbytes() <= 8 * mask.numel()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layers_can_be_replaced_one_by_one(implementation, device):
    model = bert(attn_implementation=implementation).to(device)
    batch = padded_batch(device)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    wanted = model(**inputs).last_hidden_state
    layers = model.encoder.layer[:1]
    same = SparseAttentionUtils.replace_self_attention_layer_with_sparse_self_attention_layer(
        model.config, layers, DenseSparsityConfig(HEADS)
    )
    assert same is layers
    assert isinstance(model.encoder.layer[0].attention.self, BertSparseSelfAttention)
    assert not isinstance(model.encoder.layer[1].attention.self, BertSparseSelfAttention)
    torch.testing.assert_close(model(**inputs).last_hidden_state, wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_model_takes_longer_inputs_after_its_positions_are_extended(kind, device):
    torch.manual_seed(0)
    if kind == "bert":
        model, reserved = bert("BertForMaskedLM"), 0
    else:
        config = transformers.RobertaConfig(
            **{
                **tiny_config().to_diff_dict(),
                "model_type": "roberta",
                "max_position_embeddings": LENGTH + 2,
            }
        )
        model, reserved = transformers.RobertaForMaskedLM(config).eval(), 2
    inner = getattr(model, kind)
    old = inner.embeddings.position_embeddings.weight.detach().clone()
    longer = 2 * LENGTH + 20  # no multiple of what there was
    SparseAttentionUtils.extend_position_embedding(model, longer)
    SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(
        model, longer, BigBirdSparsityConfig(HEADS)
    )
    new = inner.embeddings.position_embeddings.weight
    assert new.shape[0] == longer + reserved == model.config.max_position_embeddings
    assert torch.equal(new[reserved:][LENGTH : 2 * LENGTH], old[reserved:])
    assert torch.equal(new[reserved:][2 * LENGTH :], old[reserved:][:20])
    model.to(device)
    ids = torch.randint(3, 50, (2, longer), device=device)
    assert model(ids).logits.shape[:2] == (2, longer)
    with pytest.raises(ConfigError, match=f"max_position is {longer}; allowed: more than"):
        SparseAttentionUtils.extend_position_embedding(model, longer)


def test_what_cannot_be_replaced_is_named():
    with pytest.raises(ConfigError, match=r"decoder .is_decoder is True"):
        replaced(bert(is_decoder=True), None)
    with pytest.raises(ConfigError, match=f"for 2 heads and the model has {HEADS}"):
        replaced(bert(), DenseSparsityConfig(2))
    with pytest.raises(ConfigError, match="Linear is neither BERT nor RoBERTa"):
        replaced(torch.nn.Linear(2, 2), None)
    model = bert()
    SparseAttentionUtils.replace_self_attention_layer_with_sparse_self_attention_layer(
        model.config, model.encoder.layer
    )
    causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with pytest.raises(ConfigError, match="differs between queries"):
        model(torch.ones(1, LENGTH, dtype=torch.int64), attention_mask=causal)


@pytest.mark.ranks
def test_bert_trains_under_zero_2_with_padding_on_two_ranks(tmp_path: Path) -> None:
    result = tmp_path / "losses.json"
    script = str(ROOT / "tests" / "ops" / "train_bert.py")
    launch([*command("torchrun", 2), script, str(result)], tmp_path)
    losses = json.loads(result.read_text())
    assert losses.keys() == SPARSITY.keys()
    # The same sums in another order, about 1e-7 a step, amplified by eight steps of AdamW.
    assert losses["dense"] == pytest.approx(losses["original"], rel=1e-3)
    assert losses["bigbird"] != losses["dense"]
    assert losses["bigbird"][-1] < losses["bigbird"][0] / 2
