"""Which samples meet: the partners that are drawn, and those that are given."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdkernels.exchange import draw_pairing

CPU = torch.device("cpu")
seeds = st.integers(0, 2**31)


@st.composite
def both_domains(draw: st.DrawFn) -> list[int]:
    """0 and 1 for each sample, each at least once."""
    base, novel = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return draw(st.permutations([0] * base + [1] * novel))


def draw(exchange: str, batch: int, seed: int = 0, **given):
    generator = torch.Generator().manual_seed(seed)
    options = {"pairing": None, "domains": None, "generator": generator, **given}
    return draw_pairing(exchange, batch, CPU, **options)


@given(both_domains(), seeds)
def test_pairs_join_every_sample_of_the_larger_side_to_the_other_side_evenly(domains, seed):
    pairs = draw("pooled", len(domains), seed, domains=torch.tensor(domains))
    used = [pair for pair in pairs.tolist() if min(pair) >= 0]
    base = [n for n, domain in enumerate(domains) if domain == 0]
    novel = [n for n, domain in enumerate(domains) if domain == 1]
    assert len(used) == max(len(base), len(novel))
    for side, samples in ((0, base), (1, novel)):
        times = Counter(pair[side] for pair in used)
        assert set(times) == set(samples)
        assert max(times.values()) - min(times.values()) <= 1
    # Unused rows are unused as a whole.
    assert all(pair == [-1, -1] for pair in pairs.tolist() if min(pair) < 0)


@given(st.integers(2, 12), seeds)
def test_a_shuffle_is_a_permutation(batch, seed):
    assert sorted(draw("shuffle", batch, seed).tolist()) == list(range(batch))


@given(both_domains(), seeds)
def test_a_generator_repeats_its_pairs(domains, seed):
    for exchange in ("shuffle", "pooled"):
        given_domains = torch.tensor(domains) if exchange == "pooled" else None
        first, second = (draw(exchange, len(domains), seed, domains=given_domains) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("exchange", ["shuffle", "pooled"])
def test_other_seeds_give_other_partners(exchange):
    domains = torch.tensor([0, 1] * 4)
    drawn = {tuple(draw(exchange, 8, seed, domains=domains).flatten().tolist()) for seed in range(10)}
    assert len(drawn) > 5


def test_both_sides_are_shuffled():
    # Two samples a side, one matching of the two: each must come up.
    matchings = {
        frozenset((i, j) for i, j in draw("pooled", 4, seed, domains=[0, 0, 1, 1]).tolist() if i >= 0)
        for seed in range(20)
    }
    assert matchings == {frozenset({(0, 2), (1, 3)}), frozenset({(0, 3), (1, 2)})}


def test_without_a_generator_torchs_own_seed_decides():
    torch.manual_seed(5)
    first = draw("shuffle", 9, generator=None)
    torch.manual_seed(5)
    assert torch.equal(first, draw("shuffle", 9, generator=None))


def test_every_permutation_is_equally_likely():
    torch.manual_seed(0)
    times = Counter(tuple(draw("shuffle", 3, generator=None).tolist()) for _ in range(1200))
    assert len(times) == 6
    assert all(150 <= count <= 250 for count in times.values())  # 200 each, four standard deviations


def test_no_exchange_has_no_partners():
    assert draw("none", 1) is None


def test_given_partners_are_taken_as_they_are():
    assert draw("shuffle", 3, pairing=[2, 2, 0]).tolist() == [2, 2, 0]
    assert draw("pooled", 3, pairing=torch.tensor([[0, 2]], dtype=torch.int32)).tolist() == [[0, 2]]


@pytest.mark.parametrize("domains", [[True, False, True], torch.tensor([1, 0, 1], dtype=torch.uint8)])
def test_domains_may_be_bools_or_bytes(domains):
    pairs = draw("pooled", 3, domains=domains).tolist()
    assert sorted(pair for pair in pairs if pair[0] >= 0) == [[1, 0], [1, 2]]
