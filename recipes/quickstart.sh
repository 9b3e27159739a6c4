#!/usr/bin/env bash
# From a target to a faster target, with nothing but the commands a user would type. `make quickstart` runs this in the
# environment it made; run again, it reuses what is done.
set -euo pipefail
cd "$(dirname "$0")/.."

RECIPE=recipes/quickstart.yaml
RUN=${1:-runs/quickstart}

step() { printf '\n== %s\n' "$1"; }

step "1/5  the target answers the prompts"
accelerate launch --num_processes 1 data_prep/responses.py --config $RECIPE --run "$RUN"

step "2/5  distil a drafter, cut from the target"
accelerate launch --num_processes 1 drafttrain/train_drafter.py --config $RECIPE --run "$RUN"

step "3/5  trace what the target accepts of its proposals"
accelerate launch --num_processes 1 data_prep/traces.py --config $RECIPE --run "$RUN"

step "4/5  fit the acceptance head that decides when to stop drafting"
accelerate launch --num_processes 1 drafttrain/train_head.py --config $RECIPE --run "$RUN"

step "5/5  evaluate: sweep by replay, then really run the best settings"
drafttrain evaluate --config $RECIPE --run "$RUN"
