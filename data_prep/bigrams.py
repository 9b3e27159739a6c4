"""Learn the bigram table that a Max-Gram drafter falls back on, from the target's own answers.

Reads RUN/responses (training split), writes RUN/bigrams.safetensors, which method expressions call `bigrams`.

    python data_prep/bigrams.py --config recipes/reference/pair.yaml --run runs/pair
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drafttrain.config import parse
from drafttrain.errors import UserError, run_program
from drafttrain.run_folder import RunFolder

SECTIONS = ("target",)


@run_program
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Raises:
        UserError: there are no responses, or they were made with another tokenizer than the target's.
    """
    parsed = parse(__doc__.split("\n\n")[0], SECTIONS, argv)
    from drafttrain.models.bigrams import UNSEEN, learn
    from drafttrain.models.fingerprint import tokenizer_hash
    from drafttrain.models.loading import load_tokenizer
    from drafttrain.records import read_manifest, read_records

    run = RunFolder(parsed.run)
    responses = run.require(run.responses, "data_prep/responses.py")
    target = parsed.recipe.target
    tokenizer = load_tokenizer(target.path, target.revision, target.trust_remote_code)
    own, recorded = tokenizer_hash(tokenizer), read_manifest(responses, "responses")["fingerprints"]["target"]
    if recorded["tokenizer"] != own:
        raise UserError(
            f"the responses in {responses} are in tokens of the tokenizer {recorded['tokenizer'][:8]}, but that of "
            f"{target.path} is {own[:8]}; make them again with data_prep/responses.py."
        )
    rows = read_records(responses, "responses", columns=["split", "prompt_ids", "response_ids"])
    texts = [[*row["prompt_ids"], *row["response_ids"]] for row in rows if row["split"] == "train"]
    table = learn(texts, 1 + max(tokenizer.get_vocab().values()), own)
    known = sum(successor != UNSEEN for successor in table.successors)
    if parsed.plan:
        print(f"{table.pairs} pairs of {len(texts)} responses, successors of {known} tokens, to {run.bigrams}")
        return
    run.record(parsed, "data_prep/bigrams.py")
    table.save(run.bigrams)
    print(f"{run.bigrams}: successors of {known} of {len(table.successors)} tokens, from {table.pairs} pairs")


if __name__ == "__main__":
    main()
