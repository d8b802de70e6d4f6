"""kvcfg as a wheel, away from its checkout: the command line, and inside somebody else's Hydra application."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {".py", ".cpp", ".h"}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

HOST = """
import hydra
import kvcfg

@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg):
    experiment = kvcfg.validate(cfg.kv, prefix="kv")
    inside = kvcfg.compose(["model=llama-3.1-8b", "devices=h100", "cache.kv_cache_page_size=16"])
    sizes = experiment.cache.kv_cache_page_size, inside.cache.kv_cache_page_size
    print(cfg.lr, experiment.cache.kv_cache_format, *sizes)

main()
"""

HOST_CONFIG = """
defaults:
  - kvcfg_schema@kv
  - cache@kv.cache: fp8
  - model@kv.model: llama-3.1-8b
  - devices@kv.devices: h100
  - optimizer: sgd
  - _self_
hydra:
  searchpath: [pkg://kvcfg.conf]
  run: {dir: .}
  output_subdir: null
lr: 0.1
"""


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def copy_checkout(folder: Path) -> Path:
    source = folder / "source"
    for name in ("conf", "hydra_plugins", "kvcfg", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "setup.py"):
        shutil.copy(ROOT / name, source)
    return source


def build_wheel(folder: Path, **environment: str) -> Path:
    """A wheel of a copy of the checkout."""
    source = copy_checkout(folder)
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, env={**os.environ, **environment}, check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A folder with the installed wheel and nothing else of the checkout."""
    target = wheel.parent / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """An application of somebody else, with a group of its own."""
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    (tmp_path / "conf" / "optimizer" / "sgd.yaml").write_text("momentum: 0.9\n")
    (tmp_path / "conf" / "train.yaml").write_text(HOST_CONFIG)
    (tmp_path / "train.py").write_text(HOST)
    return tmp_path


def run(site: Path, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, "PYTHONPATH": str(site), **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=everything, capture_output=True, text=True, check=False
    )


def test_wheel_plans_from_another_folder(site: Path, tmp_path: Path) -> None:
    code = "import kvcfg, sys; print(kvcfg.__file__, file=sys.stderr); from kvcfg.cli import main; sys.exit(main())"
    done = run(site, tmp_path, "-c", code, "plan", "model=llama-3.1-8b", "devices=h100x8", "output=json")
    assert str(site) in done.stderr
    assert json.loads(done.stdout)["bytes_per_token"] == 131072


def test_wheel_hands_sweeps_over_to_its_own_scripts(site: Path, tmp_path: Path) -> None:
    code = "import sys; from kvcfg.cli import main; sys.exit(main())"
    done = run(site, tmp_path, "-c", code, "plan", "model=llama-3.1-8b", "devices=h100", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "kv_cache_page_size: 128" in done.stdout


def test_groups_work_inside_another_application(site: Path, host: Path) -> None:
    done = run(site, host, "train.py", "kv.cache.kv_cache_page_size=64")
    assert done.stdout.split() == ["0.1", "float8_e4m3fn", "64", "16"], done.stderr


def test_schema_refuses_a_mistyped_key_inside_another_application(site: Path, host: Path) -> None:
    done = run(site, host, "train.py", "kv.cache.kv_cache_page_siz=64")
    assert done.returncode == 1 and "kv_cache_page_siz" in done.stderr


def test_rule_is_told_with_the_hosts_own_key(site: Path, host: Path) -> None:
    done = run(site, host, "train.py", "kv.cache.kv_cache_page_size=0")
    assert "kv.cache.kv_cache_page_size=0: must be" in done.stderr


def test_own_groups_of_the_application_stay_its_own(site: Path, host: Path) -> None:
    done = run(site, host, "train.py", "optimizer=adam")
    assert done.returncode == 1 and "sgd" in done.stderr


def test_wheel_holds_every_module_and_source(wheel: Path) -> None:
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kvcfg").rglob("*") if path.suffix in SOURCES}
    assert not ours - set(zipfile.ZipFile(wheel).namelist())


@needs_compiler
def test_wheel_with_kernels_says_which_platform_they_are_for(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")


@needs_compiler
def test_kernels_of_the_wheel_need_no_compiler(site: Path, tmp_path: Path) -> None:
    code = (
        "from kvcfg.kernels.cpu.build import kernels\n"
        "from kvcfg.kernels.cpu.loader import load_kernel\n"
        "print(*(load_kernel(name)._name for name in kernels()))\n"
    )
    done = run(site, tmp_path, "-c", code, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    loaded = [Path(name) for name in done.stdout.split()]
    assert {path.parent for path in loaded} == {site / "kvcfg" / "kernels" / "cpu"}
    assert [path.name.split("-")[0] for path in loaded] == ["hash_chain", "page_core", "pages"]


def test_wheel_made_without_a_compiler_is_pure(tmp_path: Path) -> None:
    pure = build_wheel(tmp_path, CXX="no-such-compiler")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure).namelist() if name.endswith(".so")]


def test_editable_install_compiles_nothing_ahead(tmp_path: Path) -> None:
    source = copy_checkout(tmp_path)
    command = [*PIP, "install", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    subprocess.run([*command, "--editable", str(source)], check=True)
    assert list((tmp_path / "site").glob("*kvcfg*"))
    assert not list(tmp_path.rglob("*.so"))
