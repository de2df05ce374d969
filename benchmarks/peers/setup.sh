#!/usr/bin/env bash
# Makes an environment for the tools that we compare with: setup.sh DIR [genai|llama_cpp|optimum]
# Safe to run again: what is there already is kept. PYTHON picks the interpreter (3.11 or newer); pip's own settings
# (PIP_INDEX_URL, PIP_FIND_LINKS, ...) pick where packages come from. A `torch` with or without CUDA will do: it only
# reads the checkpoint when the model is built.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: $0 DIR [genai|llama_cpp|optimum]" >&2
  exit 2
fi
directory=$1
tool=${2:-genai}

genai=(onnxruntime-genai==0.18.0 onnxruntime==1.32.0 numpy==2.4.6 tokenizers==0.23.3
  torch==2.13.0 transformers==5.23.0 onnx==1.23.2 onnx-ir==1.1.0)
# Compiled here, for this processor: about ten minutes on one core. It needs a C++ compiler.
llama_cpp=(llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6 tokenizers==0.23.3)
# Its exporter needs transformers 4.
optimum=(optimum==2.1.0 optimum-onnx==0.1.0 onnxruntime==1.32.0 onnx==1.23.2 torch==2.13.0 transformers==4.57.6)

case $tool in
  genai) packages=("${genai[@]}") ;;
  llama_cpp) packages=("${llama_cpp[@]}") ;;
  optimum) packages=("${optimum[@]}") ;;
  *) echo "$0: no tool is named '$tool': genai, llama_cpp or optimum" >&2; exit 2 ;;
esac

[ -x "$directory/bin/python" ] || "${PYTHON:-python3}" -m venv "$directory"
# The multimodal half of llama.cpp is left out: it is not used and takes long to compile.
CMAKE_ARGS="${CMAKE_ARGS:-} -DLLAVA_BUILD=OFF" "$directory/bin/python" -m pip install --quiet "${packages[@]}"

case $tool in
  genai) "$directory/bin/python" -c 'import onnxruntime_genai; print("onnxruntime-genai", onnxruntime_genai.__version__)' ;;
  llama_cpp) "$directory/bin/python" -c 'import llama_cpp; print("llama-cpp-python", llama_cpp.__version__)' ;;
  optimum) "$directory/bin/python" -c 'from optimum.version import __version__; print("optimum", __version__)' ;;
esac
