"""The plain Hugging Face folder that every consumer reads: its vocabulary, and that it computes the same."""

# B batch, T time, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from drafttrain.errors import UserError
from drafttrain.models.loading import load_drafter, vocabulary_size
from drafttrain.records import iter_records
from drafttrain.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS, _ROW_TOKENS = 4, 256
_MOST_TV = 1e-4
"""Largest total variation distance to the original, mean over tokens."""


@dataclass(frozen=True)
class Comparison:
    """A reloaded model beside the original, on the same tokens.

    Attributes:
        tokens: compared.
        largest: largest difference of a logit.
        total_variation: mean over tokens of the distance of the distributions, in [0, 1]; the acceptance of drafted
            tokens can change by no more.
    """

    tokens: int
    largest: float
    total_variation: float


def compare_or_raise(original: nn.Module, written: Path, rows: Tensor) -> Comparison:
    """Reload a model and compare it with the original.

    Args:
        original: what its logits are compared with.
        written: the folder.
        rows: token ids [B, T] to compare on.

    Raises:
        UserError: the reloaded model computes something else.
    """
    found = compare(original, load_drafter(str(written)).model, rows)
    if not found.total_variation <= _MOST_TV:  # NaN is refused too
        raise UserError(
            f"the export reloads with other logits (total variation {found.total_variation:.2g} > {_MOST_TV:g} on "
            f"{found.tokens} tokens); nothing was written."
        )
    return found


@torch.no_grad()
def compare(original: nn.Module, reloaded: nn.Module, rows: Tensor) -> Comparison:
    """Logits of both models on the same tokens, over the vocabulary that both have.

    TV(p, q) = 1/2 sum_x |p(x) - q(x)| (Leviathan et al. 2023): acceptance changes by at most this.
    """
    rows = rows.to(next(original.parameters()).device)
    ours_BTV = original(input_ids=rows).logits.float()
    theirs_BTV = reloaded.to(rows.device)(input_ids=rows).logits.float()
    shared = min(ours_BTV.shape[-1], theirs_BTV.shape[-1])
    ours_BTV, theirs_BTV = ours_BTV[..., :shared], theirs_BTV[..., :shared]
    distance_BT = 0.5 * (ours_BTV.softmax(-1) - theirs_BTV.softmax(-1)).abs().sum(-1)
    return Comparison(rows.numel(), (ours_BTV - theirs_BTV).abs().max().item(), distance_BT.mean().item())


def comparison_rows(run: RunFolder, vocabulary: int, context: int) -> Tensor:
    """Tokens to compare on, [B, T]: answers of the run with their prompts where there are any, else drawn ones."""
    length = min(_ROW_TOKENS, context)
    texts = [ids for ids in _answers(run) if len(ids) >= length and max(ids) < vocabulary][:_ROWS]
    if texts:
        return torch.tensor([ids[-length:] for ids in texts])
    draw = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (_ROWS, length), generator=draw)


def fit_vocabulary(model: PreTrainedModel, size: int) -> bool:
    """Pad or cut the model's vocabulary to the target's.

    Families pad their embeddings to different sizes, and transformers, vLLM and SGLang all want both equal. New rows
    are the mean of the others: their logits stay far below the largest, and a token that the target gives no
    probability is rejected anyway.

    Returns:
        whether anything changed.
    """
    if vocabulary_size(model) == size:
        return False
    old = vocabulary_size(model)
    model.resize_token_embeddings(size, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        with torch.no_grad():
            layer.weight[old:] = layer.weight[:old].mean(0)
    return True


def _answers(run: RunFolder) -> Sequence[list[int]]:
    if not (run.responses / "manifest.json").exists():
        return []
    try:
        rows = iter_records(run.responses, "responses", columns=["prompt_ids", "response_ids"])
        return [row["prompt_ids"] + row["response_ids"] for row, _ in zip(rows, range(256), strict=False)]
    except UserError:  # unfinished or damaged responses are no reason not to export
        return []
