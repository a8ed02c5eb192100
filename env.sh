# Environment of this checkout: `source env.sh` (the Makefile does it too).
#
# Puts bin/ and the virtual environment first on PATH, keeps the state of every tool under .graincast/ and not in
# the home directory, and switches telemetry off. A variable that is already set wins, so
#     export ZENML_STORE_URL=https://zenml.example.org ZENML_STORE_API_KEY=...
#     export MLFLOW_TRACKING_URI=https://mlflow.example.org MLFLOW_TRACKING_TOKEN=...
# before sourcing points graincast at servers of your own. POSIX sh; a shell that cannot tell a sourced file where it
# lies (dash) must source it from the checkout. Sourced after another checkout's, it takes over from that one.

graincast_root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE:-$0}")" && pwd)
[ -f "$graincast_root/env.sh" ] || graincast_root=$PWD
graincast_state=$graincast_root/.graincast

# What another checkout's env.sh set in this shell is not the user's own choice.
if [ -n "${GRAINCAST_ROOT-}" ] && [ "$GRAINCAST_ROOT" != "$graincast_root" ]; then
    for graincast_name in ZENML_CONFIG_PATH MLFLOW_TRACKING_URI DVC_GLOBAL_CONFIG_DIR DVC_SYSTEM_CONFIG_DIR \
            DVC_SITE_CACHE_DIR MPLCONFIGDIR NUMBA_CACHE_DIR TORCH_HOME HF_HOME; do
        eval "graincast_value=\${$graincast_name-}"
        case $graincast_value in
            "$GRAINCAST_ROOT/.graincast/"* | "sqlite:///$GRAINCAST_ROOT/.graincast/"*) unset "$graincast_name" ;;
        esac
    done
    case ":$PATH:" in
        *":$GRAINCAST_ROOT/bin:$GRAINCAST_ROOT/.venv/bin:"*)
            PATH=:$PATH:
            PATH=${PATH%%":$GRAINCAST_ROOT/bin:$GRAINCAST_ROOT/.venv/bin:"*}:${PATH#*":$GRAINCAST_ROOT/bin:$GRAINCAST_ROOT/.venv/bin:"}
            PATH=${PATH#:}
            PATH=${PATH%:}
            ;;
    esac
    unset graincast_name graincast_value
fi
export GRAINCAST_ROOT="$graincast_root"

case ":$PATH:" in
    *":$graincast_root/bin:$graincast_root/.venv/bin:"*) ;;
    *) PATH=$graincast_root/bin:$graincast_root/.venv/bin:$PATH ;;
esac
export PATH

# Where the tools keep their state.
export ZENML_CONFIG_PATH="${ZENML_CONFIG_PATH:-$graincast_state/zenml}"
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///$graincast_state/mlflow.db}"
export DVC_GLOBAL_CONFIG_DIR="${DVC_GLOBAL_CONFIG_DIR:-$graincast_state/dvc/global}"
export DVC_SYSTEM_CONFIG_DIR="${DVC_SYSTEM_CONFIG_DIR:-$graincast_state/dvc/system}"
export DVC_SITE_CACHE_DIR="${DVC_SITE_CACHE_DIR:-$graincast_state/dvc/site}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$graincast_state/matplotlib}"
export NUMBA_CACHE_DIR="${NUMBA_CACHE_DIR:-$graincast_state/numba}"
export TORCH_HOME="${TORCH_HOME:-$graincast_state/torch}"
export HF_HOME="${HF_HOME:-$graincast_state/huggingface}"

# No telemetry, no update checks.
export DO_NOT_TRACK="${DO_NOT_TRACK:-true}"
export ZENML_ANALYTICS_OPT_IN="${ZENML_ANALYTICS_OPT_IN:-false}"
export MLFLOW_DISABLE_TELEMETRY="${MLFLOW_DISABLE_TELEMETRY:-true}"
export DVC_NO_ANALYTICS="${DVC_NO_ANALYTICS:-true}"
export GX_ANALYTICS_ENABLED="${GX_ANALYTICS_ENABLED:-false}"
export EVIDENTLY_DISABLE_TELEMETRY="${EVIDENTLY_DISABLE_TELEMETRY:-1}"
export ITERATIVE_DO_NOT_TRACK="${ITERATIVE_DO_NOT_TRACK:-true}"
export HF_HUB_DISABLE_TELEMETRY="${HF_HUB_DISABLE_TELEMETRY:-1}"
export ORT_DISABLE_TELEMETRY="${ORT_DISABLE_TELEMETRY:-1}"

# Plain, brief messages.
export ZENML_LOGGING_COLORS_DISABLED="${ZENML_LOGGING_COLORS_DISABLED:-true}"
export ZENML_ENABLE_RICH_TRACEBACK="${ZENML_ENABLE_RICH_TRACEBACK:-false}"
export MLFLOW_LOGGING_LEVEL="${MLFLOW_LOGGING_LEVEL:-WARNING}"

unset graincast_root graincast_state
