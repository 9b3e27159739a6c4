"""The acceptance head: its arithmetic, its two ways to compute, its files, and whom it stands beside."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from drafttrain.errors import UserError
from drafttrain.models.acceptance_head import FEATURES, SCALARS, AcceptanceHead, AcceptanceHeadConfig, load_config
from drafttrain.models.fingerprint import Fingerprint
from drafttrain.training.calibration import invert_loss_weight

TARGET = Fingerprint("t", "a", "w")
DRAFTER = Fingerprint("t", "b", "w")


def make(hidden_size=8, seed=0, **settings) -> AcceptanceHead:
    torch.manual_seed(seed)
    head = AcceptanceHead(AcceptanceHeadConfig(hidden_size, **settings))
    for parameter in head.parameters():  # the silent features must speak here
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def inputs(rows=5, hidden_size=8):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, hidden_size, generator=generator)
    q = torch.rand(rows, generator=generator)
    entropy = 2 * torch.rand(rows, generator=generator)
    return hidden, q, entropy, torch.arange(1, rows + 1)


def test_untied_blocks_are_the_published_recurrence():
    head = make(depth=2, features=())
    x = hidden = inputs()[0]
    for block in head.blocks:
        x = x + F.silu(x @ block.weight.T + block.bias)
    assert torch.allclose(head(hidden), (x @ head.output.weight.T + head.output.bias)[:, 0], atol=1e-6)


def test_tied_blocks_repeat_one_matrix():
    head = make(depth=3, tied=True, features=())
    assert len(head.blocks) == 1
    x = hidden = inputs()[0]
    for _ in range(3):
        x = x + F.silu(head.blocks[0](x))
    assert torch.allclose(head(hidden), head.output(x)[:, 0], atol=1e-6)


def test_the_published_size_is_one_block_and_the_output():
    with torch.device("meta"):
        head = AcceptanceHead(AcceptanceHeadConfig(4096, depth=3, tied=True, features=()))
    published = 16_789_506  # two logits under a softmax; one logit under a sigmoid saves a row of 4096 and a bias
    assert sum(p.numel() for p in head.parameters()) == published - 4097


def test_depth_zero_is_a_linear_probe():
    head = make(depth=0, features=())
    hidden = inputs()[0]
    both = head(hidden) + head(-hidden)
    assert torch.allclose(both, 2 * head.output.bias.expand(5), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("features", [(), ("log_q",), ("step",), SCALARS])
@pytest.mark.parametrize("tied", [False, True])
def test_scoring_equals_the_training_forward(rows, depth, features, tied):
    head = make(depth=depth, features=features, tied=tied)
    arguments = inputs(rows)
    scores = head.score(*arguments)
    assert scores.shape == (rows,)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert torch.allclose(scores, torch.sigmoid(head(*arguments)), atol=1e-6)


def test_scores_of_half_precision_states_are_computed_in_float32():
    head = make(depth=2)
    hidden, q, entropy, _ = inputs()
    half = hidden.bfloat16()
    scores = head.score(half, q.double(), entropy)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, head.score(half.float(), q, entropy), atol=1e-6)


def test_scores_follow_the_weights_through_training_loading_and_moves():
    head = make(depth=1)
    arguments = inputs()
    before = head.score(*arguments)
    step = torch.optim.SGD(head.parameters(), lr=0.1)
    head(*arguments).sum().neg().backward()
    step.step()
    after = head.score(*arguments)
    assert (after > before).all()
    head.double()
    assert torch.allclose(head.score(*arguments), after, atol=1e-6)
    head.load_state_dict(make(depth=1).state_dict())
    assert torch.allclose(head.score(*arguments), before, atol=1e-6)


def test_calibrated_scores_invert_the_loss_weight():
    head = make(w_rej=6.0, w_acc=2.0)
    raw = head.score(*inputs())
    head.calibrated = True
    expected = invert_loss_weight(raw.double().numpy(), 2.0, 6.0)
    assert head.score(*inputs()).double().numpy() == pytest.approx(expected, abs=1e-6)
    head.calibrated = False
    assert torch.equal(head.score(*inputs()), raw)


def test_certain_and_impossible_tokens_have_finite_scores():
    head = make(features=SCALARS)
    hidden = inputs(4)[0]
    q = torch.tensor([1.0 + 1e-6, 1.0 - 1e-7, 1e-35, 0.0])
    entropy = torch.tensor([0.0, 1e-30, 5.0, 0.0])
    step = torch.tensor([1, 2, 1000, 1])
    assert torch.isfinite(head.score(hidden, q, entropy, step)).all()
    assert torch.isfinite(head(hidden, q, entropy, step)).all()


def test_huge_states_saturate_without_warning(recwarn):
    head = make(depth=1)
    scores = head.score(1e4 * inputs()[0], *inputs()[1:])
    assert ((scores >= 0) & (scores <= 1)).all()
    assert not recwarn.list


def test_confident_tokens_stay_apart():
    head = make(features=("log_q",), depth=0)
    with torch.no_grad():
        head.output.weight.zero_()
        head.feature_output.weight.copy_(torch.tensor([[0.25, -0.25]]))
    q = torch.tensor([0.9, 0.99, 0.999, 0.9999], dtype=torch.float64)
    scores = head.score(torch.zeros(4, 8), q.float())
    assert (scores.diff() > 0.02).all()


@pytest.mark.parametrize("features", [("token",), ("log_q", "token"), FEATURES])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_settled_head_scores_tokens_as_it_was_trained_on_their_embeddings(features, rows):
    head = make(features=features, embeddings=(11, 5), token_rank=3)
    embeddings = 0.3 * torch.randn(11, 5, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([7, 0, 10, 7])[:rows]
    trained = torch.sigmoid(head(*inputs(rows), embeddings[tokens]))
    head.settle(embeddings)
    assert torch.allclose(head.score(*inputs(rows), tokens), trained, atol=1e-6)
    assert not torch.equal(head.score(*inputs(rows), (tokens + 1) % 11), head.score(*inputs(rows), tokens))


def test_a_missing_feature_is_named():
    head = make(features=("log_q", "entropy"))
    hidden, q, _, _ = inputs()
    with pytest.raises(ValueError, match="entropy"):
        head.score(hidden, q)
    with pytest.raises(ValueError, match="log_q"):
        head(hidden)
    with pytest.raises(ValueError, match="token"):
        make(features=("token",), embeddings=(3, 2)).score(hidden)


def test_no_rows_still_give_gradients_of_zero():
    head = make(depth=2, features=FEATURES, embeddings=(3, 2))
    empty = torch.empty(0)
    head(torch.empty(0, 8), empty, empty, empty, torch.empty(0, 2)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_features_have_one_order_whatever_the_recipe_says():
    assert AcceptanceHeadConfig(8, features=("entropy", "log_q")).features == ("log_q", "entropy")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"depth": 5}, "depth"),
        ({"depth": -1}, "depth"),
        ({"w_rej": 0.0}, "w_rej"),
        ({"state": "consuming"}, "state"),
        ({"features": ("log_p",)}, "log_p"),
        ({"threshold": 1.5}, "threshold"),
        ({"min_length": 9, "max_length": 4}, "min_length"),
        ({"mixing": -0.1}, "mixing"),
        ({"state": "producing", "data": "mixed"}, "consumed"),
        ({"features": ("token",)}, "embeddings"),
    ],
)
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(UserError, match=named):
        AcceptanceHeadConfig(8, **settings)


CONFIGS = [
    {"state": state, "depth": depth, "tied": tied, "features": features}
    for (state, depth, tied), features in itertools.product(
        [("producing", 0, False), ("consumed", 3, True), ("producing", 2, False)], [(), ("log_q", "step")]
    )
]


@pytest.mark.parametrize("settings", CONFIGS)
def test_a_saved_head_scores_the_same(tmp_path, settings):
    config = {"w_rej": 3.0, "sampling": {"temperature": 0.7}, "target": TARGET, "drafter": DRAFTER}
    head = make(**settings, **config)
    head.save_pretrained(tmp_path)
    loaded = AcceptanceHead.load(tmp_path, target=TARGET, drafter=DRAFTER)
    assert loaded.config == head.config
    assert torch.equal(loaded.score(*inputs()), head.score(*inputs()))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training


def test_a_saved_head_knows_tokens_without_the_drafter(tmp_path):
    head = make(features=("log_q", "token"), embeddings=(11, 5)).settle(torch.randn(11, 5))
    head.save_pretrained(tmp_path)
    tokens = torch.tensor([3, 1, 4, 1, 5])
    loaded = AcceptanceHead.load(tmp_path)
    assert loaded.config == head.config
    assert torch.equal(loaded.score(*inputs(), tokens), head.score(*inputs(), tokens))


def test_a_calibrated_head_is_calibrated_when_loaded(tmp_path):
    head = make(calibrated=True)
    head.save_pretrained(tmp_path)
    assert torch.equal(AcceptanceHead.load(tmp_path).score(*inputs()), head.score(*inputs()))


def test_a_head_is_refused_beside_another_drafter(tmp_path):
    make(target=TARGET, drafter=DRAFTER).save_pretrained(tmp_path)
    tuned = replace(DRAFTER, weights="other")
    with pytest.raises(UserError, match=r"(?s)drafter.*weights differ.*train_head.*--accept-new-target") as refusal:
        AcceptanceHead.load(tmp_path, target=TARGET, drafter=tuned)
    assert "\n" not in str(refusal.value)
    AcceptanceHead.load(tmp_path, target=TARGET, drafter=tuned, accept_new_target=True)
    with pytest.raises(UserError, match="architecture"):
        AcceptanceHead.load(tmp_path, drafter=replace(DRAFTER, architecture="x"), accept_new_target=True)
    with pytest.raises(UserError, match="target"):
        AcceptanceHead.load(tmp_path, target=replace(TARGET, weights="x"), drafter=DRAFTER)


def test_missing_and_damaged_files_are_told_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no acceptance head"):
        AcceptanceHead.load(tmp_path)
    make().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        AcceptanceHead.load(tmp_path)
    make(depth=1).save_pretrained(tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="damaged"):
        AcceptanceHead.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="missing"):
        AcceptanceHead.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}', '{"model_type": "drafttrain_acceptance_head"}'])
def test_a_foreign_configuration_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(tmp_path)


def test_unknown_keys_of_a_configuration_are_refused(tmp_path):
    values = json.loads(AcceptanceHeadConfig(8).to_json_string()) | {"dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="dropout"):
        load_config(tmp_path)
