#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>

#include "check.h"

namespace vitfast {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

Capability best_capability() {
#if VITFAST_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::kPortable;
    for (const bool supported : {bool(__builtin_cpu_supports("avx512f")), bool(__builtin_cpu_supports("avx512bw")),
                                 bool(__builtin_cpu_supports("avx512dq")), bool(__builtin_cpu_supports("avx512vl"))}) {
        if (!supported) return Capability::kAvx2;
    }
    if (!__builtin_cpu_supports("avx512vnni")) return Capability::kAvx512;  // so has every CPU with bf16
    return __builtin_cpu_supports("avx512bf16") ? Capability::kAvx512Bf16 : Capability::kAvx512Vnni;
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
    for (int i = 0; i <= static_cast<int>(Capability::kAvx512Bf16); ++i) {
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
