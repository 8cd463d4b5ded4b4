#!/usr/bin/env bash
# A whole GPU visit: tests on the device, compute-sanitizer, the benchmark suite, profiles, a report.
#
#     tools/gpu_check.sh OUT              every part, in order
#     tools/gpu_check.sh OUT kernels ...  these parts
#     tools/gpu_check.sh --list           what parts there are
#
# Needs gemcut installed (pip install -e '.[test,bench]') and a GPU.  Each part ends within eight
# minutes and leaves OUT/PART.log; benchmarks leave OUT/*.json row by row, so that a part which runs
# out of time keeps what it has measured.  Exits with 1 where a part failed; the others run anyway.
#
#     DEVICE=cpu tools/gpu_check.sh OUT   the same parts at small sizes: tries the script itself
set -uo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
LIMIT=${LIMIT:-470} # seconds of a part
PARTS=(tests-kernels tests-rest sanitizer kernels compiled decode-small decode-middle decode-large)
PARTS+=(prefill serve-sim host-work tune profile report)
KERNEL_TESTS=(norm rotary matmul mlp qkv head prefill_attention decode_attention)
KERNEL_TESTS+=(sampling_kernels penalize registration model_kernels)

KERNEL_TESTS=("${KERNEL_TESTS[@]/#/tests/test_}")
KERNEL_TESTS=("${KERNEL_TESTS[@]/%/.py}")

if [ "$DEVICE" = cuda ]; then
    SMALL=(vaultgemma-1b gemma-3-1b gemma-2b gemma-2-2b)
    MIDDLE=gemma-2-9b
    LARGE=gemma-2-27b
    KERNEL_MODELS=(gemma-2-2b gemma-2-9b)
    DECODE=(--batch 1 16 --prompt-tokens 960 --new-tokens 128)
    PREFILL=(--tokens 512 4096)
    SERVE=()
    CUT=()
    TUNE=(--minutes 7)
    ROUNDS=10
else
    SMALL=(gemma-3-270m)
    MIDDLE=gemma-3-270m
    LARGE=gemma-3-270m
    KERNEL_MODELS=(demo)
    DECODE=(--batch 1 2 --prompt-tokens 8 --new-tokens 4 --repeats 2)
    PREFILL=(--tokens 16 --repeats 2)
    SERVE=(--requests 4)
    CUT=(--layers 1)
    TUNE=(--compile-only --part sm_90 --kernels norm_linear --minutes 1)
    ROUNDS=2
fi

bench() {
    "$PYTHON" -P -c 'import sys; from gemcut.bench.cli import main; sys.exit(main())' "$@"
}

tests() { # in as many processes as there are cores, where pytest-xdist is installed
    local workers=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc)")
    (cd "$ROOT" && OMP_NUM_THREADS=1 "$PYTHON" -m pytest "${workers[@]}" "$@")
}

decode() { # MODEL PEER...
    local model=$1
    shift
    bench decode --random "$model" "${CUT[@]}" "${DECODE[@]}" --device "$DEVICE" --peer "$@" \
        --json "$OUT/decode-$model.json"
}

sanitize() { # TOOL: a few tokens of the demo, then each op once
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
    local check=(compute-sanitizer --tool "$1" --error-exitcode 1 "$PYTHON" -P -c)
    # torch's own pool would hide what lies beyond a tensor
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    "${check[@]}" 'import sys; from gemcut.engine.cli import main; sys.exit(main())' \
        generate "It was" --max-tokens 4 --device cuda &&
        "${check[@]}" 'import sys; from gemcut.bench.cli import main; sys.exit(main())' \
            kernels --models demo --batch 2 --context 40 --tokens 40 --rounds 1 --peer
}

run_part() {
    local failed=0
    case $1 in
        tests-kernels) tests "${KERNEL_TESTS[@]}" ;;
        tests-rest) tests "${KERNEL_TESTS[@]/#/--ignore=}" ;;
        sanitizer)
            [ "$DEVICE" = cuda ] || { echo "there is none for a CPU"; return; }
            sanitize memcheck && sanitize initcheck
            ;;
        kernels)
            bench kernels --models "${KERNEL_MODELS[@]}" --rounds $ROUNDS --device "$DEVICE" \
                --peer torch blas rms_norm sdpa --json "$OUT/kernels.json"
            ;;
        compiled) # peers that compile for each case anew
            bench kernels --models "${KERNEL_MODELS[-1]}" --rounds $ROUNDS --device "$DEVICE" \
                --op attention_prefill attention_decode rmsnorm geglu norm_linear_geglu \
                --batch 1 --json "$OUT/kernels-compiled.json"
            ;;
        decode-small)
            for model in "${SMALL[@]}"; do
                decode "$model" transformers transformers-compiled gpt-fast || failed=1
            done
            return $failed
            ;;
        decode-middle) decode "$MIDDLE" transformers transformers-compiled gpt-fast ;;
        decode-large) decode "$LARGE" transformers-compiled gpt-fast ;;
        prefill)
            bench prefill --random "$MIDDLE" "${CUT[@]}" "${PREFILL[@]}" --device "$DEVICE" \
                --json "$OUT/prefill-$MIDDLE.json"
            ;;
        serve-sim)
            bench serve-sim --random "${SMALL[-1]}" "${CUT[@]}" "${SERVE[@]}" --device "$DEVICE" \
                --json "$OUT/serve-sim-${SMALL[-1]}.json"
            ;;
        host-work) bench host-work --device "$DEVICE" --json "$OUT/host-work.json" ;;
        tune) "$PYTHON" -P -m gemcut.tools.tune --models "$MIDDLE" --out "$OUT" "${TUNE[@]}" ;;
        profile)
            for batch in 1 16; do
                "$PYTHON" -P -m gemcut.tools.profile_step --random "$MIDDLE" "${CUT[@]}" \
                    --device "$DEVICE" --batch $batch --out "$OUT/profile-batch-$batch" || failed=1
            done
            return $failed
            ;;
        report) bench report "$OUT" --out "$OUT" ;;
    esac
}

if [ "${1:-}" = --list ]; then
    printf '%s\n' "${PARTS[@]}"
    exit
fi
[ $# -gt 0 ] || { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
if [ -n "${INSIDE_PART:-}" ]; then
    run_part "$1"
    exit
fi

chosen=("$@")
[ $# -gt 0 ] || chosen=("${PARTS[@]}")
for part in "${chosen[@]}"; do
    [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "there is no part $part: ${PARTS[*]}" >&2; exit 2; }
done
status=0
for part in "${chosen[@]}"; do
    echo "== $part"
    started=$SECONDS
    # SIGINT, at which the benchmarks print what they have measured
    INSIDE_PART=1 timeout --signal=INT --kill-after=15 "$LIMIT" "$0" "$OUT" "$part" 2>&1 |
        tee "$OUT/$part.log" | tail -n 25
    code=${PIPESTATUS[0]}
    [ "$code" = 124 ] && echo "ran out of its $LIMIT seconds"
    echo "== $part: exit code $code after $((SECONDS - started)) s"
    [ "$code" = 0 ] || status=1
done
exit $status
