// Vectors of floats (F) and of 32-bit integers (I), and the dot products of the linear kernels, for each instruction set.
// Included only by kernels_isa.cpp, which is compiled once for each: scalar, AVX2, AVX-512 (with BF16 and VNNI), and AMX, which has the vectors of AVX-512.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace intaglio::ISA {

inline float from_bf16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

inline uint16_t to_bf16(float f) {  // nearest, ties to even; NaN stays NaN
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
  if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(float(fraction) * 0x1p-24f));
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | (fraction << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
}

// Twice the value of each of E2M1's sixteen codes, plus 12, which makes them unsigned for the dot products.
constexpr uint8_t kLevels[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

constexpr uint16_t e4m3_as_bf16(uint32_t code) {  // exact: bf16 has a larger exponent range and mantissa
  uint32_t sign = (code & 128) << 8, exponent = (code >> 3) & 15, fraction = code & 7;
  if ((code & 127) == 127) return uint16_t(sign | 0x7fc0);
  if (exponent) return uint16_t(sign | (exponent + 120) << 7 | fraction << 4);
  if (!fraction) return uint16_t(sign);
  int shift = fraction >= 4 ? 0 : fraction >= 2 ? 1 : 2;  // normalises a subnormal: shift until the leading bit is 1
  return uint16_t(sign | uint32_t(120 - shift) << 7 | ((fraction << (shift + 1)) & 7) << 4);
}
struct E4M3Bytes {  // low and high bytes of the bf16 values of all positive codes
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  constexpr E4M3Bytes() {
    for (uint32_t i = 0; i < 128; i++) low[i] = uint8_t(e4m3_as_bf16(i)), high[i] = uint8_t(e4m3_as_bf16(i) >> 8);
  }
};
inline constexpr E4M3Bytes kE4M3;

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

struct F {
  static constexpr int N = 16;
  __m512 v;
};
struct I {
  __m512i v;
};
inline F set(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
inline F round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F if_less(F a, F b, F yes, F no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline F power_of_two(F n) {  // 2^n for integer n in -126..127
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
inline F load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline F load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }

// Dot product of bf16 pairs along K: acc[n] += w[n][0] * x[0] + w[n][1] * x[1].
inline I load_raw(const void* p) { return {_mm512_loadu_si512(p)}; }
inline F dot_bf16(F acc, I w, uint32_t pair) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(int(pair)))};
}
inline F even_bf16(I w) { return {_mm512_castsi512_ps(_mm512_slli_epi32(w.v, 16))}; }
inline F odd_bf16(I w) { return {_mm512_castsi512_ps(_mm512_and_si512(w.v, _mm512_set1_epi32(int(0xffff0000))))}; }

// Dot products along K of weights and a quad of int8 activations: acc[n] += sum over j < 4 of w[n][j] * x[j].
// dot_u8 takes unsigned bytes, stored as code + 128; it leaves kOffset8 * (sum of x) too much in the sum. dot_u6 takes unsigned
// bytes below 64, or the result of joined_nibbles(); then part_joined() must separate the two sums afterwards. dot_pair takes
// pairs of signed 16-bit words. dot_words() is dot_u6(), but with kWordSums its sums are two 16-bit words, which the caller keeps
// from overflowing; add_scaled(acc, sum, size) = acc + such a sum times an integer. levels() maps both nibbles of each byte through kLevels.
constexpr int kOffset8 = 128;
inline I set_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I dot_u8(I acc, I w, int32_t quad) {
  // Inline assembly, since with the intrinsic GCC 12 keeps a tile's accumulators in memory, at less than half the speed.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(_mm512_set1_epi32(quad)));
  return acc;
}
inline I dot_u6(I acc, I w, int32_t quad) { return dot_u8(acc, w, quad); }
inline I dot_pair(I acc, I w, int32_t pair) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(_mm512_set1_epi32(pair)));
  return acc;
}
inline I dot_words(I acc, I w, int32_t quad) { return dot_u8(acc, w, quad); }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I operator*(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I add_scaled(I acc, I sum, I size) { return acc + sum * size; }
constexpr bool kWordSums = false;
inline I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int bits>
I right(I a) { return {_mm512_srli_epi32(a.v, bits)}; }
template <int bits>
I left(I a) { return {_mm512_slli_epi32(a.v, bits)}; }
inline I load_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline I load_i8(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline void nibbles(I both, I& low, I& high) {
  const I mask = set_int(0x0f0f0f0f);
  low = both & mask, high = right<4>(both) & mask;
}
// low = the byte itself, 16 * high nibble + low nibble; high = 16 * high nibble. Separating two sums once (part_joined())
// is cheaper than separating the nibbles of many bytes.
inline void joined_nibbles(I both, I& low, I& high) {
  asm("" : "+v"(both.v));  // keeps GCC from loading it twice; the loop is bound by loads
  low = both, high = both & set_int(int(0xf0f0f0f0));
}
inline void part_joined(I& low, I& high) { low.v = _mm512_sub_epi32(low.v, high.v), high.v = _mm512_srai_epi32(high.v, 4); }
inline void levels(I both, I& low, I& high) {  // vpermb looks up by six bits: the table of 16 is repeated four times
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)kLevels));
  low = {_mm512_permutexvar_epi8(both.v, table)}, high = {_mm512_permutexvar_epi8(_mm512_srli_epi32(both.v, 4), table)};
}
// A table of 16 floats, and those at the 4-bit codes number `nibble` (0: the lowest) of each word.
struct Book {
  __m512 v;
};
inline Book load_book(const float* p) { return {_mm512_loadu_ps(p)}; }
template <int nibble>
F look_up(const Book& b, I codes) { return {_mm512_permutexvar_ps(_mm512_srli_epi32(codes.v, 4 * nibble), b.v)}; }
inline void load_e4m3(const uint8_t* p, I* w) {  // a panel's row of 64 codes to pairs of bf16
  __m512i code = _mm512_loadu_si512(p);
  __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kE4M3.low), code, _mm512_load_si512(kE4M3.low + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kE4M3.high), code, _mm512_load_si512(kE4M3.high + 64));
  high = _mm512_ternarylogic_epi64(high, code, _mm512_set1_epi8(-128), 0xf8);  // high | (code & sign)
  w[0] = {_mm512_unpacklo_epi8(low, high)};
  w[1] = {_mm512_unpackhi_epi8(low, high)};
}
// Sixteen E4M3 codes as floats, exactly: as f16 their bits are the value / 256. NaN is set by its own bits.
inline F load_e4m3_row(const uint8_t* p) {
  const __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), all = _mm256_and_si256(code, _mm256_set1_epi16(127));
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(all, _mm256_set1_epi16(127)), _mm256_set1_epi16(0x7e00));
  const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(code, all), 8);
  return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(all, 7), sign), nan)), _mm512_set1_ps(256))};
}
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }

#elif defined(__AVX2__)

struct F {
  static constexpr int N = 8;
  __m256 v;
};
struct I {
  __m256i v;
};
inline F set(float x) { return {_mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F sqrt(F a) { return {_mm256_sqrt_ps(a.v)}; }
inline F round(F a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F if_less(F a, F b, F yes, F no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline F power_of_two(F n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}
inline F load_bf16(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
inline F load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }

inline I load_raw(const void* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
inline F even_bf16(I w) { return {_mm256_castsi256_ps(_mm256_slli_epi32(w.v, 16))}; }
inline F odd_bf16(I w) { return {_mm256_castsi256_ps(_mm256_and_si256(w.v, _mm256_set1_epi32(int(0xffff0000))))}; }
inline F dot_bf16(F acc, I w, uint32_t pair) {
  F x0 = set(std::bit_cast<float>(pair << 16)), x1 = set(std::bit_cast<float>(pair & 0xffff0000));
  return fma(odd_bf16(w), x1, fma(even_bf16(w), x0, acc));
}

constexpr int kOffset8 = 0;  // dot_u8 subtracts the 128 itself, since maddubs saturates above 2 * 128 * 127
inline I set_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline I dot_u6(I acc, I w, int32_t quad) {
  __m256i pairs = _mm256_maddubs_epi16(w.v, _mm256_set1_epi32(quad));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
constexpr bool kWordSums = true;
inline I dot_words(I acc, I w, int32_t quad) {
  acc.v = _mm256_add_epi16(acc.v, _mm256_maddubs_epi16(w.v, _mm256_set1_epi32(quad)));
  asm("" : "+x"(acc.v));  // keeps GCC from adding in another order, for which it stores most products to the stack
  return acc;
}
inline I add_scaled(I acc, I sum, I size) {  // both words of a sum are multiplied by the size's low word
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(sum.v, _mm256_shuffle_epi8(size.v, twice)))};
}
inline I dot_u8(I acc, I w, int32_t quad) {
  __m256i code = _mm256_xor_si256(w.v, _mm256_set1_epi8(-128));
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(_mm256_set1_epi32(quad), code));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
inline I dot_pair(I acc, I w, int32_t pair) {
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(w.v, _mm256_set1_epi32(pair)))};
}
inline I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I operator*(I a, I b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline I operator&(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
inline I operator|(I a, I b) { return {_mm256_or_si256(a.v, b.v)}; }
template <int bits>
I right(I a) { return {_mm256_srli_epi32(a.v, bits)}; }
template <int bits>
I left(I a) { return {_mm256_slli_epi32(a.v, bits)}; }
inline I load_u8(const uint8_t* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))}; }
inline I load_i8(const int8_t* p) { return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))}; }
inline void nibbles(I both, I& low, I& high) {
  const I mask = set_int(0x0f0f0f0f);
  low = both & mask, high = right<4>(both) & mask;
}
inline void joined_nibbles(I both, I& low, I& high) { nibbles(both, low, high); }
inline void part_joined(I&, I&) {}
inline void levels(I both, I& low, I& high) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)kLevels));
  nibbles(both, low, high);
  low.v = _mm256_shuffle_epi8(table, low.v), high.v = _mm256_shuffle_epi8(table, high.v);
}
struct Book {
  __m256 low, high;
};
inline Book load_book(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
template <int nibble>
F look_up(const Book& b, I codes) {  // vpermps looks up by three bits; the blend chooses by the fourth, moved to the sign
  const __m256i at = _mm256_srli_epi32(codes.v, 4 * nibble), fourth = _mm256_slli_epi32(codes.v, 28 - 4 * nibble);
  return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(b.low, at), _mm256_permutevar8x32_ps(b.high, at), _mm256_castsi256_ps(fourth))};
}
inline __m256i words_of_e4m3(__m256i code) {  // converts 16-bit words that hold one code each to bf16
  const __m256i all = _mm256_and_si256(code, _mm256_set1_epi16(127)), sign = _mm256_slli_epi16(_mm256_xor_si256(code, all), 8);
  const __m256i normal = _mm256_add_epi16(_mm256_slli_epi16(all, 4), _mm256_set1_epi16(120 << 7));
  const __m128i low = _mm_loadl_epi64((const __m128i*)kE4M3.low), high = _mm_loadl_epi64((const __m128i*)kE4M3.high);
  const __m256i table = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(low, high));  // bf16 values of the eight smallest codes
  const __m256i at = _mm256_or_si256(_mm256_or_si256(all, _mm256_slli_epi16(all, 8)), _mm256_set1_epi16(0x0800));
  const __m256i small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), all), nan = _mm256_cmpeq_epi16(all, _mm256_set1_epi16(127));
  __m256i word = _mm256_blendv_epi8(normal, _mm256_shuffle_epi8(table, at), small);
  word = _mm256_blendv_epi8(word, _mm256_set1_epi16(0x7fc0), nan);
  return _mm256_or_si256(word, sign);
}
inline void load_e4m3(const uint8_t* p, I* w) {  // a panel's row of 64 codes to pairs of bf16
  for (int half = 0; half < 2; half++) {
    const __m256i code = _mm256_loadu_si256((const __m256i*)(p + half * 32)), zero = _mm256_setzero_si256();
    w[half] = {words_of_e4m3(_mm256_unpacklo_epi8(code, zero))};
    w[half + 2] = {words_of_e4m3(_mm256_unpackhi_epi8(code, zero))};
  }
}
// Eight E4M3 codes as floats, exactly: as f16 their bits are the value / 256. NaN is set by its own bits.
inline F load_e4m3_row(const uint8_t* p) {
  const __m128i code = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), all = _mm_and_si128(code, _mm_set1_epi16(127));
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(all, _mm_set1_epi16(127)), _mm_set1_epi16(0x7e00));
  const __m128i sign = _mm_slli_epi16(_mm_xor_si128(code, all), 8);
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(_mm_slli_epi16(all, 7), sign), nan)), _mm256_set1_ps(256))};
}
inline F to_float(I a) { return {_mm256_cvtepi32_ps(a.v)}; }

#else

#define EACH for (int i = 0; i < F::N; i++)
struct F {
  static constexpr int N = 8;
  float v[N];
};
struct I {
  int32_t v[F::N];
};
inline F set(float x) { F r; EACH r.v[i] = x; return r; }
inline F load(const float* p) { F r; EACH r.v[i] = p[i]; return r; }
inline void store(float* p, F a) { EACH p[i] = a.v[i]; }
inline F operator+(F a, F b) { EACH a.v[i] += b.v[i]; return a; }
inline F operator-(F a, F b) { EACH a.v[i] -= b.v[i]; return a; }
inline F operator*(F a, F b) { EACH a.v[i] *= b.v[i]; return a; }
inline F operator/(F a, F b) { EACH a.v[i] /= b.v[i]; return a; }
inline F fma(F a, F b, F c) { EACH c.v[i] += a.v[i] * b.v[i]; return c; }
inline F max(F a, F b) { EACH b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return b; }
inline F min(F a, F b) { EACH b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return b; }
inline F sqrt(F a) { EACH a.v[i] = std::sqrt(a.v[i]); return a; }
inline F round(F a) { EACH a.v[i] = std::nearbyintf(a.v[i]); return a; }
inline F if_less(F a, F b, F yes, F no) { EACH no.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; return no; }
inline F power_of_two(F n) { EACH n.v[i] = std::bit_cast<float>((int32_t(n.v[i]) + 127) << 23); return n; }
inline F load_bf16(const uint16_t* p) { F r; EACH r.v[i] = from_bf16(p[i]); return r; }
inline F load_f16(const uint16_t* p) { F r; EACH r.v[i] = from_f16(p[i]); return r; }

inline I load_raw(const void* p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline F even_bf16(I w) { F r; EACH r.v[i] = std::bit_cast<float>(uint32_t(w.v[i]) << 16); return r; }
inline F odd_bf16(I w) { F r; EACH r.v[i] = std::bit_cast<float>(uint32_t(w.v[i]) & 0xffff0000); return r; }
inline F dot_bf16(F acc, I w, uint32_t pair) {
  F x0 = set(std::bit_cast<float>(pair << 16)), x1 = set(std::bit_cast<float>(pair & 0xffff0000));
  return fma(odd_bf16(w), x1, fma(even_bf16(w), x0, acc));
}

constexpr int kOffset8 = 128;
inline I set_int(int32_t x) { I r; EACH r.v[i] = x; return r; }
inline I dot_u8(I acc, I w, int32_t quad) {
  for (int j = 0; j < 4; j++) {
    int32_t x = int8_t(uint32_t(quad) >> (8 * j));
    EACH acc.v[i] += int32_t((uint32_t(w.v[i]) >> (8 * j)) & 255) * x;
  }
  return acc;
}
inline I dot_words(I acc, I w, int32_t quad) { return dot_u8(acc, w, quad); }
inline I dot_u6(I acc, I w, int32_t quad) { return dot_u8(acc, w, quad); }
inline I dot_pair(I acc, I w, int32_t pair) {
  EACH acc.v[i] += int16_t(w.v[i]) * int16_t(pair) + (w.v[i] >> 16) * (pair >> 16);
  return acc;
}
inline I operator+(I a, I b) { EACH a.v[i] += b.v[i]; return a; }
inline I operator*(I a, I b) { EACH a.v[i] *= b.v[i]; return a; }
inline I add_scaled(I acc, I sum, I size) { return acc + sum * size; }
constexpr bool kWordSums = false;
inline I operator&(I a, I b) { EACH a.v[i] &= b.v[i]; return a; }
inline I operator|(I a, I b) { EACH a.v[i] |= b.v[i]; return a; }
template <int bits>
I right(I a) { EACH a.v[i] = int32_t(uint32_t(a.v[i]) >> bits); return a; }
template <int bits>
I left(I a) { EACH a.v[i] = int32_t(uint32_t(a.v[i]) << bits); return a; }
inline I load_u8(const uint8_t* p) { I r; EACH r.v[i] = p[i]; return r; }
inline I load_i8(const int8_t* p) { I r; EACH r.v[i] = p[i]; return r; }
inline void nibbles(I both, I& low, I& high) {
  const I mask = set_int(0x0f0f0f0f);
  low = both & mask, high = right<4>(both) & mask;
}
inline void joined_nibbles(I both, I& low, I& high) { nibbles(both, low, high); }
inline void part_joined(I&, I&) {}
inline void levels(I both, I& low, I& high) {
  auto each = [](I codes) {
    EACH {
      uint32_t x = uint32_t(codes.v[i]), y = 0;
      for (int b = 0; b < 32; b += 8) y |= uint32_t(kLevels[(x >> b) & 15]) << b;
      codes.v[i] = int32_t(y);
    }
    return codes;
  };
  nibbles(both, low, high);
  low = each(low), high = each(high);
}
struct Book {
  const float* levels;
};
inline Book load_book(const float* p) { return {p}; }
template <int nibble>
F look_up(const Book& b, I codes) { F r; EACH r.v[i] = b.levels[(uint32_t(codes.v[i]) >> (4 * nibble)) & 15]; return r; }
inline void load_e4m3(const uint8_t* p, I* w) {  // a panel's row of 64 codes to pairs of bf16
  for (int row = 0; row < 32; row++) {
    const uint8_t* code = p + row / 4 % 4 * 16 + row / 16 * 8 + row % 4 * 2;
    w[row / F::N].v[row % F::N] = int32_t(uint32_t(e4m3_as_bf16(code[0])) | uint32_t(e4m3_as_bf16(code[1])) << 16);
  }
}
inline F load_e4m3_row(const uint8_t* p) { F r; EACH r.v[i] = from_bf16(e4m3_as_bf16(p[i])); return r; }
inline F to_float(I a) { F r; EACH r.v[i] = float(a.v[i]); return r; }
#undef EACH

#endif

inline float sum(F a) {  // adds halves of the vector: the same order on every instruction set
  float t[F::N];
  store(t, a);
  for (int n = F::N / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) t[i] += t[i + n];
  return t[0];
}
inline float largest(F a) {
  float t[F::N];
  store(t, a);
  for (int i = 1; i < F::N; i++) t[0] = t[i] > t[0] ? t[i] : t[0];
  return t[0];
}
inline F abs(F a) { return max(a, set(0) - a); }

// e^r for |r| <= ln(2) / 2: 1 + r + r^2 p (Cephes expf). Returns p.
inline F exp_tail(F r) {
  F p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  return fma(p, r, set(5.0000001201e-1f));
}

// exp to 2 ulp (Cephes expf); 0 below -87.33, so that a masked score has weight 0. max and min return their second operand if
// either is NaN, so the order of their operands keeps NaN.
inline F exp(F x) {
  F c = min(set(88.37f), max(set(-87.33f), x));
  F n = round(c * set(1.44269504f));
  F r = fma(n, set(-0.693359375f), c);
  r = fma(n, set(2.12194440e-4f), r);
  F p = fma(exp_tail(r), r * r, r + set(1.0f));
  return if_less(x, set(-87.33f), set(0), p * power_of_two(n));
}
// e^x - 1, to a few ulp also near 0.
inline F expm1(F x) { return if_less(abs(x), set(0.34657359f), fma(exp_tail(x), x * x, x), exp(x) - set(1)); }
// ln(1 + e^x), to a few ulp: max(x, 0) + ln(1 + e), where e = e^-|x|. ln(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1 / 3.
inline F softplus(F x) {
  F e = exp(set(0) - abs(x)), s = e / (set(2) + e), z = s * s, p = set(1.0f / 15);
  p = fma(p, z, set(1.0f / 13));
  p = fma(p, z, set(1.0f / 11));
  p = fma(p, z, set(1.0f / 9));
  p = fma(p, z, set(1.0f / 7));
  p = fma(p, z, set(1.0f / 5));
  p = fma(p, z, set(1.0f / 3));
  return max(set(0), x) + set(2) * fma(s * z, p, s);
}
inline F sigmoid(F x) { return set(1) / (set(1) + exp(set(0) - x)); }
inline F silu(F x) { return x / (set(1) + exp(set(0) - x)); }
inline F gelu_tanh(F x) {  // x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
  F u = set(0.7978845608f) * fma(set(0.044715f) * x * x, x, x);
  return x / (set(1) + exp(set(-2) * u));
}
inline F tanh(F x) {  // Cephes tanhf: a polynomial near 0, else 1 - 2 / (exp(2x) + 1)
  F z = x * x, p = set(-5.70498872745e-3f);
  p = fma(p, z, set(2.06390887954e-2f));
  p = fma(p, z, set(-5.37397155531e-2f));
  p = fma(p, z, set(1.33314422036e-1f));
  p = fma(p, z, set(-3.33332819422e-1f));
  F far = set(1) - set(2) / (exp(set(2) * x) + set(1));
  return if_less(abs(x), set(0.625f), fma(p * z, x, x), far);
}
inline F gelu(F x) {
  float t[F::N];
  store(t, x);
  for (int i = 0; i < F::N; i++) t[i] = float(0.5 * double(t[i]) * (1 + std::erf(double(t[i]) * 0.70710678118654752)));
  return load(t);
}

}  // namespace intaglio::ISA
