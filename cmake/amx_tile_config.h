/* Force-included before ggml's AMX kernels where GCC compiles them (Amx.cmake).
 *
 * Why: GCC 12's _tile_loadconfig tells the optimizer of 8 of the 64 bytes that the instruction reads. A configuration on
 * the stack loses the stores to its other bytes, and the first tile instruction dies of SIGILL. This one reads all 64.
 */
#pragma once

#include <immintrin.h>

#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%0" : : "m"(*(const char(*)[64])(config)))
