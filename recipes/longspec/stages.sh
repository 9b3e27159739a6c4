#!/usr/bin/env bash
# All stages of a LongSpec drafter, each from the one before: recipes/longspec/stages.sh RECIPE RUN [TASK_PROMPTS]
# Run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."

RECIPE=$1
RUN=$2
TASK=${3:-}
LONG=(--training.positions.kind plain --training.max_length 32768 --training.arguments.learning_rate 5.0e-6)

stage() { # name, further flags
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    accelerate launch data_prep/responses.py --config "$RECIPE" --run "$RUN/$name" "$@"
    accelerate launch drafttrain/train_drafter.py --config "$RECIPE" --run "$RUN/$name" "$@"
}

stage short
stage long --prompts.path THUDM/LongAlign-10k --prompts.hub_split train "${LONG[@]}" \
    --drafter.init_from "$RUN/short/drafter"
if [ -n "$TASK" ]; then
    stage task --prompts.source file --prompts.path "$TASK" --prompts.preset auto "${LONG[@]}" \
        --drafter.init_from "$RUN/long/drafter"
fi
