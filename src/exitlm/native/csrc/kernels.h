// What each instruction set provides, and how rows of activations lie.
#pragma once
#include "exitcpu.h"

// M rows of K activations. Floats [M, K]; and for grids int8 in groups of 32: q [K / 32, M, 32 * digits], the step of each
// group d [K / 32, M], and s [K / 32, M, 2]: step times the sum of each half of the group's integers.
struct Acts {
    float *x;
    int8_t *q;
    float *d, *s;
    int K, M, digits;
};

// A cache entry as one query sees it: keys of a head at `keys + slot * dim`.
struct Seen {
    const void *keys, *values;
    const int32_t *blocks;  // of each block_size positions
    int block_size, dim, half;
    float scale;
};

struct Kernels {
    const char *name;
    void (*quantise)(const float *x, int n, int64_t M, int digits, int8_t *q, float *d, float *s);
    void (*norm)(const float *x, const float *weight, int n, float eps, float *out);  // weight may be null
    void (*pair)(const Matrix *w, int pair, const Acts *a, float *out, int64_t stride);  // 32 rows: out[m * stride + r]
    void (*gated)(int activation, const float *gate, const float *up, int n, float *out);
    void (*rotate)(float *head, const float *rotation, int rotary);
    void (*to_half)(const float *x, int n, uint16_t *out);
    // n queries of one key head; query i sees positions firsts[i] to lasts[i]. scratch: n * stride floats and a block's
    void (*attend)(const Seen *seen, int n, const float *const *q, const int *firsts, const int *lasts, float *const *out,
                   float *scratch, int64_t stride);
    void (*best)(const float *x, int n, int *at, float *top);  // the first of the largest; -1 where one is not finite
    float (*mass)(const float *x, int n, float top);
};

extern const Kernels kernels_generic, kernels_avx2, kernels_avxvnni, kernels_avx512vnni, kernels_neon;
const Kernels &kernels();  // of the instruction set in use

// Bytes of a pair of blocks, 32 rows.
static inline int64_t pair_bytes(int format, int64_t cols) {
    const int64_t groups = cols / 32;
    switch (format) {
        case FORMAT_Q4: return groups * 2 * 320;
        case FORMAT_Q8: return groups * 2 * (32 + 512);
        case FORMAT_K4: return groups / 8 * 2 * 2368;
        case FORMAT_K6: return groups / 8 * 2 * 4416;
        case FORMAT_F16:
        case FORMAT_BF16: return cols * 64;
        default: return cols * 128;
    }
}
// Bytes from a pair of a matrix to its next.
static inline int64_t stride_of(const Matrix &w) { return w.stride ? w.stride : pair_bytes(w.format, w.cols); }
static inline bool is_grid(int format) { return format <= FORMAT_K6; }
