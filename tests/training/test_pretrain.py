"""Training from nothing: the schedule, the optimizer and a run that is cut short."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from drafttrain.config import DrafterConfig, TargetConfig, parse
from drafttrain.errors import UserError
from drafttrain.models.checkpoint import read_info
from drafttrain.models.drafters import build_drafter
from drafttrain.models.fingerprint import fingerprint
from drafttrain.models.loading import Loaded
from drafttrain.recipe import PretrainConfig, Recipe, StageConfig
from drafttrain.training.muon import MuonAdamW
from drafttrain.training.pretrain import (
    _note_settings,
    _take_weights,
    check_stages,
    load_pair,
    pretrain,
    train,
    warmup_stable_decay,
    weighted_loss,
)
from tests.conftest import build_llama, build_tokenizer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "reference" / "target.yaml"
SETTINGS = PretrainConfig(
    model={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    stages=[StageConfig(steps=6, tokens=256, lengths={256: 1.0}, mixture={"code": 1.0})],
    warmup_steps=2,
    decay_steps=2,
    save_every=3,
)


def save_corpus(run, tokenizer):
    tokenizer.save_pretrained(run / "corpus" / "tokenizer")
    tokens = (np.arange(20_000) * 7 % 60 + 6).astype(np.uint16)
    for name in ("train", "held_out"):
        np.save(run / "corpus" / f"{name}.npy", tokens)


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
    with pytest.raises(UserError, match="no task is called recal"):
        check_stages([StageConfig(lengths={64: 1.0}, mixture={"recal": 1.0})])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("stages: [{steps: x}]", "pretrain.stages"),
        ("stages: [{lenghts: {64: 1}}]", "did you mean pretrain.stages.lengths"),
        ("stages: [{steps: 0}]", "pretrain.stages.steps must be at least 1"),
        ("warmup_steps: -1", "pretrain.warmup_steps must be at least 0"),
        ("stages: [{mixture: {code: 1}}]", "lengths is {}, but it needs shares above 0"),
        ("stages: [{lengths: {64: 1}, mixture: {code: 0}}]", "mixture is {'code': 0"),
        ("model: {hiden_size: 3}", "pretrain.model: llama has no setting hiden_size; did you mean hidden_size"),
        ("model: {hidden_size: wide}", "pretrain.model makes no model"),
    ],
)
def test_settings_that_make_no_training_are_one_sentence(tmp_path, settings, sentence):
    stages = "" if settings.startswith("stages") else ", stages: [{lengths: {64: 1}, mixture: {code: 1}}]"
    (tmp_path / "bad.yaml").write_text(f"pretrain: {{{settings}{stages}}}")
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        pretrain(parse("", ("pretrain",), ["--config", str(tmp_path / "bad.yaml"), "--run", str(tmp_path), "--plan"]))
    assert "\n" not in str(error.value)


def test_the_plan_fails_on_what_the_run_would_fail_on(tmp_path):
    with pytest.raises(UserError, match=r"holds no corpus; run data_prep/corpus\.py"):
        pretrain(parse("", ("pretrain",), ["--config", str(RECIPE), "--run", str(tmp_path), "--plan"]))


def test_a_loss_that_is_no_number_ends_in_a_sentence(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("drafttrain.training.pretrain._compile", lambda model: None)
    monkeypatch.setattr(
        "drafttrain.training.pretrain.weighted_loss", lambda model, **_: model.lm_head.weight.sum() * float("nan")
    )
    save_corpus(tmp_path, tiny_tokenizer)
    with pytest.raises(UserError, match=r"the loss is nan at step 0; lower pretrain\.learning_rate"):
        train(tmp_path, SETTINGS)


def test_weights_to_start_from_are_taken_only_where_they_belong(tmp_path, tiny_target, tiny_tokenizer):
    def save(name, model, tokenizer):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    earlier = build_llama(len(tiny_tokenizer), seed=7)
    _take_weights(tiny_target, tiny_tokenizer, save("earlier", earlier, tiny_tokenizer))
    assert all(torch.equal(weight, earlier.state_dict()[name]) for name, weight in tiny_target.state_dict().items())
    foreign = save("foreign", earlier, build_tokenizer(280))
    with pytest.raises(UserError, match="foreign has another tokenizer than the corpus"):
        _take_weights(tiny_target, tiny_tokenizer, foreign)
    small = save("small", build_llama(len(tiny_tokenizer), hidden=16), tiny_tokenizer)
    with pytest.raises(UserError, match=r"another shape than pretrain\.model") as error:
        _take_weights(tiny_target, tiny_tokenizer, small)
    assert "\n" not in str(error.value)


def test_a_teacher_is_followed_where_the_text_is_not(tiny_target, tiny_tokenizer):
    torch.manual_seed(0)
    teacher, ids = build_llama(len(tiny_tokenizer), seed=7).requires_grad_(False), torch.randint(6, 200, (2, 24))
    weights, places = torch.rand(2, 24), torch.arange(24).expand(2, -1)
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].double().softmax(-1) for model in (teacher, tiny_target))
        divergence = (p * (p / q).log()).sum(-1)
    expected = (divergence * weights[:, 1:]).sum() / weights[:, 1:].sum()
    with torch.compiler.set_stance("force_eager"):
        loss = weighted_loss(tiny_target, ids, weights, places, teacher)
        assert weighted_loss(teacher, ids, weights, places, teacher).abs() < 1e-6
    torch.testing.assert_close(loss, expected.float())


def test_a_drafter_learns_its_target_and_is_saved_as_its_drafter(tmp_path, tiny_target, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("drafttrain.training.pretrain._compile", lambda model: None)
    monkeypatch.setattr("drafttrain.training.pretrain.PROBES", {})
    save_corpus(tmp_path, tiny_tokenizer)
    tiny_target.save_pretrained(tmp_path / "big")
    tiny_tokenizer.save_pretrained(tmp_path / "big")
    stages = [{"steps": 6, "tokens": 256, "lengths": {64: 1.0}, "mixture": {"code": 1.0}}]
    recipe = {
        "target": {"path": str(tmp_path / "big")},
        "drafter": {"kind": "cut", "layers": [0]},
        "pretrain": {"of": "drafter", "stages": stages, "learning_rate": 0.01, "warmup_steps": 1, "decay_steps": 2},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with torch.compiler.set_stance("force_eager"):
        pretrain(parse("", ("pretrain",), ["--config", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path)]))
    before, drafter = AutoModelForCausalLM.from_pretrained(tmp_path / "big"), read_info(tmp_path / "drafter")
    assert drafter.kind == "drafter" and drafter.target == fingerprint(before, tiny_tokenizer)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "drafter", dtype=torch.float32)
    cut = build_drafter(DrafterConfig(kind="cut", layers=[0]), Loaded(before, tiny_tokenizer, drafter.target, "big"))
    ids = torch.arange(6, 38)[None] * 7 % 60 + 6
    with torch.no_grad():
        p = before(ids).logits.softmax(-1)
        overlap = [torch.minimum(p, model(ids).logits.softmax(-1)).sum(-1).mean() for model in (cut, trained)]
    assert overlap[1] > overlap[0]


@pytest.mark.parametrize(
    ("vocabulary", "model", "sentence"),
    [(310, LlamaForCausalLM, "310 output rows and the target 300"), (300, GPT2LMHeadModel, "is a GPT2LMHeadModel")],
)
def test_a_drafter_that_cannot_be_compared_is_told(tmp_path, tiny_target, tiny_tokenizer, vocabulary, model, sentence):
    tiny_target.save_pretrained(tmp_path / "big")
    small = (
        build_llama(vocabulary)
        if model is LlamaForCausalLM
        else model(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=2))
    )
    small.save_pretrained(tmp_path / "small")
    for name in ("big", "small"):
        tiny_tokenizer.save_pretrained(tmp_path / name)
    drafter = DrafterConfig(kind="pretrained", path=str(tmp_path / "small"))
    with pytest.raises(UserError, match=sentence):
        load_pair(Recipe(target=TargetConfig(path=str(tmp_path / "big")), drafter=drafter))


def test_going_on_with_other_settings_is_said(tmp_path, capsys):
    _note_settings(tmp_path, SETTINGS, None)
    _note_settings(tmp_path, SETTINGS, tmp_path / "checkpoint-3")
    assert not capsys.readouterr().out
    _note_settings(tmp_path, dataclasses.replace(SETTINGS, learning_rate=1.0), tmp_path / "checkpoint-3")
    said = capsys.readouterr().out
    assert "checkpoint-3" in said and said.endswith("learning_rate\n") and said.count("\n") == 1


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("drafttrain.training.pretrain._compile", lambda model: None)
    monkeypatch.setattr("drafttrain.training.pretrain.PROBES", {})
    finals = {}
    for name in ("whole", "killed"):
        save_corpus(tmp_path / name, tiny_tokenizer)
        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr("drafttrain.training.pretrain.Probe.on_step_end", _die_after(4))
                with pytest.raises(KeyboardInterrupt):
                    train(tmp_path / name, SETTINGS)
            (tmp_path / name / "pretrain" / "checkpoint-4").mkdir()  # killed while saving
        finals[name], _ = train(tmp_path / name, SETTINGS)
    for name, weight in finals["whole"].state_dict().items():
        assert torch.equal(weight, finals["killed"].state_dict()[name]), name


def _die_after(step: int):
    def on_step_end(self, args, state, control, **_: object) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    return on_step_end
