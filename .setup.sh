# Sourced by run_all.sh and tests/run.sh, from the repository's root: sets BASE_PYTHON (any Python
# that is new enough) and defines choose_environment, which sets PYTHON (one that has every pin).

BASE_PYTHON=""
for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        BASE_PYTHON=$candidate
        break
    fi
done
if [[ -z "$BASE_PYTHON" ]]; then
    echo "error: no Python 3.11 or newer on the path: install one and run again" >&2
    exit 2
fi

choose_environment() {
    PYTHON=$("$BASE_PYTHON" -m lib.environment setup) || exit 2
}
