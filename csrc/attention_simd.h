// float32 vectors of one instruction set, chosen by SPION_DS_VECTOR_BYTES (16, 32 or 64) before
// the inclusion. GCC's vector extensions, with intrinsics where those have no word for it.
//
// Everything is in an unnamed namespace: code compiled for AVX-512 must never be merged by the
// linker with a function of the same name that an older processor runs.

#pragma once

#include <cstdint>
#include <cstring>

#if SPION_DS_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#define SPION_DS_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kBytes = SPION_DS_VECTOR_BYTES;
constexpr int kLanes = kBytes / 4;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

template <class To, class From>
SPION_DS_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Vector>
SPION_DS_INLINE Vector load_as(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class Vector>
SPION_DS_INLINE void store_as(void* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

SPION_DS_INLINE Floats load(const float* from) { return load_as<Floats>(from); }
SPION_DS_INLINE void store(float* to, Floats vector) { store_as(to, vector); }
SPION_DS_INLINE Floats all(float value) { return Floats{} + value; }

// Fused where the instruction set has it; never left to the compiler, so that all kernels of one
// instruction set round alike.
SPION_DS_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if SPION_DS_VECTOR_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif SPION_DS_VECTOR_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

SPION_DS_INLINE Floats maximum(Floats a, Floats b) {
#if SPION_DS_VECTOR_BYTES == 64
  return _mm512_max_ps(a, b);
#elif SPION_DS_VECTOR_BYTES == 32
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// 0, 1, 2, ...
SPION_DS_INLINE Ints lane_numbers() {
  Ints numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

// exp(x) for x <= 0, relative error under 1.3e-7; 0 below -86, where float32 runs out of exponents.
SPION_DS_INLINE Floats exp_of_negative(Floats x) {
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  const Floats shifted = multiply_add(x, all(1.44269504088896341f), all(12582912.0f));
  const Floats whole = shifted - 12582912.0f;
  Floats rest = multiply_add(whole, all(-0.693145751953125f), x);
  rest = multiply_add(whole, all(-1.42860682030941723e-6f), rest);
  // Minimax fit of (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2.
  Floats value = all(1.3814583653584123e-3f);
  value = multiply_add(value, rest, all(8.368724025785923e-3f));
  value = multiply_add(value, rest, all(4.166838899254799e-2f));
  value = multiply_add(value, rest, all(1.666652113199234e-1f));
  value = multiply_add(value, rest, all(4.999999403953552e-1f));
  value = multiply_add(value, rest, all(1.0f));
  value = multiply_add(value, rest, all(1.0f));
  const Floats scaled = bits<Floats>(bits<Ints>(value) + (bits<Ints>(shifted) << 23));
  // NaN is not below -86 and stays NaN.
  return x < -86.0f ? Floats{} : scaled;
}

// The hash of spion_ds/attention/dropout.py.
template <class Word>
SPION_DS_INLINE Word mix(Word x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

constexpr uint32_t kStride = 0x9e3779b9u;

SPION_DS_INLINE uint32_t combine(uint32_t key, uint32_t counter) {
  return mix(key + (counter + 1) * kStride);
}

SPION_DS_INLINE Words combine(Words key, Words counter) {
  return mix(key + (counter + 1) * kStride);
}

}  // namespace
