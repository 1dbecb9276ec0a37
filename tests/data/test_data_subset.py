from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from maehpc.data import epoch_order, subset
from maehpc.data.subset import stratified_order

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(lambda values: np.array(values, dtype=np.int64))


@given(labels=LABELS, count=st.integers(1, 100), seed=st.integers(0, 2**40))
def test_subsets_are_as_balanced_as_the_classes_allow(labels, count, seed):
    chosen = subset(labels, count, seed)
    assert chosen.dtype == torch.int64
    assert len(chosen) == min(count, len(labels))
    assert torch.equal(chosen, torch.unique(chosen)), "rising and each once"
    assert chosen.min() >= 0 and chosen.max() < len(labels)
    available = np.bincount(labels)
    taken = np.bincount(labels[chosen.numpy()], minlength=len(available))
    for label in range(len(available)):
        # Nobody has less than another, but by 1, unless it gave all it has.
        assert taken[label] >= min(available[label], taken.max() - 1)


@given(labels=LABELS, seed=st.integers(0, 1000))
def test_smaller_subsets_lie_inside_larger_ones(labels, seed):
    sets = [set(subset(labels, count, seed).tolist()) for count in range(1, len(labels) + 1)]
    assert all(small < large for small, large in itertools.pairwise(sets))


def test_the_seed_decides():
    labels = np.arange(1000) % 7
    first = subset(labels, 100, 0)
    assert torch.equal(first, subset(torch.from_numpy(labels), 100, 0)), "arrays and tensors alike"
    assert not torch.equal(first, subset(labels, 100, 1))
    assert first.max() > 800, "not simply the first"
    remainders = {tuple(np.bincount(labels[subset(labels, 9, seed).numpy()])) for seed in range(20)}
    assert len(remainders) > 5, "the remainder goes to classes by lot"


def test_multi_label_subsets_are_uniform():
    labels = np.zeros((50, 3), dtype=np.int64)
    hits = np.zeros(50)
    for seed in range(2000):
        hits[subset(labels, 10, seed).numpy()] += 1
    assert np.abs(hits / 2000 - 0.2).max() < 0.04  # 4.5 standard errors
    assert torch.equal(subset(labels, 80, 0), torch.arange(50))


@given(labels=LABELS, seed=st.integers(0, 1000))
def test_every_beginning_of_a_stratified_order_is_proportional(labels, seed):
    order = stratified_order(labels, seed, "test")
    assert sorted(order) == list(range(len(labels)))
    classes, sizes = np.unique(labels, return_counts=True)
    for length in range(len(labels) + 1):
        head = labels[order[:length]]
        for label, size in zip(classes, sizes, strict=True):
            expected = length * size / len(labels)
            assert abs((head == label).sum() - expected) <= 1 + len(classes) / 2 * size / len(labels)


def test_epoch_orders():
    state = torch.get_rng_state()
    orders = [epoch_order(100, 0, epoch) for epoch in range(5)]
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 5
    assert torch.equal(orders[3], epoch_order(100, 0, 3))
    assert not torch.equal(orders[3], epoch_order(100, 1, 3))
    assert torch.equal(state, torch.get_rng_state())
