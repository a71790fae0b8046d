# Toolchain for 64-bit Arm Linux on another machine, with qemu-user to run what it makes (scripts/arm/check.py).
#
#   cmake -S . -B build/arm --toolchain cmake/aarch64-linux-gnu.cmake
#
# Debian: apt-get install g++-aarch64-linux-gnu qemu-user. Also finds compilers that are there with their version only.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

foreach(pair "C gcc" "CXX g++")
  separate_arguments(pair)
  list(GET pair 0 language)
  list(GET pair 1 tool)
  set(names aarch64-linux-gnu-${tool})
  foreach(version RANGE 16 10 -1)
    list(APPEND names aarch64-linux-gnu-${tool}-${version})
  endforeach()
  find_program(CMAKE_${language}_COMPILER NAMES ${names} REQUIRED)
endforeach()
find_program(SWAA_EDGE_QEMU NAMES qemu-aarch64 qemu-aarch64-static)
if(SWAA_EDGE_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR "${SWAA_EDGE_QEMU};-cpu;max")
endif()

# Libraries and headers of the build machine are of another architecture.
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
if(NOT CMAKE_FIND_ROOT_PATH)
  set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
endif()
