#!/usr/bin/env bash
# The test command: sets up the environment where that is needed, then runs every fast test.
# Arguments go to pytest: ./tests/run.sh tests/test_ranking.py -k ties
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./.setup.sh
choose_environment
exec "$PYTHON" -m pytest "$@"
