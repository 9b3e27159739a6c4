"""`drafttrain <verb>`: the library's verbs on the command line. No logic: each verb imports its function when asked.

drafttrain evaluate --config recipes/reference/pair.yaml --run runs/pair
drafttrain compare runs/a runs/b
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from drafttrain import __version__
from drafttrain.config import Parsed, nearest, parse
from drafttrain.errors import UserError, run_program

_PAIR = ("target", "drafter", "prompts", "responses")

UNLIKE = ("target", "prompts", "sampling", "hardware")
"""What two reports may differ in only when the person says so."""


def _evaluate(argv: Sequence[str]) -> None:
    parsed = _parse(_evaluate_help, "evaluate", (*_PAIR, "traces", "head", "evaluate", "context"), argv)
    from drafttrain.evaluation.command import evaluate

    evaluate(parsed)


def _tune(argv: Sequence[str]) -> None:
    parsed = _parse(_tune_help, "tune", (*_PAIR, "evaluate"), argv)
    from drafttrain.evaluation.tune import tune

    tune(parsed)


def _lossless(argv: Sequence[str]) -> None:
    aliases = {"--method": "--evaluate.methods+", "--answers": "--evaluate.answers"}
    sections = (*_PAIR, "head", "evaluate")
    parsed = _parse(_lossless_help, "lossless", sections, argv, aliases, default_run="runs/lossless")
    from drafttrain.evaluation.lossless import command

    command(parsed)


def _export(argv: Sequence[str]) -> None:
    aliases = {"--to": "--export.to", "--output": "--export.output"}
    parsed = _parse(_export_help, "export", ("target", "drafter", "export"), argv, aliases)
    from drafttrain.export.command import export

    export(parsed)


def _pretrain(argv: Sequence[str]) -> None:
    parsed = _parse(_pretrain_help, "pretrain", ("corpus", "pretrain"), argv)
    from drafttrain.training.pretrain import pretrain

    pretrain(parsed)


def _compare(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("drafttrain compare", description=_compare_help, allow_abbrev=False)
    parser.add_argument("a", type=Path, help="run folder or report.json, the baseline")
    parser.add_argument("b", type=Path, help="run folder or report.json compared with it")
    parser.add_argument(
        "--allow-unlike",
        choices=UNLIKE,
        nargs="+",
        default=[],
        metavar="WHAT",
        help=f"compare though these differ ({', '.join(UNLIKE)}); counts such as tau stay comparable",
    )
    parser.add_argument("--output", type=Path, help="write the comparison to this Markdown file too")
    arguments = parser.parse_args(argv)
    from drafttrain.evaluation.compare import compare

    compare(arguments.a, arguments.b, allow_unlike=frozenset(arguments.allow_unlike), output=arguments.output)


_evaluate_help = "Sweep lengths and thresholds by replay, really run the best, check the output, write the report."
_tune_help = "Find the fastest method for a pair: count hundreds by a cost model, run the best, write a recipe."
_lossless_help = "Check that every method emits what the target would: tokens in float64, distributions by chi-square."
_compare_help = "Pair two reports by prompt and bootstrap the differences."
_export_help = "Write the trained drafter for another decoder, reload and compare it before saying so."
_pretrain_help = "Train a target from scratch on the reference corpus."

VERBS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "evaluate": (_evaluate, _evaluate_help),
    "tune": (_tune, _tune_help),
    "lossless": (_lossless, _lossless_help),
    "compare": (_compare, _compare_help),
    "export": (_export, _export_help),
    "pretrain": (_pretrain, _pretrain_help),
}


def _parse(
    description: str,
    verb: str,
    sections: Sequence[str],
    argv: Sequence[str],
    aliases: dict[str, str] | None = None,
    default_run: str | None = None,
) -> Parsed:
    return parse(description, sections, argv, aliases, f"drafttrain {verb}", default_run)


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<10}{text}" for verb, (_, text) in VERBS.items())
    return (
        f"usage: drafttrain <verb> [options]\n\n{verbs}\n\n"
        "`drafttrain <verb> --help` shows the settings of a verb. The pipelines are programs of their own:\n"
        "data_prep/responses.py, drafttrain/train_drafter.py, data_prep/traces.py, drafttrain/train_head.py."
    )


@run_program
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `drafttrain` command.

    Raises:
        UserError: unknown verb.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(_usage())
    elif verb == "--version":
        print(f"drafttrain {__version__}")
    elif verb in VERBS:
        VERBS[verb][0](arguments[1:])
    else:
        guess = nearest(verb, list(VERBS))
        hint = f"did you mean {guess}?" if guess else f"the verbs are {', '.join(VERBS)}."
        raise UserError(f"there is no drafttrain {verb}; {hint}")


if __name__ == "__main__":
    main()
