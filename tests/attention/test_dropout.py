"""Counter-based dropout: the hash, its statistics, and the same decisions everywhere."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from spion_ds.attention import BlockLayout, block_sparse_attention
from spion_ds.attention.dropout import dropout
from spion_ds.random_bits import combine, keep_mask, keep_threshold, mix, sample_keys

from .cases import BACKENDS, DTYPES, needs_gpu, needs_triton

WORD = 2**32
EDGES = [0, 1, 2, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF]
P = 0.3


def hashed(x: int) -> int:
    """The documented hash, on unsigned 32-bit words in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % WORD
    x ^= x >> 15
    x = x * 0x846CA68B % WORD
    return x ^ (x >> 16)


def combined(key: int, *counters: int) -> int:
    for counter in counters:
        key = hashed((key + (counter + 1) * 0x9E3779B9) % WORD)
    return key


def kept(key: int, row: int, column: int, p: float) -> bool:
    """Whether element ``column`` of row ``row`` stays, by the documented bits."""
    row_key = combined(key, row)
    word = (column + 1) * 0x9E3779B9 % WORD
    word = (word ^ (word >> 16)) * 0x7FEB352D % WORD
    bits = (row_key ^ word) * (row_key * 0x846CA68B | 1) % WORD
    return (bits ^ 2**31) >= min(round(p * WORD), WORD - 1)  # in the order of signed words


def signed(words: list[int]) -> Tensor:
    return torch.tensor([(word + 2**31) % WORD - 2**31 for word in words], dtype=torch.int32)


def unsigned(x: Tensor) -> list[int]:
    return [word % WORD for word in x.flatten().tolist()]


def drawn_words(count: int) -> list[int]:
    return EDGES + random.Random(0).choices(range(WORD), k=count)


def test_mix_is_the_documented_hash(device):
    words = drawn_words(500)
    assert unsigned(mix(signed(words).to(device))) == [hashed(word) for word in words]


@pytest.mark.parametrize("counter", [0, 1, -1, 2**31 - 1, 2**31, WORD - 1, WORD, 123456789])
def test_combine_takes_whole_numbers_and_tensors_modulo_2_to_the_32(counter, device):
    words = drawn_words(100)
    expected = [combined(word, counter) for word in words]
    keys = signed(words).to(device)
    before = keys.clone()
    assert unsigned(combine(keys, counter)) == expected
    assert unsigned(combine(keys, torch.tensor(counter, device=device))) == expected
    assert torch.equal(keys, before)


def test_combine_broadcasts_keys_against_counters():
    keys, counters = signed([3, 2**31 + 5]), torch.arange(3)
    found = combine(keys[:, None], counters)
    assert unsigned(found) == [combined(key, c) for key in (3, 2**31 + 5) for c in range(3)]


def test_sample_keys_are_a_hash_of_seed_step_sample_and_place(device):
    for seed, step in ((0, 0), (42, 7), (2**31 + 1, 10**6)):
        samples = torch.tensor([0, 5, 255, 100_000], device=device)
        keys = sample_keys(seed, step, samples, places=3)
        assert keys.shape == (3, 4)
        assert keys.dtype == torch.int32
        assert unsigned(keys) == [
            combined(0, seed, step, sample, place)
            for place in range(3)
            for sample in samples.tolist()
        ]


def test_sample_keys_do_not_depend_on_the_micro_batch():
    whole = sample_keys(1, 2, torch.arange(12), places=5)
    for part in (slice(0, 4), slice(4, 5), slice(5, 12)):
        assert torch.equal(sample_keys(1, 2, torch.arange(12)[part], places=5), whole[:, part])


def test_no_two_samples_steps_places_or_seeds_share_a_key():
    keys = [
        key
        for seed, step in itertools.product(range(3), range(20))
        for key in unsigned(sample_keys(seed, step, torch.arange(30), places=5))
    ]
    # 9000 fair draws of 32 bits would collide with a chance of 1 %; these are fixed, and do not.
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.9, 1 - 1e-12])
def test_keep_mask_is_the_documented_formula(p):
    row_keys, columns = combine(signed([7, 99]), 0)[:, None], [*range(50), 2**31 - 1]
    expected = [[kept(key, 0, column, p) for column in columns] for key in (7, 99)]
    assert keep_mask(row_keys, torch.tensor(columns), p).tolist() == expected


def test_thresholds_are_int32_and_give_p_to_2_to_the_minus_32():
    for p in (0.0, 1e-12, 2**-32, 0.001, 0.1, 0.5, 0.9, 1 - 2**-32, 1 - 1e-12):
        threshold = keep_threshold(p)
        assert -(2**31) <= threshold < 2**31
        # As many of the 2^32 words are below the threshold as are dropped.
        assert abs((threshold + 2**31) / WORD - p) <= 2**-32


@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 5), (3, 2, 4, 6), (1, 1)])
def test_dropout_decides_by_sample_row_and_column(shape, device):
    words = [12345, WORD - 2, 77][: shape[0]]
    y = dropout(torch.ones(shape, device=device), P, signed(words).to(device))
    rows = math.prod(shape[1:-1])
    expected = [
        kept(word, row, column, P)
        for word in words
        for row in range(rows)
        for column in range(shape[-1])
    ]
    assert (y != 0).flatten().tolist() == expected


def test_kept_elements_are_scaled_and_dropped_ones_are_zero(device):
    x = torch.randn(3, 40, 16, device=device)
    y = dropout(x, 0.25, signed([1, 2, 3]).to(device))
    kept_ones = y != 0.0
    assert not kept_ones.all()
    # One rounded product.
    torch.testing.assert_close(y[kept_ones], x[kept_ones] * 4 / 3, rtol=1e-6, atol=0.0)
    assert dropout(x, 0.0, signed([1, 2, 3]).to(device)) is x


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_keep_rates_are_binomial(p, device):
    samples, rows, columns = 8, 256, 512
    keys = sample_keys(3, 1, torch.arange(samples, device=device), places=1)[0]
    keep = dropout(torch.ones(samples, rows, columns, device=device), p, keys) != 0.0
    # 5 standard deviations: fair draws pass one mean with all but 6e-7, and the about 800
    # marginal means of one p with all but 5e-4. The draws are fixed, so it does not flicker.
    for dims in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        means = keep.double().mean(dim=dims)
        count = keep.numel() / max(means.numel(), 1)
        bound = 5 * math.sqrt(p * (1 - p) / count)
        assert (means - (1 - p)).abs().max() < bound, dims


def test_neighbours_are_uncorrelated(device):
    keys = sample_keys(0, 0, torch.arange(8, device=device), places=2)
    ones = torch.ones(8, 256, 512, device=device)
    first, second = (((dropout(ones, 0.5, key) != 0.0).double() - 0.5) * 2 for key in keys)
    pairs = {
        "columns": (first[..., 1:], first[..., :-1]),
        "rows": (first[:, 1:], first[:, :-1]),
        "samples": (first[1:], first[:-1]),
        "places": (first, second),
    }
    for name, (a, b) in pairs.items():
        # The mean of n products of fair ±1 has a standard deviation of 1/sqrt(n); 5 of them.
        assert (a * b).mean().abs() < 5 / math.sqrt(a.numel()), name


def coins(columns: range = range(512)) -> Tensor:
    """Return fair ±1 decisions (4096 rows, columns): consecutive rows of heads, samples, steps."""
    samples, heads, rows = torch.arange(2), torch.arange(2), torch.arange(512)
    keys = torch.stack([sample_keys(0, step, samples, places=1)[0] for step in range(2)])
    row_keys = combine(combine(keys[..., None], heads)[..., None], rows).flatten()
    keep = keep_mask(row_keys[:, None], torch.tensor(columns), 0.5)
    return keep.float() * 2 - 1


def lag_sums(x: Tensor, y: Tensor) -> Tensor:
    """Return sum over c of x[r, c] · y[r, c + lag], divided by its standard deviation for coins.

    (rows, lags): all lags from 2 that leave 32 columns.
    """
    columns = x.shape[1]
    # Padded to twice the length, the circular correlation is the plain one.
    x_f, y_f = (torch.fft.rfft(z, n=2 * columns) for z in (x, y))
    lags = torch.arange(2, columns - 32)
    return torch.fft.irfft(x_f.conj() * y_f)[:, lags] / (columns - lags).sqrt()


@pytest.mark.parametrize("first_column", [0, 60_000])
def test_decisions_at_every_distance_are_as_independent_as_coins(first_column):
    y = coins(range(first_column, first_column + 512))
    neighbours = y[:, :-1] * y[:, 1:]
    pairs = {
        "in a row": lag_sums(y, y),
        "in the next row": lag_sums(y[:-1], y[1:]),
        "in the next head": lag_sums(y[:-512], y[512:]),
        "in the next sample": lag_sums(y[:-1024], y[1024:]),
        "in the next step": lag_sums(y[:-2048], y[2048:]),
        "three, two of them neighbours": lag_sums(neighbours, y[:, :-1]),
        "two pairs of neighbours": lag_sums(neighbours, neighbours),
        "two by two": lag_sums(y[:-1] * y[1:], y[:-1] * y[1:]),
    }
    for name, sums in pairs.items():
        rows = len(sums)
        # A mean over rows is normal, of variance 1 / rows. Coins go past 5.5 standard deviations
        # at one of the 8 · 478 lags with a chance of 1.5e-4; these are fixed, and do not.
        assert (sums.mean(dim=0) * math.sqrt(rows)).abs().max() < 5.5, name
        # Nor may a row lean one way and another row the other: the squares have mean 1, variance
        # 2. A few standard deviations more for their heavier tail.
        spread = ((sums**2).mean(dim=0) - 1) * math.sqrt(rows / 2)
        assert spread.abs().max() < 6.5, name


def test_no_two_columns_agree_over_the_rows():
    y = coins()
    agreement = (y.T @ y).triu(1) / math.sqrt(len(y))
    # Normal for coins, of which one of 131 000 pairs goes past 6 with a chance of 3e-4.
    assert agreement.abs().max() < 6


@pytest.mark.parametrize("p", [0.001, 0.999])
def test_rare_decisions_have_their_rate(p):
    keys = combine(torch.tensor([7], dtype=torch.int32), torch.arange(4096))
    rate = keep_mask(keys[:, None], torch.arange(1024), p).double().mean()
    # 5 standard deviations of 4 million draws: 4 parts in 10^5, of 1 in 10^3.
    assert abs(rate - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 2**22)


def test_all_patterns_of_eight_neighbours_are_equally_frequent():
    patterns = (coins() > 0).unflatten(1, (-1, 8)).long() @ (2 ** torch.arange(8))
    counts = patterns.flatten().bincount(minlength=256).double()
    mean = counts.sum() / 256
    # Chi-square with 255 degrees of freedom: mean 255, standard deviation 22.6; 5 of them.
    assert ((counts - mean) ** 2 / mean).sum() < 255 + 5 * 22.6


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_does_not_depend_on_how_the_batch_is_split(dtype, device):
    x = torch.randn(6, 10, 33, dtype=dtype, device=device)
    keys = sample_keys(0, 0, torch.arange(6, device=device), places=1)[0]
    whole = dropout(x, P, keys)
    parts = [dropout(x[part], P, keys[part]) for part in (slice(0, 1), slice(1, 6))]
    assert torch.equal(torch.cat(parts), whole)


def test_the_gradient_is_dropped_and_scaled_alike(device):
    keys = signed([4, 5]).to(device)
    x = torch.randn(2, 9, 21, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    dropout(x, P, keys).backward(grad)
    assert torch.equal(x.grad, dropout(grad, P, keys))


def test_no_generator_is_touched(device):
    state = torch.get_rng_state()
    dropout(torch.ones(2, 3, device=device), P, sample_keys(0, 0, torch.arange(2), 1)[0].to(device))
    assert torch.equal(torch.get_rng_state(), state)


@needs_triton
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        # The interpreter cuts float32 to bfloat16 instead of rounding it.
        pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu]),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), (2, 40, 37), (2, 3, 16, 32)])
def test_the_kernels_bits_are_pytorchs(shape, dtype, device):
    from spion_ds.attention.triton.dropout import dropout_triton

    keys = signed([5, WORD - 6, 7][: shape[0]])
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    results = []
    for apply, place in ((dropout, torch.device("cpu")), (dropout_triton, device)):
        at_place = x.detach().to(place, copy=True).requires_grad_()
        y = apply(at_place, P, keys.to(place))
        y.backward(grad.to(place))
        results.append((y.detach().cpu(), at_place.grad.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@needs_triton
def test_the_kernel_takes_strided_inputs(device):
    from spion_ds.attention.triton.dropout import dropout_triton

    x, keys = torch.randn(2, 7, 5, device=device), signed([1, 2]).to(device)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(dropout_triton(strided, P, keys), dropout_triton(x, P, keys))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_attention_drops_by_sample_head_query_and_key(backend, device):
    # Equal scores and one-hot values: output (i, j) is 0 exactly where probability (i, j) is.
    heads, length, words = 2, 36, [123, WORD - 9]
    q = torch.zeros(2, heads, length, length, device=device)
    values = torch.eye(length, device=device).expand_as(q)
    mask = torch.eye(3, dtype=torch.bool)
    mask[2, 0] = True
    out = block_sparse_attention(
        q,
        q,
        values,
        BlockLayout.from_mask(mask, 16).to(device),
        dropout_p=P,
        dropout_key=signed(words).to(device),
        backend=backend,
    )
    expected = [
        mask[i // 16, j // 16].item() and kept(combined(word, h), i, j, P)
        for word in words
        for h in range(heads)
        for i in range(length)
        for j in range(length)
    ]
    assert (out != 0.0).flatten().tolist() == expected
    # Every key counts 1 in a denominator of 36, a pruned one too; 1e-6: a few roundings.
    nonzero = out[out != 0.0]
    torch.testing.assert_close(
        nonzero, torch.full_like(nonzero, 1 / 36 / (1 - P)), rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("p", "drops"), [(1e-12, False), (1 - 1e-12, True)])
def test_attention_takes_the_smallest_and_largest_probabilities(p, drops, backend, device):
    ones = torch.ones(1, 1, 16, 16, device=device)
    layout = BlockLayout.from_mask(torch.ones(1, 1), 16).to(device)
    key = signed([5]).to(device)
    options = {"dropout_p": p, "dropout_key": key, "backend": backend}
    out = block_sparse_attention(ones, ones, ones, layout, **options)
    # 16 equal probabilities, exact in binary, times 1 / (1 - p), which rounds to 1.
    assert torch.equal(out, torch.zeros_like(ones) if drops else ones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_dropout_does_not_depend_on_how_the_batch_is_split(backend, device):
    q, k, v = (torch.randn(3, 2, 36, 16, device=device) for _ in range(3))
    layout = BlockLayout.from_mask(torch.ones(3, 3).tril(), 16).to(device)
    keys = sample_keys(0, 0, torch.arange(3, device=device), places=1)[0]

    def attend(part: slice) -> Tensor:
        return block_sparse_attention(
            q[part], k[part], v[part], layout, dropout_p=P, dropout_key=keys[part], backend=backend
        )

    parts = torch.cat([attend(slice(0, 1)), attend(slice(1, 3))])
    # Another drop would move whole values; a batched product may round in another order.
    torch.testing.assert_close(parts, attend(slice(0, 3)), rtol=1e-5, atol=1e-6)
