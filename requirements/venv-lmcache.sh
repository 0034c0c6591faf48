#!/usr/bin/env bash
# LMCache for `make bench-lmcache`: venv-lmcache.sh PYTHON FOLDER VLLM_FOLDER. It sees the packages of vLLM's environment
# and adds LMCache and what its files' tier imports: what LMCache wants beside (CUDA libraries, clouds' clients) is not
# used on a CPU, and its pins do not go with vLLM's.
set -euo pipefail

python=$1 venv=$2 vllm=$3
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
site "$vllm" > "$(site "$venv")/vllm.pth"
"$venv/bin/python" -m pip install --quiet --no-deps lmcache==0.5.6 aiofiles aiofile caio
echo "== ready: $venv/bin/lmcache server --help"
