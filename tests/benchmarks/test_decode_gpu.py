"""The benchmark of the decoder on a GPU: sizes, timing and figures, all on a CPU, where only the device differs."""

import argparse
import json
import sys
import weakref

import pytest
import torch

from benchmarks import decode_gpu, shapes
from benchmarks.decode_gpu import Row, costs_of, shares
from benchmarks.shapes import SHAPES, Case, Rounds
from drafttrain.decoding.synthetic import SyntheticAcceptance
from drafttrain.evaluation.environment import streamed_bytes
from drafttrain.evaluation.runner import steady
from drafttrain.ops.cache import DenseCache

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models():
    return shapes.make_models("tiny", torch.float32, CPU)


@pytest.fixture(scope="module")
def pair(models):
    return shapes.pair_of(models, compiled=False)


# ---- shapes ----


def test_shapes_are_those_of_the_published_models():
    counts = {name: [shapes.parameters(shapes.config_of(each)) for each in sizes] for name, sizes in SHAPES.items()}
    assert counts["8b"] == [8_030_261_248, 1_235_814_400]
    assert counts["70b"] == [70_553_706_496, 1_235_814_400]
    assert shapes.kv_bytes(shapes.config_of(SHAPES["8b"][0]), torch.bfloat16) == 128 * 1024


def test_the_bytes_of_a_step_are_those_of_the_model(models, pair):
    for model in models:
        assert shapes.parameters(model.config) == sum(weight.numel() for weight in model.parameters())
        assert 4 * shapes.parameters(model.config, embedding=False) == streamed_bytes(model)
    cache = DenseCache(2, 1, CPU, block=1)
    pair.target.forward(cache, torch.ones(1, 7, dtype=torch.int64))
    case = Case(7, 1)
    assert pair.bytes_of_step(case) == streamed_bytes(models[0]) + cache.memory_bytes() * 7 // cache.slots


# ---- timing ----


@torch.inference_mode()
def test_a_filled_cache_holds_rows_of_unlike_lengths_that_can_be_read_on(pair):
    case = Case(1500, 3)
    cache = pair.target.new_cache(3, 1600)
    pair.target.read(cache, case.prompts)
    assert cache.lengths == [1500, 1497, 1494]
    assert all(layer.keys[row, :, : cache.lengths[row]].abs().sum(-1).all() for layer in cache.layers for row in (0, 2))
    assert torch.isfinite(pair.target.forward(cache, torch.ones(3, 4, dtype=torch.int64)).logits).all()


@pytest.mark.parametrize(("rate", "each"), [(1.0, 5), (0.0, 1)])
def test_rounds_are_of_a_full_batch_and_all_their_tokens_are_counted(pair, rate, each):
    found = shapes.speculative_rounds(pair, Case(40, 3), 4, SyntheticAcceptance([rate]), rounds=6, seed=0)
    assert (found.length, found.rounds, found.tokens) == (4, 6, 6 * 3 * each)
    assert found.seconds > 0


def test_caches_are_gone_with_what_was_timed_on_them(models, monkeypatch):
    """Garbage is not collected while runs are timed, and a GPU has no room for two of the largest."""
    made = []
    plain = shapes.FilledEngine.new_cache

    def watched(engine, *sizes):
        cache = plain(engine, *sizes)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(shapes.FilledEngine, "new_cache", watched)
    pair, case = shapes.pair_of(models, compiled=False), Case(40, 2)
    with steady():
        shapes.speculative_rounds(pair, case, 3, SyntheticAcceptance([0.5]), rounds=2, seed=0)
        shapes.forward_seconds(pair.target, case, (1, 2), 1)
        shapes.draft_seconds(pair.drafter, case, 1)
        shapes.step_seconds(pair, case, 2)
        assert len(made) == 5 and not any(cache() for cache in made)


def test_forwards_of_every_width_and_steps_are_timed(pair):
    case = Case(40, 2)
    found = shapes.forward_seconds(pair.target, case, (1, 2, 5), 2)
    assert list(found) == [1, 2, 5] and all(0 < seconds < 1 for seconds in found.values())
    assert 0 < shapes.draft_seconds(pair.drafter, case, 3) < 1
    assert 0 < shapes.step_seconds(pair, case, 3) < 1


# ---- figures ----


def row(repeat=0, mode="eager", o=0.25, batch=2):
    """A repeat in which a step costs 10, a forward of width w 8 + w / 4, a draft step 1, the rest of a round 10 o."""
    rounds = []
    for length in decode_gpu.LENGTHS:
        seconds = 4 * (length + 8 + (length + 1) / 4 + 10 * o)
        rounds.append(Rounds(length, 4, seconds, 4 * batch * 3))
    forwards = {width: 8 + width / 4 for width in range(1, 17)}
    return Row(1024, batch, mode, repeat, 500, 10.0, forwards, 1.0, rounds)


def test_costs_and_speed_ups_are_read_off_the_rows():
    found = costs_of([row(0), row(1)])
    assert found["overhead_o"].value == pytest.approx(0.25) and found["c"].value == pytest.approx(0.1)
    assert found["v_16"].value == pytest.approx(12 / 8.25) and found["tau_k5"].value == pytest.approx(3)
    assert found["speedup_k3"].value == pytest.approx(3 / ((3 + 9 + 2.5) / 10))
    for length in decode_gpu.LENGTHS:  # the model is right where o is the same for all lengths
        assert found[f"predicted_speedup_k{length}"] == pytest.approx(found[f"speedup_k{length}"].value)


def test_a_length_is_predicted_with_the_overhead_of_the_others():
    rows = [row(0)]
    at = decode_gpu.LENGTHS.index(5)
    slow = rows[0].rounds[at]
    rows[0].rounds[at] = Rounds(5, slow.rounds, 2 * slow.seconds, slow.tokens)
    found = costs_of(rows)
    assert found["predicted_speedup_k5"] == pytest.approx(2 * found["speedup_k5"].value)


def test_shares_are_of_the_bytes_that_must_be_read():
    found = shares([row(0), row(1)], bandwidth=100.0, sheet=200.0)
    assert found["roofline_share"].value == pytest.approx(0.5)
    assert found["bandwidth_share"].value == pytest.approx(0.25)
    assert found["roofline_share_forward"].value == pytest.approx(500 / 8.25 / 100)
    assert "bandwidth_share" not in shares([row(0)], 100.0, None)


def test_figures_without_a_suffix_are_of_the_compiled_path(monkeypatch):
    monkeypatch.setattr(decode_gpu, "bandwidths", lambda device, size: {"copy": 50.0, "read": 100.0})
    run = decode_gpu.Run(argparse.Namespace(device=CPU, quick=True))
    run.rows = [row(batch=1, o=0.5), row(mode="compiled", batch=1, o=0.125), row(mode="compiled", batch=4)]
    found = run.figures()
    assert found["overhead_o"].value == pytest.approx(0.125) and found["overhead_o_eager"].value == pytest.approx(0.5)
    assert found["overhead_o_b4"].value == pytest.approx(0.25)
    assert found["roofline_share_1k"].value == pytest.approx(0.5) and "roofline_share_1k_b4" in found
    run.rows = run.rows[:1]
    assert run.figures()["overhead_o"].value == pytest.approx(0.5)


# ---- the program ----


def asked(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["decode_gpu.py", *words])
    decode_gpu.main()


@pytest.fixture
def small(monkeypatch):
    """Two cases of a few forwards."""
    monkeypatch.setattr(decode_gpu, "CASES", (Case(1024, 1), Case(2048, 2)))
    monkeypatch.setattr(decode_gpu, "WIDTHS", decode_gpu.FEW_WIDTHS)
    monkeypatch.setattr(decode_gpu, "QUICK", {"repeats": 2, "steps": 2, "forwards": 1, "rounds": 2})


def test_it_ends_in_its_figures_and_keeps_its_rows(small, monkeypatch, tmp_path, capsys):
    asked(monkeypatch, "--quick", "--device", "cpu", "--output", str(tmp_path / "new" / "rows.json"))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"roofline_share_1k", "roofline_share_2k_b2", "v_6", "v_6_2k_b2", "speedup_k5_low"} <= set(last["figures"])
    kept = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert kept["figures"] == last["figures"] and len(kept["rows"]["rows"]) == 4


def test_what_was_measured_before_a_kill_is_kept(small, monkeypatch, tmp_path):
    plain = decode_gpu.draft_seconds

    def killed(engine, case, count):
        if case.batch == 2:
            raise KeyboardInterrupt
        return plain(engine, case, count)

    monkeypatch.setattr(decode_gpu, "draft_seconds", killed)
    with pytest.raises(SystemExit):
        asked(monkeypatch, "--quick", "--device", "cpu", "--output", str(tmp_path / "rows.json"))
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert kept["unfinished"] and "overhead_o_low" in kept["figures"]
    assert {each["batch"] for each in kept["rows"]["rows"]} == {1}


def test_what_time_or_memory_leave_out_is_said(small, monkeypatch, capsys):
    monkeypatch.setattr(decode_gpu, "free_bytes", lambda device: 0)
    asked(monkeypatch, "--quick", "--device", "cpu")
    assert "context 2k, batch 2: not measured, memory has no room" in capsys.readouterr().out
    monkeypatch.setattr(decode_gpu, "LAST_CASE", 0.0)
    asked(monkeypatch, "--quick", "--device", "cpu")
    assert "context 1k, batch 1: not measured, the time is up" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        asked(monkeypatch)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "needs an NVIDIA GPU" in error and len(error.splitlines()) == 1


def test_the_plan_needs_no_gpu_and_fits_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked(monkeypatch, "--plan")
    *cases, total = capsys.readouterr().out.splitlines()
    assert len(cases) == 1 + len(decode_gpu.CASES) and "target 15.0 GiB, drafter 2.3 GiB" in cases[0]
    assert all(int(line.split(" GiB")[0].split()[-1]) < 80 for line in cases[1:])
    assert int(total.split()[3]) < decode_gpu.LAST_REPEAT
