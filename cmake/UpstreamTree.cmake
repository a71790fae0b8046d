# Gives the llama.cpp tree to build, in SWAA_EDGE_TREE_DIR: vendor/llama.cpp-patched, brought in step with patches/
# first, or vendor/llama.cpp for a baseline, or SWAA_EDGE_TREE as it is. Fetches upstream's sdist if it is not there.
#
# Edits made in the patched tree are kept and built (--keep): that is where patches are developed.
set(root "${CMAKE_CURRENT_LIST_DIR}/..")
get_filename_component(root "${root}" ABSOLUTE)

if(SWAA_EDGE_TREE)
  set(SWAA_EDGE_TREE_DIR "${SWAA_EDGE_TREE}")
else()
  if(SWAA_EDGE_BASELINE)
    set(SWAA_EDGE_TREE_DIR "${root}/vendor/llama.cpp")
    set(arguments fetch)
  else()
    set(SWAA_EDGE_TREE_DIR "${root}/vendor/llama.cpp-patched")
    set(arguments apply --keep)
  endif()
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${root}/scripts/patches.py" ${arguments}
    RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_STRIP_TRAILING_WHITESPACE)
  if(failed)
    message(FATAL_ERROR "scripts/patches.py failed: ${said}")
  endif()
  message(STATUS "swaa-edge: ${said}")

  # A build notices a changed patch by itself.
  file(GLOB_RECURSE patch_files CONFIGURE_DEPENDS "${root}/patches/*")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${patch_files} "${root}/scripts/patches.py")
endif()
if(NOT EXISTS "${SWAA_EDGE_TREE_DIR}/src/llama.cpp")
  message(FATAL_ERROR "${SWAA_EDGE_TREE_DIR} is no llama.cpp tree")
endif()
get_filename_component(SWAA_EDGE_TREE_PARENT "${SWAA_EDGE_TREE_DIR}" DIRECTORY)
