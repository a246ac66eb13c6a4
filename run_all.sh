#!/usr/bin/env bash
# Plays the game and draws every figure; sets up the environment first where that is needed.
# `./run_all.sh --help` lists the flags.
set -euo pipefail
export COMPENDIUM_CALLER=$PWD  # relative paths in flags are meant from here
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./.setup.sh

for argument in "$@"; do
    if [[ "$argument" == "--help" || "$argument" == "-h" ]]; then
        exec "$BASE_PYTHON" -m lib.pipeline --help  # needs nothing installed
    fi
done
choose_environment
exec "$PYTHON" -m lib.pipeline "$@"
