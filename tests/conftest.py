"""Helpers that every test file uses."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two files run at a time
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_sessionstart(session):
    """MATMUL_PRECISION=highest|high|medium forces torch's: results must not hang on what a library set."""
    if "MATMUL_PRECISION" in os.environ:
        import torch

        torch.set_float32_matmul_precision(os.environ["MATMUL_PRECISION"])


def load_stage(name):
    """Import a numbered script, such as load_stage("00_prepare_data")."""
    spec = importlib.util.spec_from_file_location(f"stage_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_stage(script, *args, env=None):
    """Run a script as a user does; returns its CompletedProcess with text; env adds to the environment."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        text=True,
        encoding="utf-8",
        capture_output=True,
        env=os.environ | (env or {}),
    )


@pytest.fixture
def on_amd(monkeypatch):
    """Products as on an AMD processor, whatever this one is."""
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC", "avx512_bf16": True})


def pytest_collection_modifyitems(items):
    """The longest files first (with --no-loadscope-reorder): both workers end at about the same time."""
    longest = ("test_readme_commands", "test_real_encoder", "test_pipeline", "test_03_generate_negatives")
    items.sort(key=lambda item: item.path.stem not in longest)
