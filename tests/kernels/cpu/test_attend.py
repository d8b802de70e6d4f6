"""The compiled attention against the float64 reference, on pages of odd shapes whose unwritten slots are NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kvcfg.attention import Reach, attend, causal, cpu
from kvcfg.cache.closing import ClosingStorage
from kvcfg.cache.closing_step import ClosingStep
from kvcfg.cache.step import GroupStep
from kvcfg.cache.storage import PagedStorage
from kvcfg.cache.view import LayerView
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import BackendUnavailable, ShapeError
from kvcfg.formats import FORMATS, Recipe
from kvcfg.formats.codec import Calibrated, LayerCalibration
from kvcfg.kernels.cpu.attend import attend_pages
from kvcfg.kernels.cpu.loader import load_kernel
from kvcfg.params import KVCacheParams
from kvcfg.units import ceil_div

EXACT, CLOSE = 1e-5, 2e-3
SPARE_PAGES = 3


def recipe_of(keys: str, values: str | None = None, scale: DType = DType.float16, **changes: object) -> Recipe:
    key_format, value_format = FORMATS[keys], FORMATS[values or keys]
    granularity = "token_head" if key_format.scaled or value_format.scaled else "none"
    base = {"granularity": granularity, "scale_source": "dynamic", "scale_dtype": scale}
    return Recipe(key_format, value_format, **{**base, **changes})  # type: ignore[arg-type]


def fixed(name: str, granularity: str, source: str) -> Recipe:
    return recipe_of(name, granularity=granularity, scale_source=source)


RECIPES = {
    "float32": recipe_of("float32"),
    "float16": recipe_of("float16"),
    "bfloat16": recipe_of("bfloat16"),
    "bfloat16 turned": recipe_of("bfloat16", transform="hadamard"),
    "e4m3": recipe_of("float8_e4m3fn", scale=DType.float32),
    "e4m3 turned": recipe_of("float8_e4m3fn", transform="hadamard"),
    "e4m3 calibrated": fixed("float8_e4m3fn", "head", "static"),
    "e5m2": recipe_of("float8_e5m2", scale=DType.bfloat16),
    "e5m2 without scales": fixed("float8_e5m2", "tensor", "unit"),
    "int8": recipe_of("int8", scale=DType.float32),
    "int8 turned": recipe_of("int8", transform="hadamard"),
    "int8 calibrated": fixed("int8", "tensor", "static"),
    "int8 without scales": fixed("int8", "head", "unit"),
    "int8 keys, float16 values": recipe_of("int8", "float16", DType.bfloat16),
    "float32 keys, e4m3 values": recipe_of("float32", "float8_e4m3fn"),
    "int8 that closes": recipe_of("int8", transform="centred", sink_tokens=1),
    "gauss4": recipe_of("gauss4", transform="centred", sink_tokens=1),
    "gauss4 that is not turned": recipe_of("gauss4", scale=DType.float32),
    "float4": recipe_of("float4_e2m1fn", transform="hadamard"),
    "int4": recipe_of("int4", scale=DType.bfloat16, transform="centred"),
    "uint4": recipe_of("uint4", transform="centred", sink_tokens=5),
    "gauss4 keys, uint4 values": recipe_of("gauss4", "uint4", scale=DType.float32),
}

TURNED_AS_THEY_CLOSE = recipe_of("int8", transform="hadamard", open_page_format=FORMATS["bfloat16"])
"""Open pages hold keys as they are, closed ones turned."""

EXACT_RECIPES = ("float32", "float16", "bfloat16", "bfloat16 turned", "e4m3", "e4m3 turned", "e5m2", "float4")


@dataclass(frozen=True)
class Case:
    """A batch of sequences with their last tokens as queries; `closed` of the pages of each are closed."""

    recipe: str
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    n_kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    value_dim: int | None = None
    page_size: int = 16
    closed: tuple[int, ...] | None = None
    rank: int | None = None
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def is_exact(self) -> bool:
        return self.recipe in EXACT_RECIPES and self.dtype == torch.float32


@dataclass(frozen=True)
class Scene:
    view: LayerView
    queries: Tensor
    reach: Reach
    sinks: Tensor | None
    case: Case

    def attend(self, backend: str = "cpu", queries: Tensor | None = None) -> Tensor:
        case = self.case
        asked = self.queries if queries is None else queries
        options = {"scale": case.head_dim**-0.5, "softcap": case.softcap, "sinks": self.sinks}
        return attend(asked, self.view, self.reach, backend=backend, **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def kernel() -> None:
    library = load_kernel("pages")
    if library is None:
        pytest.skip("kernels cannot be compiled here")
    if not hasattr(library, "kvcfg_attend"):
        pytest.skip("the library of kernels has no attention")


@pytest.fixture(autouse=True)
def no_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel must do by itself whatever is asked for here."""

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the kernel handed the call to the reference")

    monkeypatch.setattr(cpu, "_by_reference", refuse)


def scene_of(case: Case) -> Scene:
    generator = torch.Generator().manual_seed(case.seed)
    storage, tables, step = stored(case, generator)
    view = storage.view(0, step, tables, value_dim=case.rank)
    n_q_heads = case.n_kv_heads * case.group
    queries = torch.randn(sum(case.counts), n_q_heads, case.head_dim, generator=generator) * 1.5
    starts = [length - count for length, count in zip(case.lengths, case.counts, strict=True)]
    reach = causal(starts, case.counts, case.window)
    sinks = torch.randn(n_q_heads, generator=generator) * 3 if case.has_sinks else None
    return Scene(view, queries.to(case.dtype), reach, sinks, case)


def params_of(case: Case) -> KVCacheParams:
    recipe = RECIPES[case.recipe]
    mla = {"is_mla": True, "num_q_heads": case.group} if case.rank is not None else {}
    return KVCacheParams(
        dtype=recipe.key_format.dtype,
        n_kv_heads=case.n_kv_heads,
        head_dim=case.head_dim,
        value_head_dim=case.value_dim,
        num_layers=1,
        devices=[DeviceRef.CPU()],
        page_size=case.page_size,
        recipe=recipe,
        speculative_method="eagle",
        num_draft_tokens=4,
        **mla,  # type: ignore[arg-type]
    )


def stored(case: Case, generator: torch.Generator) -> tuple[PagedStorage, Tensor, GroupStep]:
    params, size, batch = params_of(case), case.page_size, len(case.lengths)
    num_pages = [ceil_div(length, size) for length in case.lengths]
    count, device = sum(num_pages) + SPARE_PAGES, torch.device("cpu")
    calibrated = None
    if params.storage.scale_source == "static":
        sides = [Calibrated(amax=torch.linspace(4, 9, case.n_kv_heads)) for _ in range(2)]
        calibrated = [LayerCalibration(*sides)]
    closes = params.closes_pages
    storage = (
        ClosingStorage(params, count, batch, [device], calibrated)
        if closes
        else PagedStorage(params, count, [device], calibrated)
    )
    storage.shards[0].arena.fill_(0xFF)
    storage.newest.shards[0].arena.fill_(0xFF)
    order = torch.randperm(count, generator=generator).to(torch.int32)
    tables = torch.full((batch, max(num_pages) + 2), count, dtype=torch.int32)
    for number, (pages, part) in enumerate(zip(num_pages, order.split([*num_pages, SPARE_PAGES]), strict=False)):
        tables[number, :pages] = part
    closed = (case.closed or closed_of(case, params)) if closes else (0,) * batch
    for number, length in enumerate(case.lengths):
        keys, values = numbers(case, params, length, generator)
        pages, whole = tables[number].long(), closed[number] * size
        if whole:
            shaped = [item[:whole].unflatten(0, (-1, size)) for item in (keys, values)]
            storage.store(0, storage.encode(0, *shaped), pages[: closed[number]])
        tokens = torch.arange(whole, length)
        slots = pages[tokens // size] * size + tokens % size
        if isinstance(storage, ClosingStorage):
            ring = storage.ring_pages * size
            slots = number * ring + tokens % ring
        storage.newest.store(0, storage.newest.encode(0, keys[whole:], values[whole:]), slots)
    nothing = torch.empty(0, dtype=torch.int64)
    if not isinstance(storage, ClosingStorage):
        return storage, tables, GroupStep(nothing, (), (), nothing, None)
    step = ClosingStep(
        past_pages=nothing,
        past=(),
        fresh=(),
        slots=nothing,
        stored=None,
        open_slots=nothing,
        opened=(),
        closing=(),
        segments=(),
        closed=torch.tensor(closed, dtype=torch.int32) * size,
        open_rows=torch.arange(batch, dtype=torch.int32) * storage.ring_pages,
        ring_tokens=storage.ring_pages * size,
    )
    return storage, tables, step


def closed_of(case: Case, params: KVCacheParams) -> tuple[int, ...]:
    """Per sequence as many closed pages as leave a ring of open tokens, or some more."""
    rng = random.Random(case.seed)
    ring = params.open_pages_per_sequence
    most = [length // case.page_size for length in case.lengths]
    least = [ceil_div(max(0, length - ring * case.page_size), case.page_size) for length in case.lengths]
    return tuple(rng.randint(low, high) for low, high in zip(least, most, strict=True))


def numbers(case: Case, params: KVCacheParams, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys with a common part and an outlier, and values that are not about zero; in whole units without scales."""
    unit = 12.0 if params.storage.scale_source == "unit" and params.storage.key_format.bits == 8 else 1.0
    common = torch.randn(case.n_kv_heads, case.head_dim, generator=generator)
    common[:, 3] *= 5
    keys = common + torch.randn(length, case.n_kv_heads, case.head_dim, generator=generator)
    values = 0.3 + torch.randn(length, case.n_kv_heads, params.value_dim, generator=generator)
    return keys * min(unit, 3.0), values * unit


def beyond_rounding(found: Tensor, wanted: Tensor) -> float:
    """The relative error of a whole output, less what rounding the exact one to its type costs."""
    error, rounding = (found.double() - wanted).norm(), (wanted.to(found.dtype).double() - wanted).norm()
    return float((error.square() - rounding.square()).clamp(min=0).sqrt() / wanted.norm())


def worst_error(found: Tensor, wanted: Tensor) -> float:
    """The largest relative error of any query's output, over its heads; NaN if there is one."""
    difference, wanted = (found.double() - wanted).flatten(1), wanted.flatten(1)
    return float((difference.norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)).amax())


def check(case: Case) -> None:
    scene = scene_of(case)
    found, wanted = scene.attend(), scene.attend("reference", scene.queries.double())
    assert found.dtype == case.dtype
    error, bound = (worst_error, EXACT) if case.is_exact else (beyond_rounding, CLOSE)
    assert error(found, wanted) <= bound, case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_format_matches_the_reference(recipe: str, dtype: torch.dtype) -> None:
    check(Case(recipe, (1, 37, 130), (1, 1, 1), head_dim=64, dtype=dtype))
    check(Case(recipe, (70, 5, 300, 16), (3, 5, 1, 2), head_dim=128, page_size=32, dtype=dtype, seed=1))


@pytest.mark.parametrize("recipe", ["float32", "bfloat16", "e4m3", "int8", "int8 turned", "gauss4", "uint4"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_width_of_head_matches_the_reference(recipe: str, head_dim: int) -> None:
    check(Case(recipe, (33, 100), (2, 1), head_dim=head_dim, n_kv_heads=3))


@pytest.mark.parametrize(
    "recipe", ["float32", "float16", "bfloat16", "e4m3", "e5m2 without scales", "int8", "gauss4 that is not turned"]
)
@pytest.mark.parametrize("group", [1, 5, 16])
def test_latents_match_the_reference(recipe: str, group: int) -> None:
    check(Case(recipe, (200, 1), (2, 1), n_kv_heads=1, group=group, head_dim=576, rank=512, page_size=64))


def sampled(seed: int) -> Case:
    """A case of any format and shape, small enough to be quick."""
    rng = random.Random(seed)
    recipe = rng.choice(list(RECIPES))
    head_dim = rng.choice([64, 80, 96, 128, 192, 256])
    n_kv_heads = rng.choice([1, 2, 3, 8])
    lengths = [rng.choice([1, 2, 15, 16, 17, 127, 128, 129, rng.randint(1, 700)]) for _ in range(rng.randint(1, 5))]
    if head_dim * n_kv_heads < 300:
        lengths[0] = rng.choice([1, 511, 2048, 5000])
    sinks = RECIPES[recipe].sink_tokens
    return Case(
        recipe,
        tuple(lengths),
        tuple(min(length, rng.choice([1, 1, 1, 2, 3, 5])) for length in lengths),
        n_kv_heads=n_kv_heads,
        group=rng.choice([1, 2, 3, 4, 7, 8, 16]),
        head_dim=head_dim,
        value_dim=rng.choice([None, None, 64, 96]),
        page_size=rng.choice([size for size in (1, 16, 17, 32, 64, 128, 512) if size > sinks]),
        window=rng.choice([None, None, 1, 19, 128, 1000]),
        softcap=rng.choice([None, None, 5.0, 50.0]),
        has_sinks=rng.random() < 0.4,
        dtype=rng.choice([torch.float32, torch.bfloat16]),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(150))
def test_sampled_shapes_match_the_reference(seed: int) -> None:
    check(sampled(seed))


@pytest.mark.parametrize("recipe", ["float32", "bfloat16", "int8", "gauss4"])
def test_prompt_over_a_cached_prefix_matches_the_reference(recipe: str) -> None:
    check(Case(recipe, (300, 150), (170, 150), group=4, page_size=128, closed=(1, 0)))


@pytest.mark.parametrize("closed", [(0, 0), (1, 2), (2, 2)])
def test_closed_and_open_tokens_match_the_reference_wherever_they_meet(closed: tuple[int, int]) -> None:
    check(Case("gauss4", (32, 35), (2, 1), closed=closed))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("recipe", ["float32", "int8", "gauss4"])
def test_query_that_sees_nothing_gives_zeros(recipe: str, sinks: bool) -> None:
    scene = scene_of(Case(recipe, (20, 40), (5, 2), has_sinks=sinks))
    skipped = replace(scene, reach=causal([15, 38], [5, 2], skip=[18, 0]))
    found = skipped.attend()
    assert not found[:3].any()
    assert worst_error(found[3:], skipped.attend("reference", scene.queries.double())[3:]) <= CLOSE


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_batch_without_queries_gives_nothing(num_sequences: int) -> None:
    scene = scene_of(Case("int8", (20,) * num_sequences, (1,) * num_sequences))
    nobody = replace(scene, queries=scene.queries[:0], reach=causal([20] * num_sequences, [0] * num_sequences))
    assert nobody.attend().shape == (0, 4, 64)


def test_queries_need_not_be_dense() -> None:
    scene = scene_of(Case("int8", (20, 90), (3, 2)))
    wide = torch.full((7, 9, 64), torch.nan)
    wide[1:6, 2:6] = scene.queries
    assert torch.equal(replace(scene, queries=wide[1:6, 2:6]).attend(), scene.attend())


def test_table_is_a_ring_of_columns() -> None:
    scene = scene_of(Case("float32", (90, 60), (1, 1), window=30))
    ring = torch.full((2, 3), 10**6, dtype=torch.int32)
    for sequence, last in enumerate((89, 59)):
        for page in range((last - 29) // 16, last // 16 + 1):
            ring[sequence, page % 3] = scene.view.tables[sequence, page]
    assert torch.equal(replace(scene, view=replace(scene.view, tables=ring)).attend(), scene.attend())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_queries_of_other_types_get_outputs_of_their_own(dtype: torch.dtype) -> None:
    scene = scene_of(Case("int8", (50,), (2,)))
    found = replace(scene, queries=scene.queries.to(dtype)).attend()
    assert found.dtype == dtype
    assert worst_error(found, scene.attend("reference", scene.queries.double())) <= CLOSE


@pytest.mark.parametrize(
    "case",
    [
        Case("float32", (1500, 40, 700), (1, 1, 1), group=4),
        Case("bfloat16", (2000,), (5,), n_kv_heads=8),
        Case("int8", (900, 1300), (1, 3), head_dim=128, has_sinks=True),
        Case("gauss4", (600,), (400,), group=4),
    ],
    ids=lambda case: case.recipe,
)
def test_runs_and_threads_give_the_same_numbers(case: Case) -> None:
    """On one number of threads bit for bit; how tokens are split over them moves the last bits alone."""
    scene, before = scene_of(case), torch.get_num_threads()
    wanted = scene.attend("reference", scene.queries.double())
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first = scene.attend()
            assert worst_error(first, wanted) <= CLOSE
            assert all(torch.equal(scene.attend(), first) for _ in range(30))
    finally:
        torch.set_num_threads(before)


def test_pages_without_code_go_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    cpu._say_once.cache_clear()
    scene = scene_of(Case("int8", (20,), (1,)))
    monkeypatch.setattr(cpu, "attend_pages", lambda *arguments: None)
    found = [scene.attend() for _ in range(2)]
    assert torch.equal(found[0], scene.attend("reference"))
    assert [record.message for record in caplog.records].count(caplog.messages[0]) == 1
    assert "int8" in caplog.messages[0]


def test_open_pages_that_are_turned_as_they_close_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(RECIPES, "turned as they close", TURNED_AS_THEY_CLOSE)
    check(Case("turned as they close", (40, 7), (1, 2), closed=(1, 0)))


def arguments_of(scene: Scene) -> tuple[object, ...]:
    pages, reach = scene.view.pages, scene.reach
    return (scene.queries, reach.query_starts, reach.first, reach.stop, pages.arena, scene.view.tables, pages.ints)


@pytest.mark.parametrize("shape", [(2, 4, 48), (2, 3, 64), (1, 4, 64)])
def test_queries_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    scene = scene_of(Case("int8", (20,), (2,)))
    with pytest.raises(ShapeError, match=r"queries"):
        attend_pages(torch.zeros(shape), *arguments_of(scene)[1:])  # type: ignore[arg-type]


def operator_arguments(case: Case) -> tuple[object, ...]:
    scene = scene_of(case)
    opened, step = scene.view.open_pages, scene.view.step
    rest: tuple[object, ...] = (scene.view.pages.levels, scene.view.pages.head_scales)
    rest += (None, None, None, None, 0)
    if opened is not None:
        rest = (*rest[:2], opened.arena, opened.ints, step.open_rows, step.closed, step.ring_tokens)  # type: ignore[attr-defined]
    return (*arguments_of(scene), *rest, scene.sinks, case.head_dim**-0.5, 0.0)


OPERATED = [Case("int8", (20, 33), (1, 2), has_sinks=True), Case("gauss4", (40,), (2,), dtype=torch.bfloat16)]


@pytest.mark.parametrize("case", OPERATED, ids=lambda case: case.recipe)
def test_operator_passes_torchs_own_checks(case: Case) -> None:
    torch.library.opcheck(torch.ops.kvcfg.attend.default, operator_arguments(case))


@pytest.mark.parametrize("case", OPERATED, ids=lambda case: case.recipe)
def test_operator_compiles_into_one_graph(case: Case) -> None:
    queries, *others = operator_arguments(case)

    def layer(queries: Tensor) -> Tensor:
        return torch.ops.kvcfg.attend(queries * 2, *others) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries), layer(queries))  # type: ignore[arg-type]


def test_operator_without_code_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcfg.kernels.cpu.attend.page_kernel", lambda name: None)
    with pytest.raises(BackendUnavailable, match="backend=reference"):
        torch.ops.kvcfg.attend(*operator_arguments(OPERATED[0]))
