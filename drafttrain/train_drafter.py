"""Distil the drafter of a pair from the target's responses.

Reads RUN/responses and the target, writes RUN/drafter and RUN/tau_history.json. Killed at any moment and started again
it goes on where it was; started again when it is done it does nothing.

    accelerate launch drafttrain/train_drafter.py --config recipes/reference/pair.yaml --run runs/pair
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drafttrain.config import parse
from drafttrain.errors import run_program

SECTIONS = ("target", "drafter", "training", "responses")


@run_program
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parsed = parse(__doc__.split("\n\n")[0], SECTIONS, argv)
    if parsed.plan:
        from drafttrain.training.drafter_plan import plan

        plan(parsed)
        return
    from drafttrain.distributed import process_group
    from drafttrain.training.drafter_program import train_drafter

    with process_group():
        train_drafter(parsed)


if __name__ == "__main__":
    main()
