"""SPION's section 1 as plain loops over float64 NumPy arrays: no code shared with the package."""

from __future__ import annotations

import numpy as np


def convolve(a: np.ndarray, filter_size: int) -> np.ndarray:
    """S[i,j] = Σ_{f=-h..h} A[i+f, j+f], terms outside A being 0."""
    length = len(a)
    half = filter_size // 2
    s = np.zeros((length, length))
    for i in range(length):
        for j in range(length):
            for f in range(-half, half + 1):
                if 0 <= i + f < length and 0 <= j + f < length:
                    s[i, j] += a[i + f, j + f]
    return s


def pool(a: np.ndarray, block: int, filter_size: int | None) -> np.ndarray:
    """Block means; a block adds up each column from the top, then the columns from the left."""
    a = a.astype(np.float64)
    if filter_size is not None:
        a = convolve(a, filter_size)
    length = len(a)
    n = -(-length // block)
    pooled = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            rows = range(i * block, min(length, (i + 1) * block))
            columns = range(j * block, min(length, (j + 1) * block))
            total = 0.0
            for c in columns:
                column = 0.0
                for r in rows:
                    column += a[r, c]
                total += column
            pooled[i, j] = total / (len(rows) * len(columns))
    return pooled


def flood_fill(pooled: np.ndarray, t: float) -> np.ndarray:
    n = len(pooled)
    padded = np.zeros((n + 1, n + 1))
    padded[:n, :n] = pooled
    marks = np.zeros((n + 1, n + 1), dtype=bool)
    for x0, y0 in [(0, k) for k in range(n)] + [(k, 0) for k in range(n)]:
        x, y = x0, y0
        while x + 1 <= n and y + 1 <= n:
            down, right, diag = padded[x + 1, y], padded[x, y + 1], padded[x + 1, y + 1]
            if down > right and down > diag:
                following = (x + 1, y)
            elif down <= right and right > diag:
                following = (x, y + 1)
            else:
                following = (x + 1, y + 1)
            if padded[following] > t:
                marks[following] = True
            x, y = following
    return marks[:n, :n]


def top_k(pooled: np.ndarray, density: float) -> np.ndarray:
    n = len(pooled)
    k = min(max(int(n * n * density - n), 0), n * n)
    cells = [(i, j) for i in range(n) for j in range(n)]
    cells.sort(key=lambda cell: -pooled[cell])  # stable: ties stay in row-major order
    marks = np.zeros((n, n), dtype=bool)
    for cell in cells[:k]:
        marks[cell] = True
    return marks


def pattern(
    a: np.ndarray, variant: str, block: int, level: float, filter_size: int | None
) -> np.ndarray:
    """The pattern of variant cf, f or c; ``level`` is its alpha or its density."""
    pooled = pool(a, block, None if variant == "f" else filter_size)
    if variant == "c":
        marks = top_k(pooled, level)
    else:
        marks = flood_fill(pooled, float(np.quantile(pooled, level)))
    np.fill_diagonal(marks, True)
    return marks
