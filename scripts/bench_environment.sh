# Sourced by scripts/bench and scripts/peers: the environment of scripts/demo and scripts/test, which is made anew when
# its files change, and in it what mpreader is compared with.
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

benched=$(sha256sum "$root/.venv/stamp")
if [ "$benched" != "$(cat "$root/.venv/bench-stamp" 2>/dev/null)" ]; then
    echo "Adding what is compared (obstore, Run:ai's streamer, s3fs, matplotlib) to $root/.venv." >&2
    python -m pip install --quiet --disable-pip-version-check -c "$root/scripts/constraints.txt" -e "$root[bench]"
    # s3fs wants another botocore than the tested boto3: it gets a folder of its own.
    python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --upgrade --target "$root/.venv/s3fs" \
        -c <(grep '^fsspec==' "$root/scripts/constraints.txt") s3fs
    echo "$benched" >"$root/.venv/bench-stamp"
fi
