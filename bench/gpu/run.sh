#!/bin/bash
# Measures BGE-M3's encoder on one GPU: a full-size checkpoint with random weights, torch's
# reference and sentence-transformers beside Lockstep's engine. Needs torch, transformers and
# sentence-transformers for python3, a CUDA build of ONNX Runtime (1.31 or newer, with
# libonnxruntime_providers_cuda.so beside it) and the program of this folder:
#
#   go build -o gpu ./bench/gpu
#   bench/gpu/run.sh torch WORK                        makes the checkpoint, times torch
#   bench/gpu/run.sh engine WORK GPU LIBONNXRUNTIME    builds, compares and times the engine
#   bench/gpu/run.sh soak WORK GPU LIBONNXRUNTIME -for 4h -bound 1440
#                                                      watches memory, see the program's flags
#   bench/gpu/run.sh moonshot WORK                     products in 8 bits and a CUDA graph, in torch
#
# WORK takes 5 GB and keeps the results: torch.json, engine.json, moonshot.json.
set -euo pipefail
cd "$(dirname "$0")"
stage=$1
work=$2
side() { python3 torch_side.py "$@" 2> >(grep -v -i -e warn -e 'Loading weights' -e deprecated >&2); }
data=../../embedder/model/testdata
mkdir -p "$work"

case $stage in
torch)
  [ -d "$work/full" ] || python3 $data/make_tiny_m3.py --full "$work/full"
  side peak > "$work/peak"
  echo "8192^3 fp16 product, TFLOP/s, burst and sustained: $(cat "$work/peak")"
  side time "$work/full" "$(cut -d' ' -f1 "$work/peak")" "$work/torch.json"
  ;;
engine | soak)
  gpu=$3
  export ONNXRUNTIME_LIB=$4
  # CUDA's libraries as pip installs them with torch.
  libs=$(python3 -c 'import glob, os, torch; d = os.path.dirname(os.path.dirname(torch.__file__)); print(":".join(sorted({os.path.dirname(p) for p in glob.glob(d + "/nvidia/**/lib*.so*", recursive=True)})))')
  export LD_LIBRARY_PATH="$(dirname "$ONNXRUNTIME_LIB"):$libs:${LD_LIBRARY_PATH:-}"

  if [ "$stage" = soak ]; then
    [ -d "$work/full" ] || python3 $data/make_tiny_m3.py --full "$work/full"
    [ -d "$work/full-fp16" ] || "$gpu" build -checkpoint "$work/full" -model "$work/full-fp16"
    exec "$gpu" soak -model "$work/full-fp16" -budget 32768 "${@:5}" # as the service runs it
  fi
  "$gpu" build -checkpoint $data/tiny-m3 -model "$work/tiny-fp16"
  side goldens ids $data/m3_goldens.json "$work/ids.json"
  "$gpu" embed -model "$work/tiny-fp16" -rows "$work/ids.json" -heads dense,sparse,colbert -out "$work/vectors.bin"
  side goldens compare $data/m3_goldens.json "$work/vectors.bin"

  "$gpu" build -checkpoint "$work/full" -model "$work/full-fp16"
  side rows 250002 8192 "$work/rows.json"
  for heads in dense,sparse,colbert dense; do
    "$gpu" embed -model "$work/full-fp16" -rows "$work/rows.json" -heads $heads -out "$work/vectors.bin"
    side compare "$work/full" "$work/rows.json" "$work/vectors.bin"
  done
  side peak > "$work/peak"
  echo "8192^3 fp16 product, TFLOP/s, burst and sustained: $(cat "$work/peak")"
  "$gpu" time -model "$work/full-fp16" -peak "$(cut -d' ' -f1 "$work/peak")" -out "$work/engine.json"
  for budget in 32768 65536; do
    "$gpu" http -model "$work/full-fp16" -budget $budget
  done
  ;;
moonshot)
  [ -d "$work/full" ] || python3 $data/make_tiny_m3.py --full "$work/full"
  python3 moonshot.py "$work/full" "$work/moonshot.json" 2> >(grep -v -i -e warn -e 'Loading weights' -e deprecated >&2)
  ;;
*)
  echo "run.sh torch|engine|soak|moonshot" >&2
  exit 2
  ;;
esac
