# Sourced by the scripts beside it: goes to the repository root and puts a virtual environment with the package and
# its development tools first in PATH. It is made if it is missing, and brought up to date when pyproject.toml or
# constraints.txt has changed; else this takes no time.
#
#   AUTO_ROUND_VENV   folder of the environment (default: .venv in the repository root)
#   PYTHON            interpreter it is made with (default: python3)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

venv="${AUTO_ROUND_VENV:-$root/.venv}"
stamp="$venv/.auto_round_installed"
wanted="$(cat pyproject.toml constraints.txt | cksum) $root"

if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
    [[ -x "$venv/bin/python" ]] || "${PYTHON:-python3}" -m venv "$venv"
    # torch first, so that nothing below pulls in another version of it.
    "$venv/bin/python" -m pip install -c constraints.txt torch==2.13.0
    "$venv/bin/python" -m pip install -c constraints.txt -e ".[dev]"
    printf '%s\n' "$wanted" > "$stamp"
fi

venv="$(cd "$venv" && pwd)"
export VIRTUAL_ENV="$venv"
export PATH="$venv/bin:$PATH"
