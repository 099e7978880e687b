# CUDA operators: a library of their own, since torch's CUDA symbols exist only in a torch built with CUDA.
enable_language(CUDA)
if(NOT EXISTS "${SHAREDLLM_CUTLASS_INCLUDE}/cute/tensor.hpp")
  message(FATAL_ERROR "SHAREDLLM_CUTLASS_INCLUDE: expected CUTLASS headers (with cute/tensor.hpp), got "
                      "'${SHAREDLLM_CUTLASS_INCLUDE}'; pip install nvidia-cutlass")
endif()
include(SharedLLMInstances)
# kernels take their tiles as structs with named fields
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
find_package(CUDAToolkit REQUIRED)
set(_cuda_architectures "${SHAREDLLM_ARCHITECTURES}")
list(TRANSFORM _cuda_architectures APPEND "-real")
set(_ptx "${SHAREDLLM_PTX}")
list(TRANSFORM _ptx APPEND "-virtual")
list(APPEND _cuda_architectures ${_ptx})
add_library(sharedllm_cuda SHARED ${SHAREDLLM_CUDA_SOURCES})
# kernels that use instructions of Hopper alone are compiled for it alone
if("90a" IN_LIST SHAREDLLM_ARCHITECTURES)
  add_library(sharedllm_sm90 OBJECT ${SHAREDLLM_SM90_SOURCES})
  set_target_properties(sharedllm_sm90 PROPERTIES CUDA_ARCHITECTURES "90a-real")
  target_link_libraries(sharedllm_cuda PRIVATE sharedllm_sm90)
  target_compile_definitions(sharedllm_cuda PRIVATE SHAREDLLM_SM90A)
endif()
set_target_properties(sharedllm_cuda PROPERTIES CUDA_ARCHITECTURES "${_cuda_architectures}")
foreach(_target sharedllm_cuda sharedllm_sm90)
  if(TARGET ${_target})
    set_target_properties(${_target} PROPERTIES CUDA_VISIBILITY_PRESET hidden)
    target_include_directories(${_target} SYSTEM PRIVATE "${SHAREDLLM_CUTLASS_INCLUDE}" ${CUDAToolkit_INCLUDE_DIRS})
    target_include_directories(${_target} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
    # compressed, the code of kernels takes a quarter of the space; it is unpacked when it is first used
    target_compile_options(
      ${_target}
      PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr --expt-extended-lambda -Xfatbin=-compress-all>)
  endif()
endforeach()
target_compile_definitions(sharedllm_cuda PRIVATE USE_CUDA)
target_link_libraries(sharedllm_cuda PRIVATE sharedllm_torch_stable ${SHAREDLLM_TORCH_CPU_LIBRARIES} CUDA::cudart_static)
find_library(SHAREDLLM_TORCH_CUDA torch_cuda PATHS "${SHAREDLLM_TORCH_DIR}/lib" NO_DEFAULT_PATH)
if(NOT SHAREDLLM_TORCH_CUDA)
  # a torch without CUDA is enough to build: an empty library of the same name records the dependency, and the loader
  # then takes the real one that torch has loaded
  file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/generated/empty.cpp" "")
  add_library(sharedllm_torch_cuda_name SHARED "${CMAKE_CURRENT_BINARY_DIR}/generated/empty.cpp")
  set_target_properties(sharedllm_torch_cuda_name PROPERTIES OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY generated)
  set(SHAREDLLM_TORCH_CUDA sharedllm_torch_cuda_name)
endif()
target_link_libraries(sharedllm_cuda PRIVATE -Wl,--no-as-needed ${SHAREDLLM_TORCH_CUDA})
