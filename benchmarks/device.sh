#!/usr/bin/env bash
# Checks and timings on a machine with one data-centre GPU: ten minutes at most, no package index needed there.
#
#   bash benchmarks/device.sh --pack DIR       here: collect the wheels that such a machine lacks (under 60 MiB)
#   bash benchmarks/device.sh --wheels DIR     there: use them; it has Python 3.12, torch 2.11 and transformers 5.17
#   bash benchmarks/device.sh --dry-run        on any CPU, with tiny shapes: does the script itself work?
#
# --out DIR is where rows (device.json, engine.json) and the log go; by default a new temporary folder.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
pack="" wheels="" out="" dry=""
while [ $# -gt 0 ]; do
    case $1 in
        --pack | --wheels | --out)
            [ $# -gt 1 ] || { echo "$1 needs a folder" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --dry-run) dry=1; shift ;;
        *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done

# What the core needs beside torch and transformers. Rewards that need more (simplemma) are not used here.
packages="annotated-types cloudpickle farama-notifications gymnasium lazy-loader markdown-it-py mdurl pandas platformdirs
psutil pydantic pydantic-core pygments python-dateutil pytz rich sb3-contrib shellingham six stable-baselines3 typer
typing-inspection tzdata vaderSentiment matplotlib contourpy cycler fonttools kiwisolver pyparsing pillow filelock requests
charset-normalizer idna urllib3 certifi"

if [ -n "$pack" ]; then
    mkdir -p "$pack"
    # shellcheck disable=SC2086
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --constraint "$root/constraints.txt" --dest "$pack" $packages
    "$python" -m build --wheel --no-isolation --outdir "$pack" "$root" > "$pack/build.log" 2>&1 || { cat "$pack/build.log"; exit 1; }
    rm "$pack/build.log"
    bytes=$(du -sb "$pack" | cut -f1)
    echo "$(ls "$pack" | wc -l) wheels, $((bytes / 1048576)) MiB in $pack"
    [ "$bytes" -le $((60 * 1048576)) ] || { echo "more than 60 MiB: take something out of the list" >&2; exit 1; }
    exit 0
fi

out=${out:-$(mktemp -d)}
mkdir -p "$out"
if [ -n "$wheels" ]; then
    # Behind what is installed: a target folder never changes the machine.
    "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$wheels"/*.whl
    export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
status=0
"$python" "$root/benchmarks/device.py" ${dry:+--dry-run} --out "$out" --json "$out/device.json" 2>&1 | tee "$out/log.txt" || status=1
if [ -n "$dry" ]; then
    "$python" "$root/benchmarks/engine.py" --device cpu --dtype float32 --model "$out/random-tiny" --repeats 1 \
        --only visited --json "$out/engine.json" 2>&1 | tee -a "$out/log.txt" || status=1
else
    timeout 240 "$python" "$root/benchmarks/engine.py" --device cuda --model "$out/random-135M" --repeats 2 \
        --only one_env many_envs no_cache outside_the_forward above_the_floor size_of_the_tree \
        --json "$out/engine.json" 2>&1 | tee -a "$out/log.txt" || status=1
fi
echo "rows and log in $out"
exit $status
