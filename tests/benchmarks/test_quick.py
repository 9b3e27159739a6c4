"""Every benchmark runs with --quick to its last line, which names the figures that are asked of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.distillation import LOSSES

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("common", "context", "copying_plot", "pair", "redundant", "shapes")
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in SHARED)
FIGURES = {
    "adaptive_length": (
        *("gain_over_best_fixed", "gain_over_confidence", "oracle_gap_closed", "worst_task"),
        *("speedup_best_fixed", "speedup_head", "speedup_published", "speedup_oracle"),
    ),
    "batching": ("throughput_ratio", "identical_fraction"),
    "cascade": ("gain_over_best_speculation", "gain_over_copy_and_drafter"),
    "copying": (
        *("gain_over_speculation_revise", "speedup_revise", "speedup_self_correct_turn3", "no_redundancy_ratio"),
        *("sampled_acceptance_error", "policy_gain"),
    ),
    "decode_gpu": (
        *("roofline_share_1k", "roofline_share_8k", "roofline_share_32k", "overhead_o", "speedup_k5", "speedup_k5_b16"),
        *(f"v_{width}" for width in range(2, 17)),
    ),
    "distillation": tuple(f"tau_{loss}" for loss in LOSSES),
    "distillation_memory": ("peak_memory_ratio", "time_ratio"),
    "identity": ("identical_fraction_float64", "divergences_float32", "unexplained_float32", "memory_growth_mib"),
    "kv_dropping": (
        *("snapkv_gap_closed", "points_from_dense", "prefill_overhead", "kv_memory_ratio", "scoring_bytes_64k"),
        *("free_tokens_4", "free_tokens_8", "free_tokens_16"),
    ),
    "prompt_compression": ("points_over_chunked_25", "ttft_ratio_25"),
    "longspec_loss": ("loss_reference", "loss_end_reference"),
    "longspec_memory": ("kv_bytes_ratio_32k_1k", "startup_ratio_32k_1k"),
    "longspec_positions": (
        *("tau_ratio_plain", "tau_ratio_anchor_offset", "tau_ratio_multi_gap", "target_loss_delta", "noisy_gain"),
    ),
    "longspec_speed": ("speedup_over_autoregressive", "speedup_over_causal_drafter"),
    "narrow_attention": ("speedup_bf16_4096_1", "speedup_bf16_4096_5", "speedup_fp32_4096_5"),
    "reference_target": ("code_loss_512",),
    "replay": ("policies_per_second",),
    "speculation": ("speedup_revise", "speedup_code"),
    "tree_attention": ("max_error", "speedup_over_repeated", "speedup_over_folded", "extra_mib_8k"),
    "verify_attention": ("speedup",),
    "vs_transformers": (
        *("autoregressive_ratio", "assisted_ratio_fp32", "assisted_ratio_bf16", "overhead_ratio"),
        "identical_fraction",
    ),
}
EXACT = ("max_error", "extra_mib_8k", "kv_memory_ratio", "scoring_bytes_64k")
"""Figures that are the same every time."""

WITHOUT_SPREAD = ("identity", "reference_target")
"""What it measures is no draw."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_ends_in_one_line_with_its_figures(name, tmp_path):
    run = ["--run", str(tmp_path / "run")] if name in ("adaptive_length", "speculation") else []
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", *run]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == ["benchmark", "figures", "environment"] and result["benchmark"] == name
    assert set(FIGURES[name]) <= set(result["figures"])
    if name not in WITHOUT_SPREAD:
        assert {f"{figure}_low" for figure in FIGURES[name] if figure not in EXACT} <= set(result["figures"])
