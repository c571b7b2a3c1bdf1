#!/bin/sh
# Print the first Python >= $1 (e.g. 3.11) that runs and can make an environment.
#
# The lowest version that will do comes first: it is the likeliest to have wheels
# for everything. A name on PATH is not enough (version managers leave shims that
# exist and fail, some systems ship Python without venv), so each one is tried.
set -u
minimum=${1:?usage: find_python.sh MAJOR.MINOR}
probe="
import sys
if sys.version_info[:2] < tuple(map(int, '$minimum'.split('.'))):
    sys.exit(1)
import ensurepip, venv
print(sys.executable)"

for name in python3.11 python3.12 python3.13 python3.14 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.[0-9]*/bin/python3 \
    "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}"/cpython-3.*/bin/python3 \
    "$HOME"/miniconda3/bin/python3 "$HOME"/miniforge3/bin/python3 \
    /opt/homebrew/bin/python3 /usr/local/bin/python3 /opt/python/cp3*/bin/python3; do
    found=$("$name" -c "$probe" 2>/dev/null </dev/null) && echo "$found" && exit 0
done
echo "no Python >= $minimum that can make an environment (venv) was found" >&2
exit 1
