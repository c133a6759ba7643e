// AVX-VNNI: the dot products of AVX-512 VNNI in vectors of 256 bits.
#include "avx2.inc"
namespace {
constexpr int TILES[2] = {4, 2}, TOGETHER[2] = {2, 1};
constexpr float BIAS = 128.0f;
inline vi nibble_dot(vi sum, vi w, vi x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
inline vi nibbles(vi sum) { return sum; }
inline vi byte_dot(vi sum, vi w, vi x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
}  // namespace
#include "tile.inc"
#include "rest.inc"
const Kernels kernels_avxvnni = KERNELS("avxvnni");
