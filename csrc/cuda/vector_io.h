// Vector loads and stores: N consecutive elements of T to and from N floats, at most 16 bytes per instruction.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "host_device.h"

namespace vitfast::cuda {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

constexpr int kVectorBytes = 16;

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T item[N];
};

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
        *reinterpret_cast<Pack<T, kPerPack>*>(p + i * kPerPack) = pack;
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
