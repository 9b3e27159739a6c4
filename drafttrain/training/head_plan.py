"""`train_head.py --plan`: what would run, on a real example, with estimates; fails on what would fail later."""

from __future__ import annotations

import math
import shutil

import yaml

from drafttrain.config import Parsed
from drafttrain.distributed import say
from drafttrain.errors import UserError
from drafttrain.models.acceptance_head import AcceptanceHead
from drafttrain.training.head_data import HeadDataset, Trace, make_examples
from drafttrain.training.head_program import (
    Inputs,
    head_arguments,
    is_finished,
    read_inputs,
    start_head,
)
from drafttrain.training.head_states import StateStore, states_of
from drafttrain.training.state_file import StateFile
from drafttrain.training.work_folder import global_batch

_SHOWN = 60  # response tokens of the example


def plan(parsed: Parsed) -> None:
    """Print the recipe, an example with the trained tokens marked, and estimates.

    Raises:
        UserError: whatever would stop the run: no traces, another drafter, impossible settings, too little disk.
    """
    sections = {name: parsed.resolved[name] for name in ("drafter", "traces", "head", "seed")}
    say(yaml.safe_dump(sections, sort_keys=False, allow_unicode=True).rstrip())
    inputs = read_inputs(parsed)
    say("\n--- one example; [[ ]] marks drafted tokens that are trained on, -> what the target said instead ---")
    say(render(inputs, parsed.recipe.seed))
    say("\n--- what would run ---")
    for line in (*_data(inputs), *_work(parsed, inputs)):
        say(line)


def render(inputs: Inputs, seed: int) -> str:
    """The end of a prompt and the start of its response as the drafter reads them, trained tokens marked."""
    tokenizer = inputs.drafter.tokenizer
    row = next(row for row, ids in enumerate(inputs.train["response_ids"]) if len(ids))
    trace = inputs.layout.trace(inputs.train[row])
    examples = make_examples(trace, inputs.config, seed, epoch=0)
    trained = set(examples.index_N.tolist())
    parts = ["..." * (len(trace.prompt) > _SHOWN), tokenizer.decode(trace.prompt[-_SHOWN:])]
    together: list[int] = []  # accepted tokens in a row, decoded as one: a token may be part of a character

    def close() -> None:
        if together:
            parts.append(f"[[{tokenizer.decode(together)}]]")
            together.clear()

    for position in range(min(_SHOWN, len(trace.draft_T))):
        x, y = int(trace.response_T[position]), int(trace.draft_T[position])
        if position in trained and x == y:
            together.append(y)
            continue
        close()
        if position in trained:
            parts.append(f"[[{tokenizer.decode([y])}]]->{tokenizer.decode([x])}")
        else:
            parts.append(tokenizer.decode([x]))
    close()
    return "".join(parts) + "..." * (len(trace.draft_T) > _SHOWN)


def _data(inputs: Inputs) -> list[str]:
    lines = []
    for name, records in (("train", inputs.train), ("tune", inputs.tune)):
        traces: list[Trace] = [inputs.layout.trace(records[row]) for row in range(len(records))]
        tokens = sum(len(trace.reached(trace.draft_T)) for trace in traces)
        accepted = sum(float(trace.reached(trace.label_T).sum()) for trace in traces) / max(tokens, 1)
        lines.append(f"{name}: {len(records)} responses, {tokens} drafted tokens, {accepted:.1%} accepted")
    sampling = inputs.config.sampling
    way = "greedy" if inputs.layout.greedy else f"at temperature {sampling['temperature']}"
    return [*lines, f"labels: {way}; states: {inputs.config.state}; data: {inputs.config.data}"]


def _work(parsed: Parsed, inputs: Inputs) -> list[str]:
    if is_finished(inputs):
        return [f"nothing: {inputs.folder} is already trained with these settings"]
    arguments = head_arguments(parsed.recipe, inputs)
    head = start_head(parsed.recipe.head, inputs.config, parsed.accept_new_target)
    batch = global_batch(arguments)
    steps = math.ceil(len(inputs.train) / batch) * math.ceil(arguments.num_train_epochs)
    steps = arguments.max_steps if arguments.max_steps > 0 else steps
    return [
        f"head: {_count(head):,} parameters, depth {inputs.config.depth}{' tied' if inputs.config.tied else ''}",
        f"training: {steps} steps of {batch} responses, learning rate {arguments.learning_rate:g}",
        f"memory: {_gigabytes(_memory(inputs, head))} for drafter, head and optimizer, and one batch of states",
        *_disk(parsed, inputs),
    ]


def _disk(parsed: Parsed, inputs: Inputs) -> list[str]:
    states = states_of(inputs.drafter.model, inputs.config)
    if inputs.config.data == "mixed":
        return ["disk: the head only; with token mixing the drafter runs in every epoch"]
    dataset = HeadDataset(inputs.train, inputs.layout, inputs.config, parsed.recipe.seed)
    needed = StateStore.bytes_needed(dataset, states)
    place = inputs.folder.parent
    if StateFile.fits(place / "states", needed):
        return [f"disk: {_gigabytes(needed)} for the drafter's states while training"]
    free = shutil.disk_usage(place).free
    if free < 4 * _count(AcceptanceHead(inputs.config)) * 4:
        raise UserError(f"{place} has {_gigabytes(free)} free, which does not hold the head's checkpoints; make room.")
    return [f"disk: {_gigabytes(needed)} of states do not fit in {place}, so the drafter runs in every epoch"]


def _memory(inputs: Inputs, head: AcceptanceHead) -> int:
    """Bytes: drafter; weights, gradients and two moments of the head; activations of 4096 tokens."""
    model = inputs.drafter.model
    drafter = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return drafter + 16 * _count(head) + 4096 * 4 * inputs.config.hidden_size * (2 + 3 * inputs.config.depth)


def _count(head: AcceptanceHead) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


def _gigabytes(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
