// Decoder layers and output heads on a CPU: a flat C ABI of pointers and integers, without Python or torch.
//
// Weights are packed for it (see pack.py and docs/native.md). Rows of activations are positions of any sequences; what a
// row gives does not depend, to the last bit, on the rows beside it or on the number of threads.
#pragma once
#include <stdint.h>
#if defined(__cplusplus)
extern "C" {
#endif
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#define EXITCPU_ABI 2

// How a packed matrix lies in memory: pairs of blocks of 16 output rows, and of each pair groups of 32 inputs, first the
// one block's and then the other's.
enum {
    FORMAT_Q4 = 0,    // scale and offset (fp16) of each group, 4-bit steps
    FORMAT_Q8 = 1,    // scale (fp16) of each group, signed bytes
    FORMAT_K4 = 2,    // Q4_K: two levels of scales and offsets, 4-bit steps
    FORMAT_K6 = 3,    // Q6_K: two levels of scales for groups of 16, signed bytes
    FORMAT_F16 = 4,
    FORMAT_BF16 = 5,
    FORMAT_F32 = 6,
    FORMATS = 7
};
enum { SILU = 0, GELU_TANH = 1, GELU = 2 };
enum { QK_PLAIN = 0, QK_NORM_HEAD = 1, QK_NORM_FULL = 2 };
enum { PART_ALL = 0, PART_ATTENTION = 1, PART_MLP = 2 };
enum { OK = 0, BAD_ABI = 1, BAD_MATRIX = 2, BAD_SHAPE = 3, BAD_BATCH = 4, NO_MEMORY = 5 };

typedef struct {
    const uint8_t *data;  // from a 64-byte boundary; null: absent
    const float *bias;    // [rows] or null
    int32_t rows, cols;   // multiples of 32
    int32_t format;
    int32_t digits;       // of activations that meet a grid: 1 (8 bits) or 2 (15 bits)
    int64_t stride;       // bytes from a pair of blocks to the next, between which another matrix may lie; 0: none does
} Matrix;

typedef struct {
    Matrix queries, keys, values, out;
    Matrix gate, up, down;
    const float *norm_attention, *norm_mlp;        // in front; null: none
    const float *norm_queries, *norm_keys;         // [head_dim], or over all heads
    const float *post_attention, *post_mlp;        // behind; null: none
    void *cache;           // keys and values [2, kv_heads, slots, head_dim], float or half
    int64_t slots;
    int32_t group;         // of block tables
    int32_t window;        // positions that a row sees, itself included; 0: all
    int32_t rotation;      // index of the table of rotations; -1: none
    int32_t rotary;        // dims of a head that are rotated
    int32_t qk_norm, activation;
} Layer;

typedef struct {
    int32_t hidden, heads, kv_heads, head_dim, inner;
    int32_t half_cache;    // the cache holds halves
    float eps, scale;      // of norms; of attention
} Shape;

typedef struct {
    int32_t rows, parts, groups, block_size;
    int32_t width;              // blocks of a table
    int32_t positions;          // rows of each table of rotations
    const int32_t *starts;      // [parts] first position of the rows of a sequence
    const int32_t *counts;      // [parts] how many rows it has
    const int32_t *variants;    // [parts] which variant of the rotations
    const int32_t *blocks;      // [groups, parts, width] the block that holds each block_size positions
    const float *const *rotations;  // [variants * 2] tables [positions, rotary]: cosines, then sines
} Batch;

typedef struct {
    Matrix lens;                       // absent: none
    Matrix gate, up, down;             // of a branch or an MLP; absent: none
    Matrix first, second;              // the output matrix; of low rank: two
    const float *norm_mlp, *post_mlp;  // in front of and behind the MLP
    const float *norm;                 // in front of the output; null: none
    int32_t activation;
    int32_t unit;                      // the input is divided by its root mean square first
    int32_t adds;                      // what the MLP gives is added to: 0 the lens's output, 1 the input
    int32_t width;                     // tokens; the rows of the last matrix may be more
} Head;

EXPORT int exitcpu_abi(void);
EXPORT const char *exitcpu_digest(void);  // of the source
EXPORT const char *exitcpu_isa(void);     // the instruction set in use
EXPORT int exitcpu_use(const char *isa);  // for tests and measurements: 0 if this processor has it
EXPORT int exitcpu_check(void);           // the tiles of this instruction set against integers: 0 if right
EXPORT int exitcpu_threads(int count);
EXPORT void exitcpu_after_fork(void);

// Layers in turn on hidden [rows, D], in place. residual [rows, D] or null gets the stream before the last one's MLP.
EXPORT int exitcpu_layers(const Shape *shape, const Layer *layers, int32_t count, int32_t part, const Batch *batch,
                          float *hidden, float *residual);
// Scores [rows, rows of the last matrix] of a head. best [rows]: the best token, the first of equals (-1: not finite);
// top [rows]: its score; mass [rows] or null: the sum of exp(score - top).
EXPORT int exitcpu_head(const Shape *shape, const Head *head, int32_t rows, const float *input, float *scores,
                        int32_t *best, float *top, float *mass);
// out [rows, N] = x [rows, K] times a matrix.
EXPORT int exitcpu_matmul(const Matrix *matrix, int32_t rows, const float *x, float *out);
EXPORT int64_t exitcpu_packed_bytes(int32_t format, int32_t rows, int32_t cols);  // -1: not a shape of this format
EXPORT double exitcpu_read(const uint8_t *data, int64_t bytes, int32_t rounds);   // seconds to read all, all threads
#if defined(__cplusplus)
}
#endif
