from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcfg.dtypes import DeviceRef, DType
from kvcfg.params import KVCacheParams, KVCacheQuantizationConfig, MultiKVCacheParams
from kvcfg.planning.capacity import Capacity, longest_context


@st.composite
def layer_groups(draw: st.DrawFn) -> MultiKVCacheParams:
    """One to three layer groups of any kind, on one to eight devices in one or two replicas."""
    tp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    drafts = draw(st.integers(0, 4))
    is_scaled = draw(st.booleans())
    common = {
        "dtype": DType.int8 if is_scaled else DType.bfloat16,
        "kvcache_quant_config": KVCacheQuantizationConfig(quantization_granularity=16) if is_scaled else None,
        "devices": [DeviceRef.GPU(index) for index in range(tp * dp)],
        "data_parallel_degree": dp,
        "page_size": draw(st.integers(1, 300)),
        "num_q_heads": 8,
        "allow_kv_head_replication": True,
        "speculative_method": draw(st.sampled_from(["eagle", "dflash"])) if drafts else None,
        "num_draft_tokens": drafts,
    }
    kinds = draw(
        st.lists(st.sampled_from(["full", "sliding_window", "chunked", "mla", "linear"]), min_size=1, max_size=3)
    )
    return MultiKVCacheParams.from_params(*(KVCacheParams(**common, **draw(group_of(kind))) for kind in kinds))


def group_of(kind: str) -> st.SearchStrategy[dict[str, object]]:
    fields: dict[str, st.SearchStrategy[object]] = {
        "kind": st.just(kind),
        "num_layers": st.integers(1, 40),
        "n_kv_heads": st.just(1) if kind == "mla" else st.sampled_from([1, 2, 4, 8]),
        "head_dim": st.sampled_from([16, 64, 576]),
    }
    if kind in ("sliding_window", "chunked"):
        fields["window"] = st.integers(1, 5000)
    if kind == "linear":
        fields["state_bytes"] = st.integers(1, 2**22).map(lambda count: 4 * count)
    return st.fixed_dictionaries(fields)


budgets = st.integers(-(2**30), 2**42)
lengths = st.integers(1, 300_000)


@given(layer_groups(), budgets, lengths)
def test_pool_fills_the_budget_and_one_more_page_does_not_fit_when_sequences_are_open(
    params: MultiKVCacheParams, budget: int, length: int
) -> None:
    capacity = Capacity(params, budget, None, length)
    if not (capacity.fits and params.grows):
        return
    batch, pages = capacity.max_batch_size, capacity.num_pages
    assert params.memory(pages, batch, length).total <= budget < params.memory(pages + 1, batch, length).total


@given(layer_groups(), budgets, lengths)
def test_one_more_sequence_of_full_length_does_not_fit(params: MultiKVCacheParams, budget: int, length: int) -> None:
    capacity = Capacity(params, budget, None, length)
    most = capacity.max_sequences
    assert most == 0 or capacity.memory_of(most).total <= budget
    assert capacity.memory_of(most + 1).total > budget


@given(layer_groups(), budgets, st.integers(1, 300), lengths)
def test_pool_is_what_the_workload_can_use_or_the_budget_holds_when_sequences_are_given(
    params: MultiKVCacheParams, budget: int, batch: int, length: int
) -> None:
    capacity = Capacity(params, budget, batch, length)
    usable = batch * capacity.pages_per_sequence
    if capacity.fits:
        assert capacity.num_pages == usable
    else:
        assert params.memory(capacity.num_pages + 1, batch, length).total > budget or not params.grows


@given(layer_groups(), budgets, st.integers(0, 2**40), st.integers(1, 300), lengths)
def test_what_fits_still_fits_in_a_larger_budget(
    params: MultiKVCacheParams, budget: int, more: int, batch: int, length: int
) -> None:
    small, large = Capacity(params, budget, batch, length), Capacity(params, budget + more, batch, length)
    assert small.fits <= large.fits
    assert small.num_pages <= large.num_pages
    assert small.max_sequences <= large.max_sequences


@given(layer_groups(), budgets, st.integers(1, 300), lengths)
def test_fits_says_whether_as_many_sequences_fit_as_were_asked_for(
    params: MultiKVCacheParams, budget: int, batch: int, length: int
) -> None:
    capacity = Capacity(params, budget, batch, length)
    assert capacity.fits == (batch <= capacity.max_sequences)


@given(layer_groups(), budgets, st.integers(1, 300), lengths)
def test_longest_context_fits_and_one_more_token_does_not(
    params: MultiKVCacheParams, budget: int, batch: int, limit: int
) -> None:
    longest = longest_context(params, budget, batch, limit)
    assert 0 <= longest <= limit
    assert longest == 0 or Capacity(params, budget, batch, longest).fits
    assert longest == limit or not Capacity(params, budget, batch, longest + 1).fits


def test_draft_tokens_take_a_page_where_the_length_fills_the_last_one() -> None:
    common = {"dtype": DType.bfloat16, "n_kv_heads": 1, "head_dim": 64, "num_layers": 1, "devices": [DeviceRef.CPU()]}
    plain = MultiKVCacheParams.from_params(KVCacheParams(**common))
    drafting = MultiKVCacheParams.from_params(KVCacheParams(**common, speculative_method="eagle", num_draft_tokens=3))
    assert Capacity(plain, 2**30, 1, 512).num_pages == 4
    assert Capacity(drafting, 2**30, 1, 512).num_pages == 5
