# Kernel instances: the launchers of a kernel template for one element type and head size, each in a file of its own, so
# that they compile side by side. The files are written into the build folder.
#
# sharedllm_instances(<variable that takes the files> <their name>
#   HEADERS <below csrc/kernels> LAUNCHERS <templates that they define> PARAMS <type of a launcher's first argument>
#   [TYPES <bf16 fp16 fp32>] [SIZES <template arguments after the type, joined by _>])
set(SHAREDLLM_TYPE_bf16 __nv_bfloat16)
set(SHAREDLLM_TYPE_fp16 __half)
set(SHAREDLLM_TYPE_fp32 float)

function(sharedllm_instances variable name)
  cmake_parse_arguments(PARSE_ARGV 2 row "" "PARAMS" "HEADERS;LAUNCHERS;TYPES;SIZES")
  if(NOT row_HEADERS OR NOT row_LAUNCHERS OR NOT row_PARAMS OR row_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "sharedllm_instances(${name}): expected HEADERS, LAUNCHERS, PARAMS, TYPES and SIZES, got ${ARGN}")
  endif()
  if(NOT row_TYPES)
    set(row_TYPES bf16 fp16)
  endif()
  set(_includes "")
  foreach(_header IN LISTS row_HEADERS)
    string(APPEND _includes "#include \"kernels/${_header}\"\n")
  endforeach()
  set(_suffixes ${row_TYPES})
  if(row_SIZES)
    set(_suffixes "")
    foreach(_type IN LISTS row_TYPES)
      list(TRANSFORM row_SIZES PREPEND "${_type}_" OUTPUT_VARIABLE _of_type)
      list(APPEND _suffixes ${_of_type})
    endforeach()
  endif()
  set(_files "")
  foreach(_suffix IN LISTS _suffixes)
    # bf16_64_2 -> __nv_bfloat16, 64, 2
    string(REGEX MATCH "^[a-z]+[0-9]+" _type "${_suffix}")
    string(REGEX REPLACE "^[a-z]+[0-9]+" "" _sizes "${_suffix}")
    string(REPLACE "_" ", " _sizes "${_sizes}")
    set(_text "${_includes}\n")
    foreach(_launcher IN LISTS row_LAUNCHERS)
      string(APPEND _text "template cudaError_t sharedllm::${_launcher}<${SHAREDLLM_TYPE_${_type}}${_sizes}>(\n"
                          "    const sharedllm::${row_PARAMS}&, cudaStream_t);\n")
    endforeach()
    set(_file "${CMAKE_CURRENT_BINARY_DIR}/instances/${name}_${_suffix}.cu")
    # only if it changes: otherwise it would be compiled again
    file(CONFIGURE OUTPUT "${_file}" CONTENT "${_text}" @ONLY)
    list(APPEND _files "${_file}")
  endforeach()
  set(${variable} ${${variable}} ${_files} PARENT_SCOPE)
endfunction()

# ---- for any device of compute capability 8.0 and later ----
sharedllm_instances(SHAREDLLM_CUDA_SOURCES decode_linear
  HEADERS decode_linear.cuh
  LAUNCHERS launch_decode_linear_of
  PARAMS DecodeLinearParams
  TYPES bf16 fp16 fp32)
sharedllm_instances(SHAREDLLM_CUDA_SOURCES injected_attention_portable
  HEADERS injected_attention/portable/forward.cuh
  LAUNCHERS launch_injected_attention_portable_instance
  PARAMS InjectedAttentionParams
  SIZES 64 96 128 256)
sharedllm_instances(SHAREDLLM_CUDA_SOURCES injected_attention_backward_portable
  HEADERS injected_attention/portable/backward.cuh
  LAUNCHERS launch_injected_attention_backward_portable_instance
  PARAMS InjectedAttentionBackwardParams
  SIZES 64 96 128 256)
# TMA's swizzle takes pieces of 128 bytes: D 96 has an instance that refuses, so that the choice needs no case
sharedllm_instances(SHAREDLLM_CUDA_SOURCES injected_attention_decode_bulk
  HEADERS injected_attention/decode/launch.cuh
  LAUNCHERS launch_injected_attention_decode_bulk
  PARAMS InjectedAttentionParams
  SIZES 64 96 128 256)
sharedllm_instances(SHAREDLLM_CUDA_SOURCES injected_attention_decode_portable
  HEADERS injected_attention/decode/launch.cuh
  LAUNCHERS launch_injected_attention_decode_portable
  PARAMS InjectedAttentionParams
  SIZES 64 96 128 256)
sharedllm_instances(SHAREDLLM_CUDA_SOURCES injected_attention_decode_8bit
  HEADERS injected_attention/decode/eight_bit.cuh
  LAUNCHERS launch_injected_attention_decode_8bit_bulk launch_injected_attention_decode_8bit_portable
  PARAMS InjectedAttention8BitParams
  SIZES 64 96 128 256)
# head size and columns of tiles, eight rows each
sharedllm_instances(SHAREDLLM_CUDA_SOURCES node_vectors
  HEADERS node_vectors.cuh
  LAUNCHERS node_vectors::launch_tensor
  PARAMS NodeVectorsParams
  SIZES 64_1 64_2 96_1 96_2 128_1 128_2 256_1)

# ---- for compute capability 9.0 alone ----
sharedllm_instances(SHAREDLLM_SM90_SOURCES injected_attention_sm90
  HEADERS injected_attention/hopper/forward.cuh
  LAUNCHERS launch_injected_attention_sm90_instance
  PARAMS InjectedAttentionSm90Params
  SIZES 64 96 128 256)
sharedllm_instances(SHAREDLLM_SM90_SOURCES injected_attention_chained_sm90
  HEADERS injected_attention/hopper/chained.cuh
  LAUNCHERS launch_injected_attention_chained_sm90_instance
  PARAMS InjectedAttentionSm90Params
  SIZES 128)
sharedllm_instances(SHAREDLLM_SM90_SOURCES injected_attention_bulk_sm90
  HEADERS injected_attention/hopper/chained.cuh
  LAUNCHERS launch_injected_attention_bulk_sm90_instance
  PARAMS InjectedAttentionSm90Params
  SIZES 64 96 128)
sharedllm_instances(SHAREDLLM_SM90_SOURCES injected_attention_backward_sm90
  HEADERS injected_attention/hopper/backward.cuh injected_attention/hopper/query_gradient.cuh
  LAUNCHERS launch_query_gradient launch_backward
  PARAMS InjectedAttentionBackwardParams
  SIZES 64 96 128)
# D 256 has no fused backward
sharedllm_instances(SHAREDLLM_SM90_SOURCES injected_attention_backward_sm90
  HEADERS injected_attention/hopper/query_gradient.cuh
  LAUNCHERS launch_query_gradient
  PARAMS InjectedAttentionBackwardParams
  SIZES 256)
