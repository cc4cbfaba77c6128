# Sourced by run and full: a fresh clone, the README's commands, and checks that both make.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_QUIET=1

step() { echo "=== $1, $SECONDS s ==="; }

# A fresh clone of this name, as the working directory.
start() {
    step "$1"
    git clone -q "$root" "$work/$1"
    cd "$work/$1"
}

# Into the clone's own environment, which is made where it is not there.
pip_quietly() {
    [[ -d .venv ]] || python3 -m venv .venv
    .venv/bin/pip install "$@"
}

# The command in README.md under this comment ("# Test").
readme_command() {
    local command
    command=$(sed -n "/^# $1/,/^\`\`\`\$/p" README.md | sed '1d;$d')
    [[ -n $command ]] || { echo "README.md has no command under '# $1'" >&2; return 1; }
    echo "$command"
}

lint() {
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
    .venv/bin/codespell
    git ls-files csrc tests | grep -E '\.(h|cpp|cu)$' | xargs .venv/bin/clang-format --dry-run -Werror
}

# A digest of all sources of kernels.
kernels_digest() {
    git ls-files -s csrc multilora/ops/{triton,native.py,hopper.py} | grep -v '\.json$' | sha256sum | cut -d ' ' -f 1
}

# The machine code of every GPU kernel: no spills, no serialised products, shared memory. Its record
# is kept in $MULTILORA_ARTEFACTS, if that is set.
machine_code() {
    local folder="${MULTILORA_ARTEFACTS:-$work}"
    local record="$folder/kernels-$(basename "$PWD")-$1"
    mkdir -p "$folder"
    .venv/bin/multilora kernels --target "$1" --out "$record.json" > "$record.txt" ||
        { tail -n 300 "$record.txt"; return 1; }
    tail -n 1 "$record.txt"
}

# `uses_wheel PYTHON BACKEND`: what is installed in "$work/installed" works without the sources.
uses_wheel() {
    cd "$work/installed"
    PYTHONPATH=$PWD MULTILORA_BACKEND=$2 "$1" - <<'END'
import os, torch, multilora as ml

assert os.path.dirname(ml.__file__) == os.path.join(os.getcwd(), "multilora"), ml.__file__
nll, divergence = ml.particle_loss(torch.randn(4, 8, 10), torch.arange(8))
print(nll.mean().item(), divergence.item())
END
    PYTHONPATH=$PWD "$1" -m multilora info
    cd - > /dev/null
}
