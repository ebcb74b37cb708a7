"""Where each head looks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.helpers import close, grads, leaf, untouched
from tests.strategies import (
    IGNORE,
    LAYOUTS,
    SEEDS,
    SHARES,
    Documents,
    integers,
    mask,
    normal,
    offset_sets,
    packings,
    relayout,
    sizes,
)
from wmtp import align_to_heads, mtp_targets
from wmtp.documents import find_documents
from wmtp.targets import resolve_offsets, resolve_targets


@st.composite
def label_rows(draw: st.DrawFn) -> torch.Tensor:
    batch, seq, seed = draw(sizes(3)), draw(sizes(8)), draw(SEEDS)
    ignored = 1 - draw(SHARES)
    return integers(seed, 9, batch, seq).masked_fill(mask(seed + 1, ignored, batch, seq), IGNORE)


@st.composite
def described_labels(draw: st.DrawFn) -> tuple[torch.Tensor, Documents, dict[str, torch.Tensor]]:
    """Labels and any combination of the ways to tell documents and padding."""
    packing = draw(packings())
    seed = draw(SEEDS)
    labels = integers(seed, 9, packing.batch, packing.seq)
    labels = labels.masked_fill(mask(seed + 1, 0.2, packing.batch, packing.seq), IGNORE)
    told: dict[str, torch.Tensor] = {}
    if draw(st.booleans()):
        told["segment_ids"] = packing.segment_ids
    if draw(st.booleans()):
        told["position_ids"] = packing.position_ids
    if packing.batch == 1 and draw(st.booleans()):
        told["cu_seqlens"] = packing.cu_seqlens
    if draw(st.booleans()):
        told["attention_mask"] = mask(seed + 2, 0.8, packing.batch, packing.seq).long()
        if draw(st.booleans()):  # some collators number the documents in it
            told["attention_mask"] *= packing.segment_ids
    return labels, packing, told


def steps_of(heads: int, offsets: int | tuple[int, ...] | None) -> int | tuple[int, ...]:
    return heads if offsets is None else offsets


def test_index_law_of_the_worked_example() -> None:
    a, b, c, d, e = 10, 11, 12, 13, 14
    x = IGNORE
    expected = [[b, c, d], [c, d, e], [d, e, x], [e, x, x], [x, x, x]]
    assert mtp_targets(torch.tensor([[a, b, c, d, e]]), 3).tolist() == [expected]


@given(label_rows(), st.integers(1, 4), st.data())
def test_index_law(labels: torch.Tensor, heads: int, data: st.DataObject) -> None:
    offsets = steps_of(heads, data.draw(offset_sets(heads)))
    actual = mtp_targets(labels, offsets)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, oracle.mtp_targets(labels, offsets))


@given(label_rows(), st.integers(1, 4))
def test_an_int_means_one_to_heads(labels: torch.Tensor, heads: int) -> None:
    spelled = mtp_targets(labels, list(range(1, heads + 1)))
    assert torch.equal(mtp_targets(labels, heads), spelled)


@given(described_labels(), st.integers(1, 4), st.data())
def test_documents_and_padding_follow_the_oracle(
    case: tuple[torch.Tensor, Documents, dict[str, torch.Tensor]],
    heads: int,
    data: st.DataObject,
) -> None:
    labels, _, told = case
    offsets = steps_of(heads, data.draw(offset_sets(heads)))
    expected = oracle.mtp_targets(labels, offsets, **told)
    assert torch.equal(mtp_targets(labels, offsets, **told), expected)


@given(SEEDS, st.integers(1, 8), st.integers(1, 3))
def test_any_segment_and_position_ids_follow_the_oracle(seed: int, seq: int, heads: int) -> None:
    labels = integers(seed, 9, 2, seq)
    for name in ("segment_ids", "position_ids"):
        told = {name: integers(seed + 1, 3, 2, seq)}
        expected = oracle.mtp_targets(labels, heads, **told)
        assert torch.equal(mtp_targets(labels, heads, **told), expected)


@given(packings(), st.integers(1, 4), SEEDS, st.sampled_from(["segment_ids", "position_ids"]))
def test_packed_equals_separate_documents(
    packing: Documents, heads: int, seed: int, told: str
) -> None:
    labels = integers(seed, 9, packing.batch, packing.seq)
    packed = mtp_targets(labels, heads, **{told: getattr(packing, told)})
    for b, piece in packing.pieces():
        alone = mtp_targets(labels[b : b + 1, piece], heads)
        assert torch.equal(packed[b : b + 1, piece], alone)


@given(packings(max_batch=1), st.integers(1, 4), SEEDS)
def test_packed_by_cu_seqlens_equals_separate_documents(
    packing: Documents, heads: int, seed: int
) -> None:
    labels = integers(seed, 9, 1, packing.seq)
    packed = mtp_targets(labels, heads, cu_seqlens=packing.cu_seqlens.int())
    by_segment = mtp_targets(labels, heads, segment_ids=packing.segment_ids)
    numbered = mtp_targets(labels, heads, attention_mask=packing.segment_ids)
    assert torch.equal(numbered, by_segment)
    assert torch.equal(packed, by_segment)


def test_a_mask_of_floats_tells_padding_alone() -> None:
    labels, soft = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1.0, 0.5, 1.0, 0.0]])
    assert torch.equal(
        mtp_targets(labels, 2, attention_mask=soft),
        mtp_targets(labels, 2, attention_mask=soft != 0),
    )


def test_tokens_behind_cu_seqlens_belong_to_no_document() -> None:
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    targets = mtp_targets(labels, (0, 1), cu_seqlens=torch.tensor([0, 2, 3]))
    assert targets[0, :, 0].tolist() == [1, 2, 3, IGNORE, IGNORE]
    assert targets[0, :, 1].tolist() == [2, IGNORE, IGNORE, IGNORE, IGNORE]


def test_cu_seqlens_of_no_document_leave_nothing_to_predict() -> None:
    targets = mtp_targets(torch.tensor([[1, 2]]), (0, 1), cu_seqlens=torch.tensor([0]))
    assert (targets == IGNORE).all()


def test_an_empty_document_in_cu_seqlens_is_harmless() -> None:
    labels = torch.tensor([[1, 2, 3, 4]])
    with_empty = mtp_targets(labels, 2, cu_seqlens=torch.tensor([0, 2, 2, 4]))
    assert torch.equal(with_empty, mtp_targets(labels, 2, cu_seqlens=torch.tensor([0, 2, 4])))


@given(SEEDS, st.integers(1, 5), st.integers(0, 4), st.integers(1, 3))
def test_left_and_right_padding_equal_no_padding(
    seed: int, seq: int, padding: int, heads: int
) -> None:
    labels = integers(seed, 9, 2, seq)
    junk = integers(seed + 1, 9, 2, padding)
    there, pad = torch.ones(2, seq).long(), torch.zeros(2, padding).long()
    alone = mtp_targets(labels, heads)
    left = mtp_targets(
        torch.cat([junk, labels], 1), heads, attention_mask=torch.cat([pad, there], 1)
    )
    right = mtp_targets(
        torch.cat([labels, junk], 1), heads, attention_mask=torch.cat([there, pad], 1)
    )
    assert torch.equal(left[:, padding:], alone)
    assert torch.equal(right[:, :seq], alone)
    assert (left[:, :padding] == IGNORE).all()
    assert (right[:, seq:] == IGNORE).all()


@given(described_labels(), st.integers(1, 4))
def test_a_prediction_needs_every_description(
    case: tuple[torch.Tensor, Documents, dict[str, torch.Tensor]], heads: int
) -> None:
    labels, _, told = case
    together = mtp_targets(labels, heads, **told)
    expected = mtp_targets(labels, heads)
    for name, value in told.items():
        expected = expected.where(mtp_targets(labels, heads, **{name: value}) != IGNORE, IGNORE)
    assert torch.equal(together, expected)


def test_masking_the_first_label_of_a_document_is_not_enough() -> None:
    labels = torch.tensor([[1, 2, 3, 4, 5, 6]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    collated = labels.clone()
    collated[0, 3] = IGNORE
    leaked = mtp_targets(collated, 2)
    right = mtp_targets(labels, 2, segment_ids=segments)
    assert leaked[0, 2, 1] == 5
    assert right[0, 2, 1] == IGNORE


@given(label_rows(), st.integers(1, 3), st.sampled_from([-100, -1, 0, 8]))
def test_the_ignore_index_is_the_callers(
    labels: torch.Tensor, heads: int, ignore_index: int
) -> None:
    actual = mtp_targets(labels, heads, ignore_index=ignore_index)
    assert torch.equal(actual, oracle.mtp_targets(labels, heads, ignore_index=ignore_index))
    targets, valid = resolve_targets(labels, None, *labels.shape, heads, ignore_index)
    assert torch.equal(targets, actual)
    assert torch.equal(valid, actual != ignore_index)


@given(described_labels(), st.integers(1, 3))
def test_targets_never_write_to_their_inputs(
    case: tuple[torch.Tensor, Documents, dict[str, torch.Tensor]], heads: int
) -> None:
    labels, _, told = case
    with untouched(labels, *told.values()):
        targets = mtp_targets(labels, heads, **told)
        targets.fill_(7)


@given(label_rows(), st.integers(1, 3), LAYOUTS)
def test_targets_do_not_depend_on_the_layout(labels: torch.Tensor, heads: int, layout: str) -> None:
    view = relayout(labels, layout)
    assert torch.equal(mtp_targets(view, heads), mtp_targets(view.clone(), heads))


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("seq", [0, 1])
def test_nothing_to_predict_in_empty_and_one_token_rows(batch: int, seq: int) -> None:
    targets = mtp_targets(torch.zeros(batch, seq).long(), 3)
    assert targets.shape == (batch, seq, 3)
    assert (targets == IGNORE).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_the_attention_mask_may_have_any_dtype(dtype: torch.dtype) -> None:
    there = torch.tensor([[0, 1, 1, 1]])
    targets = mtp_targets(torch.tensor([[1, 2, 3, 4]]), 1, attention_mask=there.to(dtype))
    assert targets[0, :, 0].tolist() == [IGNORE, 3, 4, IGNORE]


@pytest.mark.parametrize("offsets", [0, -1, [], [2, 1], [1, 1], [-1, 1]])
def test_illegal_offsets_are_refused(offsets: int | list[int]) -> None:
    with pytest.raises(ValueError, match="offsets"):
        mtp_targets(torch.tensor([[1, 2, 3]]), offsets)
    with pytest.raises(ValueError, match="offsets"):
        align_to_heads(torch.tensor([[1, 2, 3]]), offsets)


def test_offsets_for_another_number_of_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="each of the 2 heads of the predictions, got 3"):
        resolve_targets(torch.tensor([[1, 2, 3]]), 3, 1, 3, 2, IGNORE)


def test_a_wild_number_of_offsets_is_refused_and_not_cut_off() -> None:
    for many in (range(10**6), range(2**70)):
        with pytest.raises(ValueError, match="the number of offsets must lie in"):
            resolve_offsets(many)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "segment_ids"])
def test_a_description_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        mtp_targets(torch.tensor([[1, 2, 3]]), 1, **{name: torch.ones(1, 2).long()})
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        find_documents(torch.tensor([[1, 2, 3]]), **{name: torch.ones(1, 2).long()})


def test_labels_of_another_rank_or_type_are_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="labels"):
        mtp_targets(torch.tensor([1, 2, 3]), 1)
    with pytest.raises(TypeError, match="labels"):
        mtp_targets(torch.tensor([[1.0, 2.0]]), 1)
    with pytest.raises(TypeError):
        mtp_targets([[1, 2]], 1)  # type: ignore[arg-type]


def test_cu_seqlens_need_a_batch_of_one_row() -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        mtp_targets(torch.ones(2, 3).long(), 1, cu_seqlens=torch.tensor([0, 3]))


@pytest.mark.parametrize("bounds", [[0, 5], [0, 2, 5], [0, 2, 1, 3], [1, 3], [-1, 3], []])
def test_impossible_cu_seqlens_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        mtp_targets(torch.ones(1, 3).long(), 1, cu_seqlens=torch.tensor(bounds, dtype=torch.long))


@pytest.mark.parametrize("bounds", [[0, 2, 5], [0, 3, 0], [0, 2, 1, 3], [1, 3], [-1, 3]])
def test_impossible_cu_seqlens_are_refused_where_nobody_could_look(bounds: list[int]) -> None:
    """Under a compiler: padded with zeros they would leave no target at all."""
    torch._dynamo.reset()
    targets = torch.compile(mtp_targets, backend="aot_eager", fullgraph=True)
    labels = torch.ones(1, 3).long()
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to at most seq"):
        targets(labels, 1, cu_seqlens=torch.tensor(bounds))
    right = torch.tensor([0, 2, 3, 3, 3][: len(bounds)])
    found = targets(labels, 1, cu_seqlens=right)
    assert torch.equal(found, mtp_targets(labels, 1, cu_seqlens=right))


@given(SEEDS, st.integers(0, 3), st.integers(0, 6), st.integers(1, 4), st.data())
def test_alignment_follows_the_index_law(
    seed: int, batch: int, seq: int, heads: int, data: st.DataObject
) -> None:
    offsets = steps_of(heads, data.draw(offset_sets(heads)))
    for x in (
        normal(seed, batch, seq),
        integers(seed, 9, batch, seq),
        mask(seed, 0.5, batch, seq),
    ):
        actual = align_to_heads(x, offsets)
        assert actual.dtype == x.dtype
        assert torch.equal(actual, oracle.align_to_heads(x, offsets))


@pytest.mark.parametrize(
    ("row", "fill"), [([1.0, 2.0], float("nan")), ([1, 2], -7), ([True, True], True)]
)
def test_alignment_fills_past_the_end(row: list[float], fill: float) -> None:
    aligned = align_to_heads(torch.tensor([row]), [1, 3], fill=fill)
    expected = torch.tensor([[[row[1], fill], [fill, fill]]], dtype=aligned.dtype)
    torch.testing.assert_close(aligned, expected, rtol=0, atol=0, equal_nan=True)


@given(SEEDS, st.integers(1, 6), st.integers(1, 3))
def test_the_gradient_of_an_alignment_counts_the_heads_that_look(
    seed: int, seq: int, heads: int
) -> None:
    x, upstream = leaf(normal(seed, 2, seq)), normal(seed + 1, 2, seq, heads)
    (actual,) = grads(align_to_heads(x, heads), [x], upstream)
    expected = torch.zeros(2, seq, dtype=torch.float64)
    for b, t, h in oracle.places((2, seq, heads)):
        if t + h + 1 < seq:
            expected[b, t + h + 1] += upstream[b, t, h]
    close(actual, expected)


@given(SEEDS, st.integers(1, 5), LAYOUTS)
def test_alignment_does_not_depend_on_the_layout(seed: int, seq: int, layout: str) -> None:
    x = relayout(normal(seed, 2, seq), layout)
    with untouched(x):
        aligned = align_to_heads(x, 2)
    assert torch.equal(aligned, align_to_heads(x.clone(), 2))


@pytest.mark.parametrize(
    ("row", "fill", "expected"),
    [([1, 2], 7.9, "a whole number for torch.int64, got 7.9"), ([1, 2], 0.5, "a whole number"),
     ([True, False], 2, "0 or 1 for torch.bool, got 2")],
)  # fmt: skip
def test_a_fill_that_the_dtype_cannot_hold_is_refused(
    row: list[float], fill: float, expected: str
) -> None:
    with pytest.raises(ValueError, match=f"fill must be {expected}"):
        align_to_heads(torch.tensor([row]), 1, fill=fill)


def test_a_fill_may_be_of_another_type_if_it_fits() -> None:
    assert align_to_heads(torch.tensor([[1, 2]]), 1, fill=3.0).tolist() == [[[2], [3]]]
    assert align_to_heads(torch.tensor([[1j, 2j]]), 1, fill=0.5).tolist() == [[[2j], [0.5]]]


def test_labels_shifted_inside_each_document_give_the_same_targets() -> None:
    tokens, segments = torch.arange(10, 19)[None], torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]])
    shifted = mtp_targets(tokens, 1, segment_ids=segments)[..., 0]
    for heads in (1, 2, 5):
        here = mtp_targets(shifted, range(heads), segment_ids=segments)
        assert torch.equal(here, mtp_targets(tokens, heads, segment_ids=segments))
