"""Who may import whom: each module only what stands to the right of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "kvcfg").rglob("*.py"))

LAYERS = (
    {"kvcfg.cli", "kvcfg.scripts", "kvcfg.__main__", "kvcfg"},
    {"kvcfg.evaluation"},
    {"kvcfg.results", "kvcfg.exporters", "kvcfg.importers", "kvcfg.integrations"},
    {"kvcfg.attention"},
    {"kvcfg.cache"},
    {"kvcfg.formats.*", "kvcfg.kernels"},
    {"kvcfg.planning", "kvcfg.composition"},
    {"kvcfg.config"},
    {"kvcfg.params", "kvcfg.group_params", "kvcfg.param_checks", "kvcfg.sizing", "kvcfg.symbolic"},
    {"kvcfg.formats"},
    {"kvcfg.dtypes", "kvcfg.registry", "kvcfg.units", "kvcfg.errors", "kvcfg.version"},
)

ALLOWED_IN = {
    "hydra": {"kvcfg.composition", "kvcfg.config.structured", "kvcfg.cli"},
    "omegaconf": {"kvcfg.composition", "kvcfg.config.structured", "kvcfg.cli"},
    "torch": {
        "kvcfg.formats.*",
        "kvcfg.kernels",
        "kvcfg.cache",
        "kvcfg.attention",
        "kvcfg.integrations",
        "kvcfg.evaluation",
    },
    "transformers": {"kvcfg.integrations", "kvcfg.evaluation"},
    "pydantic": {"kvcfg.config", "kvcfg.composition"},
    "pydantic_core": {"kvcfg.config", "kvcfg.composition"},
}

EXEMPT = {
    ("kvcfg.dtypes", "torch"): "DType.to_torch imports torch when it is called",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports at run time, wherever in it; type-checking blocks are left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> int | None:
    if module == "kvcfg":
        return 0
    if module.startswith("kvcfg.formats."):
        return next(rank for rank, names in enumerate(LAYERS) if "kvcfg.formats.*" in names)
    return next((rank for rank, names in enumerate(LAYERS) for name in names - {"kvcfg"} if within(module, name)), None)


def within(module: str, name: str) -> bool:
    if name == "kvcfg.formats.*":
        return module.startswith("kvcfg.formats.")
    return module == name or module.startswith(f"{name}.")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_imports_nothing_from_its_left(path: Path) -> None:
    module = module_name(path)
    rank = layer_of(module)
    assert rank is not None, f"{module} has no place in LAYERS"
    known = {module_name(item) for item in MODULES}
    for imported in imports(path):
        if imported in known and imported != "kvcfg":
            imported_rank = layer_of(imported)
            assert imported_rank is not None and imported_rank >= rank, f"{module} imports {imported}"


@pytest.mark.parametrize("library", ALLOWED_IN)
def test_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = {
        module_name(path) for path in MODULES if any(imported.split(".")[0] == library for imported in imports(path))
    }
    strays = {
        user
        for user in users
        if not any(within(user, name) for name in ALLOWED_IN[library]) and (user, library) not in EXEMPT
    }
    assert not strays


def test_no_public_function_shares_its_name_with_a_module() -> None:
    """A function and a module of one name in one package hide each other once both are imported."""
    for folder in {path.parent for path in MODULES}:
        modules = {path.stem for path in folder.glob("*.py")} | {
            path.name for path in folder.iterdir() if path.is_dir()
        }
        init = folder / "__init__.py"
        names = {name.rsplit(".", 1)[-1] for name in imports(init)} if init.exists() else set()
        functions = names - {name for name in names if f"{module_name(init)}.{name}" in map(module_name, MODULES)}
        assert not modules & functions, folder
