"""Buckets, padding and samplers: what goes where, the waste, and the same order in every process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import steploop as sl
from steploop.seq2seq.buckets import bucket_by_length, lengths_of, pad_to_longest
from steploop.seq2seq.samplers import BucketBatchSampler, LengthBatchSampler


class Pairs(torch.utils.data.Dataset):
    """(source, target), whose first entry is the example's number."""

    def __init__(self, count, longest=12):
        self.sizes = np.random.default_rng(0).integers(1, longest, (count, 2)).tolist()

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, k):
        source, target = self.sizes[k]
        return torch.full((source,), k), torch.full((target,), k)


def test_each_example_is_in_the_first_bucket_that_holds_it():
    dataset = [([1] * s, [2] * t) for s, t in ((2, 3), (3, 3), (2, 4), (9, 1), (5, 6), (0, 0))]
    buckets = bucket_by_length(dataset, [(2, 3), (5, 6)])
    assert buckets.indices == [[0, 5], [1, 2, 4]] and buckets.left_out == [3]
    assert buckets.waste_by_bucket == pytest.approx([1 - 5 / 10, 1 - 23 / 33])
    assert buckets.waste == pytest.approx(1 - 28 / 43)
    assert bucket_by_length([], [3]).waste == 0.0
    single = bucket_by_length([[1, 2], [3]], [1, 2])
    assert single.indices == [[1], [0]] and single.waste == 0.0


def test_batches_are_padded_to_their_bucket():
    dataset = [(torch.ones(2, 3), [7]), (torch.ones(1, 3), [7, 8])]
    buckets = bucket_by_length(dataset, [(4, 3)], pad=-1)
    source, target = buckets.collate(dataset)
    assert source.values.shape == (4, 2, 3) and target.values.tolist() == [[7, 7], [-1, 8], [-1, -1]]
    assert source.lengths.tolist() == [2, 1] and target.waste == pytest.approx(0.5)
    with pytest.raises(sl.InputError, match="too long for every bucket"):
        buckets.collate([(torch.ones(9, 3), [1])])


def test_to_the_longest():
    padded = pad_to_longest([[1, 2, 3], [], np.array([4])], pad=9)
    assert padded.values.tolist() == [[1, 9, 4], [2, 9, 9], [3, 9, 9]]
    assert padded.lengths.tolist() == [3, 0, 1] and padded.waste == pytest.approx(5 / 9)
    pair = pad_to_longest([(torch.ones(2), torch.ones(1)), (torch.ones(1), torch.ones(3))])
    assert [p.values.shape for p in pair] == [(2, 2), (3, 2)]
    assert pad_to_longest([[]]).waste == 0.0


SAMPLERS = {
    "lengths": lambda data, **options: LengthBatchSampler(lengths_of(data), 4, pool=3, **options),
    "buckets": lambda data, **options: bucket_by_length(data, [(6, 6), (12, 12)]).sampler(4, **options),
}


@pytest.mark.parametrize("kind", SAMPLERS)
class TestSamplers:
    def test_every_example_once_and_another_order_in_every_epoch(self, kind):
        data = Pairs(50)
        sampler = SAMPLERS[kind](data, seed=3)
        orders = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(sampler) == len(batches)
            assert sorted(k for batch in batches for k in batch) == list(range(50))
            assert all(len(batch) <= 4 for batch in batches)
            assert list(sampler) == batches
            orders.append(batches)
        assert orders[0] != orders[1] != orders[2]
        again = SAMPLERS[kind](data, seed=3)
        again.set_epoch(1)
        assert list(again) == orders[1]
        assert list(SAMPLERS[kind](data, seed=4)) != orders[0]

    def test_global_random_numbers_play_no_part(self, kind):
        data = Pairs(50)
        torch.manual_seed(1)
        one = list(SAMPLERS[kind](data))
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert list(SAMPLERS[kind](data)) == one and torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("replicas", [2, 3, 40])
    @pytest.mark.parametrize("drop_last", [False, True])
    def test_processes_share_the_batches(self, kind, replicas, drop_last):
        data = Pairs(50)
        options = {"drop_last": drop_last, "replicas": replicas}
        parts = [list(SAMPLERS[kind](data, rank=rank, **options)) for rank in range(replicas)]
        assert len({len(part) for part in parts}) == 1
        seen = [k for part in parts for batch in part for k in batch]
        if drop_last:
            assert len(set(seen)) == len(seen) and all(len(b) == 4 for part in parts for b in part)
        else:
            assert set(seen) == set(range(50))

    def test_in_a_loader_with_workers(self, kind):
        data = Pairs(50)
        sampler = SAMPLERS[kind](data, seed=5)
        orders = []
        for workers in (0, 2):
            loader = DataLoader(data, batch_sampler=sampler, collate_fn=pad_to_longest, num_workers=workers)
            assert len(loader) == len(sampler)
            orders.append([source.values[0].tolist() for source, _ in loader])
        assert orders[0] == orders[1] == list(sampler)

    def test_unshuffled(self, kind):
        data = Pairs(20)
        one, two = (SAMPLERS[kind](data, shuffle=False, seed=k) for k in range(2))
        assert list(one) == list(two)

    def test_errors(self, kind):
        data = Pairs(20)
        with pytest.raises(sl.InputError, match="rank is none of the replicas"):
            SAMPLERS[kind](data, rank=2, replicas=2)


def test_batches_of_a_bucket_are_padded_to_it():
    data = Pairs(50)
    buckets = bucket_by_length(data, [(6, 6), (12, 12)])
    for source, target in DataLoader(data, batch_sampler=buckets.sampler(8), collate_fn=buckets.collate):
        assert source.values.shape[0] == target.values.shape[0] and source.values.shape[0] in (6, 12)


def test_sorting_saves_padding_and_the_waste_is_that_of_the_batches():
    data = Pairs(400, 60)
    lengths = lengths_of(data)
    for known, share in ((lengths[:, 0], 0.2), (lengths, 0.5)):
        sorted_, random = (LengthBatchSampler(known, 8, pool=pool) for pool in (50, 1))
        assert sorted_.waste < share * random.waste
    filled = total = 0
    for batch in sorted_:
        for padded in pad_to_longest([data[k] for k in batch]):
            filled += int(padded.lengths.sum())
            total += padded.values.numel()
    assert sorted_.waste == pytest.approx(1 - filled / total)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 30), max_size=60),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_any_lengths(lengths, size, pool, replicas, drop_last, seed):
    options = {"pool": pool, "replicas": replicas, "drop_last": drop_last, "seed": seed}
    parts = [LengthBatchSampler(lengths, size, rank=rank, **options) for rank in range(replicas)]
    batches = [batch for part in parts for batch in part]
    seen = [k for batch in batches for k in batch]
    assert len({len(part) for part in parts}) == 1 and set(seen) <= set(range(len(lengths)))
    if not drop_last:
        assert set(seen) == set(range(len(lengths)))
    assert all(0 <= part.waste <= 1 for part in parts)


def test_errors():
    with pytest.raises(sl.InputError, match="from the smallest to the largest"):
        bucket_by_length([[1]], [3, 2])
    with pytest.raises(sl.InputError, match="sizes of these examples"):
        bucket_by_length([([1], [2])], [3])
    with pytest.raises(sl.InputError, match="sizes of these examples"):
        bucket_by_length([[1]], [])
    with pytest.raises(sl.InputError, match="same number of sequences"):
        lengths_of([[1], ([1], [2])])
    with pytest.raises(sl.InputError, match="no sequence"):
        lengths_of([3])
    with pytest.raises(sl.InputError, match="no examples"):
        pad_to_longest([])
    for size in (0, True, 1.5):
        with pytest.raises(sl.InputError, match="batch_size"):
            BucketBatchSampler([[1]], size)
    with pytest.raises(sl.InputError, match="lengths_of"):
        LengthBatchSampler(torch.rand(3), 2)
