"""`drafttrain export`: write the trained drafter for another decoder.

drafttrain export --config R --run D --to transformers
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

from drafttrain.config import Parsed, TargetConfig
from drafttrain.export import to_sglang, to_transformers, to_vllm
from drafttrain.export.advice import Advice, advise
from drafttrain.export.plain import compare_or_raise, comparison_rows, fit_vocabulary
from drafttrain.export.source import Source, exported_info, load_source
from drafttrain.models.checkpoint import refuse_foreign, save_checkpoint
from drafttrain.models.loading import load_model_config, max_context, vocabulary_size
from drafttrain.run_folder import RunFolder

CONSUMERS: dict[str, ModuleType] = {module.NAME: module for module in (to_transformers, to_vllm, to_sglang)}


def export(parsed: Parsed) -> Path:
    """Write the drafter as a plain folder, reload and compare it, and say how it is used.

    Returns:
        the folder.

    Raises:
        UserError: there is no drafter, no engine loads its kind, the folder is taken by something else, or the
            reloaded model differs.
    """
    recipe, run = parsed.recipe, RunFolder(parsed.run)
    consumer = CONSUMERS[recipe.export.to]
    folder = Path(recipe.export.output or run.path / "export" / consumer.NAME).absolute()
    refuse_foreign(folder)
    source = load_source(parsed)
    advice = advise(run, source.fingerprint)
    use = consumer.command(recipe.target, folder, advice)
    if parsed.plan:
        print(f"would write {source.path} to {folder} for {consumer.NAME} ({consumer.CLAIM})\n\n{use}")
        return folder
    run.record(parsed, "drafttrain export")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _write(folder, source, advice, consumer, recipe.target, run, use)
    _tell(folder, advice, consumer, use)
    return folder


def _write(
    folder: Path, source: Source, advice: Advice, consumer: ModuleType, target: TargetConfig, run: RunFolder, use: str
) -> None:
    model = copy.deepcopy(source.original)
    consumer.prepare(model, advice)
    if fit_vocabulary(model, _target_vocabulary(target)):
        print(f"the vocabulary was padded or cut to the target's {vocabulary_size(model)} entries.")
    info = exported_info(source, consumer.NAME, advice.tokens, _card(consumer, advice, use))
    rows = comparison_rows(run, 1 + max(source.tokenizer.get_vocab().values()), max_context(model))

    def check(written: Path) -> None:
        found = compare_or_raise(source.original, written, rows)
        print(
            f"reloaded and compared on {found.tokens} tokens: largest logit difference {found.largest:.2g}, "
            f"total variation {found.total_variation:.2g}."
        )

    save_checkpoint(folder, model, source.tokenizer, info, check)


def _target_vocabulary(target: TargetConfig) -> int:
    """Rows of the target's embedding, from its config alone."""
    config = load_model_config(target.path, target.revision, target.trust_remote_code)
    return config.get_text_config().vocab_size


def _card(consumer: ModuleType, advice: Advice, use: str) -> str:
    """The part of the model card that says how the export is used."""
    language = "python" if consumer is to_transformers else "bash"
    return (
        f"## With {consumer.NAME}\n\n{consumer.CLAIM.capitalize()}.\n\n```{language}\n{use}\n```\n\n"
        f"Tokens a round: {advice.tokens}, {advice.reason}."
    )


def _tell(folder: Path, advice: Advice, consumer: ModuleType, use: str) -> None:
    print(f"{folder} is for {consumer.NAME}: {consumer.CLAIM}.")
    print(f"tokens a round: {advice.tokens}, {advice.reason}.")
    if advice.verdict:
        print(f"the report's verdict: {advice.verdict}")
    print(f"\n{use}")
