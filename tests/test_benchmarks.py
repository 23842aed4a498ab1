"""The GPU benchmark runs where there is no GPU, so that it does not break unseen."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_with_tiny_sizes_on_the_cpu():
    """Half a minute; the same code as on a card, so a check that fails there is a bug, not a size."""
    done = subprocess.run([sys.executable, "benchmarks/gpu.py", "--smoke"], cwd=ROOT, capture_output=True, text=True)
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(rows) > 25 and not [row for row in rows if "FAILED" in row[3]]
    for part in ("features", "main job", "resume after SIGKILL", "FT, batch", "LoRA, batch", "kernel, N", "predict.py"):
        assert any(part in row[1] for row in rows), part
