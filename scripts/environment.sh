# Sourced by the scripts beside it: makes .venv at the repository's root, or brings it up to date, and uses it.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "mpreader needs Python 3.10 or newer, and '$python' is not. Name another one: PYTHON=python3.12 $0" >&2
    exit 1
fi

# Held until the environment is whole, so that two scripts started at once don't build it over each other.
exec 9<"$root"
flock 9
stamp=$({ echo "$root"; "$python" -VV; cat "$root/pyproject.toml" "$root/scripts/constraints.txt"; } | sha256sum)
if [ "$stamp" != "$(cat "$root/.venv/stamp" 2>/dev/null)" ]; then
    echo "Making $root/.venv with $("$python" -V). The first time this downloads PyTorch: some minutes." >&2
    "$python" -m venv --clear "$root/.venv"
    # Not compiled: of what is installed here most is never imported, and the rest is compiled when it is.
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
        -c "$root/scripts/constraints.txt" -e "$root[test]"
    echo "$stamp" >"$root/.venv/stamp"
fi
exec 9<&-

export PATH="$root/.venv/bin:$PATH"
# Without bytecode each of the thousands of processes of the tests would compile what it imports: a fifth of their time.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
