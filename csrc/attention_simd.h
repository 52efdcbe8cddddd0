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

// Half as many numbers of twice the size.
constexpr int kDoubleLanes = kBytes / 8;
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef float HalfFloats __attribute__((vector_size(kBytes / 2)));

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

// 2^x for x <= 0, relative error under 1e-7; 0 below -124, where float32 runs out of exponents.
SPION_DS_INLINE Floats exp2_of_negative(Floats x) {
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  const Floats shifted = x + 12582912.0f;
  const Floats rest = x - (shifted - 12582912.0f);
  // Minimax fit of (2^r - 1) / r on |r| <= 1 / 2.
  Floats value = all(1.5353341586887836e-4f);
  value = multiply_add(value, rest, all(1.3398900628089905e-3f));
  value = multiply_add(value, rest, all(9.618437848985195e-3f));
  value = multiply_add(value, rest, all(5.5503323674201965e-2f));
  value = multiply_add(value, rest, all(2.4022647738456726e-1f));
  value = multiply_add(value, rest, all(6.931471824645996e-1f));
  value = multiply_add(value, rest, all(1.0f));
  const Floats scaled = bits<Floats>(bits<Ints>(value) + (bits<Ints>(shifted) << 23));
  // NaN is not below -124 and stays NaN.
  return x < -124.0f ? Floats{} : scaled;
}

// The hash of spion_ds/attention/dropout.py.
constexpr uint32_t kMultiply1 = 0x7feb352du;
constexpr uint32_t kMultiply2 = 0x846ca68bu;
constexpr uint32_t kStride = 0x9e3779b9u;

SPION_DS_INLINE uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= kMultiply1;
  x ^= x >> 15;
  x *= kMultiply2;
  x ^= x >> 16;
  return x;
}

SPION_DS_INLINE uint32_t combine(uint32_t key, uint32_t counter) {
  return mix(key + (counter + 1) * kStride);
}

// What its keep_mask takes of a row's key and of a column, and what it makes of the two.
SPION_DS_INLINE uint32_t row_multiplier(uint32_t row_key) { return (row_key * kMultiply2) | 1u; }

SPION_DS_INLINE uint32_t column_word(uint32_t column) {
  const uint32_t word = (column + 1) * kStride;
  return (word ^ (word >> 16)) * kMultiply1;
}

// All ones in the lanes that dropout keeps.
SPION_DS_INLINE Ints dropout_keeps(int32_t threshold, Words row_keys, Words row_multipliers,
                                   Words column_words) {
  return bits<Ints>((row_keys ^ column_words) * row_multipliers) >= threshold;
}

}  // namespace
