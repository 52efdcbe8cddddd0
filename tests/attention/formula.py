"""The sparse softmax and its gradients as loops over rows, in NumPy: no code of the package.

O_i = Σ_kept P_ij V_j with P_ij = exp(s_ij - m) / (Σ_kept exp(s_ik - m) + pruned_i · exp(0 - m)),
pruned_i the number of valid keys that row i does not keep (0 for pruned="excluded"), and
dS = P ∘ (dP - Σ_kept P ∘ dP).
"""

from __future__ import annotations

import numpy as np


def attention_by_formula(
    q: np.ndarray,  # (B, H, L, D)
    k: np.ndarray,  # (B, H, M, D)
    v: np.ndarray,
    grad: np.ndarray,
    mask: np.ndarray,  # (n, m) bool, kept blocks
    block: int,
    real: np.ndarray,  # (B, M) bool
    causal: bool,
    pruned: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Output and gradients of q, k and v."""
    out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    scale = 1.0 / np.sqrt(q.shape[-1])
    for b, h, i in np.ndindex(*q.shape[:3]):
        valid = [j for j in range(k.shape[2]) if real[b, j] and (j <= i or not causal)]
        kept = [j for j in valid if mask[i // block, j // block]]
        if not kept:
            continue
        absent = len(valid) - len(kept) if pruned == "zero" else 0
        scores = scale * k[b, h, kept] @ q[b, h, i]
        m = max([*scores, 0.0]) if absent else max(scores)
        denominator = np.exp(scores - m).sum() + absent * np.exp(0.0 - m)
        probs = np.exp(scores - m) / denominator
        out[b, h, i] = probs @ v[b, h, kept]
        dprobs = v[b, h, kept] @ grad[b, h, i]
        dscores = probs * (dprobs - (probs * dprobs).sum())
        dq[b, h, i] = scale * dscores @ k[b, h, kept]
        dk[b, h, kept] += scale * np.outer(dscores, q[b, h, i])
        dv[b, h, kept] += np.outer(probs, grad[b, h, i])
    return out, dq, dk, dv
