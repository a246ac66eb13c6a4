#!/usr/bin/env bash
# Runs the notebooks in order, in an environment that has every pin of requirements.lock: the active one if
# it has them, else .venv, which is made here once. ./run_all.sh --help lists the flags.
set -euo pipefail
export COMPENDIUM_CALLER=${COMPENDIUM_CALLER:-$PWD}  # relative paths in flags are meant from here
cd "$(dirname "${BASH_SOURCE[0]}")"

complete() {  # has this interpreter every pin, and this project?
    "$1" -c 'import importlib.metadata as m, re, sys
pins = re.findall(r"(?m)^([\w.-]+)==(\S+)", open("requirements.lock").read())
sys.exit(any(m.version(name).split("+")[0] != version for name, version in pins)
         or not m.version("captioner-generator-compendium"))' >/dev/null 2>&1
}

for python in python3 .venv/bin/python none; do
    complete "$python" && break
done
if [[ $python == none ]]; then
    for base in python3.11 python3.12 python3.13 python3 none; do
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [[ $base != none ]] || { echo "error: no Python 3.11 or newer is installed" >&2; exit 2; }
    [[ " $* " != *" --help "* ]] || exec "$base" -m lib.run --help  # needs nothing installed
    echo "setting up .venv from requirements.lock (once; several hundred MB, with CUDA libraries some GB)" >&2
    python=.venv/bin/python
    [[ -x $python ]] || "$base" -m venv .venv
    "$python" -m pip install --only-binary=:all: -r requirements.lock >&2
    "$python" -m pip install -q --no-deps --no-build-isolation -e . >&2
fi
exec "$python" -m "${COMPENDIUM_MODULE:-lib.run}" "$@"
