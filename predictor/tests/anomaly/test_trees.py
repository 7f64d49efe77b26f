"""The isolation forest by itself: what its trees are, and what they call odd."""

import numpy as np
import pytest
from citadel_predictor.anomaly.trees import DEPTH, INNER, Trees, expected


def cloud(size: int = 1000) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 1, (size, 3))


def test_expected_is_the_mean_over_all_ways_to_cut() -> None:
    """c(n) = 1 + the mean of what the two parts take, each weighted by its rows; the closed form is near it."""
    plain = [0.0, 0.0]
    for size in range(2, 300):
        parts = [(left * plain[left] + (size - left) * plain[size - left]) / size for left in range(1, size)]
        plain.append(1 + float(np.mean(parts)))
    closed = expected(np.arange(300))
    assert closed[:3].tolist() == [0, 0, 1]
    assert closed[10:] == pytest.approx(plain[10:], rel=0.05)


def test_the_farther_out_the_odder() -> None:
    rows = cloud()
    found = Trees(rows, 50).score(np.array([[0.0, 0, 0], [2, 2, 2], [9, -9, 9]]))
    assert found[0] < 0.5 < found[1] < found[2] < 1
    every = Trees(rows, 50).score(rows)
    away = np.linalg.norm(rows, axis=1)
    assert np.corrcoef(every, away)[0, 1] > 0.8
    assert np.median(every) == pytest.approx(0.45, abs=0.03)


def test_rows_end_where_the_cuts_have_put_them() -> None:
    """Every tree by itself: cuts lie within the rows, each parts what it gets, and no path is longer than DEPTH."""
    rows = cloud(200)
    trees = Trees(rows, 5)
    for tree in range(5):
        groups = {0: rows}
        for node in range(INNER):
            here = groups.get(node)
            feature = int(trees.feature[tree, node])
            if feature < 0:
                continue
            assert here is not None
            right = here[:, feature] > trees.cut[tree, node]
            assert 0 < right.sum() < len(here)
            groups[2 * node + 1], groups[2 * node + 2] = here[~right], here[right]
            del groups[node]
        assert sum(len(group) for group in groups.values()) == 200
        for node, group in groups.items():
            depth = int(np.log2(node + 1))
            assert depth <= DEPTH
            assert trees.length[tree, node] == pytest.approx(depth + expected(np.array([len(group)]))[0])


def test_the_same_rows_make_the_same_trees() -> None:
    rows = cloud()
    assert (Trees(rows, 10).score(rows[:50]) == Trees(rows, 10).score(rows[:50])).all()
    assert Trees(rows, 10).score(rows[:1])[0] == Trees(rows, 10).score(rows[:50])[0]


@pytest.mark.parametrize("rows", [np.zeros((300, 2)), np.zeros((1, 2)), np.array([[1.0, 1e100], [1.0, -1e100]])])
def test_of_nothing_to_cut_nothing_is_odd(rows: np.ndarray) -> None:
    found = Trees(rows, 10).score(np.vstack([rows[:1], [[5.0, 7.0]]]))
    assert np.isfinite(found).all()
    assert found[0] == found[1] or len(rows) == 2
