// Moving rows of tokens between tensors of any supported dtype and float32 buffers.

#pragma once

#include "attention_kernels.h"
#include "attention_simd.h"

namespace {

using spion_ds::DType;
using spion_ds::Tokens;

SPION_DS_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

SPION_DS_INLINE int64_t offset(const Tokens& x, int64_t b, int64_t h, int64_t token) {
  return b * x.batch + h * x.head + token * x.token;
}

inline float from_bfloat16(uint16_t half) { return bits<float>(static_cast<uint32_t>(half) << 16); }

inline uint16_t to_bfloat16(float value) {
  const uint32_t word = bits<uint32_t>(value);
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return bits<float>(sign | rest | 0x7f800000u);  // infinity, NaN
  // Shifted, the exponent is 112 too small; the product also normalises subnormal values.
  const float value = bits<float>(rest) * bits<float>(0x77800000u);  // 2^112
  return bits<float>(sign | bits<uint32_t>(value));
}

inline uint16_t to_float16(float value) {
  const uint32_t word = bits<uint32_t>(value);
  const uint32_t sign = (word >> 16) & 0x8000u;
  const uint32_t size = word & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (size < 0x38800000u) {
    // Subnormal: adding 0.5 moves the value's unit of 2^-24 into the last bit, rounded.
    const float shifted = bits<float>(size) + 0.5f;
    return static_cast<uint16_t>(sign | (bits<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = size + 0xfffu + ((size >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// to[0 : count] = the values at `index` of a tensor, as float32.
inline void load_row(DType dtype, const void* data, int64_t index, int64_t count, float* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, static_cast<const float*>(data) + index, count * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + index;
  int64_t i = 0;
  if (dtype == DType::kBFloat16) {
    for (; i + kLanes <= count; i += kLanes) {
      const Words words = __builtin_convertvector(load_as<Halves>(from + i), Words);
      store(to + i, bits<Floats>(words << 16));
    }
    for (; i < count; ++i) to[i] = from_bfloat16(from[i]);
    return;
  }
#if SPION_DS_VECTOR_BYTES > 16
  for (; i + 8 <= count; i += 8) {
    store_as(to + i, _mm256_cvtph_ps(load_as<__m128i>(from + i)));
  }
#endif
  for (; i < count; ++i) to[i] = from_float16(from[i]);
}

// The other way, rounded to nearest even.
inline void store_row(DType dtype, void* data, int64_t index, int64_t count, const float* from) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(data) + index, from, count * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(data) + index;
  int64_t i = 0;
  if (dtype == DType::kBFloat16) {
    for (; i + kLanes <= count; i += kLanes) {
      const Floats value = load(from + i);
      const Words words = bits<Words>(value);
      const Words rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
      const Words result = value == value ? rounded : Words{} + 0x7fc0u;
      store_as(to + i, __builtin_convertvector(result, Halves));
    }
    for (; i < count; ++i) to[i] = to_bfloat16(from[i]);
    return;
  }
#if SPION_DS_VECTOR_BYTES > 16
  for (; i + 8 <= count; i += 8) {
    store_as(to + i, _mm256_cvtps_ph(load_as<__m256>(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) to[i] = to_float16(from[i]);
}

// to (columns, rows) = from (rows, columns) transposed.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                      float* to, int64_t to_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const float* corner = from + r * from_stride + c;
      const Floats4 a = load_as<Floats4>(corner);
      const Floats4 b = load_as<Floats4>(corner + from_stride);
      const Floats4 d = load_as<Floats4>(corner + 2 * from_stride);
      const Floats4 e = load_as<Floats4>(corner + 3 * from_stride);
      const Floats4 ab_low = __builtin_shuffle(a, b, Ints4{0, 4, 1, 5});
      const Floats4 ab_high = __builtin_shuffle(a, b, Ints4{2, 6, 3, 7});
      const Floats4 de_low = __builtin_shuffle(d, e, Ints4{0, 4, 1, 5});
      const Floats4 de_high = __builtin_shuffle(d, e, Ints4{2, 6, 3, 7});
      float* target = to + c * to_stride + r;
      store_as(target, __builtin_shuffle(ab_low, de_low, Ints4{0, 1, 4, 5}));
      store_as(target + to_stride, __builtin_shuffle(ab_low, de_low, Ints4{2, 3, 6, 7}));
      store_as(target + 2 * to_stride, __builtin_shuffle(ab_high, de_high, Ints4{0, 1, 4, 5}));
      store_as(target + 3 * to_stride, __builtin_shuffle(ab_high, de_high, Ints4{2, 3, 6, 7}));
    }
    for (; c < columns; ++c) {
      for (int64_t i = r; i < r + 4; ++i) to[c * to_stride + i] = from[i * from_stride + c];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

// Rows of tokens as float32.
struct Rows {
  const float* data;
  int64_t stride;
};

// Returns `count` tokens from `first` on: in place if they are float32, else converted into
// `buffer` (count, round_up(head_dim, kLanes)). With `padded` a row must have values (any) up to a
// whole number of vectors.
inline Rows rows_of(DType dtype, const Tokens& x, int64_t b, int64_t h, int64_t first,
                    int64_t count, int64_t head_dim, bool padded, float* buffer) {
  const int64_t start = offset(x, b, h, first);
  if (dtype == DType::kFloat32 && !(padded && head_dim % kLanes != 0)) {
    return {static_cast<const float*>(x.data) + start, x.token};
  }
  const int64_t stride = round_up(head_dim, kLanes);
  for (int64_t i = 0; i < count; ++i) {
    load_row(dtype, x.data, start + i * x.token, head_dim, buffer + i * stride);
    for (int64_t d = head_dim; d < stride; ++d) buffer[i * stride + d] = 0.0f;
  }
  return {buffer, stride};
}

inline void store_zeros(DType dtype, const Tokens& x, int64_t b, int64_t h, int64_t first,
                        int64_t count, int64_t head_dim) {
  // Zero is all bits 0 in every dtype.
  const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t token = first; token < first + count; ++token) {
    std::memset(static_cast<char*>(x.data) + offset(x, b, h, token) * bytes, 0, head_dim * bytes);
  }
}

// to (head_dim, width) = rows (count, head_dim) transposed; the columns from count to width are 0.
inline void pack_transposed(const Rows& rows, int64_t count, int64_t width, int64_t head_dim,
                            float* to) {
  transpose(rows.data, rows.stride, count, head_dim, to, width);
  for (int64_t d = 0; d < head_dim && count < width; ++d) {
    for (int64_t i = count; i < width; ++i) to[d * width + i] = 0.0f;
  }
}

// Writes `count` tokens from `first` on from their transposed values (head_dim, width).
inline void store_transposed(DType dtype, const Tokens& x, int64_t b, int64_t h, int64_t first,
                             int64_t count, int64_t width, int64_t head_dim, const float* from,
                             float* buffer) {
  const int64_t start = offset(x, b, h, first);
  if (dtype == DType::kFloat32) {
    transpose(from, width, head_dim, count, static_cast<float*>(x.data) + start, x.token);
    return;
  }
  const int64_t stride = round_up(head_dim, kLanes);
  transpose(from, width, head_dim, count, buffer, stride);
  for (int64_t i = 0; i < count; ++i) {
    store_row(dtype, x.data, start + i * x.token, head_dim, buffer + i * stride);
  }
}

}  // namespace
