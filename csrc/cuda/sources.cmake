# The files of the CUDA kernels, for nvcc and for the emulator alike.
set(cuda_names append.cu attention.cu decode.cu decode_bfloat16.cu decode_float16.cu rotary.cu)
list(TRANSFORM cuda_names PREPEND ${CMAKE_CURRENT_LIST_DIR}/ OUTPUT_VARIABLE cuda_sources)
