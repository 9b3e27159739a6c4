"""The acceptance head of SpecDec++: will the target accept the token that the drafter just drew?

A small network on the drafter's last hidden state (after the final norm) predicts P' = P(Y_i accepted | everything
before it was accepted); drafting stops when the predicted chance of a rejection so far, 1 - prod P'_i, exceeds a
threshold. The head never touches the output: it only decides when to ask the target.

Which state is read is part of the head, saved with it:

* `producing`: the state whose logits drew Y_i. Known at once, and it depends on the tokens before Y_i only; what it
  cannot know of Y_i itself comes from the features log q(Y_i) and `token`, a few learned numbers a vocabulary entry.
* `consumed`: the state after reading Y_i (the published form), known one drafter forward later.

`depth` residual blocks x <- x + SiLU(W x + b), then one logit; depth 0 is a linear probe. The published code repeats
one block object, so its blocks share their weights: `tied` reproduces that, untied is the default.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drafttrain.errors import UserError
from drafttrain.models.fingerprint import Fingerprint

# B drafted tokens (any batch), H hidden size of the drafter, F columns of scalar features

SCALARS = ("log_q", "entropy", "step")
FEATURES = (*SCALARS, "token")
_COLUMNS = 2  # columns that one scalar becomes
_SMALLEST = 1.2e-7  # float32 resolution at 1: probabilities closer to 0 cannot be told from it
MODEL_TYPE = "drafttrain_acceptance_head"


@dataclass
class AcceptanceHeadConfig:
    """Everything about a head that is not a weight; the whole of its config.json.

    It has what `transformers.Trainer` and its trackers ask of a model's config: attributes can be set on it, and it
    turns into a dict and JSON.

    Attributes:
        hidden_size: of the drafter.
        state, depth, tied, features: the network, see the module's docstring.
        w_acc, w_rej: loss weights that it was trained with; they distort P', `calibrated` undoes it.
        data, mixing: how training sequences were made; r of token mixing.
        token_rank: columns that the feature `token` becomes: a projection of the drafter's input embedding.
        embeddings: shape of those embeddings, (vocabulary, size); needed with that feature.
        sampling: decoding setting that the labels follow (temperature 0 is greedy).
        min_length, max_length, threshold: recommended limits of a round and h.
        calibrated: whether `score` inverts the loss weighting, so that it returns a probability that can be believed.
        target, drafter: fingerprints of the pair, None only for a head that was never trained.
    """

    hidden_size: int
    state: Literal["producing", "consumed"] = "producing"
    depth: int = 3
    tied: bool = False
    features: tuple[str, ...] = ("log_q", "entropy")
    token_rank: int = 16
    embeddings: tuple[int, int] | None = None
    w_acc: float = 1.0
    w_rej: float = 6.0
    data: str = "exact"
    mixing: float = 0.0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    min_length: int = 1
    max_length: int = 20
    threshold: float = 0.7
    calibrated: bool = False
    target: Fingerprint | None = None
    drafter: Fingerprint | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.features if name not in FEATURES]
        checks = {
            "depth": (0 <= self.depth <= 4, "between 0 (linear probe) and 4"),
            "w_acc": (self.w_acc > 0, "positive"),
            "w_rej": (self.w_rej > 0, "positive"),
            "state": (self.state in ("producing", "consumed"), "producing or consumed"),
            "data": (self.data in ("exact", "expected", "mixed", "rounds"), "exact, expected, mixed or rounds"),
            "features": (not unknown, f"made of {', '.join(FEATURES)}"),
            "embeddings": ("token" not in self.features or self.embeddings is not None, "given for the feature token"),
            "mixing": (0 <= self.mixing <= 1, "a probability"),
            "threshold": (0 <= self.threshold <= 1, "a probability"),
            "min_length": (1 <= self.min_length <= self.max_length, "between 1 and head.max_length"),
        }
        for name, (fine, rule) in checks.items():
            if not fine:
                raise UserError(f"head.{name} is {getattr(self, name)}, but it must be {rule}.")
        if self.data == "mixed" and self.state == "producing":
            # The producing state of Y sees the tokens before Y only: mixing would spoil it and save nothing.
            raise UserError("head.data mixed needs head.state consumed; for the producing state take exact or rounds.")
        if self.data == "expected" and self.state == "consumed":
            raise UserError("head.data expected needs head.state producing: the consumed state is of one token only.")
        # One order, whatever the recipe's: columns of the weights are laid out by it.
        self.features = tuple(name for name in FEATURES if name in self.features)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    def to_json_string(self) -> str:
        """Text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> AcceptanceHeadConfig:
        """Read what `to_json_string` wrote.

        Raises:
            ValueError: it is not the configuration of a head.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
            raise ValueError("not the configuration of an acceptance head")
        unknown = set(values) - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        for model in ("target", "drafter"):
            if values.get(model) is not None:
                values[model] = Fingerprint.from_dict(values[model])
        values["features"] = tuple(values["features"])
        values["embeddings"] = values.get("embeddings") and tuple(values["embeddings"])
        return cls(**values)


class AcceptanceHead(nn.Module):
    """The network.

    Example:
        >>> head = AcceptanceHead.load("runs/q/head", drafter=fingerprint)
        >>> head.score(hidden_BH, q_B, entropy_B)  # P' [B] float32
    """

    def __init__(self, config: AcceptanceHeadConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        distinct = min(config.depth, 1) if config.tied else config.depth
        self.blocks = nn.ModuleList(nn.Linear(size, size) for _ in range(distinct))
        self.output = nn.Linear(size, 1)
        if config.features:
            columns = sum(config.token_rank if name == "token" else _COLUMNS for name in config.features)
            # Features enter twice: into the blocks, to interact with the state, and straight into the logit, so that
            # a logistic regression on them alone is inside the family at any depth. Both start silent.
            self.feature_input = nn.Linear(columns, size, bias=False)
            self.feature_output = nn.Linear(columns, 1, bias=False)
            nn.init.zeros_(self.feature_input.weight)
            nn.init.zeros_(self.feature_output.weight)
        if "token" in config.features:
            vocabulary, width = config.embeddings
            self.token_input = nn.Linear(width, config.token_rank, bias=False)
            self.register_buffer("token_table", torch.zeros(vocabulary, config.token_rank))
        self._folded: _Folded | None = None
        self.calibrated = config.calibrated

    @property
    def state(self) -> Literal["producing", "consumed"]:
        """Which drafter state `score` wants."""
        return self.config.state

    @property
    def features(self) -> tuple[str, ...]:
        """What `score` reads besides the state; the decoder computes nothing else."""
        return self.config.features

    @property
    def calibrated(self) -> bool:
        """Whether `score` inverts the loss weighting: P = w P' / (1 - P' + w P'), which adds log w to the logit."""
        return self._calibrated

    @calibrated.setter
    def calibrated(self, on: bool) -> None:
        self._calibrated = on
        self._shift = math.log(self.config.w_rej / self.config.w_acc) if on else 0.0
        self._folded = None

    def forward(
        self,
        hidden_BH: Tensor,
        q_B: Tensor | None = None,
        entropy_B: Tensor | None = None,
        step_B: Tensor | None = None,
        embedding_BE: Tensor | None = None,
    ) -> Tensor:
        """Logits of P' as trained, [B].

        Args:
            hidden_BH, q_B, entropy_B, step_B: as in `score`.
            embedding_BE: the drafter's input embeddings of the drafted tokens, in place of the tokens themselves.
        """
        self._folded = None  # the weights are being trained
        x_BH = hidden_BH.to(self.output.weight.dtype)
        columns = self.scalar_columns((q_B, entropy_B, step_B))
        if "token" in self.config.features:
            columns.append(self.token_input(_given("token", embedding_BE).to(x_BH.dtype)))
        if columns:
            columns_BF = torch.cat(columns, dim=-1).to(x_BH.dtype)
            x_BH = x_BH + self.feature_input(columns_BF)
        for block in self._all_blocks():
            x_BH = x_BH + F.silu(block(x_BH))
        logit_B1 = self.output(x_BH)
        if columns:
            logit_B1 = logit_B1 + self.feature_output(columns_BF)
        return logit_B1.squeeze(-1)

    def score(
        self,
        hidden_BH: Tensor,
        q_B: Tensor | None = None,
        entropy_B: Tensor | None = None,
        step_B: Tensor | None = None,
        tokens_B: Tensor | None = None,
    ) -> Tensor:
        """Predicted acceptance P' of drafted tokens, computed in float32.

        The decoder calls this once per drafted token, so nothing here reads a value from the device, and operations are
        few: in a small model starting one costs more than its arithmetic.

        Args:
            hidden_BH: the drafter's last hidden state after its final norm; producing or consumed, as `config.state`.
            q_B: q(Y), needed when the head has the feature `log_q`; likewise the others.
            entropy_B: entropy of the q that drew Y, in nats.
            step_B: place of Y in its round, from 1.
            tokens_B: Y itself, int64.

        Returns:
            [B] float32 in (0, 1); with `calibrated` the loss weighting is inverted.

        Raises:
            ValueError: a feature that the head reads was not given.
        """
        folded = self._folded or self._fold()
        columns = self.scalar_columns((q_B, entropy_B, step_B))
        if "token" in self.config.features:
            columns.append(self.token_table[_given("token", tokens_B)])
        input_BI = torch.cat((hidden_BH, *columns), dim=-1).to(folded.first_RI.dtype)
        z_BR = F.linear(input_BI, folded.first_RI, folded.first_bias_R)
        logit_B = z_BR[:, -1]
        if folded.blocks:
            added_BH = F.silu(z_BR[:, :-1])
            if len(folded.blocks) > 1:
                x_BH = input_BI[:, : self.config.hidden_size]
                if columns:
                    x_BH = x_BH + F.linear(input_BI[:, self.config.hidden_size :], folded.columns_HF)
                for block in folded.blocks[1:]:
                    added_BH = added_BH + F.silu(F.linear(x_BH + added_BH, *block))
            logit_B = torch.addmv(logit_B, added_BH, folded.output_H)
        return torch.sigmoid(logit_B)

    def settle(self, embeddings_VE: Tensor) -> AcceptanceHead:
        """Make the head ready to score without the drafter: look the feature `token` up in a table from now on.

        Args:
            embeddings_VE: the drafter's input embeddings.
        """
        if "token" in self.config.features:
            weight = self.token_input.weight
            with torch.no_grad():
                self.token_table.copy_(embeddings_VE.to(weight.device, weight.dtype) @ weight.T)
        return self

    def _all_blocks(self) -> list[nn.Linear]:
        return list(self.blocks) * (self.config.depth if self.config.tied else 1)

    @torch.no_grad()
    def _fold(self) -> _Folded:
        """Weights as `score` takes them, float32."""
        blocks = [(block.weight.detach().float(), block.bias.detach().float()) for block in self._all_blocks()]
        output_1H = self.output.weight.detach().float()
        first_RI = torch.cat([*(weight for weight, _ in blocks[:1]), output_1H])
        first_bias_R = torch.cat([*(bias for _, bias in blocks[:1]), self.output.bias.float() + self._shift])
        columns_HF = None
        if self.config.features:
            columns_HF = self.feature_input.weight.detach().float()
            columns_RF = first_RI @ columns_HF
            columns_RF[-1] += self.feature_output.weight.float()[0]
            first_RI = torch.cat([first_RI, columns_RF], dim=1)
        self._folded = _Folded(blocks, output_1H[0], first_RI, first_bias_R, columns_HF)
        return self._folded

    def _apply(self, *args: Any, **kwargs: Any) -> AcceptanceHead:
        self._folded = None  # moved or converted
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's."""
        self._folded = None
        return super().load_state_dict(*args, **kwargs)

    def scalar_columns(self, scalars: Sequence[Tensor | None]) -> list[Tensor]:
        """Scalar features (q, entropy, step) as columns, [B, 2] of each that the head reads.

        Raises:
            ValueError: one that it reads is None.
        """
        read = [pair for pair in zip(SCALARS, scalars, strict=True) if pair[0] in self.config.features]
        return [_COLUMN_MAKERS[name](_given(name, value)) for name, value in read]

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json; `checkpoint.save_checkpoint` makes it atomic."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(self.config.to_json_string(), encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        target: Fingerprint | None = None,
        drafter: Fingerprint | None = None,
        accept_new_target: bool = False,
        device: torch.device | str = "cpu",
    ) -> AcceptanceHead:
        """Read a head for use (float32, frozen).

        Args:
            folder: what `save_pretrained` wrote.
            target, drafter: the models it will stand beside; None does not check.
            accept_new_target: allow other weights of the same architecture and tokenizer.

        Raises:
            UserError: missing or damaged files, or the head was trained for another pair.
        """
        folder = Path(folder)
        config = load_config(folder)
        for what, recorded, present in (("target", config.target, target), ("drafter", config.drafter, drafter)):
            if recorded is not None and present is not None:
                recorded.require(
                    present,
                    f"the head in {folder} was trained for one {what}",
                    accept_new_target,
                    remedy="train a head for this pair with train_head.py",
                )
        head = cls(config)
        try:
            head.load_state_dict(load_file(folder / "model.safetensors"))
        except FileNotFoundError:
            raise UserError(f"{folder / 'model.safetensors'} is missing; train the head again.") from None
        except (SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder / 'model.safetensors'} is damaged ({reason}); train the head again.") from None
        return head.float().eval().requires_grad_(False).to(device)


def load_config(folder: str | os.PathLike[str]) -> AcceptanceHeadConfig:
    """The configuration of a saved head.

    Raises:
        UserError: no head there, or its configuration is damaged.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"there is no acceptance head in {folder} (no config.json); train one with train_head.py.")
    try:
        return AcceptanceHeadConfig.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not the configuration of an acceptance head ({error}).") from None


@dataclass(frozen=True)
class _Folded:
    """A head's weights as `score` takes them: one matrix reads the state and the features.

    Attributes:
        blocks: weight and bias of every block.
        output_H: of the logit.
        first_RI, first_bias_R: from input (state and columns) to the first block's and, last, the logit's own part.
        columns_HF: from the columns to what they add to the state, None without features.
    """

    blocks: list[tuple[Tensor, Tensor]]
    output_H: Tensor
    first_RI: Tensor
    first_bias_R: Tensor
    columns_HF: Tensor | None


def _given(name: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"this head reads {name}, which was not given")
    return value


def _log_q_columns(q_B: Tensor) -> Tensor:
    # log q and log(1 - q): of min(1, p / q) neither alone says enough. Rounded, q may exceed 1.
    return torch.stack((q_B, 1.0 - q_B), dim=-1).clamp_min_(_SMALLEST).log_()


def _entropy_columns(entropy_B: Tensor) -> Tensor:
    return torch.stack((entropy_B, (entropy_B + _SMALLEST).log()), dim=-1)


def _step_columns(step_B: Tensor) -> Tensor:
    return torch.stack((1.0 / step_B, step_B.log()), dim=-1)


_COLUMN_MAKERS = {"log_q": _log_q_columns, "entropy": _entropy_columns, "step": _step_columns}
