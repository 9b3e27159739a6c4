"""Training from nothing: the schedule, the optimizer and a run that is cut short."""

import numpy as np
import pytest
import torch

from drafttrain.errors import UserError
from drafttrain.recipe import PretrainConfig
from drafttrain.training.muon import MuonAdamW
from drafttrain.training.pretrain import _stages, train, warmup_stable_decay


def test_the_rate_rises_stays_and_falls():
    rates = [warmup_stable_decay(step, warmup=10, decay=20, total=100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[100] == 0.0
    assert all(rate == 1.0 for rate in rates[10:80])
    assert rates == sorted(rates[:10]) + rates[10:80] + sorted(rates[80:], reverse=True)


def test_a_longer_run_begins_as_the_shorter_one():
    assert [warmup_stable_decay(s, 10, 20, 100) for s in range(80)] == [
        warmup_stable_decay(s, 10, 20, 500) for s in range(80)
    ]


def test_muon_takes_the_inner_matrices_only(tiny_target):
    optimizer = MuonAdamW(tiny_target, learning_rate=0.01)
    muon, adamw = ({id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    assert id(tiny_target.model.layers[0].mlp.up_proj.weight) in muon
    assert id(tiny_target.get_input_embeddings().weight) in adamw and not muon & adamw
    assert len(muon | adamw) == len(list(tiny_target.parameters()))


def test_an_unknown_task_in_a_stage_is_one_sentence():
    stage = {"steps": 1, "tokens": 64, "lengths": {64: 1.0}, "mixture": {"recal": 1.0}}
    with pytest.raises(UserError, match="no task is called recal"):
        _stages([stage])
    with pytest.raises(UserError, match="unexpected keyword"):
        _stages([{**stage, "lenghts": {}}])


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("drafttrain.training.pretrain._compile", lambda model: None)
    monkeypatch.setattr("drafttrain.training.pretrain.PROBES", {})
    settings = PretrainConfig(
        model={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        stages=[{"steps": 6, "tokens": 256, "lengths": {256: 1.0}, "mixture": {"code": 1.0}}],
        warmup_steps=2,
        decay_steps=2,
        save_every=3,
    )
    finals = {}
    for name in ("whole", "killed"):
        corpus = tmp_path / name / "corpus"
        tiny_tokenizer.save_pretrained(corpus / "tokenizer")
        tokens = (np.arange(20_000) * 7 % 60 + 6).astype(np.uint16)
        np.save(corpus / "train.npy", tokens)
        np.save(corpus / "held_out.npy", tokens)
        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr("drafttrain.training.pretrain.Probe.on_step_end", _die_after(4))
                with pytest.raises(KeyboardInterrupt):
                    train(tmp_path / name, settings, _stages(settings.stages))
        finals[name], _ = train(tmp_path / name, settings, _stages(settings.stages))
    for name, weight in finals["whole"].state_dict().items():
        assert torch.equal(weight, finals["killed"].state_dict()[name]), name


def _die_after(step: int):
    def on_step_end(self, args, state, control, **_: object) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    return on_step_end
