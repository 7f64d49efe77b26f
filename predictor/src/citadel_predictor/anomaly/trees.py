"""Isolation forest: how few random cuts set a row apart from the others (Liu, Ting and Zhou, 2008)."""

import math

import numpy as np
from numpy.typing import NDArray

from ..forecast import FloatArray

SAMPLE = 256  # rows that one tree is grown from
DEPTH = 8  # cuts at most, log2 of that: who is not alone by then is not odd
INNER, NODES = 2**DEPTH - 1, 2 ** (DEPTH + 1) - 1  # of a tree: node n has its children at 2n + 1 and 2n + 2
EULER = 0.5772156649015329


def expected(size: NDArray[np.int64]) -> FloatArray:
    """Cuts that it takes on average to set one of so many rows apart."""
    n = np.maximum(size, 2).astype(np.float64)
    return np.where(size > 2, 2 * (np.log(n - 1) + EULER) - 2 * (n - 1) / n, (size == 2).astype(np.float64))


class Trees:
    """Grown all at once, level by level, and the same ones from the same rows each time."""

    def __init__(self, rows: FloatArray, count: int) -> None:
        """``rows`` has shape (n, features)."""
        random = np.random.default_rng(0)
        size = min(SAMPLE, len(rows))
        self.count, self.usual = count, float(expected(np.array([size]))[0]) or 1.0
        self.feature = np.full((count, INNER), -1, dtype=np.int8)
        self.cut = np.zeros((count, INNER))
        self.length = np.zeros((count, NODES), dtype=np.float32)
        picked = random.random((count, len(rows))).argpartition(size - 1, axis=1)[:, :size]
        seen = rows[picked.ravel()]
        tree = np.repeat(np.arange(count), size)
        node = np.zeros(tree.size, dtype=np.int64)
        for depth in range(DEPTH + 1):
            order = np.argsort(tree * NODES + node, kind="stable")
            seen, tree, node = seen[order], tree[order], node[order]
            first = np.flatnonzero(np.diff(tree * NODES + node, prepend=-1))
            sizes = np.diff(first, append=tree.size)
            self.length[tree[first], node[first]] = depth + expected(sizes)
            if depth == DEPTH:
                break
            low, high = np.minimum.reduceat(seen, first), np.maximum.reduceat(seen, first)
            chance = np.where(high > low, random.random(low.shape), -1.0)
            taken = chance.argmax(axis=1)
            each = np.arange(first.size)
            cut = low[each, taken] + random.random(first.size) * (high - low)[each, taken]
            cut = np.minimum(cut, np.nextafter(high[each, taken], -math.inf))  # so that each side has a row
            parted = chance[each, taken] >= 0
            self.feature[tree[first[parted]], node[first[parted]]] = taken[parted]
            self.cut[tree[first[parted]], node[first[parted]]] = cut[parted]
            group = np.repeat(each, sizes)
            right = seen[np.arange(tree.size), taken[group]] > cut[group]
            going = parted[group]
            seen, tree, node = seen[going], tree[going], (2 * node + 1 + right)[going]
            if not tree.size:
                break

    def score(self, rows: FloatArray) -> FloatArray:
        """Of each row, from 0 to 1: the higher, the fewer cuts. Shape (n,)."""
        tree = np.arange(self.count)
        node = np.zeros((len(rows), self.count), dtype=np.int64)
        for _ in range(DEPTH):
            within = np.minimum(node, INNER - 1)
            feature = np.where(node < INNER, self.feature[tree, within], -1)
            right = np.take_along_axis(rows, np.maximum(feature, 0), axis=1) > self.cut[tree, within]
            node = np.where(feature >= 0, 2 * node + 1 + right, node)
        lengths = self.length[tree, node].mean(axis=1, dtype=np.float64)
        return np.asarray(2.0 ** (-lengths / self.usual), dtype=np.float64)
