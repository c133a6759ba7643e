// AVX-512 with VNNI: 16 output rows in a vector.
#include <immintrin.h>
#include "kernels.h"
namespace {
typedef __m512i vi;
typedef __m512 vf;
constexpr int W = 16, TILES[2] = {4, 4}, TOGETHER[2] = {4, 4};
constexpr float BIAS = 128.0f;
inline vi zero_i() { return _mm512_setzero_si512(); }
inline vf zero_f() { return _mm512_setzero_ps(); }
inline vf set_f(float x) { return _mm512_set1_ps(x); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vi add_i(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi shift_left_7(vi a) { return _mm512_slli_epi32(a, 7); }
inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
inline vi bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
inline vi low(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline vi high(vi a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
inline vi four(const int8_t *p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}
inline vi nibble_dot(vi sum, vi w, vi x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline vi nibbles(vi sum) { return sum; }
inline vi byte_dot(vi sum, vi w, vi x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline vf halves(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline vf brains(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
inline vf floats(const void *p) { return _mm512_loadu_ps(p); }
inline vf small_floats(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))); }
inline vf signed_floats(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
inline void to_halves(uint16_t *p, vf v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline void store(float *p, vf v) { _mm512_storeu_ps(p, v); }
}  // namespace
#include "tile.inc"
#include "rest.inc"
const Kernels kernels_avx512vnni = KERNELS("avx512vnni");
