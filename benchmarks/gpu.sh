#!/usr/bin/env bash
# Everything that one GPU tells about this code in at most ten minutes: the CUDA tests, a recipe as it ships, the
# table of docs/performance.md, two profiles, and the experiments of gpu_lab.py. The table is printed last.
#
#     OUT=runs/gpu benchmarks/gpu.sh --seconds 560
#     benchmarks/gpu.sh --parts "table lab" --seconds 900    # without the tests and the recipe as it ships
#     benchmarks/gpu.sh --tiny                               # the whole script on a CPU, with the tiny model
set -u
started=$(date +%s)
root=$(cd "$(dirname "$0")/.." && pwd)
seconds=560 tiny="" parts="tests shipped table lab" python=${PYTHON:-python3}
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=--tiny ;;
        --seconds) seconds=$2; shift ;;
        --parts) parts=$2; shift ;;
        *) echo "gpu.sh: unknown option '$1'; there are --tiny, --seconds N, --parts 'NAMES'" >&2; exit 2 ;;
    esac
    shift
done
cd "$root"
export OUT=${OUT:-runs/gpu} PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$OUT"
rm -f "$OUT"/tests.log "$OUT"/soar.txt "$OUT"/grpo.txt
left() { echo $((seconds - $(date +%s) + started)); }

begins() { # part: says so, if it is wanted
    case " $parts " in *" $1 "*) echo "== $1" ;; *) return 1 ;; esac
}
told() { # exit status, log
    [ "$1" -eq 0 ] || tail -n 5 "$2"
}
tested=0
: >"$OUT/gpu.jsonl"

if begins tests; then
    parallel=""
    [ -z "$tiny" ] && "$python" -c "import xdist" 2>/dev/null && parallel="-n 8"
    timeout 105 "$python" -m pytest -q -m cuda -p no:cacheprovider $parallel --durations 8 \
        tests/test_cuda.py tests/test_run.py >"$OUT/tests.log" 2>&1
    tested=$?
    tail -n 25 "$OUT/tests.log"
fi
if begins shipped; then
    # with a compiler's cache of its own: what a user sees the first time
    part=220
    [ -n "$tiny" ] && part=100
    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) WORK=${WORK:-/tmp/posttrain-as-shipped} timeout $((part + 60)) \
        "$python" benchmarks/as_shipped.py sd35m-soar $tiny --steps 3 --seconds "$part" 2>"$OUT/shipped.log"
    told $? "$OUT/shipped.log"
fi
# the seconds that a process takes to begin are not on its own clock
if begins table; then
    part=$(($(left) - 85))
    [ -n "$tiny" ] && part=1500
    timeout $((part + 45)) "$python" benchmarks/gpu_table.py $tiny --seconds "$part" 2>"$OUT/table.log"
    told $? "$OUT/table.log"
fi
if begins lab; then
    part=$(($(left) - 15))
    [ -n "$tiny" ] && part=1500
    timeout $((part + 15)) "$python" benchmarks/gpu_lab.py $tiny --seconds "$part" 2>"$OUT/lab.log"
    told $? "$OUT/lab.log"
fi

cat "$OUT/grpo.txt" "$OUT/soar.txt" 2>/dev/null
"$python" benchmarks/gpu_report.py "$OUT/gpu.jsonl"
[ -f "$OUT/tests.log" ] && echo "tests: exit status $tested, $(tail -n 1 "$OUT/tests.log")"
echo "all in $(($(date +%s) - started)) s"
exit $tested
