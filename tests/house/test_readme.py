"""Every command and snippet of the README runs, in its order, on smaller windows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
SMALL = {
    "eval": ["workload.num_windows=1", "workload.window_tokens=64", "workload.decode_tokens=2"],
    "bench": ["workload.window_tokens=64", "workload.decode_tokens=2", "batch_size=1", "context=64"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = blocks("sh")[0].splitlines()


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.model
@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_tour_runs(command: str, tmp_path: Path) -> None:
    program, verb, *rest = shlex.split(command)
    assert program == "kvcfg"
    code = "import sys; from kvcfg.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run(["-c", code, verb, *rest, *SMALL.get(verb, [])], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 2


def test_trace_of_the_readme_is_replayed(tmp_path: Path) -> None:
    program = f"""kvcfg() {{ {shlex.quote(sys.executable)} -m kvcfg "$@"; }}; set -e\n{blocks("sh")[1]}"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "requests.jsonl: 3 requests" in done.stdout and "vs wider" in done.stdout


@pytest.mark.model
def test_calibration_of_the_readme_is_read(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    (tmp_path / "my_text.txt").write_text("\n\n".join(topics.values()))
    # Not the file beside the weights, which may be somebody's.
    own = ["quantization.calibration=own.safetensors", *SMALL["eval"]]
    for command in blocks("sh")[3].splitlines():
        _, verb, *rest = shlex.split(command)
        done = run(["-m", "kvcfg", verb, *rest, *own], tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "own.safetensors").exists() and "gauss4" in done.stdout


@pytest.mark.model
def test_python_snippets_run_one_after_the_other(tmp_path: Path) -> None:
    done = run(["-W", "error::DeprecationWarning:__main__", "-c", "\n".join(blocks("python"))], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "requested → resolved" in done.stdout


def test_presets_named_in_the_readme_exist() -> None:
    conf = Path(__file__).parents[2] / "conf"
    for group, presets in re.findall(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", README, flags=re.MULTILINE):
        names = [name for part in re.findall(r"`([^`]*)`", presets) for name in part.split()]
        for name in names:
            if (conf / group).is_dir():
                assert (conf / group / f"{name}.yaml").exists(), f"{group}={name}"


def test_number_of_models_is_the_one_stated() -> None:
    stated = int(re.search(r"(\d+) published models", README)[1])  # type: ignore[index]
    own = {"hf", "tiny", "smollm2-135m-outlier"}
    found = {path.stem for path in (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml")} - own
    assert len(found) == stated
