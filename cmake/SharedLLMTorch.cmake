# torch's headers and libraries, found from the installed package without importing it.
if(NOT EXISTS "${SHAREDLLM_TORCH_DIR}/include/torch/csrc/stable/ops.h")
  message(FATAL_ERROR "SHAREDLLM_TORCH_DIR: expected the folder of a torch package 2.10 or newer (with "
                      "include/torch/csrc/stable/ops.h), got '${SHAREDLLM_TORCH_DIR}'")
endif()
file(READ "${SHAREDLLM_TORCH_DIR}/version.py" _version)
string(REGEX MATCH "__version__ = '([^']+)'" _ "${_version}")
set(SHAREDLLM_TORCH_VERSION "${CMAKE_MATCH_1}")

add_library(sharedllm_torch_stable INTERFACE)
target_include_directories(sharedllm_torch_stable SYSTEM INTERFACE "${SHAREDLLM_TORCH_DIR}/include")
target_include_directories(sharedllm_torch_stable INTERFACE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
# the oldest torch whose stable ABI the sources use
target_compile_definitions(sharedllm_torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000ULL)
find_library(SHAREDLLM_TORCH_CPU torch_cpu PATHS "${SHAREDLLM_TORCH_DIR}/lib" NO_DEFAULT_PATH REQUIRED)
set(SHAREDLLM_TORCH_CPU_LIBRARIES "${SHAREDLLM_TORCH_CPU}")
# a toolchain that links the C++ runtime statically must not export it: torch's own copy would be mixed with ours
if(NOT APPLE)
  target_link_options(sharedllm_torch_stable INTERFACE LINKER:--exclude-libs,ALL)
endif()
# torch is always imported first, so its libraries are found by name: no path of this machine in the result
set(CMAKE_SKIP_RPATH ON)
