"""Loading Hugging Face models: one way for target, drafters and stand-ins, with people's mistakes told in a sentence.

Safetensors only: no pickle is ever opened. A model's own Python code runs only when a flag asks for it.
"""

from __future__ import annotations

import errno
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from drafttrain.config import Recipe, TargetConfig, nearest
from drafttrain.distributed import local_rank
from drafttrain.errors import UserError
from drafttrain.models.checkpoint import restore_interrupted
from drafttrain.models.fingerprint import Fingerprint, fingerprint, tokenizer_hash
from drafttrain.run_folder import RunFolder

HTTPError = HfHubHTTPError.__bases__[0]
"""What the hub's HTTP client raises when a connection fails; the client differs between versions of huggingface_hub."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@dataclass(frozen=True)
class Loaded:
    """A model ready to use, with what identifies it and what it takes to load it again."""

    model: Any
    tokenizer: Any
    fingerprint: Fingerprint
    path: str
    revision: str | None = None
    trust_remote_code: bool = False


def load_target(config: TargetConfig) -> Loaded:
    """The target, in eval mode, without gradients, on this process's device unless `device_map` says otherwise.

    Raises:
        UserError: there is no such model, it has no safetensors, it is damaged, or it could not be downloaded.
    """
    model = load_causal_lm(
        config.path,
        dtype=config.dtype,
        device_map=config.device_map or {"": str(default_device())},
        quantization=config.quantization,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    model.requires_grad_(False)
    tokenizer = load_tokenizer(config.path, config.revision, config.trust_remote_code)
    prints = fingerprint(model, tokenizer)
    return Loaded(model, tokenizer, prints, config.path, config.revision, config.trust_remote_code)


def load_random(config: TargetConfig, seed: int) -> Loaded:
    """A model of the given shape with random weights: its folder needs config.json and a tokenizer alone.

    Args:
        config: path, dtype (auto is that of config.json), and at most one device.
        seed: of the weights.

    Raises:
        UserError: there is no such folder, or it is asked for quantized or on several devices.
    """
    if config.quantization is not None:
        raise UserError("random weights are not quantized; leave target.quantization out.")
    device = config.device_map or default_device()
    if isinstance(device, dict) or device in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise UserError("random weights are made on one device; set target.device_map to it, e.g. cuda:0.")
    shape = load_model_config(config.path, config.revision, config.trust_remote_code)
    dtype = _dtype(config.dtype)
    with _told(config.path):
        dtype = shape.dtype or torch.float32 if dtype == "auto" else dtype
        model = random_causal_lm(shape, dtype, torch.device(device), seed, config.trust_remote_code)
    tokenizer = load_tokenizer(config.path, config.revision, config.trust_remote_code)
    return Loaded(model, tokenizer, fingerprint(model, tokenizer), config.path, config.revision)


def random_causal_lm(
    config: Any, dtype: torch.dtype, device: torch.device, seed: int, trust_remote_code: bool = False
) -> Any:
    """A causal LM (or LongSpec drafter) with weights drawn as its architecture initialises them, in eval mode, frozen.

    They are made in their dtype on their device; no other copy ever exists, so a model may be as large as the device.
    """
    from transformers import AutoModelForCausalLM

    from drafttrain.models.longspec import LongSpecConfig, LongSpecDrafter

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), device:
        torch.manual_seed(seed)
        if isinstance(config, LongSpecConfig):
            return LongSpecDrafter._from_config(config, dtype=dtype).requires_grad_(False).eval()
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.requires_grad_(False).eval()


def drafter_path(recipe: Recipe, run: RunFolder) -> str:
    """The drafter of a run: the one named by drafter.path, else the one that the run trained.

    Raises:
        UserError: there is neither.
    """
    restore_interrupted(run.drafter)
    if recipe.drafter.path is not None and (recipe.drafter.kind != "pretrained" or not run.drafter.exists()):
        return recipe.drafter.path
    if run.drafter.exists():
        return str(run.drafter)
    raise UserError(
        f"there is no drafter in {run.drafter}; train one with train_drafter.py --run {run.path}, or name one with "
        "--drafter.path."
    )


def load_drafter(path: str, dtype: str = "auto", trust_remote_code: bool = False) -> Loaded:
    """A drafter to decode with: eval mode, without gradients, on this process's device. Raises as `load_target`."""
    model = AutoDrafter.from_pretrained(path, dtype, trust_remote_code, {"": str(default_device())})
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    prints = fingerprint(model, tokenizer)
    return Loaded(model.requires_grad_(False), tokenizer, prints, str(path), None, trust_remote_code)


class AutoDrafter:
    """Loads a drafter of any kind by what its folder says: a `LongSpecDrafter`, or a causal LM."""

    @staticmethod
    def from_pretrained(
        path: str | Path, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False, device_map: Any = None
    ) -> Any:
        """The model in eval mode; on the CPU when `device_map` is None. Raises as `load_target`."""
        from drafttrain.models.longspec import LongSpecConfig, LongSpecDrafter

        shape = load_model_config(path, trust_remote_code=trust_remote_code)
        kind = LongSpecDrafter if isinstance(shape, LongSpecConfig) else None
        return load_causal_lm(path, dtype, device_map, trust_remote_code=trust_remote_code, kind=kind)


def is_longspec(path: str | Path) -> bool:
    """Whether a folder holds a LongSpec drafter, told without importing anything."""
    file = Path(path).expanduser() / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type") == "longspec"
    except (OSError, ValueError, AttributeError):
        return False


def load_causal_lm(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    quantization: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    config: Any = None,
    kind: Any = None,
) -> Any:
    """A causal LM in eval mode, parameters as trainable as they are; on the CPU when `device_map` is None.

    Args:
        path: a folder or a hub id.
        dtype: auto (as stored) or a name in `DTYPES`.
        device_map: as in transformers.
        quantization: keys of a transformers quantization config with its `quant_method`.
        revision: of a hub model.
        trust_remote_code: let the model's own code run.
        config: a transformers config to use instead of the stored one.
        kind: class of the model; that of a causal LM by default.

    Raises:
        UserError: as `load_target`.
    """
    from transformers import AutoModelForCausalLM

    path = check_folder(path, weights=True)
    if kind is None and is_longspec(path):
        raise UserError(f"{path} is a LongSpec drafter, which reads its target and cannot stand alone.")
    extra = {} if config is None else {"config": config}
    if quantization is not None:
        extra["quantization_config"] = quantization_config(quantization)
    with _told(path):
        model, info = (kind or AutoModelForCausalLM).from_pretrained(
            path,
            dtype=_dtype(dtype),
            device_map=device_map,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"the weights of {path} lack {missing[0]} and {len(missing) - 1} more; get a complete copy.")
    return model.eval()


def load_model_config(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model, without its weights.

    Raises:
        UserError: there is none, it is damaged, or it could not be downloaded.
    """
    from transformers import AutoConfig

    path = check_folder(path, weights=False)
    with _told(path):
        return AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=trust_remote_code)


def load_tokenizer(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model; where it has no padding token, the end-of-sequence token pads.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    path = check_folder(path, weights=False)
    if Path(path).is_dir() and not _has_tokenizer(Path(path)):
        raise UserError(f"{path} has no tokenizer (tokenizer.json); copy the tokenizer of its model there.")
    with _told(path):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def default_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def max_context(model: nn.Module) -> int:
    """Longest sequence, in tokens, that the model was made for."""
    return model.config.get_text_config().max_position_embeddings


def vocabulary_size(model: nn.Module) -> int:
    """Width of the model's logits, padding included."""
    return model.get_output_embeddings().weight.shape[0]


def shared_vocabulary(target: nn.Module, drafter: nn.Module) -> int:
    """Number of leading token ids that both models have logits for.

    Vocabularies of one family are padded to different sizes (Qwen: 151,936 and 152,064); no text ever needs the
    padding, so both models' logits are cut to the shorter.
    """
    return min(vocabulary_size(target), vocabulary_size(drafter))


def check_same_tokenizer(target: Any, drafter: Any, drafter_path: str = "the drafter") -> None:
    """Refuse a drafter that numbers or splits text otherwise than the target.

    Raises:
        UserError: names the first token that differs.
    """
    if tokenizer_hash(target) == tokenizer_hash(drafter):
        return
    ours, theirs = target.get_vocab(), drafter.get_vocab()
    differing = sorted((index, token) for token, index in ours.items() if theirs.get(token) != index)
    if differing:
        index, token = differing[0]
        detail = f"token {token!r} is {index} in the target and {theirs.get(token, 'absent')} in the drafter"
    elif len(ours) != len(theirs):
        detail = f"{len(ours)} entries in the target, {len(theirs)} in the drafter"
    else:
        detail = "the same entries, but text is split differently"
    raise UserError(f"{drafter_path} has another tokenizer than the target ({detail}); take a drafter of its family.")


def quantization_config(settings: dict[str, Any]) -> Any:
    """A transformers quantization config from plain settings, chosen by `quant_method`.

    Raises:
        UserError: no or unknown method, unknown or impossible settings, or the library for it is not installed.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

    method = settings.get("quant_method")
    known = sorted(AUTO_QUANTIZATION_CONFIG_MAPPING)
    if method == "bitsandbytes":
        bits = "load_in_8bit" if settings.get("load_in_8bit") else "load_in_4bit"
        settings = {bits: True, **settings}
    elif method not in known:
        guess = nearest(str(method), known)
        raise UserError(
            f"target.quantization.quant_method is {method}; did you mean {guess}? Known: {', '.join(known)}."
        )
    try:
        config = AutoQuantizationConfig.from_dict(settings)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"target.quantization ({method}) cannot be used: {_one_line(error)}.") from None
    accepted = list(inspect.signature(type(config).__init__).parameters)
    for name in settings:  # most of these classes swallow what they do not know
        if name not in accepted and not hasattr(config, name):
            raise UserError(f"target.quantization: {method} has no {name}; did you mean {nearest(name, accepted)}?")
    return config


class _told:
    """Context: what goes wrong while opening a model becomes one sentence; bugs and full disks pass through."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> bool:
        from safetensors import SafetensorError

        if isinstance(error, OSError) and error.errno in _MENDABLE:
            return False
        local = Path(self.path).is_dir()
        if isinstance(error, SafetensorError):
            raise UserError(
                f"the weights in {self.path} are damaged or truncated ({_one_line(error)}); copy them again."
            )
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise UserError(
                f"{self.path} brings Python code of its own; read it, then pass --target.trust_remote_code true."
            ) from None
        if isinstance(error, ImportError):
            raise UserError(f"{self.path} needs a library that is not installed: {_one_line(error)}.") from None
        if isinstance(error, OSError | ValueError | RuntimeError | KeyError | AssertionError) and local:
            raise UserError(f"{self.path} cannot be loaded: {_one_line(error)}.") from error
        if isinstance(error, ValueError | OSError | HTTPError):
            raise UserError(
                f"{self.path} is no folder here and could not be got from the hub ({_one_line(error)}); check the name "
                "and the network and run again, what was downloaded is kept."
            ) from error
        return False


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        guess = nearest(dtype, ["auto", *DTYPES])
        raise UserError(f"dtype {dtype} is unknown; did you mean {guess}? Known: auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))


def check_folder(path: str | Path, weights: bool) -> str:
    """`path` as a string, refused when it is clearly no model; hub ids (owner/name, not there as a folder) pass."""
    folder = Path(path).expanduser()
    restore_interrupted(folder)
    if not folder.exists():
        looks_local = folder.is_absolute() or str(path).startswith(".") or len(folder.parts) != 2
        if looks_local:
            raise UserError(f"{path} does not exist; give the folder of a Hugging Face model or a hub id (owner/name).")
        return str(path)
    if not folder.is_dir():
        raise UserError(f"{path} is a file; give the folder of a Hugging Face model.")
    if not (folder / "config.json").exists():
        raise UserError(f"{path} is no Hugging Face model (no config.json); check the path.")
    if weights and not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        has = f"holds pickled weights only ({pickles[0]})" if pickles else "holds no weights"
        raise UserError(
            f"{path} {has}; this program reads safetensors only, so convert or copy model.safetensors there."
        )
    return str(folder)
