// pybind11 module: what is not an operator.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "build_info.h"

namespace {

pybind11::list split(const std::string& text) {
  pybind11::list entries;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find(';', begin), text.size());
    entries.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return entries;
}

// What this build was made with; compared with the running installation when the libraries load.
pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = SHAREDLLM_VERSION;
  info["revision"] = SHAREDLLM_REVISION;
  info["torch"] = SHAREDLLM_TORCH_VERSION;
  info["cuda"] = SHAREDLLM_CUDA_VERSION;
  info["compiler"] = SHAREDLLM_COMPILER;
  info["architectures"] = split(SHAREDLLM_ARCHITECTURES);
  info["ptx"] = split(SHAREDLLM_PTX);
  return info;
}

// Best instruction set of this machine that the CPU kernels have a version for.
std::string cpu_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16")) return "avx512_bf16";
  if (__builtin_cpu_supports("avx512f")) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "generic";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and host-side helpers of sharedllm_ext.";
  m.def("build_info", &build_info, "Version, revision, torch, CUDA, compiler and architectures of this build.");
  m.def("cpu_capability", &cpu_capability, "Best instruction set of this machine that the CPU kernels use.");
}
