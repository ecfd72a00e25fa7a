#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>

#include "check.h"

#if VITFAST_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vitfast {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

#if VITFAST_X86
// AMX's tiles with products of bf16 and of 8-bit integers. Linux gives a process the tile registers (8 KiB more to save
// for each thread) only when asked.
bool has_amx() {
    if (__GNUC__ < 11) return false;                             // which could not compile the kernels
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Capability best_capability() {
#if VITFAST_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::kPortable;
    for (const bool supported : {bool(__builtin_cpu_supports("avx512f")), bool(__builtin_cpu_supports("avx512bw")),
                                 bool(__builtin_cpu_supports("avx512dq")), bool(__builtin_cpu_supports("avx512vl"))}) {
        if (!supported) return Capability::kAvx2;
    }
    if (!__builtin_cpu_supports("avx512vnni")) return Capability::kAvx512;  // so has every CPU with bf16
    if (!__builtin_cpu_supports("avx512bf16")) return Capability::kAvx512Vnni;
    return has_amx() ? Capability::kAmx : Capability::kAvx512Bf16;
#else
    return Capability::kPortable;
#endif
}

std::atomic<Capability>& chosen() {
    static std::atomic<Capability> capability{best_capability()};
    return capability;
}

std::string get_capability() { return kNames[static_cast<int>(cpu_capability())]; }

// For tests: makes the whole process use one instruction set.
void set_capability(std::string name) {
    for (int i = 0; i <= static_cast<int>(Capability::kAmx); ++i) {
        if (name != kNames[i]) continue;
        if (i > static_cast<int>(best_capability())) {
            fail("capability \"", name, "\" is not what this CPU can run; best: \"",
                 kNames[static_cast<int>(best_capability())], "\"");
        }
        chosen() = static_cast<Capability>(i);
        return;
    }
    fail("capability is \"", name, "\"; allowed: ", show(kNames));
}

}  // namespace

Capability cpu_capability() { return chosen().load(std::memory_order_relaxed); }

}  // namespace vitfast

// No tensor arguments, so no device decides: for all of them.
STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CompositeExplicitAutograd, m) {
    m.impl("cpu_capability", TORCH_BOX(&vitfast::get_capability));
    m.impl("set_cpu_capability", TORCH_BOX(&vitfast::set_capability));
}
