#!/usr/bin/env bash
# Starts the head of a Ray cluster with token authentication and the Jobs API; further options go to `ray start`.
#   RAY_AUTH_TOKEN=… cluster/start-head.sh --port 6379 --dashboard-host 127.0.0.1
# A worker joins with: RAY_AUTH_MODE=token RAY_AUTH_TOKEN=… ray start --address HEAD:6379 --block
set -euo pipefail
if [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] && [ ! -s "$HOME/.ray/auth_token" ]; then
    echo "There is no token. Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or make one: ray get-auth-token --generate" >&2
    exit 2
fi
export RAY_AUTH_MODE=token
exec ray start --head --block --include-dashboard true --disable-usage-stats "$@"
