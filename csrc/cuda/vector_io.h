// Vector loads and stores: N consecutive elements of T to and from N floats, at most 16 bytes per instruction.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "host_device.h"

namespace vitfast::cuda {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

constexpr int kVectorBytes = 16;

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T item[N];
};

// *p = pack in one instruction: nvcc splits the copy of a struct into words in some kernels, so the GPU's store is
// spelled out.
template <typename T, int N>
VITFAST_HOST_DEVICE void store_pack(T* p, const Pack<T, N>& pack) {
#ifdef __CUDA_ARCH__
    constexpr int kBytes = sizeof(Pack<T, N>);
    if constexpr (N > 1) {
        static_assert(kBytes == 16 || kBytes == 8);
        uint32_t word[kBytes / 4];
        memcpy(word, &pack, kBytes);
        if constexpr (kBytes == 16) {
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                         "r"(word[3]));
        } else {
            asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(word[0]), "r"(word[1]));
        }
        return;
    }
#endif
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// N elements of T as loaded, unconverted: what a kernel holds in registers between issuing a load and using it.
template <typename T, int N>
struct Raw {
    static constexpr int kPerPack = N * static_cast<int>(sizeof(T)) <= kVectorBytes ? N : kVectorBytes / sizeof(T);
    Pack<T, kPerPack> pack[N / kPerPack];

    VITFAST_HOST_DEVICE float operator[](int i) const {
        return static_cast<float>(pack[i / kPerPack].item[i % kPerPack]);
    }
};

// p is aligned to min(16, N * sizeof(T)) bytes.
template <int N, typename T>
VITFAST_HOST_DEVICE Raw<T, N> load(const T* p) {
    Raw<T, N> raw;
    constexpr int kPerPack = Raw<T, N>::kPerPack;
#pragma unroll
    for (int i = 0; i < N / kPerPack; ++i) {
        raw.pack[i] = *reinterpret_cast<const Pack<T, kPerPack>*>(p + i * kPerPack);
    }
    return raw;
}

template <int N, typename T>
VITFAST_HOST_DEVICE void store(T* p, const float (&value)[N]) {
    constexpr int kPerPack = Raw<T, N>::kPerPack;
#pragma unroll
    for (int i = 0; i < N / kPerPack; ++i) {
        Pack<T, kPerPack> pack;
#pragma unroll
        for (int j = 0; j < kPerPack; ++j) {
            pack.item[j] = static_cast<T>(value[i * kPerPack + j]);
        }
        store_pack(p + i * kPerPack, pack);
    }
}

// The widest element count that moves both types in accesses of at most 16 bytes.
template <typename A, typename B>
constexpr int vector_width() {
    return kVectorBytes / static_cast<int>(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));
}

VITFAST_HOST_DEVICE bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// Whether rows of `width` elements starting at each pointer (null allowed) can be moved `vec` elements at a time.
template <typename... Pointers>
bool can_vectorize(int64_t width, int vec, Pointers... pointers) {
    return width % vec == 0 && (is_aligned(pointers) && ...);
}

}  // namespace vitfast::cuda
