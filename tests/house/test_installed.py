"""kvcfg as a wheel, away from its checkout: the command line, and inside somebody else's Hydra application."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("conf", "hydra_plugins", "kvcfg", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)], check=True
    )
    target = folder / "site"
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """An application of somebody else, with a group of its own."""
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    (tmp_path / "conf" / "optimizer" / "sgd.yaml").write_text("momentum: 0.9\n")
    (tmp_path / "conf" / "train.yaml").write_text(HOST_CONFIG)
    (tmp_path / "train.py").write_text(HOST)
    return tmp_path


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
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
