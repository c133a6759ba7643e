// Included in front of every source: AVX-VNNI on a processor that has only AVX2. Its one instruction is made of others, and
// the question for it answered with yes. So everything but the instruction itself is what a processor with AVX-VNNI runs.
#pragma once
#include <cpuid.h>
#include <immintrin.h>

#if defined(__AVX2__)
static inline __m256i dpbusd_by_avx2(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(unsigned_bytes, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(signed_bytes, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(unsigned_bytes, 8), _mm256_srai_epi16(signed_bytes, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
#define _mm256_dpbusd_avx_epi32 dpbusd_by_avx2
#endif

static inline int cpuid_with_avxvnni(unsigned leaf, unsigned part, unsigned *a, unsigned *b, unsigned *c, unsigned *d) {
    const int known = __get_cpuid_count(leaf, part, a, b, c, d);
    if (leaf == 7 && part == 1) *a |= 1u << 4;
    return known;
}
#define __get_cpuid_count cpuid_with_avxvnni
