// Includes the file VITFAST_KERNEL once per instruction set, inside namespace vitfast::VITFAST_ISA and with that set
// switched on for the functions it defines. Whatever the kernel uses from outside must be included before: a function
// of the standard library compiled with AVX-512 could replace the one that every CPU can run. Included once per .cpp.
// VITFAST_LEVEL: 0 portable, 1 AVX2 + FMA, 2 AVX-512, 3 AVX-512 with bf16 and VNNI. VITFAST_VNNI: whether products of
// 8-bit integers have an instruction; level 2 comes without, and once more with it if VITFAST_WITH_VNNI is defined.
// VITFAST_AMX: whether there are tiles; level 3 comes without, and once more with them if VITFAST_WITH_AMX is defined.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "isa.h"

// What VITFAST_DISPATCH calls where the CPU has VNNI without bf16, or AMX. Only kernels that multiply 8-bit integers
// have a version for the first, only those that multiply matrices one for the second (which needs GCC 11).
#ifdef VITFAST_WITH_VNNI
#define VITFAST_AVX512_VNNI avx512_vnni
#else
#define VITFAST_AVX512_VNNI avx512
#endif
#if defined(VITFAST_WITH_AMX) && (!VITFAST_X86 || __GNUC__ < 11)
#undef VITFAST_WITH_AMX
#endif
#ifdef VITFAST_WITH_AMX
#define VITFAST_AMX_TILES amx
#else
#define VITFAST_AMX_TILES avx512_bf16
#endif

#if VITFAST_X86
#include <immintrin.h>
#endif

#define VITFAST_AMX 0
#define VITFAST_VNNI 0
#define VITFAST_LEVEL 0
#define VITFAST_ISA portable
namespace vitfast::portable {
#include "vec.h"
#include VITFAST_KERNEL
}  // namespace vitfast::portable
#undef VITFAST_LEVEL
#undef VITFAST_ISA

#if VITFAST_X86

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define VITFAST_LEVEL 1
#define VITFAST_ISA avx2
namespace vitfast::avx2 {
#include "vec.h"
#include VITFAST_KERNEL
}  // namespace vitfast::avx2
#undef VITFAST_LEVEL
#undef VITFAST_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define VITFAST_LEVEL 2
#define VITFAST_ISA avx512
namespace vitfast::avx512 {
#include "vec.h"
#include VITFAST_KERNEL
}  // namespace vitfast::avx512
#undef VITFAST_LEVEL
#undef VITFAST_ISA
#pragma GCC pop_options

#undef VITFAST_VNNI
#define VITFAST_VNNI 1

#ifdef VITFAST_WITH_VNNI
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#define VITFAST_LEVEL 2
#define VITFAST_ISA avx512_vnni
namespace vitfast::avx512_vnni {
#include "vec.h"
#include VITFAST_KERNEL
}  // namespace vitfast::avx512_vnni
#undef VITFAST_LEVEL
#undef VITFAST_ISA
#pragma GCC pop_options
#endif

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,prefer-vector-width=512")
#define VITFAST_LEVEL 3
#define VITFAST_ISA avx512_bf16
namespace vitfast::avx512_bf16 {
#include "vec.h"
#include VITFAST_KERNEL
}  // namespace vitfast::avx512_bf16
#undef VITFAST_LEVEL
#undef VITFAST_ISA
#pragma GCC pop_options

#ifdef VITFAST_WITH_AMX
#undef VITFAST_AMX
#define VITFAST_AMX 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,prefer-vector-width=512")
#pragma GCC target("amx-tile,amx-bf16,amx-int8")
#define VITFAST_LEVEL 3
#define VITFAST_ISA amx
namespace vitfast::amx {
#include "vec.h"
#include VITFAST_KERNEL
}  // namespace vitfast::amx
#undef VITFAST_LEVEL
#undef VITFAST_ISA
#pragma GCC pop_options
#endif

#endif  // VITFAST_X86
#undef VITFAST_AMX
#undef VITFAST_VNNI
