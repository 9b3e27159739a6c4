"""The plain Hugging Face folder that every consumer reads: written aside, reloaded, compared, then moved into place."""

# B batch, T time, V vocabulary

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from drafttrain.errors import UserError
from drafttrain.models.checkpoint import INFO, CheckpointInfo, save_checkpoint
from drafttrain.models.loading import load_drafter, vocabulary_size
from drafttrain.records import iter_records
from drafttrain.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS, _ROW_TOKENS = 4, 256
_MOST_TV_SAME, _MOST_TV_MERGED = 1e-4, 1e-2
"""Largest total variation distance to the original, mean over tokens: of a copy, and where LoRA was rounded in."""


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


def write_checked(
    folder: Path, model: PreTrainedModel, original: nn.Module, tokenizer: Any, info: CheckpointInfo, rows: Tensor
) -> Comparison:
    """Write a model, reload it and compare it with the original; only then does it get its name.

    Args:
        folder: final place; an older export there is replaced.
        model: to be written, plain.
        original: what its logits are compared with.
        tokenizer: written beside it.
        info: for drafttrain.json and the model card.
        rows: token ids [B, T] to compare on.

    Raises:
        UserError: something that is no export of ours stands there, or the reloaded model computes something else.
    """
    refuse_foreign(folder)
    aside = folder.parent / f".unchecked-{folder.name}-{os.getpid()}"
    try:
        written = save_checkpoint(aside / folder.name, model, tokenizer, info)
        found = compare(original, load_drafter(str(written)).model, rows)
        bound = _MOST_TV_SAME if model.dtype == original.dtype and not _has_lora(original) else _MOST_TV_MERGED
        if not found.total_variation <= bound:  # NaN is refused too
            raise UserError(
                f"the export of {folder.name} reloads with other logits (total variation "
                f"{found.total_variation:.2g} > {bound:g} on {found.tokens} tokens); nothing was written."
            )
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(written, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return found


def refuse_foreign(folder: Path) -> None:
    """Refuse to replace what this program did not write.

    Raises:
        UserError: names it.
    """
    if folder.exists() and not (folder / INFO).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no export of drafttrain; move it away or choose another --output.")


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


def _has_lora(model: nn.Module) -> bool:
    from drafttrain.models.drafters import is_lora

    return is_lora(model)
