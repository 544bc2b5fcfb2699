"""What segment_ids and mask mean, by definition."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from synapse_arch.ops._packing import compaction, segment_index

positions = st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=12)


@given(positions)
def test_segment_index_by_its_definition(row: list[tuple[int, bool]]) -> None:
    number, previous, expected = 0, None, []
    for segment, real in row:
        if real:
            number += previous is not None and segment != previous
            previous = segment
        expected.append(number)
    ids, mask = (torch.tensor([list(column)]) for column in zip(*row, strict=True))
    found = segment_index(ids, mask)
    assert found is not None
    assert found[0].tolist() == expected
    if mask.all():
        plain = segment_index(ids, None)
        assert plain is not None
        assert plain[0].tolist() == expected


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_compaction_moves_real_positions_to_the_front(row: list[bool]) -> None:
    order, inverse = compaction(torch.tensor([row]))
    count = sum(row)
    assert order[0, :count].tolist() == [t for t, real in enumerate(row) if real]
    assert order[0][inverse[0]].tolist() == list(range(len(row)))
