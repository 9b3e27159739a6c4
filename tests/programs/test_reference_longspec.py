"""The committed LongSpec drafter belongs to the committed target and drafts better than one that learnt nothing."""

from pathlib import Path

import pytest
import torch

from drafttrain.config import BlockConfig, TargetConfig
from drafttrain.decoding.counts import Counts
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.longspec import LongSpec
from drafttrain.decoding.loop import Decoder
from drafttrain.evaluation.tasks import generate
from drafttrain.models.checkpoint import read_info
from drafttrain.models.loading import load_drafter, load_target
from drafttrain.models.longspec_new import new_block
from drafttrain.ops.sampling import Sampling

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"


@pytest.mark.slow
def test_the_reference_longspec_drafter_is_made_for_the_target_and_has_learnt():
    target = load_target(TargetConfig(path=str(CHECKPOINTS / "reference-target"), dtype="bfloat16"))
    path = CHECKPOINTS / "reference-longspec"
    assert read_info(path).target == target.fingerprint
    trained = load_drafter(str(path), "bfloat16").model
    untrained = new_block(target.model, BlockConfig(warm_start=11), torch.bfloat16, 0).requires_grad_(False)

    def count(text: str) -> int:
        return len(target.tokenizer(text, add_special_tokens=False)["input_ids"])

    examples = [generate("recall/single/prose", 10**9 + seed, 400, count, 1) for seed in range(4)]
    prompts = [
        target.tokenizer.apply_chat_template(
            [{"role": "user", "content": example.turns[0].user}], add_generation_prompt=True, return_dict=False
        )
        for example in examples
    ]
    taus = []
    for block in (trained, untrained):
        decoder = Decoder(Engine(target.model), LongSpec(block, length=4), Sampling(0.0), {2})
        taus.append(sum((done.counts for done in decoder.generate(prompts, 24)), Counts()).tau)
    assert taus[0] > 1.4 and taus[0] > taus[1] + 0.3
