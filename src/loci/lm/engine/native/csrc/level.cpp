// The kernels compiled for one instruction set. LOCI_LEVEL is given on the command line, with the flags that allow it.
// Compiled with LOCI_ABSENT for a level that the compiler does not know.
#include "kernels.h"

#ifdef LOCI_ABSENT
#if LOCI_LEVEL == 1
const Kernels *avx2_kernels() { return nullptr; }
#elif LOCI_LEVEL == 2
const Kernels *avx512_kernels() { return nullptr; }
#else
const Kernels *amx_kernels() { return nullptr; }
#endif
#else

#include "attention.h"
#include "blocks.h"
#include "elementwise.h"
#include "linear.h"
#include "panels.h"
#include "simd.h"
#include "tiles.h"
#include "top.h"

#if LOCI_LEVEL < LOCI_AMX
static void nothing() {}
#endif

#if LOCI_LEVEL == LOCI_SCALAR
const Kernels *scalar_kernels() {
  static const Kernels kernels = {"scalar",      nothing,      nothing,    expand_scalar,    multiply_scalar, attend_scalar, combine_scalar,
                                  normalise_scalar, panel_place, rotate_scalar, add_scalar, round_scalar, gate_scalar, transform_scalar, rank_scalar};
  return &kernels;
}
#elif LOCI_LEVEL == LOCI_AVX2
const Kernels *avx2_kernels() {
  static const Kernels kernels = {"avx2",         nothing,     nothing,  expand_fast, multiply_fast,  attend_fast, combine_fast,
                                  normalise_fast, panel_place, rotate_fast, add_fast, round_fast, gate_fast, transform_fast, rank_fast};
  return &kernels;
}
#elif LOCI_LEVEL == LOCI_AVX512
const Kernels *avx512_kernels() {
  static const Kernels kernels = {"avx512",       nothing,     nothing,  expand_fast, multiply_fast,  attend_fast, combine_fast,
                                  normalise_fast, panel_place, rotate_fast, add_fast, round_fast, gate_fast, transform_fast, rank_fast};
  return &kernels;
}
#else
const Kernels *amx_kernels() {
  static const Kernels kernels = {"amx",          tiles_begin, tiles_end, expand_fast, multiply_fast,  attend_fast, combine_fast,
                                  normalise_fast, panel_place, rotate_fast, add_fast, round_fast, gate_fast, transform_fast, rank_fast};
  return &kernels;
}
#endif

#endif
