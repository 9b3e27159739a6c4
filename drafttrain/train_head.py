"""Train the acceptance head of a pair (SpecDec++) from its traces.

Reads RUN/traces and the drafter, writes RUN/head. The drafter is frozen. Killed at any moment and started again it goes
on where it was; started again when it is done it does nothing.

    accelerate launch drafttrain/train_head.py --config recipes/reference/pair.yaml --run runs/pair
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drafttrain.config import parse
from drafttrain.errors import run_program

SECTIONS = ("drafter", "traces", "head")


@run_program
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parsed = parse(__doc__.split("\n\n")[0], SECTIONS, argv)
    if parsed.plan:
        from drafttrain.training.head_plan import plan

        plan(parsed)
        return
    from drafttrain.distributed import process_group
    from drafttrain.training.head_program import train_head

    with process_group():
        train_head(parsed)


if __name__ == "__main__":
    main()
