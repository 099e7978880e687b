// pybind11 module: what is not an operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu/checksum.h"
#include "cpu/common/memory.h"

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

// The bytes of an object with Python's buffer protocol, which must be contiguous.
class Bytes {
 public:
  Bytes(const pybind11::object& object, int flags) {
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw pybind11::error_already_set();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
  size_t size() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_;
};

const std::vector<sharedllm::Crc32>& versions() {
  static const std::vector<sharedllm::Crc32> found = sharedllm::crc32_versions();
  return found;
}

std::vector<std::string> crc32_instructions() {
  std::vector<std::string> names;
  for (const auto& version : versions()) names.push_back(version.instructions);
  return names;
}

uint32_t crc32(const pybind11::object& data, uint32_t value, const std::string& instructions) {
  std::string names;
  for (const auto& version : versions()) {
    if (instructions.empty() || instructions == version.instructions) {
      const Bytes bytes(data, PyBUF_SIMPLE);
      const pybind11::gil_scoped_release unlocked;
      return version.update(value, bytes.data(), bytes.size());
    }
    names += (names.empty() ? "" : ", ") + std::string(version.instructions);
  }
  throw std::invalid_argument("instructions: expected one of those that run here (" + (names.empty() ? "none" : names) +
                              "), got '" + instructions + "'");
}

void populate(const pybind11::object& data) {
  const Bytes bytes(data, PyBUF_WRITABLE);
  const pybind11::gil_scoped_release unlocked;
  sharedllm::populate(bytes.data(), bytes.size());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and host-side helpers of sharedllm_ext.";
  m.def("build_info", &build_info, "Version, revision, torch, CUDA, compiler and architectures of this build.");
  m.def("cpu_capability", &cpu_capability, "Best instruction set of this machine that the CPU kernels use.");
  m.def("crc32", &crc32, "The sum of zlib.crc32; by default with the fastest instructions.", pybind11::arg("data"),
        pybind11::arg("value") = 0, pybind11::arg("instructions") = "");
  m.def("crc32_instructions", &crc32_instructions, "Those that crc32 can use here, the fastest first.");
  m.def("populate", &populate, "Makes the pages of fresh memory present.", pybind11::arg("data"));
}
