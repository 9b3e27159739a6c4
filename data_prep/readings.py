"""Read the responses for a LongSpec drafter: what it learns of its target, computed once.

Reads RUN/responses, writes RUN/readings: of every token the keys and values of one layer of the target, of every token
that is trained the target's last state. `train_drafter.py` with `training.readings: stored` maps them into memory in
place of running the target. Killed at any moment and started again, with any number of processes, it ends with the same
files.

    accelerate launch data_prep/readings.py --config recipes/longspec/qwen3-8b.yaml --run runs/qwen3-8b/long
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drafttrain.config import Parsed, parse
from drafttrain.errors import UserError, run_program
from drafttrain.run_folder import RunFolder

if TYPE_CHECKING:
    from drafttrain.models.loading import Loaded
    from drafttrain.training.drafter_data import ResponseDataset
    from drafttrain.training.positions import Placing

SECTIONS = ("target", "drafter", "training")


@run_program
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parsed = parse(__doc__.split("\n\n")[0], SECTIONS, argv)
    if parsed.recipe.drafter.kind != "longspec":
        raise UserError(f"drafter.kind is {parsed.recipe.drafter.kind}; readings are for longspec drafters.")
    if parsed.plan:
        plan(parsed)
        return
    from drafttrain.distributed import process_group

    with process_group():
        read(parsed)


def read(parsed: Parsed) -> None:
    """Make the readings of a run; every process calls it.

    Raises:
        UserError: as `inputs_of`, or the folder holds readings made with other settings.
    """
    from drafttrain.distributed import progress, rank, say, world_size
    from drafttrain.models.loading import load_target
    from drafttrain.training.readings import ReadingWriter, bytes_needed

    run, recipe = RunFolder(parsed.run).create(), parsed.recipe
    target = load_target(recipe.target)
    data, placing, manifest = inputs_of(parsed, target)
    run.record(parsed, "data_prep/readings.py")
    size = bytes_needed(target.model.config, target.model.dtype.itemsize, data)
    writer = ReadingWriter(run.readings, manifest, data, size / len(data))
    pending = writer.pending(rank(), world_size())
    total = sum(len(writer.source_range(shard)) for shard in pending)
    for _ in progress(writer.fill(target.model, placing, pending), total, "readings"):
        pass
    writer.finish()
    say(f"readings: {_told(data, size)}, in {run.readings}")


def inputs_of(parsed: Parsed, target: "Loaded") -> "tuple[ResponseDataset, Placing, dict[str, Any]]":
    """The rows, where they stand, and what the files will be of.

    Args:
        parsed: the recipe.
        target: its model may be without storage.

    Raises:
        UserError: no responses or another target's, a target that cannot be read, positions that it does not have.
    """
    from drafttrain.models.loading import max_context
    from drafttrain.models.longspec_new import block_config
    from drafttrain.models.shared_target import check_readable
    from drafttrain.training.drafter_data import ResponseDataset, read_responses, require_trainable
    from drafttrain.training.drafter_program import longest
    from drafttrain.training.positions import Placing
    from drafttrain.training.readings import manifest_of

    run, recipe = RunFolder(parsed.run), parsed.recipe
    folder = run.require(run.responses, "data_prep/responses.py")
    config, context = block_config(target.model, recipe.drafter.block), max_context(target.model)
    placing = Placing.of(recipe.training.positions, context, config.depth, recipe.seed)
    prints = target.fingerprint.to_dict()
    known = {name: value for name, value in prints.items() if value}
    responses, rows, _ = read_responses(folder, known, parsed.accept_new_target)
    data = require_trainable(ResponseDataset(rows, longest(recipe.training, context)), folder)
    if prints["weights"]:
        check_readable(target.model, config)
    return data, placing, manifest_of(known, config.kv_layer, target.model.dtype, placing, responses, data)


def plan(parsed: Parsed) -> None:
    """Say what would be read, how large it is, and what is there already.

    Raises:
        UserError: whatever would stop the run, or too little disk.
    """
    from data_prep.planning import check_disk, show_recipe
    from drafttrain.training.drafter_plan import read_shapes
    from drafttrain.training.readings import bytes_needed

    run = RunFolder(parsed.run)
    show_recipe(parsed, SECTIONS)
    shapes = read_shapes(parsed)
    data, placing, manifest = inputs_of(parsed, shapes.target)
    size = bytes_needed(shapes.target.model.config, shapes.cache_bytes, data)
    done = sum(path.stat().st_size for path in run.readings.glob("part-*.safetensors"))
    print("\n--- what would run ---")
    print(f"readings: {_told(data, size)}, layer {manifest['layer']}, {placing.kind} positions")
    print(f"disk: {check_disk(run.path, max(0, size - done))}; {done:,} bytes are there already")


def _told(data: "ResponseDataset", size: int) -> str:
    return f"{size:,} bytes of {len(data)} responses, {sum(data.lengths):,} tokens, {data.tokens:,} of them trained"


if __name__ == "__main__":
    main()
