#!/usr/bin/env bash
# Runs every fast test, in the environment that run_all.sh finds or makes. Arguments go to pytest.
COMPENDIUM_MODULE=pytest exec "$(dirname "${BASH_SOURCE[0]}")/../run_all.sh" -n 2 --dist loadfile "$@"
