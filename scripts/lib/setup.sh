# Shared by scripts/*: finds a Python, makes .venv, installs what a chore needs and says what is going on.
# Sourced, not run. Works from the repository's root, and needs nothing but bash, a Python and a package index.
# Settings: PYTHON (the interpreter for a new .venv), and all that pip reads (PIP_INDEX_URL and so on).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VENV=$PWD/.venv
export PIP_USER=0 # a user's pip may be set to install outside of environments
CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '[%3d s] %s\n' "$SECONDS" "$*" >&2; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# step TEXT COMMAND…: says what is being done, counts the seconds on a terminal, and shows output only of what failed.
step() {
    local text=$1 log ticker='' status=0
    shift
    log=$(mktemp)
    if [ -t 2 ]; then
        (while kill -0 $$ 2>/dev/null; do printf '\r[%3d s] %s ' "$SECONDS" "$text" >&2; sleep 1; done) &
        ticker=$!
    else
        say "$text"
    fi
    "$@" >"$log" 2>&1 || status=$?
    if [ -n "$ticker" ]; then
        kill "$ticker" 2>/dev/null || true
        wait "$ticker" 2>/dev/null || true
        printf '\r[%3d s] %s \n' "$SECONDS" "$text" >&2
    fi
    [ "$status" = 0 ] || tail -n 40 "$log" >&2
    rm -f "$log"
    [ "$status" = 0 ] || fail "this step failed: $text"
}

# A Python of at least 3.10 that can make a venv; one that constraints/ knows is preferred to a newer one.
find_python() {
    local name found='' version
    for name in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.10 python}; do
        version=$("$name" -c 'import sys; print("%d%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 10))' 2>/dev/null) || continue
        "$name" -c 'import ensurepip, venv' 2>/dev/null || { found=${found:-without-venv}; continue; }
        if [ -e "constraints/py$version.txt" ] || [ -n "${PYTHON:-}" ]; then
            echo "$name"
            return
        fi
        [ -n "$found" ] && [ "$found" != without-venv ] || found=$name
    done
    case $found in
        without-venv) fail 'the Python here cannot make a venv. On Debian and Ubuntu: sudo apt-get install python3-venv' ;;
        '') fail "no Python 3.10 or newer here${PYTHON:+ (PYTHON=$PYTHON)}. Install one, or name one: PYTHON=/path/to/python" ;;
        *) echo "$found" ;;
    esac
}

make_venv() {
    local python
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
    python=$(find_python)
    step "making .venv with $("$python" --version)" "$python" -m venv --clear "$VENV"
}

# pip, quiet (-qq hides its warnings, not its errors), with the pins of this Python where there are any.
pip_install() { "$VENV/bin/python" -m pip --disable-pip-version-check install -qq --no-input --prefer-binary "$@"; }

constraints() {
    local file
    file=constraints/py$("$VENV/bin/python" -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
    if [ -e "$file" ]; then echo "$file"; fi
}

has_nvidia_gpu() { nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidiactl ] || [ -e /dev/nvhost-gpu ]; }

# The file that pip would take torch from, with further pip options.
torch_wheel() {
    pip_install --dry-run --no-deps --report - "$@" 2>/dev/null | "$VENV/bin/python" -c '
import json, sys
print(json.load(sys.stdin)["install"][0]["download_info"]["url"].rsplit("/", 1)[-1])' 2>/dev/null || true
}

# Torch ahead of everything that would pull in the platform's default build, which on Linux brings several GB of CUDA.
install_torch() {
    local pin=('torch>=2.9') index=()
    [ -z "$1" ] || pin=(torch -c "$1")
    if "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then return; fi
    if [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; then
        case $(torch_wheel "${pin[@]}") in
            *+cpu* | *%2Bcpu*) ;; # the configured index or a local folder of wheels has a CPU build
            *)
                index=(--extra-index-url "$CPU_TORCH_INDEX" --retries 1 --timeout 15)
                case $(torch_wheel "${pin[@]}" "${index[@]}") in
                    *+cpu* | *%2Bcpu*) ;;
                    *) say "no CPU build of torch within reach of this Python: the default one, with several GB of CUDA, it is" ;;
                esac
                ;;
        esac
    fi
    step 'installing torch' pip_install "${pin[@]}" ${index[@]+"${index[@]}"}
}

# The fastest way to run on this machine's CPU that can be installed.
cpu_extra() { if [ "$(uname -sm)" = 'Linux x86_64' ]; then echo openvino; else echo cpu; fi; }

# TensorRT-RTX builds engines without a GPU, on x86-64 Linux.
rtx_extra() { if [ "$(uname -sm)" = 'Linux x86_64' ]; then echo ,rtx; fi; }

# install NAME EXTRAS: .venv with this project and those extras; nothing to do if neither changed since the last time.
install() {
    local name=$1 extras=$2 pins key stamp
    make_venv
    pins=$(constraints)
    stamp=$VENV/.installed-$name
    key=$(cat pyproject.toml runtime/system/version.py scripts/lib/setup.sh ${pins:+"$pins"} | cksum) key="$key $extras $PWD"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then return; fi
    [ -n "$pins" ] || say "constraints/ has no file for this Python: taking the newest versions there are"
    if ! "$VENV/bin/python" -c 'import pip; raise SystemExit(int(pip.__version__.split(".")[0]) < 23)'; then
        step 'updating pip' pip_install --upgrade pip
    fi
    case ",$extras," in *,export,* | *,train,*) install_torch "$pins" ;; esac
    step "installing flowturbo[$extras]" pip_install -e ".[$extras]" ${pins:+-c "$pins"}
    echo "$key" >"$stamp"
}

install_for_tests() { install test "export,train,$(cpu_extra)$(rtx_extra),dev"; }
