// Which instruction set this processor has, and whether its tiles compute what they should.
#include <math.h>
#include <string.h>
#include <vector>
#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {
// By cpuid and xgetbv: what __builtin_cpu_supports knows depends on the compiler's runtime library.
bool has(const char *name) {
    if (strcmp(name, "generic") == 0) return true;
#if defined(__x86_64__)
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    const bool fused = (c & bit_FMA) && (c & bit_F16C);
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!fused || (low & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & (1u << 5))) return false;
    if (strcmp(name, "avx2") == 0) return true;
    const unsigned wide = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // AVX-512 F, DQ, BW, VL
    if (strcmp(name, "avx512vnni") == 0) return (low & 0xe0) == 0xe0 && (b & wide) == wide && (c & (1u << 11));
    if (strcmp(name, "avxvnni") == 0) return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
    return false;
#elif defined(__aarch64__) && defined(__linux__)
    return strcmp(name, "neon") == 0 && (getauxval(AT_HWCAP) & (1ul << 20)) && (getauxval(AT_HWCAP) & (1ul << 10));
#elif defined(__aarch64__) && defined(__APPLE__)
    return strcmp(name, "neon") == 0;  // every processor of theirs has dot products of bytes
#else
    return false;
#endif
}

const Kernels *const known[] = {  // the best first
#if defined(HAVE_AVX512VNNI)
    &kernels_avx512vnni,
#endif
#if defined(HAVE_AVXVNNI)
    &kernels_avxvnni,
#endif
#if defined(HAVE_AVX2)
    &kernels_avx2,
#endif
#if defined(HAVE_NEON)
    &kernels_neon,
#endif
    &kernels_generic,
};

const Kernels *best_here() {
    for (const Kernels *each : known)
        if (has(each->name)) return each;
    return &kernels_generic;
}

const Kernels *used = best_here();

struct Random {  // the same numbers everywhere
    uint32_t state = 1;
    int below(int n) {
        state = state * 1664525u + 1013904223u;
        return (int)((state >> 8) % (uint32_t)n);
    }
};

template <class T> T *aligned(std::vector<T> &storage, size_t count) {
    storage.assign(count + 64, T());
    return (T *)(((uintptr_t)storage.data() + 63) / 64 * 64);
}

// Small matrices of random bytes whose scales are 1, times small integers: all sums are exact, so that every lane of
// every format must give what the generic tiles give, bit by bit.
int checked(const Kernels &tested) {
    Random random;
    const int K = 512, M = 11;
    std::vector<uint8_t> weights;
    std::vector<float> x_storage, d_storage, s_storage;
    std::vector<int8_t> q_storage;
    float *x = aligned(x_storage, (size_t)M * K), *d = aligned(d_storage, (size_t)M * K / 32);
    float *s = aligned(s_storage, (size_t)M * K / 16);
    int8_t *q = aligned(q_storage, (size_t)M * K * 2);
    for (int format = 0; format < FORMATS; format++)
        for (int digits = 1; digits <= 2; digits++) {
            const int64_t size = pair_bytes(format, K);
            uint8_t *data = aligned(weights, (size_t)size);
            for (int64_t i = 0; i < size; i++) data[i] = (uint8_t)random.below(256);
            const auto ones = [&](int64_t from, int count) {
                for (int i = 0; i < count; i++) data[from + 2 * i] = 0, data[from + 2 * i + 1] = 0x3c;
            };
            if (format == FORMAT_Q4)
                for (int64_t at = 0; at < size; at += 320) ones(at, 32);
            else if (format == FORMAT_Q8)
                for (int64_t at = 0; at < size; at += 1088) ones(at, 32);
            else if (format == FORMAT_K4 || format == FORMAT_K6)
                for (int64_t at = 0; at < size; at += format == FORMAT_K4 ? 2368 : 4416) ones(at, 32);
            else
                for (int64_t i = 0; i < size; i += format == FORMAT_F32 ? 4 : 2) {
                    const float value = (float)random.below(17) - 8.0f;
                    uint32_t bits;
                    memcpy(&bits, &value, 4);
                    uint16_t half = (uint16_t)(bits >> 16);
                    if (format == FORMAT_F16)  // whole numbers below 16 have no more than 3 bits behind their first
                        half = value == 0.0f ? 0 : (uint16_t)((bits >> 16 & 0x8000) | (((bits >> 13) & 0x3ffff) - 0x1c000));
                    if (format == FORMAT_F32) memcpy(data + i, &bits, 4);
                    else memcpy(data + i, &half, 2);
                }
            for (int m = 0; m < M; m++)
                for (int k = 0; k < K; k += 32) {
                    const int64_t group = (int64_t)(k / 32) * M + m;
                    int sums[2] = {0, 0};
                    for (int i = 0; i < 32; i++) {
                        const int most = digits == 1 ? 127 : 16256, value = random.below(2 * most + 1) - most;
                        const int high = digits == 1 ? value : (value + 64) >> 7;
                        x[(int64_t)m * K + k + i] = (float)(value % 16);
                        q[32 * digits * group + i] = (int8_t)high;
                        if (digits == 2) q[64 * group + 32 + i] = (int8_t)(value - 128 * high);
                        sums[i / 16] += value;
                    }
                    d[group] = 1.0f;
                    s[2 * group] = (float)sums[0], s[2 * group + 1] = (float)sums[1];
                }
            const Matrix matrix = {data, nullptr, 32, K, format, digits};
            for (int rows = 1; rows <= M; rows += rows < 9 ? 1 : 2) {
                // the first rows of M only: groups stay M apart, which a pass over all of them reads too
                Acts acts = {x, q, d, s, K, M, digits};
                std::vector<float> found(32 * M), wanted(32 * M);
                std::vector<float> packed_x, packed_d, packed_s;
                std::vector<int8_t> packed_q;
                float *px = aligned(packed_x, (size_t)rows * K), *pd = aligned(packed_d, (size_t)rows * K / 32);
                float *ps = aligned(packed_s, (size_t)rows * K / 16);
                int8_t *pq = aligned(packed_q, (size_t)rows * K * 2);
                memcpy(px, x, sizeof(float) * rows * K);
                for (int g = 0; g < K / 32; g++)
                    for (int m = 0; m < rows; m++) {
                        const int64_t from = (int64_t)g * M + m, to = (int64_t)g * rows + m;
                        pd[to] = d[from];
                        memcpy(ps + 2 * to, s + 2 * from, 8);
                        memcpy(pq + 32 * digits * to, q + 32 * digits * from, 32 * digits);
                    }
                Acts part = {px, pq, pd, ps, K, rows, digits};
                tested.pair(&matrix, 0, &part, found.data(), 32);
                kernels_generic.pair(&matrix, 0, &acts, wanted.data(), 32);
                // Where sums leave the integers that a float holds, their last bits may differ.
                const bool two_levels = format == FORMAT_K4 || format == FORMAT_K6;
                const float largest = 128.0f * (two_levels ? 255.0f : 1.0f) * (digits == 1 ? 127.0f : 16256.0f) * (float)K;
                const float bound = largest < 16777216.0f || !is_grid(format) ? 0.0f : 3e-7f * largest;
                for (int i = 0; i < 32 * rows; i++)
                    if (!(fabsf(found[i] - wanted[i]) <= bound)) return 1 + format;
            }
        }
    return 0;
}
}  // namespace

const Kernels &kernels() { return *used; }

extern "C" {
int exitcpu_abi(void) { return EXITCPU_ABI; }
const char *exitcpu_digest(void) {
#if defined(EXITCPU_DIGEST)
    return EXITCPU_DIGEST;
#else
    return "";
#endif
}
const char *exitcpu_isa(void) { return used->name; }
int exitcpu_use(const char *isa) {
    for (const Kernels *each : known)
        if (strcmp(each->name, isa) == 0 && has(isa)) {
            used = each;
            return 0;
        }
    return 1;
}
int exitcpu_check(void) { return checked(*used); }
}
