"""A script as users of the old package have it: nothing in it knows of spion_ds.

Prints the loss of a few steps of a long-document classifier with sparse attention.
"""

import deepspeed
import torch
import torch.nn as nn
from deepspeed.ops.sparse_attention import (
    BertSparseSelfAttention,
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparseAttentionUtils,
    SparseSelfAttention,
    SparsityConfig,
    VariableSparsityConfig,
)
from deepspeed.ops.sparse_attention.matmul import MatMul
from deepspeed.ops.sparse_attention.softmax import Softmax
from deepspeed.ops.sparse_attention.sparsity_config import FixedSparsityConfig as Fixed

assert Fixed is FixedSparsityConfig
assert deepspeed.ops.sparse_attention.SparseSelfAttention is SparseSelfAttention

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


class StridedConfig(SparsityConfig):
    """A pattern of the user's own, on the old base class."""

    def __init__(self, num_heads, block=16, different_layout_per_head=False, stride=3):
        super().__init__(num_heads, block, different_layout_per_head)
        self.stride = stride

    def make_layout(self, seq_len):
        layout = self.setup_layout(seq_len)
        num_blocks = layout.shape[1]
        for h in range(0, self.num_layout_heads):
            for row in range(0, num_blocks):
                layout[h, row, row % self.stride :: self.stride] = 1
        return self.check_and_propagate_first_head_layout(layout)


class BertConfig:
    hidden_size = 64
    num_attention_heads = 4
    vocab_size = 100
    pad_token_id = 0


class Layer(nn.Module):
    def __init__(self, config, sparsity_config):
        super().__init__()
        self.attention = BertSparseSelfAttention(config, sparsity_config)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x, mask):
        return self.norm(x + self.attention(x, mask))


class Classifier(nn.Module):
    def __init__(self, config, sparsity_configs):
        super().__init__()
        self.config = config
        self.block = 16
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, s) for s in sparsity_configs)
        self.head = nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids, attention_mask):
        pad_len, input_ids, attention_mask, _, _, _ = SparseAttentionUtils.pad_to_block_size(
            block_size=self.block,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=torch.zeros_like(input_ids),
            position_ids=None,
            inputs_embeds=None,
            pad_token_id=self.config.pad_token_id,
            model_embeddings=self.embeddings,
        )
        extended = attention_mask.unsqueeze(1).unsqueeze(2)
        extended = (1.0 - extended.to(dtype=self.head.weight.dtype)) * -10000.0
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, extended)
        x = SparseAttentionUtils.unpad_sequence_output(pad_len, x)
        return self.head(x[:, 0])


def main():
    heads = BertConfig.num_attention_heads
    model = Classifier(
        BertConfig(),
        [
            DenseSparsityConfig(num_heads=heads),
            FixedSparsityConfig(num_heads=heads, block=16, num_local_blocks=2),
            VariableSparsityConfig(num_heads=heads, num_random_blocks=1, local_window_blocks=[2]),
            BigBirdSparsityConfig(num_heads=heads),
            BSLongformerSparsityConfig(num_heads=heads, global_block_indices=[0, 2]),
            LocalSlidingWindowSparsityConfig(heads, 16, 3, "bidirectional"),
            StridedConfig(num_heads=heads),
        ],
    )
    model.half().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = torch.randint(1, 100, (4, 90), device=device)
    mask = torch.ones_like(ids)
    mask[2, 40:] = 0
    labels = torch.tensor([0, 1, 0, 1], device=device)
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(ids, mask).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.4f}")

    layout = FixedSparsityConfig(num_heads=heads).make_layout(128)
    scores_of = MatMul(layout, 16, "sdd", trans_a=False, trans_b=True)
    context_of = MatMul(layout, 16, "dsd", trans_a=False, trans_b=False)
    q, k, v = (torch.randn(2, heads, 128, 32, device=device).half() for _ in range(3))
    causal = torch.ones(128, 128, device=device).tril().half()
    rpe = torch.randn(2, heads, 128, 128, device=device).half()
    probs = Softmax(layout, 16)(
        scores_of(q, k), scale=32**-0.5, rpe=rpe, attn_mask=causal, attn_mask_mode="mul"
    )
    by_hand = context_of(probs, v)
    attention = SparseSelfAttention(
        FixedSparsityConfig(num_heads=heads), attn_mask_mode="mul", max_seq_length=128
    ).to(device)
    at_once = attention(q, k.transpose(2, 3), v, rpe=rpe, attn_mask=causal)
    print(f"difference {(by_hand - at_once).abs().max().item():.4f}")


if __name__ == "__main__":
    main()
