// AVX2: products of bytes in pairs, summed in 16 bits.
#include "avx2.inc"
namespace {
constexpr int TILES[2] = {4, 2}, TOGETHER[2] = {1, 1};
constexpr float BIAS = 0.0f;
// 8 steps of at most 2 * 15 * 127 fit into 16 bits
inline vi nibble_dot(vi sum, vi w, vi x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
inline vi nibbles(vi sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
// |w| * (x with the sign of w): a pair is at most 2 * 128 * 127
inline vi byte_dot(vi sum, vi w, vi x) {
    const vi v = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    const vi pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x, v));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
}  // namespace
#include "tile.inc"
#include "rest.inc"
const Kernels kernels_avx2 = KERNELS("avx2");
