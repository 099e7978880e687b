# Kernel instances: the launchers of a kernel template for one element type and head size. Files of them, which compile
# side by side, are written into the build folder. Reading the headers takes 2 to 4 s of each file's time: kernels that
# take no longer are TOGETHER, all element types of a size in one file.
#
# sharedllm_instances(<variable that takes the files> <their name>
#   HEADERS <below csrc/kernels> LAUNCHERS <templates that they define> PARAMS <type of a launcher's first argument>
#   [TYPES <bf16 fp16 fp32>] [SIZES <template arguments after the type, joined by _>] [TOGETHER])
set(SHAREDLLM_TYPE_bf16 __nv_bfloat16)
set(SHAREDLLM_TYPE_fp16 __half)
set(SHAREDLLM_TYPE_fp32 float)

function(sharedllm_instances variable name)
  cmake_parse_arguments(PARSE_ARGV 2 row "TOGETHER" "PARAMS" "HEADERS;LAUNCHERS;TYPES;SIZES")
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
  if(NOT row_SIZES)
    set(row_SIZES none)
  endif()
  set(_files "")
  foreach(_size IN LISTS row_SIZES)
    # 64_2 -> ", 64, 2", and _64_2 in the file's name
    string(REPLACE "_" ", " _arguments ", ${_size}")
    set(_suffix "_${_size}")
    if(_size STREQUAL "none")
      set(_arguments "")
      set(_suffix "")
    endif()
    set(_text "${_includes}\n")
    set(_left ${row_TYPES})
    foreach(_type IN LISTS row_TYPES)
      foreach(_launcher IN LISTS row_LAUNCHERS)
        string(APPEND _text "template cudaError_t sharedllm::${_launcher}<${SHAREDLLM_TYPE_${_type}}${_arguments}>(\n"
                            "    const sharedllm::${row_PARAMS}&, cudaStream_t);\n")
      endforeach()
      list(REMOVE_ITEM _left ${_type})
      if(NOT row_TOGETHER OR NOT _left)
        set(_file "${CMAKE_CURRENT_BINARY_DIR}/instances/${name}_${_type}${_suffix}.cu")
        if(row_TOGETHER)
          set(_file "${CMAKE_CURRENT_BINARY_DIR}/instances/${name}${_suffix}.cu")
        endif()
        # only if it changes: otherwise it would be compiled again
        file(CONFIGURE OUTPUT "${_file}" CONTENT "${_text}" @ONLY)
        list(APPEND _files "${_file}")
        set(_text "${_includes}\n")
      endif()
    endforeach()
  endforeach()
  set(${variable} ${${variable}} ${_files} PARENT_SCOPE)
endfunction()

# ---- for any device of compute capability 8.0 and later ----
sharedllm_instances(SHAREDLLM_CUDA_SOURCES decode_linear
  HEADERS decode_linear.cuh
  LAUNCHERS launch_decode_linear_of
  PARAMS DecodeLinearParams
  TYPES bf16 fp16 fp32)
sharedllm_instances(SHAREDLLM_CUDA_SOURCES decode_linear_fp8
  HEADERS decode_linear_fp8.cuh
  LAUNCHERS launch_decode_linear_fp8_of
  PARAMS DecodeLinearParams
  TYPES bf16 fp16)
sharedllm_instances(SHAREDLLM_CUDA_SOURCES injected_attention_portable
  HEADERS injected_attention/portable/forward.cuh
  LAUNCHERS launch_injected_attention_portable_instance
  PARAMS InjectedAttentionParams
  SIZES 64 96 128 256
  TOGETHER)
sharedllm_instances(SHAREDLLM_CUDA_SOURCES injected_attention_backward_portable
  HEADERS injected_attention/portable/backward.cuh
  LAUNCHERS launch_injected_attention_backward_portable_instance
  PARAMS InjectedAttentionBackwardParams
  SIZES 64 96 128 256
  TOGETHER)
# TMA's swizzle takes pieces of 128 bytes: D 96 has an instance that refuses, so that the choice needs no case
sharedllm_instances(SHAREDLLM_CUDA_SOURCES injected_attention_decode
  HEADERS injected_attention/decode/launch.cuh
  LAUNCHERS launch_injected_attention_decode_bulk launch_injected_attention_decode_portable
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
  SIZES 64_1 64_2 96_1 96_2 128_1 128_2 256_1
  TOGETHER)

# ---- for compute capability 9.0 alone ----
sharedllm_instances(SHAREDLLM_SM90_SOURCES injected_attention_sm90
  HEADERS injected_attention/hopper/forward.cuh injected_attention/hopper/chained.cuh
  LAUNCHERS launch_injected_attention_sm90_instance launch_injected_attention_bulk_sm90_instance
  PARAMS InjectedAttentionSm90Params
  SIZES 64 96
  TOGETHER)
sharedllm_instances(SHAREDLLM_SM90_SOURCES injected_attention_sm90
  HEADERS injected_attention/hopper/forward.cuh injected_attention/hopper/chained.cuh
  LAUNCHERS launch_injected_attention_sm90_instance launch_injected_attention_bulk_sm90_instance
            launch_injected_attention_chained_sm90_instance
  PARAMS InjectedAttentionSm90Params
  SIZES 128
  TOGETHER)
sharedllm_instances(SHAREDLLM_SM90_SOURCES injected_attention_sm90
  HEADERS injected_attention/hopper/forward.cuh
  LAUNCHERS launch_injected_attention_sm90_instance
  PARAMS InjectedAttentionSm90Params
  SIZES 256
  TOGETHER)
sharedllm_instances(SHAREDLLM_SM90_SOURCES injected_attention_backward_sm90
  HEADERS injected_attention/hopper/backward.cuh injected_attention/hopper/query_gradient.cuh
  LAUNCHERS launch_query_gradient launch_backward
  PARAMS InjectedAttentionBackwardParams
  SIZES 64 96 128
  TOGETHER)
# D 256 has no fused backward
sharedllm_instances(SHAREDLLM_SM90_SOURCES injected_attention_backward_sm90
  HEADERS injected_attention/hopper/query_gradient.cuh
  LAUNCHERS launch_query_gradient
  PARAMS InjectedAttentionBackwardParams
  SIZES 256
  TOGETHER)
