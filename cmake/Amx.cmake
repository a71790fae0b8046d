# Decides whether a build for this machine may use AMX, and has GCC compile ggml's AMX kernels right.
#
# A processor may report AMX where the kernel or the virtual machine doesn't let it be used; the first tile instruction,
# which a library built with -march=native executes for quantized weights, then kills the process (SIGILL). So where the
# compiler would use AMX, a tiny program tries it at configure time, in a process of its own; unless it succeeds, AMX is
# left out.
#
#   include(cmake/Amx.cmake)                 # sets SWAA_EDGE_AMX: "absent", "works" or "broken"
#   swaa_edge_leave_out_amx(ggml-cpu)        # adds the switches when it is "broken"
#   swaa_edge_keep_tile_config(ggml-cpu)     # see amx_tile_config.h; in all CPU libraries of its folder
#
# For tests: SWAA_EDGE_AMX_REPORTED (ON/OFF) replaces what the compiler says of this machine, SWAA_EDGE_AMX_PROBE
# the program.
include(CheckCSourceCompiles)

set(SWAA_EDGE_AMX_PROBE "${CMAKE_CURRENT_LIST_DIR}/amx_probe.c" CACHE FILEPATH "Program that tries AMX; exits 0 if it works")
mark_as_advanced(SWAA_EDGE_AMX_PROBE)

set(SWAA_EDGE_AMX "absent")
if(GGML_NATIVE AND NOT MSVC AND NOT CMAKE_CROSSCOMPILING AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(CMAKE_REQUIRED_FLAGS "-march=native")
  check_c_source_compiles("
    #ifndef __AMX_INT8__
    #error the compiler would not use AMX here
    #endif
    int main(void) { return 0; }" SWAA_EDGE_AMX_REPORTED)
  unset(CMAKE_REQUIRED_FLAGS)
  if(SWAA_EDGE_AMX_REPORTED)
    try_run(SWAA_EDGE_AMX_RUN SWAA_EDGE_AMX_COMPILED "${CMAKE_BINARY_DIR}/amx-probe" "${SWAA_EDGE_AMX_PROBE}"
      COMPILE_DEFINITIONS -march=native)
    if(SWAA_EDGE_AMX_COMPILED AND SWAA_EDGE_AMX_RUN EQUAL 0)
      set(SWAA_EDGE_AMX "works")
    else()
      set(SWAA_EDGE_AMX "broken")
    endif()
  endif()
endif()

if(SWAA_EDGE_AMX STREQUAL "broken")
  message(STATUS "swaa-edge: AMX is reported but a trial of it failed (${SWAA_EDGE_AMX_RUN}): building without AMX")
else()
  message(STATUS "swaa-edge: AMX ${SWAA_EDGE_AMX}")
endif()

function(swaa_edge_leave_out_amx target)
  if(SWAA_EDGE_AMX STREQUAL "broken" AND TARGET ${target})
    target_compile_options(${target} PRIVATE -mno-amx-int8 -mno-amx-bf16 -mno-amx-tile)
  endif()
endfunction()

function(swaa_edge_keep_tile_config target)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    get_target_property(folder ${target} SOURCE_DIR)
    set_property(SOURCE "${folder}/ggml-cpu/amx/mmq.cpp" TARGET_DIRECTORY ${target} PROPERTY COMPILE_OPTIONS
      -include "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/amx_tile_config.h")
  endif()
endfunction()
