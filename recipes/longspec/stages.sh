#!/usr/bin/env bash
# All stages of a LongSpec drafter, each from the one before:
#   recipes/longspec/stages.sh RECIPE RUN [TASK_PROMPTS [FLAG ...]]
# Run again, it goes on where it was. TASK_PROMPTS may be "": no third stage. Further flags hold for every stage.
#   LAUNCH="accelerate launch --config_file recipes/accelerate/ddp.yaml" recipes/longspec/stages.sh ...
#   LAUNCH=deepspeed recipes/longspec/stages.sh RECIPE RUN "" --training.arguments.deepspeed recipes/deepspeed/zero2.json
set -euo pipefail
cd "$(dirname "$0")/../.."

RECIPE=$1
RUN=$2
TASK=${3:-}
MORE=("${@:4}")
read -ra LAUNCHER <<<"${LAUNCH:-accelerate launch}"
LONG=(--training.positions.kind plain --training.max_length 32768 --training.arguments.learning_rate 5.0e-6)

stage() { # name, further flags
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "${LAUNCHER[@]}" data_prep/responses.py --config "$RECIPE" --run "$RUN/$name" "$@" "${MORE[@]}"
    "${LAUNCHER[@]}" drafttrain/train_drafter.py --config "$RECIPE" --run "$RUN/$name" "$@" "${MORE[@]}"
}

stage short
stage long --prompts.path THUDM/LongAlign-10k --prompts.hub_split train "${LONG[@]}" \
    --drafter.init_from "$RUN/short/drafter"
if [ -n "$TASK" ]; then
    stage task --prompts.source file --prompts.path "$TASK" --prompts.preset auto "${LONG[@]}" \
        --drafter.init_from "$RUN/long/drafter"
fi
