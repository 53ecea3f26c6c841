#!/usr/bin/env bash
# Everything that one GPU tells about this code in at most nine minutes: the CUDA tests, the table of
# docs/performance.md, two profiles, and the experiments of gpu_lab.py. The table is printed last.
#
#     OUT=runs/gpu benchmarks/gpu.sh --seconds 520
#     benchmarks/gpu.sh --tiny            # the whole script on a CPU, with the tiny model
#
# While the tests run, processes with three of the model's blocks fill the compiler's cache, side by side, so that
# compiling does not take the time that the measurements need.
set -u
started=$(date +%s)
root=$(cd "$(dirname "$0")/.." && pwd)
seconds=520 tiny="" python=${PYTHON:-python3}
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=--tiny ;;
        --seconds) seconds=$2; shift ;;
        *) echo "gpu.sh: unknown option '$1'; there are --tiny and --seconds N" >&2; exit 2 ;;
    esac
    shift
done
cd "$root"
export OUT=${OUT:-runs/gpu} PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$OUT"
rm -f "$OUT"/gpu.jsonl "$OUT"/soar.txt "$OUT"/grpo.txt
left() { echo $((seconds - $(date +%s) + started)); }

warm() { # script, entries
    OUT=$cache TORCHINDUCTOR_COMPILE_THREADS=2 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        timeout 105 "$python" "benchmarks/$1" --warm --only "$2" >>"$OUT/warm.log" 2>&1 &
}

echo "== tests"
: >"$OUT/warm.log"
cache=$(mktemp -d)
if [ -z "$tiny" ]; then
    warm gpu_table.py "lora soar compiled"
    warm gpu_table.py "grpo compiled"
    warm gpu_table.py "nft compiled"
    warm gpu_table.py "soar compiled"
    warm gpu_table.py "sampling compiled"
    warm gpu_lab.py "bf16 rows 14,bf16 rows 7"
    warm gpu_lab.py "bf16 whole step rows 28 budget 0.5,bf16 rows 28 budget 0.3"
    warm gpu_lab.py "bf16 whole step rows 28 budget 0.7"
    warm gpu_lab.py "lora bf16"
    warm gpu_lab.py "decoder fp32 compiled,decoder bf16 compiled"
    warm gpu_lab.py "fp8,plain"
fi
parallel=""
[ -z "$tiny" ] && "$python" -c "import xdist" 2>/dev/null && parallel="-n 4"
timeout 105 "$python" -m pytest -q -m cuda -p no:cacheprovider $parallel --durations 8 \
    tests/test_cuda.py tests/test_run.py >"$OUT/tests.log" 2>&1
tested=$?
wait
tail -n 25 "$OUT/tests.log"
echo "== compiler's cache filled after $(($(date +%s) - started)) s; errors: $(grep -c '"error"' "$OUT/warm.log")"
grep '"error"' "$OUT/warm.log" | cut -c1-300

# the seconds that a process takes to begin are not on its own clock
echo "== table"
part=$((($(left) - 20) * 55 / 100))
[ -n "$tiny" ] && part=1500
timeout $((part + 45)) "$python" benchmarks/gpu_table.py $tiny --seconds "$part" 2>"$OUT/table.log"
[ $? -eq 0 ] || tail -n 5 "$OUT/table.log"
echo "== experiments"
part=$(($(left) - 20))
[ -n "$tiny" ] && part=1500
timeout $((part + 15)) "$python" benchmarks/gpu_lab.py $tiny --seconds "$part" 2>"$OUT/lab.log"
[ $? -eq 0 ] || tail -n 5 "$OUT/lab.log"

cat "$OUT/grpo.txt" "$OUT/soar.txt" 2>/dev/null
"$python" benchmarks/gpu_report.py "$OUT/gpu.jsonl"
echo "tests: exit status $tested, $(tail -n 1 "$OUT/tests.log"); all in $(($(date +%s) - started)) s"
exit $tested
