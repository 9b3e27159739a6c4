"""The models of a run as the decoder wants them: engines by dtype, members by the names that expressions use."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from drafttrain.config import EvaluateConfig, Parsed, Recipe
from drafttrain.decoding.drafters import Drafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import build, parse_method, resolved
from drafttrain.decoding.longspec import BlockEngine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stop_strings import StopStrings
from drafttrain.decoding.synthetic import SyntheticAcceptance
from drafttrain.dialogue import end_tokens
from drafttrain.errors import UserError
from drafttrain.evaluation.environment import fast_dtype, free_bytes
from drafttrain.evaluation.methods import kind_of
from drafttrain.evaluation.schema import Pair
from drafttrain.models.acceptance_head import AcceptanceHead
from drafttrain.models.bigrams import BigramTable
from drafttrain.models.checkpoint import INFO, read_info
from drafttrain.models.loading import (
    DTYPES,
    Loaded,
    check_same_tokenizer,
    default_device,
    drafter_path,
    load_drafter,
    load_random,
    load_target,
    vocabulary_size,
)
from drafttrain.models.longspec import LongSpecDrafter
from drafttrain.ops.sampling import Sampling
from drafttrain.run_folder import RunFolder

HEAD_KIND = "acceptance_head"
BIGRAMS = "bigrams"


@dataclass
class Models:
    """A target, a drafter of its, acceptance heads, and the engines made of them so far.

    Attributes:
        target, drafter: as loaded, in the dtype that speed is measured in.
        heads: acceptance heads by the names of their folders, which expressions use; the run's own is "head".
        ends: tokens that end an answer.
        dtype: name of the dtype of both models.
        stop_strings: texts that end an answer, None for none.
        compiled: whether both models run as compiled graphs in that dtype.
        allow_code: whether methods may name classes from outside.
        synthetic: decides what is accepted of drafts, where speed alone is measured; answers then end at their limits.
        bigrams: the table of Max-Gram drafters, which expressions call "bigrams"; None where there is none.
        others: more models for expressions, by name.
    """

    target: Loaded
    drafter: Loaded
    heads: dict[str, AcceptanceHead]
    ends: frozenset[int]
    dtype: str
    stop_strings: StopStrings | None = None
    compiled: bool = False
    allow_code: bool = False
    synthetic: SyntheticAcceptance | None = None
    bigrams: BigramTable | None = None
    others: dict[str, Loaded] = field(default_factory=dict)
    _engines: dict[str, tuple[Engine | BlockEngine, ...]] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        """The pair's."""
        return self.target.tokenizer

    @property
    def vocabulary(self) -> int:
        """Token ids that the target can emit: those that the tokenizer knows too, not what pads its embedding."""
        return self._known(self.target.model)

    @property
    def device(self) -> torch.device:
        """Where the target reads its tokens."""
        return self.engines()[0].device

    @property
    def context(self) -> int:
        """Tokens that both models can read and write together; with none stated, as good as no limit."""
        return min(engine.max_positions or 1 << 30 for engine in self.engines())

    def engines(self, dtype: str | None = None) -> tuple[Engine, Engine | BlockEngine]:
        """Engines of target and drafter; in another dtype than the models' they are made of copies.

        Raises:
            UserError: there is no memory for the copies, or the models are quantized or partly offloaded.
        """
        return self._all_engines(dtype)[:2]

    def _all_engines(self, dtype: str | None) -> tuple[Engine | BlockEngine, ...]:
        """Of target, drafter and the others in their order."""
        dtype = dtype or self.dtype
        if dtype not in self._engines:
            models = [loaded.model for loaded in (self.target, self.drafter, *self.others.values())]
            if dtype != self.dtype:
                models = [_in_dtype(model, dtype, self.device) for model in models]
            self._engines[dtype] = self._made(models, self.compiled and dtype == self.dtype)
        return self._engines[dtype]

    @property
    def parameters(self) -> dict[str, int]:
        """Of every drafting model, by the name that expressions use."""
        return {name: _parameters(each.model) for name, each in {"drafter": self.drafter, **self.others}.items()}

    @property
    def reads_target(self) -> bool:
        """Whether the drafter is a LongSpec drafter, which nothing can be said of without its target."""
        return isinstance(self.drafter.model, LongSpecDrafter)

    @property
    def chain(self) -> str:
        """The constructor that drafts a chain with this drafter."""
        return "LongSpec" if self.reads_target else "Model"

    def _made(self, models: Sequence[Any], compiled: bool) -> tuple[Engine | BlockEngine, ...]:
        target = Engine(models[0], self._known(models[0]), compiled=compiled).checked()
        engines: list[Engine | BlockEngine] = [target]
        for model in models[1:]:
            if isinstance(model, LongSpecDrafter):
                engines.append(BlockEngine(model, target))
            else:
                engines.append(Engine(model, self._known(model), compiled=compiled).checked())
        return tuple(engines)

    def _known(self, model: Any) -> int:
        """Token ids of the tokenizer that a model has logits for: a drafter may have fewer than its target."""
        return min(1 + max(self.tokenizer.get_vocab().values()), vocabulary_size(model))

    def release(self, dtype: str) -> None:
        """Forget the engines of a dtype that was only needed for a check."""
        if dtype != self.dtype:
            self._engines.pop(dtype, None)

    def members(self, dtype: str | None = None) -> dict[str, Any]:
        """What the names in a method expression stand for."""
        _, drafter, *others = self._all_engines(dtype)
        tables = {} if self.bigrams is None else {BIGRAMS: self.bigrams}
        return {"drafter": drafter, **dict(zip(self.others, others, strict=True)), **tables, **self.heads}

    def decoder(self, method: str, sampling: Sampling, seed: int, dtype: str | None = None) -> Decoder:
        """A decoder for a method.

        Raises:
            UserError: the method is malformed or names a member that this run does not have.
        """
        drafter: Drafter | None = build(method, self.members(dtype), self.allow_code)
        target = self.engines(dtype)[0]
        if self.synthetic is not None:
            return Decoder(target, drafter, sampling, seed=seed, synthetic=self.synthetic if drafter else None)
        return Decoder(target, drafter, sampling, self.ends, seed, self.stop_strings)

    def canonical(self, method: str) -> str:
        """A method as reports write it. Raises as `decoder`."""
        build(method, self.members(), self.allow_code)
        return str(resolved(parse_method(method), self.allow_code))

    def describe(self, run: RunFolder, accepted_new_target: bool) -> Pair:
        """The pair's part of a report."""
        return Pair(
            self.target.path,
            self.target.fingerprint.to_dict(),
            self.drafter.path,
            self.drafter.fingerprint.to_dict(),
            {name: str(run.path / name) for name in self.heads},
            accepted_new_target,
            _parameters(self.target.model),
            _parameters(self.drafter.model),
            self.parameters,
        )


def load_models(parsed: Parsed) -> Models:
    """Load the pair of a recipe and check that the parts belong together.

    Raises:
        UserError: something is missing or damaged, tokenizers differ, drafter or head were made for another target,
            evaluate.methods has one that is malformed or names a class from outside that is not allowed, or synthetic
            acceptance is asked for in an impossible way.
    """
    recipe, run = parsed.recipe, RunFolder(parsed.run)
    synthetic = synthetic_of(recipe.evaluate)
    for method in recipe.evaluate.methods or []:  # whatever is wrong with them costs no loading
        resolved(parse_method(method), parsed.allow_code)
    dtype = speed_dtype(recipe)
    path = drafter_path(recipe, run)
    target_config = dataclasses.replace(recipe.target, dtype=dtype)
    if recipe.evaluate.random_weights:
        target = load_random(target_config, recipe.seed)
        drafter = load_random(dataclasses.replace(target_config, path=path, revision=None), recipe.seed + 1)
    else:
        target = load_target(target_config)
        drafter = load_drafter(path, dtype, recipe.target.trust_remote_code)
    check_same_tokenizer(target.tokenizer, drafter.tokenizer, path)
    if not recipe.evaluate.random_weights:
        check_made_for(path, target, parsed.accept_new_target)
    checks = {"target": target.fingerprint, "drafter": drafter.fingerprint}
    checks |= {"accept_new_target": parsed.accept_new_target, "device": drafter.model.device}
    heads = {name: AcceptanceHead.load(run.path / name, **checks) for name in head_names(run)}
    others = {name: load_other(name, path, heads, target, dtype) for name, path in recipe.evaluate.members.items()}
    bigrams = BigramTable.load(run.bigrams, target.fingerprint.tokenizer) if run.bigrams.exists() else None
    ends = end_tokens(target.tokenizer, getattr(target.model, "generation_config", None))
    stops = StopStrings(target.tokenizer, recipe.responses.stop) if recipe.responses.stop else None
    settings = {"compiled": recipe.evaluate.compile, "allow_code": parsed.allow_code, "synthetic": synthetic}
    return Models(target, drafter, heads, ends, dtype, stops, bigrams=bigrams, others=others, **settings)


def synthetic_of(config: EvaluateConfig) -> SyntheticAcceptance | None:
    """The synthetic acceptance that a recipe asks for, None for real acceptance.

    Raises:
        UserError: impossible rates, no method that drafts, or random weights without it.
    """
    if config.synthetic_acceptance is None:
        if config.random_weights:
            raise UserError(
                "evaluate.random_weights makes models whose drafts are never right; give rates to accept them at, e.g. "
                "--evaluate.synthetic_acceptance '[0.8, 0.7]'."
            )
        return None
    if config.methods is not None and all(kind_of(method) == "autoregressive" for method in config.methods):
        raise UserError("evaluate.synthetic_acceptance needs a method that drafts; add one to evaluate.methods.")
    return SyntheticAcceptance(config.synthetic_acceptance)


def load_other(name: str, path: str, heads: dict[str, AcceptanceHead], target: Loaded, dtype: str) -> Loaded:
    """A further model of a method.

    Raises:
        UserError: its name is taken or none, there is no such model, or its tokenizer is another.
    """
    if name in ("drafter", BIGRAMS, *heads) or not name.isidentifier():
        raise UserError(f"evaluate.members calls a model {name!r}, which is taken or no name; call it otherwise.")
    other = load_drafter(path, dtype, target.trust_remote_code)
    check_same_tokenizer(target.tokenizer, other.tokenizer, path)
    return other


def head_names(run: RunFolder) -> list[str]:
    """Folders of the run that hold an acceptance head, the run's own first."""
    found = [info.parent for info in sorted(run.path.glob(f"*/{INFO}")) if read_info(info.parent).kind == HEAD_KIND]
    return sorted((folder.name for folder in found), key=lambda name: (name != run.head.name, name))


def speed_dtype(recipe: Recipe) -> str:
    """The dtype that speed is measured in: as asked for, else as the target is served, else the fast one."""
    for dtype in (recipe.evaluate.dtype, recipe.target.dtype):
        if dtype != "auto":
            if dtype not in DTYPES:
                raise UserError(f"evaluate.dtype is {dtype}, but it must be auto or one of {', '.join(DTYPES)}.")
            return dtype
    return fast_dtype(default_device())


def check_made_for(path: str, target: Loaded, accept_new_target: bool) -> None:
    """Refuse a drafter that says it was distilled for another target.

    Raises:
        UserError: says which part differs.
    """
    if not (Path(path) / INFO).exists():
        return
    made_for = read_info(path).target
    if made_for is not None:
        made_for.require(
            target.fingerprint,
            f"the drafter in {path} was distilled for one target",
            accept_new_target,
            remedy="distil a drafter for this target",
        )


def _in_dtype(model: Any, dtype: str, device: torch.device) -> Any:
    if getattr(model, "is_quantized", False):
        raise UserError(f"a quantized target cannot be run in {dtype}.")
    if any(weight.is_meta for weight in model.parameters()):
        raise UserError(f"a target whose weights are partly offloaded to memory or disk cannot be run in {dtype}.")
    needed = _parameters(model) * DTYPES[dtype].itemsize
    if needed > 0.8 * free_bytes(device):
        raise UserError(f"a copy in {dtype} needs {needed / 2**30:.1f} GiB, more than is free.")
    copied = copy.deepcopy(model).to(DTYPES[dtype])
    if dtype == "float64" and not isinstance(model, LongSpecDrafter):
        copied.set_experts_implementation("eager")  # grouped products of experts know no float64
    return copied


def _parameters(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())
