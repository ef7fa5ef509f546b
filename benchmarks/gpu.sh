#!/usr/bin/env bash
# What to measure first on a CUDA GPU, in seven calls of under ten minutes each, from a checkout's root:
#   OUT=gpu-results bash benchmarks/gpu.sh A    versions, correctness, 0-shot beside transformers
#   OUT=gpu-results bash benchmarks/gpu.sh B    4-shot beside transformers, 32 shots
#   OUT=gpu-results bash benchmarks/gpu.sh C    running out of memory, the demo from end to end
#   OUT=gpu-results bash benchmarks/gpu.sh D    the tests of the device, and 0-shot without graphs
#   OUT=gpu-results bash benchmarks/gpu.sh E    from JPEG files: the share of the time in which the GPU works; greedy
#   OUT=gpu-results bash benchmarks/gpu.sh F    a step's attention by Triton's kernel and by torch's, 0-shot and 4-shot
#   OUT=gpu-results bash benchmarks/gpu.sh G    one row at a time, and 64
# Needs torch with CUDA and the extra `test`. A part that fails or runs out of time leaves its log, and the next one
# starts; after each, gpu-results.tgz in OUT holds all that is there so far. Try it without a GPU, with 5 times the time:
#   PATIENCE=5 DEVICE=cpu DTYPE=fp32 SIZE=tiny CHECKED=tiny SCENES=8 PHOTOS=8 ROWS=8 ATTENTIONS=sdpa bash benchmarks/gpu.sh A
set -u
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
project=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
out=$(mkdir -p "${OUT:-gpu-results}" && realpath "${OUT:-gpu-results}")
python=${PYTHON:-python3} device=${DEVICE:-cuda} dtype=${DTYPE:-bf16} size=${SIZE:-9b} checked=${CHECKED:-mid} scenes=${SCENES:-2000}
attentions=${ATTENTIONS:-triton sdpa} # without a GPU: sdpa alone
batches=${BATCHES:-1 64} photos=${PHOTOS:-512} rows=${ROWS:-192} tests=${TESTS:-tests/device}
cd "$project" || exit 1

part() { # name, seconds, command...
  local name=$1 limit=$(($2 * ${PATIENCE:-1})) start=$SECONDS rc
  shift 2
  timeout -k 10 "$limit" "$@" >"$out/$name.json" 2>"$out/$name.log"
  rc=$?
  echo "== $name: exit code $rc, $((SECONDS - start)) s"
  tail -c 1500 "$out/$name.json"
  [ "$rc" = 0 ] || tail -n 5 "$out/$name.log"
  tar -C "$out" --exclude=photos --exclude='*.tgz' -czf "$out/gpu-results.tgz" .
}
bench() { # name, seconds, options of `idefics bench`
  part "$1" "$2" "$python" -m idefics_cli bench --device "$device" "${@:3}"
}
check() { part "$1" "$2" "$python" -m benchmarks.gpu_check "$1" --device "$device" --size "$checked"; }

case ${1:-} in
A)
  part versions 60 "$python" -m benchmarks.gpu_check versions --device "$device"
  check correct 200
  bench path 60 --random tiny --dtype fp32 --repeats 1
  bench 0shot 240 --random "$size" --dtype "$dtype" --num-beams 3 --batch-size 8 --repeats 2
  ;;
B)
  bench 4shot 280 --random "$size" --dtype "$dtype" --shots 4 --num-beams 3 --batch-size 8 --max-new-tokens 15 --repeats 2
  bench 32shot 280 --random "$size" --dtype "$dtype" --shots 32 --num-beams 3 --batch-size 4 --max-new-tokens 15 --repeats 1
  ;;
C)
  check memory 120
  bench 0shot-b32 280 --random "$size" --dtype "$dtype" --num-beams 3 --batch-size 32 --max-new-tokens 20 --repeats 1
  bench demo 120 -m demo --scenes "$scenes" --num-beams 3 --batch-size 64 --repeats 1
  part caption 60 "$python" -m idefics_cli caption examples/images -m demo --device "$device" -o "$out/captions.jsonl"
  ;;
D)
  part tests 300 "$python" -m pytest -q $tests
  bench 0shot-eager 240 --random "$size" --dtype "$dtype" --num-beams 3 --batch-size 8 --repeats 2 --eager
  ;;
E)
  part photos 60 "$python" -m benchmarks.gpu_check photos --folder "$out/photos" --count "$photos"
  part busy 240 "$python" -m benchmarks.engine_idle "$out/photos" --device "$device" --dtype "$dtype" --size "$size" \
    --rows $((photos / 2)) --batch-size 64 --workers "$(nproc)"
  part beside 40 "$python" -m benchmarks.engine_idle --beside 4 --device "$device"
  bench greedy 200 --random "$size" --dtype "$dtype" --num-beams 1 --batch-size "$rows" --max-new-tokens 20 --repeats 1
  ;;
F)
  for attention in $attentions; do
    bench "0shot-$attention" 140 --random "$size" --dtype "$dtype" --num-beams 3 --batch-size 32 --repeats 1 --attention "$attention"
    bench "4shot-$attention" 140 --random "$size" --dtype "$dtype" --shots 4 --num-beams 3 --batch-size 16 --max-new-tokens 15 --repeats 1 --attention "$attention"
  done
  ;;
G)
  for batch in $batches; do
    bench "batch-$batch" 240 --random "$size" --dtype "$dtype" --num-beams 3 --batch-size "$batch" --max-new-tokens 20 --repeats 1
  done
  ;;
*)
  echo "usage: bash benchmarks/gpu.sh A|B|C|D|E|F|G" >&2
  exit 2
  ;;
esac
