"""The command line as a user meets it: exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAN = ["plan", "model=llama-3.1-8b", "devices=h100x8"]


def kvcfg(*arguments: str, folder: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    command = f"import sys; from kvcfg.cli import main; status = main(sys.argv[1:]); {code or 'pass'}; sys.exit(status)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", command, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_plan_prints_json_alone_from_any_folder_without_torch(tmp_path: Path) -> None:
    check = "print([name for name in ('torch', 'transformers', 'rich') if name in sys.modules], file=sys.stderr)"
    done = kvcfg(*PLAN, "cache.kv_cache_page_size=64", "output=json", folder=tmp_path, code=check)
    data = json.loads(done.stdout)
    assert done.stderr.strip() == "[]"
    keys = {"bytes_per_token", "bytes_per_page", "num_pages", "num_tokens", "kv_bytes", "requested", "resolved"}
    assert keys <= set(data)
    assert data["bytes_per_token"] == 131072 and data["bytes_per_page"] == 64 * 131072
    assert list(tmp_path.iterdir()) == []


def test_sweep_prints_one_json_list(tmp_path: Path) -> None:
    done = kvcfg(*PLAN, "cache.kv_cache_page_size=16,64", "output=json", "-m", folder=tmp_path)
    assert [row["num_tokens"] % 16 for row in json.loads(done.stdout)] == [0, 0]


def test_sweep_prints_one_table(tmp_path: Path) -> None:
    done = kvcfg(*PLAN, "cache.kv_cache_page_size=16,64", "-m", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.count("kv_cache_page_size") == 1


def test_every_bad_value_is_reported_at_once_with_exit_code_2(tmp_path: Path) -> None:
    done = kvcfg("plan", "model=lama-3.1-8b", "cache.kv_cache_page_size=0", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "model=llama-3.1-8b" in done.stderr and "cache.kv_cache_page_size=0" in done.stderr
    assert "Traceback" not in done.stderr


def test_whole_grid_is_checked_before_anything_runs(tmp_path: Path) -> None:
    done = kvcfg("eval", "model=tiny", "cache.kv_cache_page_size=16,0", "-m", folder=tmp_path)
    assert done.returncode == 2 and "cache.kv_cache_page_size=0" in done.stderr
    assert not (tmp_path / "results").exists()


def test_unknown_verb_offers_the_nearest(tmp_path: Path) -> None:
    done = kvcfg("plam", folder=tmp_path)
    assert done.returncode == 2 and "plan" in done.stderr


def test_no_verb_prints_the_help(tmp_path: Path) -> None:
    done = kvcfg(folder=tmp_path)
    assert done.returncode == 0 and "kvcfg plan model=llama-3.1-8b" in done.stdout


def test_model_without_weights_is_one_line_with_exit_code_2(tmp_path: Path) -> None:
    done = kvcfg("bench", "measure=model", "model=tiny", "devices=cpu", folder=tmp_path)
    assert done.returncode == 2 and "no weights to run" in done.stderr and "Traceback" not in done.stderr


def test_config_can_be_shown_without_running(tmp_path: Path) -> None:
    done = kvcfg(*PLAN, "--cfg", "job", "--package", "cache", folder=tmp_path)
    assert done.returncode == 0 and "kv_cache_page_size: 128" in done.stdout


def test_fit_prints_overrides_that_fit(tmp_path: Path) -> None:
    asked = ["model=llama-3.1-8b", "workload.max_batch_size=4", "workload.max_seq_len=65536"]
    done = kvcfg("fit", *asked, "devices=rtx4090", "output=json", folder=tmp_path)
    data = json.loads(done.stdout)
    option = data["options"][0]
    again = kvcfg("plan", *asked, "devices=rtx4090", *option["overrides"], "output=json", folder=tmp_path)
    assert data["fits"] is False and json.loads(again.stdout)["fits"] is True


@pytest.mark.model
def test_eval_measures_once_and_then_reads_its_row(tmp_path: Path) -> None:
    small = ["workload.num_windows=1", "workload.window_tokens=64", "workload.decode_tokens=2"]
    command = ["eval", "cache.kv_cache_format=float32,int8", "-m", *small, "output=json"]
    first = kvcfg(*command, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    exact, int8 = json.loads(first.stdout)
    assert exact["kl"] < 1e-9 < 1e-5 < int8["kl"]
    assert int8["bytes_per_token_planned"] == int8["bytes_per_token_allocated"] == 12240
    second = kvcfg(*command, folder=tmp_path)
    assert json.loads(second.stdout) == [exact, int8]
    assert len((tmp_path / "results" / "rows.jsonl").read_text().splitlines()) == 2
    gated = kvcfg("eval", "cache.kv_cache_format=int8", *small, "gate.max_kl=1e-9", folder=tmp_path)
    assert gated.returncode == 1 and "above the gate" in gated.stderr


@pytest.mark.parametrize("verb", ["plan", "fit"])
def test_script_runs_on_its_own(verb: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{verb}.py"), *PLAN[1:], "output=json"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"] is True
