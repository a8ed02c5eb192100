#!/bin/sh
# Starts a command of the image (see Dockerfile) in the environment of env.sh, its state on the volume .graincast.
set -eu
cd /graincast
mkdir -p .graincast/runs .graincast/zen .graincast/dvc/cache
. ./env.sh

if [ "${1-}" = serve ]; then
    shift
    export MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR=false
    set -- mlflow models serve --model-uri "$GRAINCAST_MODEL" --env-manager local --host 0.0.0.0 --port 8080 "$@"
fi
exec "$@"
