#pragma once

#include <cstdint>

// Kernel bodies (*_kernel.h) are compiled once per instruction set by for_each_isa.h, each into a namespace of its own;
// the CPU's features, or set_cpu_capability, decide at run time which one is called.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VITFAST_X86 1
#else
#define VITFAST_X86 0
#endif

namespace vitfast {

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
};

enum class Capability { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };

Capability cpu_capability();

}  // namespace vitfast

// VITFAST_AVX512_VNNI and VITFAST_AMX_TILES: see for_each_isa.h.
#if VITFAST_X86
#define VITFAST_DISPATCH(call)                   \
    switch (::vitfast::cpu_capability()) {       \
        case ::vitfast::Capability::kAmx:        \
            VITFAST_AMX_TILES::call;             \
            break;                               \
        case ::vitfast::Capability::kAvx512Bf16: \
            avx512_bf16::call;                   \
            break;                               \
        case ::vitfast::Capability::kAvx512Vnni: \
            VITFAST_AVX512_VNNI::call;           \
            break;                               \
        case ::vitfast::Capability::kAvx512:     \
            avx512::call;                        \
            break;                               \
        case ::vitfast::Capability::kAvx2:       \
            avx2::call;                          \
            break;                               \
        case ::vitfast::Capability::kPortable:   \
            portable::call;                      \
            break;                               \
    }
#else
#define VITFAST_DISPATCH(call) portable::call
#endif
